"""What an export is, as a file beside it."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, ConfigError
from ..files import read_json, write_json

RECORD_FILE = "clex_export.json"
GGUF_FILE = "model.gguf"


@dataclass(frozen=True, kw_only=True)
class ExportRecord:
    """Everything about an export but its weights.

    Attributes:
        target: ``hf``, ``vllm`` or ``gguf``.
        form: ``portable``, ``keep_weights``, ``two_scales`` or ``many_scales``.
        source: what was exported: a result of ``clex extend``, or a plain model.
        base_model: name or folder of the plain model.
        clex: config of the extension.
        trained_weights: ``none``, ``adapter`` or ``full``.
        scale: t, the longest one where there are several.
        length: longest text in tokens.
        native_length: window of the plain model in tokens.
        rope_theta: base of the plain curve.
        rotary_dim: rotated entries of a head.
        temperature: s, the factor on the logits.
        factors: plain frequency over wanted, rotary_dim / 2 numbers.
        weights: type of most weights: ``float32``, ``bfloat16``, ``Q4_K`` ...
        queries: what was done to the query weights, in words.
        gguf: the file whose tensors were copied, if so.
        versions: of what the result depends on.
        scales: t of each length class, for ``many_scales``.
        sha256: of the files of the export, by name.
        source_sha256: of the files of the exported result, by name.
    """

    target: str
    form: str
    source: str
    base_model: str
    clex: dict[str, Any]
    trained_weights: str
    scale: float
    length: int
    native_length: int
    rope_theta: float
    rotary_dim: int
    temperature: float
    factors: list[float]
    weights: str
    queries: str
    gguf: str | None
    versions: dict[str, str]
    scales: list[float] = field(default_factory=list)
    sha256: dict[str, str] = field(default_factory=dict)
    source_sha256: dict[str, str] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write the record into an export."""
        write_json(folder / RECORD_FILE, dataclasses.asdict(self))


def is_export(folder: str | Path) -> bool:
    """Whether `folder` holds an export that was finished."""
    return os.path.isfile(Path(folder) / RECORD_FILE)


def read_record(folder: str | Path) -> ExportRecord:
    """The record of an export.

    Raises:
        ConfigError: the folder holds none.
        CheckpointError: the record is damaged.
    """
    file = Path(folder) / RECORD_FILE
    if not file.is_file():
        raise ConfigError(f"{folder} is not an export of clex: it has no {RECORD_FILE}")
    try:
        return ExportRecord(**read_json(file))
    except TypeError as error:
        raise CheckpointError(f"{file} is damaged: {error}") from None
