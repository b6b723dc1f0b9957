"""Writing a GGUF file: fields, and tensors one by one, so that memory holds only one of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

from ..errors import ConfigError
from .fixed import FixedScale

FACTORS_TENSOR = "rope_freqs.weight"
# Fields of our own: llama.cpp passes over names that it does not know.
MARK = "clex."


@dataclass(frozen=True)
class Field:
    """A metadata field; `kind` and `inner` are values of `gguf.GGUFValueType`."""

    name: str
    value: Any
    kind: Any
    inner: Any = None


@dataclass(frozen=True)
class GgufTensor:
    """A tensor to be written: raw data by a call, so that it is made when its turn comes.

    Attributes:
        name: in llama.cpp's naming.
        shape: of the data as numpy has it; for quantised types that of the bytes.
        kind: name of its type, such as ``F32`` or ``Q4_K``.
        dtype: numpy type of the data.
        data: makes it.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    dtype: Any
    data: Callable[[], Any]

    @property
    def size(self) -> int:
        """In bytes."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def require_gguf() -> None:
    """Raise a `ConfigError` where the library of the file format is not installed."""
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise ConfigError(
            "GGUF files need the package gguf: pip install 'clex-llm[gguf]'"
        ) from None


def factors_tensor(fixed: FixedScale) -> GgufTensor:
    """`rope_freqs.weight`: llama.cpp divides its plain frequencies by it, whatever the context."""
    data = fixed.factors.numpy().astype(np.float32)
    return GgufTensor(FACTORS_TENSOR, data.shape, "F32", data.dtype, lambda: data)


def scale_fields(fixed: FixedScale, arch: str) -> list[Field]:
    """The context length, and what was done, for whoever reads the file."""
    import gguf

    kinds = gguf.GGUFValueType
    return [
        Field(f"{arch}.context_length", fixed.length, kinds.UINT32),
        Field(f"{MARK}method", fixed.method, kinds.STRING),
        Field(f"{MARK}scale", fixed.t, kinds.FLOAT32),
        Field(f"{MARK}native_length", fixed.native_length, kinds.UINT32),
        Field(f"{MARK}query_temperature", fixed.temperature, kinds.FLOAT32),
    ]


def write_gguf(
    path: Path,
    arch: str,
    fields: Iterable[Field],
    tensors: list[GgufTensor],
    *,
    alignment: int | None = None,
    console: Console | None = None,
) -> None:
    """Write the file.

    Args:
        path: replaced if it exists.
        arch: general.architecture.
        fields: all others.
        tensors: in the order of the file.
        alignment: of tensor data in bytes; the format's default if not given.
        console: where a bar goes.
    """
    import gguf

    writer = gguf.GGUFWriter(path, arch)
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    for field in fields:
        writer.add_key_value(field.name, field.value, field.kind, sub_type=field.inner)
    for tensor in tensors:
        kind = gguf.GGMLQuantizationType[tensor.kind]
        writer.add_tensor_info(
            tensor.name, tensor.shape, np.dtype(tensor.dtype), tensor.size, raw_dtype=kind
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    bar = Progress(
        TextColumn("writing"),
        BarColumn(),
        DownloadColumn(),
        console=console or Console(stderr=True),
        transient=True,
    )
    with bar:
        task = bar.add_task("", total=sum(t.size for t in tensors))
        for tensor in tensors:
            writer.write_tensor_data(tensor.data())
            bar.advance(task, tensor.size)
    writer.close()
