"""A user's GGUF file at one scale: every tensor as it is, but for the queries."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from torch import nn

from ..errors import CheckpointError, ClexError, UnsupportedModelError
from .fixed import FixedScale
from .gguf_blocks import SCALES, scale_tensor
from .gguf_file import (
    FACTORS_TENSOR,
    MARK,
    Field,
    GgufTensor,
    factors_tensor,
    require_gguf,
    scale_fields,
    write_gguf,
)
from .gguf_header import check_header

# Architectures whose graph reads rope_freqs.weight, as far as a test has seen it do so.
ARCHITECTURES = ("llama",)

_HOW = (
    "convert the checkpoint with --target gguf and no --gguf where the family allows it, or use"
    " --target vllm"
)
_ALIGNMENT = "general.alignment"


def copy_gguf(
    source: Path,
    path: Path,
    fixed: FixedScale,
    model: nn.Module,
    console: Console | None = None,
) -> tuple[str, str]:
    """Write `source` with the factors and the temperature of one scale.

    Args:
        source: a GGUF file of the model, quantised or not.
        path: the new file.
        fixed: the scale.
        model: the model that the scale was made for, to see that the file holds the same one.
        console: where a bar goes.

    Returns:
        What was done to the query weights, in words, and the type that most weights have.

    Raises:
        CheckpointError: the file is damaged, is an export already, or is of another model.
        UnsupportedModelError: llama.cpp would not read the factors.
    """
    require_gguf()
    reader = _read(source)
    fields = {name: f for name, f in reader.fields.items() if not name.startswith("GGUF.")}
    with _reading(source):
        arch = _require_plain(source, fields)
        _require_same_model(source, arch, fields, reader, fixed, model)
    dropped = (f"{arch}.rope.scaling.", f"{arch}.rope.scale_linear")
    new = scale_fields(fixed, arch)
    written = {field.name for field in new} | {"general.architecture", _ALIGNMENT}
    with _reading(source):
        kept = [
            _kept(name, field)
            for name, field in fields.items()
            if not name.startswith(dropped) and name not in written
        ]
    tensors: list[GgufTensor] = []
    queries: dict[str, str] = {}
    kinds: dict[str, int] = {}
    for tensor in reader.tensors:
        kind = tensor.tensor_type.name
        if tensor.name.startswith(("rope_factors_", FACTORS_TENSOR)):
            continue
        if ".attn_q." in tensor.name and fixed.temperature != 1:
            tensors.append(_scaled(tensor, fixed.temperature))
            queries[kind] = tensors[-1].kind
        else:
            tensors.append(
                GgufTensor(
                    tensor.name, tensor.data.shape, kind, tensor.data.dtype, _raw(tensor.data)
                )
            )
        kinds[kind] = kinds.get(kind, 0) + tensor.n_bytes
    if fixed.temperature != 1 and not queries:
        raise UnsupportedModelError(f"{source} has no attn_q tensors; {_HOW}")
    alignment = fields[_ALIGNMENT].contents() if _ALIGNMENT in fields else None
    tensors.insert(0, factors_tensor(fixed))
    write_gguf(path, arch, [*kept, *new], tensors, alignment=alignment, console=console)
    return _words(queries, fixed.temperature), max(kinds, key=lambda kind: kinds[kind])


def gguf_license(source: Path) -> str | None:
    """The licence that a GGUF file names, if it names one."""
    field = _read(source).fields.get("general.license")
    with _reading(source):
        return str(field.contents()) if field is not None else None


def _read(source: Path) -> Any:
    import gguf

    if not source.is_file():
        raise CheckpointError(f"no file {source}")
    check_header(source)
    with _reading(source):
        return gguf.GGUFReader(source)


@contextmanager
def _reading(source: Path) -> Iterator[None]:
    """Fields may be missing, of another type, or hold bytes that are no text."""
    try:
        yield
    except ClexError:
        raise
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        raise CheckpointError(f"cannot read {source}: {type(error).__name__}: {error}") from None


def _require_plain(source: Path, fields: dict[str, Any]) -> str:
    """The architecture of a file that nothing was done to yet."""
    arch = str(fields["general.architecture"].contents())
    if arch not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"{source} has arch {arch!r}, and llama.cpp is known to read frequency factors for"
            f" {', '.join(ARCHITECTURES)}; {_HOW}"
        )
    if any(name.startswith(MARK) for name in fields):
        raise CheckpointError(f"{source} is an export of clex already; give the file it came from")
    if "split.count" in fields and fields["split.count"].contents() > 1:
        raise CheckpointError(f"{source} is one part of several; join them with llama-gguf-split")
    return arch


def _require_same_model(
    source: Path,
    arch: str,
    fields: dict[str, Any],
    reader: Any,
    fixed: FixedScale,
    model: nn.Module,
) -> None:
    """Sizes, theta and norms: norms are float32 in every file, and no two models share them."""
    config: Any = model.config
    wanted = {
        "block_count": config.num_hidden_layers,
        "embedding_length": config.hidden_size,
        "attention.head_count": config.num_attention_heads,
        "rope.dimension_count": fixed.rotary_dim,
        "rope.freq_base": fixed.rope_theta,
    }
    absent = {"rope.dimension_count": fixed.head_dim, "rope.freq_base": 10_000.0}
    for name, value in wanted.items():
        field = fields.get(f"{arch}.{name}")
        found = field.contents() if field is not None else absent.get(name)
        if found is None or not math.isclose(found, value, rel_tol=1e-6):
            raise CheckpointError(f"{source} is of another model: {name} is {found}, not {value}")
    norms = {
        t.name: t for t in reader.tensors if t.name == "output_norm.weight" and t.data.ndim == 1
    }
    decoder: Any = model.get_decoder()  # type: ignore[operator]
    own = decoder.norm.weight.detach().float().cpu().numpy()
    for norm in norms.values():
        if not np.allclose(norm.data.astype(np.float32), own, rtol=1e-3, atol=1e-5):
            raise CheckpointError(
                f"{source} is of another model, or of another training of it: its last norm differs"
            )


def _kept(name: str, field: Any) -> Field:
    import gguf

    kind = field.types[0]
    inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
    return Field(name, field.contents(), kind, inner)


def _raw(data: Any) -> Any:
    return lambda: data


def _scaled(tensor: Any, factor: float) -> GgufTensor:
    kind = tensor.tensor_type.name
    data, new = scale_tensor(tensor.data, kind, factor)
    return GgufTensor(tensor.name, data.shape, new, data.dtype, _raw(data))


def _words(queries: dict[str, str], temperature: float) -> str:
    if not queries:
        return "untouched; the temperature is 1"
    parts = [
        f"{old}: block scales multiplied, integers untouched"
        if old in SCALES
        else (old if old == new else f"{old}, stored as {new}")
        for old, new in sorted(queries.items())
    ]
    return f"attn_q times {temperature:.6g} ({'; '.join(parts)})"
