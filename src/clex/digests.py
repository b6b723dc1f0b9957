"""SHA-256 of saved files, by which a flipped byte or a lost end is found before it is used."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from .errors import CheckpointError


def digests_of(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """SHA-256 (hex) of files in `folder`, by name; several at a time."""
    ordered = sorted(names)
    with ThreadPoolExecutor() as pool:
        return dict(
            zip(ordered, pool.map(lambda name: _digest(folder / name), ordered), strict=True)
        )


def require_digests(folder: Path, recorded: Any, names: Iterable[str] | None = None) -> None:
    """Check that files are those that were saved.

    Args:
        folder: where they lie.
        recorded: from `digests_of`, as it was read from a file.
        names: which of them are checked; all that are recorded if not given. One that is not
            recorded is not checked.

    Raises:
        CheckpointError: a file is missing, cannot be read or differs, or the record is no record.
    """
    if not isinstance(recorded, Mapping) or not all(
        isinstance(digest, str) and isinstance(name, str) and _is_inside(name)
        for name, digest in recorded.items()
    ):
        raise CheckpointError(f"the recorded SHA-256 of the files in {folder} are damaged")
    wanted = {n: d for n, d in recorded.items() if names is None or n in set(names)}
    for name in wanted:
        if not (folder / name).is_file():
            raise CheckpointError(f"no {name} in {folder}")
    try:
        found = digests_of(folder, wanted)
    except OSError as error:
        raise CheckpointError(f"cannot read {error.filename}: {error.strerror}") from None
    for name, digest in wanted.items():
        if found[name] != digest:
            raise CheckpointError(
                f"{folder / name} is damaged: its SHA-256 is not the recorded one"
            )


def _is_inside(name: str) -> bool:
    """Whether `name` is that of a file in a folder or in one of its folders, and no way out."""
    parts = PurePosixPath(name).parts
    return "/".join(parts) == name and not {"/", "..", ""} & {*parts} and bool(parts)


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
