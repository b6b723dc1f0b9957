"""The header of a GGUF file, checked before a reader believes its counts.

The reader of the `gguf` package takes every count for true: a file of a few bytes that announces
2**60 entries keeps it busy until memory is full. Here nothing is kept, and nothing is passed over
that the file does not hold.
"""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path
from typing import Any

from ..errors import CheckpointError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY, _UINT32 = 8, 9, 4
# Bytes of each scalar type of a metadata field, by its number in the format.
_SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
# The reader makes an object of each entry. Vocabularies have some hundred thousand.
_MOST_ENTRIES = 2**22
_MOST_DIMENSIONS = 4  # GGML_MAX_DIMS
_MOST_ALIGNMENT = 2**20


def check_header(file: Path) -> None:
    """Check that a file is GGUF, and that all that its header announces is in it.

    Raises:
        CheckpointError: says what is wrong.
    """
    try:
        with (
            file.open("rb") as content,
            mmap.mmap(content.fileno(), 0, access=mmap.ACCESS_READ) as m,
        ):
            _Header(m).check()
    except (ValueError, OSError) as error:
        raise CheckpointError(f"cannot read {file}: {error}") from None


class _Header:
    """Walks over the bytes of a header; a `ValueError` says where they are no GGUF."""

    def __init__(self, data: Any) -> None:
        self.data, self.at, self.entries, self.alignment = data, 0, 0, 32

    def check(self) -> None:
        """All of the header, and the place of every tensor."""
        if self._take(4) != _MAGIC:
            raise ValueError("it is no GGUF file")
        version = self._number("<I")
        if version not in _VERSIONS:
            raise ValueError(f"GGUF version {version} is not supported (valid: 2, 3)")
        tensors, fields = self._number("<Q"), self._number("<Q")
        for _ in range(fields):
            self._field()
        extents = [self._tensor() for _ in range(tensors)]
        start = -(-self.at // self.alignment) * self.alignment
        for name, offset, size in extents:
            if start + offset + size > len(self.data):
                raise ValueError(f"tensor {name!r} ends behind the end of the file")

    def _take(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise ValueError(f"the header ends at byte {len(self.data)}, and announces more")
        self.at += size
        taken: bytes = self.data[self.at - size : self.at]
        return taken

    def _skip(self, size: int) -> None:
        if size > len(self.data) - self.at:
            raise ValueError(f"the header ends at byte {len(self.data)}, and announces more")
        self.at += size

    def _number(self, form: str) -> int:
        value: int = struct.unpack(form, self._take(struct.calcsize(form)))[0]
        return value

    def _text(self) -> str:
        return self._take(self._number("<Q")).decode("utf-8")

    def _count(self, entries: int) -> None:
        self.entries += entries
        if self.entries > _MOST_ENTRIES:
            raise ValueError(f"the header has more than {_MOST_ENTRIES:,} entries")

    def _field(self) -> None:
        self._count(1)
        name, kind = self._text(), self._number("<I")
        if name == "general.alignment":
            self.alignment = self._number("<I") if kind == _UINT32 else 0
            if not 0 < self.alignment <= _MOST_ALIGNMENT or self.alignment & (self.alignment - 1):
                raise ValueError("general.alignment is no power of two")
        elif kind == _STRING:
            self._text()
        elif kind == _ARRAY:
            inner, length = self._number("<I"), self._number("<Q")
            self._count(length)
            if inner == _STRING:
                for _ in range(length):
                    self._text()
            else:
                self._skip(length * self._size(inner, name))
        else:
            self._skip(self._size(kind, name))

    def _size(self, kind: int, name: str) -> int:
        if kind not in _SCALARS:
            raise ValueError(f"field {name!r} is of type {kind}, which is none that can be read")
        return _SCALARS[kind]

    def _tensor(self) -> tuple[str, int, int]:
        """Name, offset and bytes of a tensor."""
        import gguf

        self._count(1)
        name, dimensions = self._text(), self._number("<I")
        if dimensions > _MOST_DIMENSIONS:
            raise ValueError(f"tensor {name!r} has {dimensions} dimensions")
        shape = [self._number("<Q") for _ in range(dimensions)]
        kind, offset = self._number("<I"), self._number("<Q")
        sizes = {int(known): size for known, size in gguf.GGML_QUANT_SIZES.items()}
        if kind not in sizes:
            raise ValueError(f"tensor {name!r} is of type {kind}, which is not known")
        block, block_bytes = sizes[kind]
        if shape and shape[0] % block:
            raise ValueError(f"tensor {name!r} has rows of {shape[0]} entries in blocks of {block}")
        return name, offset, math.prod(shape) // block * block_bytes
