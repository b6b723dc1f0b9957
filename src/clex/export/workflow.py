"""The job behind `clex export`."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from torch import nn

from ..config import ClexConfig
from ..digests import digests_of, require_digests
from ..errors import CheckpointError, ConfigError, OutputError, UnsupportedModelError, unknown
from ..files import new_folder
from ..hf.extend import restore
from ..hf.models import resolve
from ..version import __version__
from .card import license_of, write_card
from .families import Family, Target, family_of
from .fixed import FixedScale, fixed_scale, length_classes
from .gguf_convert import FLOAT_TYPES, convert_gguf, quantize_gguf, require_quantizer
from .gguf_copy import copy_gguf, gguf_license
from .gguf_file import require_gguf
from .hf import Form, require_form, write_hf
from .queries import scale_queries
from .record import GGUF_FILE, ExportRecord, is_export, read_record
from .source import Source

TARGETS = ("hf", "vllm", "gguf")
DTYPES = {
    "auto": None,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def export(
    source: str | Path,
    out: str | Path,
    *,
    target: Target,
    scale: float | None = None,
    length: int | None = None,
    scales: Sequence[float] | None = None,
    clex: ClexConfig | None = None,
    form: Form = "portable",
    gguf: str | Path | None = None,
    dtype: str = "auto",
    quantize: str | None = None,
    overwrite: bool = False,
    console: Console | None = None,
) -> ExportRecord:
    """Write an extended model, held at one scale, for an engine that has none of our code.

    Everything that can be wrong with the input is found before `out` is touched, and `out` is whole
    or not there. An export that is in `out` already with the same settings is left as it is.

    Args:
        source: a result of ``clex extend``, or a plain model (then give `clex`).
        out: new folder.
        target: ``hf`` (transformers and what reads its folders), ``vllm`` or ``gguf`` (llama.cpp,
            Ollama).
        scale: t; or give `length`.
        length: longest text in tokens.
        scales: for target ``vllm``, instead of both: several t, rising, one for each length class
            of a server with clex's plugin; the weights are untouched.
        clex: how a plain model is extended, such as ``ClexConfig(method="yarn", max_scale=4)``.
        form: ``portable`` folds the temperature into the queries; ``keep_weights`` leaves weights
            untouched and writes an attention factor (hf, vllm); ``two_scales`` (vllm) holds t = 1
            beside it, chosen when vLLM starts.
        gguf: for target ``gguf``: a file of the base model whose tensors are copied as they are.
        dtype: of the weights: ``auto`` (as they are stored), ``float32``, ``bfloat16``,
            ``float16``.
        quantize: for target ``gguf`` without `gguf`: type for llama.cpp's own quantiser.
        overwrite: replace an export that is in `out`.
        console: where progress goes.

    Returns:
        What was written, as it lies in clex_export.json.

    Raises:
        UnsupportedModelError: the target would run the model wrong; the message says why.
        ConfigError: settings contradict one another, or are out of range.
        CheckpointError: the source is damaged, is an export already, or `gguf` is of another model.
        OutputError: `out` holds something else, or cannot be written.
    """
    console, out = console or Console(stderr=True), Path(out)
    _check_settings(target, gguf, dtype, quantize)
    found = Source.find(source, clex)
    family = family_of(found.host_config(), target)
    if gguf is not None and found.weights != "none":
        raise ConfigError(
            f"{source} has weights of its own ({found.weights}), and {gguf} holds those of the"
            " base model; leave out --gguf"
        )
    _check_out(out, overwrite)
    with console.status(f"loading {found.name}"):
        model = found.load(DTYPES[dtype])
    classes = None
    if scales is not None:
        if scale is not None or length is not None or form != "portable":
            raise ConfigError("several scales are a form of their own; give nothing beside them")
        form, classes = "many_scales", length_classes(model, scales)
        scale = classes.scales[-1]
    fixed = fixed_scale(model, scale=scale, length=length)
    require_form(form, family, target)
    settings: dict[str, Any] = {
        "target": target,
        "form": form,
        "source": found.name,
        "base_model": found.base,
        "clex": found.resolved(model),
        "trained_weights": found.weights,
        "source_sha256": found.sha256,
        "scale": fixed.t,
        "length": fixed.length,
        "native_length": fixed.native_length,
        "rope_theta": fixed.rope_theta,
        "rotary_dim": fixed.rotary_dim,
        "temperature": fixed.temperature,
        "factors": fixed.factors.tolist(),
        "gguf": str(gguf) if gguf is not None else None,
        "scales": list(classes.scales) if classes is not None else [],
    }
    if gguf is None:
        settings["weights"] = _weights(model, target, quantize)
    if is_export(out) and not overwrite:
        return _same_export(out, settings)
    model = restore(model)
    with new_folder(out) as folder:
        if gguf is not None:
            queries, settings["weights"] = copy_gguf(
                Path(gguf), folder / GGUF_FILE, fixed, model, console
            )
        elif target == "gguf":
            queries = _convert(found, model, folder, fixed, family, quantize, console)
        else:
            with console.status(f"writing {out}"):
                queries = write_hf(
                    model,
                    found.tokenizer(),
                    folder,
                    fixed,
                    family=family,
                    form=form,
                    classes=classes,
                )
        digests = digests_of(folder, [file.name for file in folder.iterdir() if file.is_file()])
        record = ExportRecord(**settings, queries=queries, versions=_versions(), sha256=digests)
        record.write(folder)
        license_name, languages = license_of(resolve(found.base))
        if license_name is None and gguf is not None:
            license_name = gguf_license(Path(gguf))
        write_card(folder, record, license_name=license_name, languages=languages)
    return record


def _check_settings(target: str, gguf: Any, dtype: str, quantize: str | None) -> None:
    if target not in TARGETS:
        raise ConfigError(unknown("target", target, TARGETS))
    if dtype not in DTYPES:
        raise ConfigError(unknown("dtype", dtype, DTYPES))
    if target != "gguf":
        if gguf is not None or quantize is not None:
            raise ConfigError(f"--gguf and --quantize belong to target gguf, not to {target}")
        return
    require_gguf()
    if gguf is not None and (quantize is not None or dtype != "auto"):
        raise ConfigError("--gguf keeps the types of its file; leave out --quantize and --dtype")
    if quantize is not None:
        require_quantizer()


def _check_out(out: Path, overwrite: bool) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise OutputError(f"{out} is a file, not a folder")
    if any(out.iterdir()) and not is_export(out):
        raise OutputError(f"{out} is not empty and was not written by clex export; choose another")


def _same_export(out: Path, settings: Mapping[str, Any]) -> ExportRecord:
    """The export that is there, if it is the wanted one."""
    record = read_record(out)
    changed = [name for name, value in settings.items() if getattr(record, name) != value]
    if changed:
        raise OutputError(
            f"{out} holds another export ({', '.join(changed)} differ);"
            " pass --overwrite to replace it"
        )
    try:
        require_digests(out, record.sha256)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; pass --overwrite to write the export anew") from None
    return record


def _convert(
    source: Source,
    model: nn.Module,
    folder: Path,
    fixed: FixedScale,
    family: Family,
    quantize: str | None,
    console: Console,
) -> str:
    if fixed.partial:
        raise UnsupportedModelError(
            f"only {fixed.rotary_dim} of {fixed.head_dim} entries of a head rotate, and arch llama"
            " rotates all"
        )
    blocks = scale_queries(model, family, fixed)
    name = Path(source.base).name
    tokenizer = source.tokenizer()
    with tempfile.TemporaryDirectory() as place:
        if tokenizer is not None:
            tokenizer.save_pretrained(place)
        floats = Path(place) / GGUF_FILE if quantize else folder / GGUF_FILE
        convert_gguf(model, Path(place), floats, fixed, name=name, console=console)
        if quantize:
            quantize_gguf(floats, folder / GGUF_FILE, quantize)
    return f"{family.module} of {blocks} layers times {fixed.temperature:.6g}"


def _weights(model: nn.Module, target: Target, quantize: str | None) -> str:
    """Name of the type that most weights will have."""
    dtype = next(model.parameters()).dtype
    if target == "gguf":
        return quantize or FLOAT_TYPES[dtype]
    return str(dtype).removeprefix("torch.")


def _versions() -> dict[str, str]:
    return {
        "clex": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
