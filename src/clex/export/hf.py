"""Folders that transformers and vLLM read as they are: the config that says one scale or two."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Literal

from torch import nn

from ..errors import UnsupportedModelError
from ..files import read_json, write_json
from ..serving.length_classes import ARCHITECTURES, CONFIG_KEY, PREFIX, LengthClasses
from .families import Family, Target
from .fixed import FixedScale
from .queries import scale_queries

Form = Literal["portable", "keep_weights", "two_scales", "many_scales"]

# Left in the config of an export, so that nobody scales the queries a second time.
MARK = "clex_export"
OVERRIDES_FILE = "hf_overrides.json"

_OLD_KEYS = ("rope_theta", "rope_scaling")


def require_form(form: Form, family: Family, target: Target) -> None:
    """Check that `form` is right for a model in `target`.

    Raises:
        UnsupportedModelError: it would run, and run wrong.
    """
    if form == "portable":
        return
    if target == "gguf":
        raise UnsupportedModelError(
            "llama.cpp multiplies cached keys by the attention factor again at each cache shift;"
            " only the portable form is right there"
        )
    if form == "many_scales" and (target != "vllm" or family.vllm != "native"):
        raise UnsupportedModelError(
            "several scales in one server are for vLLM, and for families that vLLM has a class for"
        )
    if form == "two_scales" and target != "vllm":
        raise UnsupportedModelError(
            "two scales are for vLLM, which chooses once; transformers changes over while keys are"
            " cached"
        )
    if form == "two_scales" and family.vllm != "native":
        raise UnsupportedModelError(
            "vLLM runs this family through transformers, which changes over from one scale to the"
            " other while keys are cached; export one scale"
        )


def config_changes(fixed: FixedScale, form: Form, partial_rotary_factor: float) -> dict[str, Any]:
    """What a config.json must say, in the keys of transformers 5 and of older readers.

    Single-scale forms have equal short and long factors and an original length equal to the
    maximum, so that no reader has a choice to make. Both mscale keys are always written: vLLM and
    SGLang read only those, transformers only `attention_factor`.

    Args:
        fixed: the scale.
        form: ``portable`` (temperature in the weights), ``keep_weights`` (as attention factor), or
            ``two_scales``. ``many_scales`` looks like ``keep_weights`` at the longest of them to
            whoever does not know it.
        partial_rotary_factor: of the model's own config; 1 where it has none.
    """
    long = fixed.factors.tolist()
    scale = 1.0 if form == "portable" else math.sqrt(fixed.temperature)
    two = form == "two_scales"
    rope: dict[str, Any] = {
        "rope_type": "longrope",
        "rope_theta": fixed.rope_theta,
        "factor": fixed.length / fixed.native_length if two else 1.0,
        "original_max_position_embeddings": fixed.native_length if two else fixed.length,
        "short_factor": fixed.native_factors.tolist() if two else long,
        "long_factor": long,
        "attention_factor": scale,
        "short_mscale": math.sqrt(fixed.native_temperature) if two else scale,
        "long_mscale": scale,
    }
    if partial_rotary_factor != 1:
        rope["partial_rotary_factor"] = partial_rotary_factor
    old = {key: value for key, value in rope.items() if key != "rope_theta"}
    changes: dict[str, Any] = {
        "max_position_embeddings": fixed.length,
        "rope_parameters": rope,
        "rope_theta": fixed.rope_theta,
        "rope_scaling": old,
    }
    # With it at the top, vLLM takes the original length for the longest one, and the short factors.
    if not two:
        changes["original_max_position_embeddings"] = fixed.length
    return changes


def write_hf(
    model: nn.Module,
    tokenizer: Any,
    folder: Path,
    fixed: FixedScale,
    *,
    family: Family,
    form: Form,
    classes: LengthClasses | None = None,
) -> str:
    """Write a plain model with the settings of one scale; its weights are changed in place.

    Args:
        model: plain, weights merged.
        tokenizer: saved along, if there is one.
        folder: exists, empty.
        fixed: the scale.
        family: where the queries are.
        form: see `config_changes`.
        classes: for ``many_scales``, whose longest is `fixed`.

    Returns:
        What was done to the query weights, in words.
    """
    done = "untouched; the temperature is the attention factor"
    if form == "portable":
        blocks = scale_queries(model, family, fixed)
        done = f"{family.module} of {blocks} layers times {fixed.temperature:.6g}"
    if classes is not None:
        done = "untouched; the temperature of each scale is in its cos and sin"
    target: Any = model
    target.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
        _lengthen_tokenizer(folder / "tokenizer_config.json", fixed.length)
    config = read_json(folder / "config.json")
    rope = config.get("rope_parameters") or {}
    changes = config_changes(fixed, form, float(rope.get("partial_rotary_factor", 1.0)))
    if classes is not None:
        changes |= _many_scales(config["architectures"], classes)
    for key in ("original_max_position_embeddings", *_OLD_KEYS):
        config.pop(key, None)
    mark = {"form": form, "scale": fixed.t, "temperature": fixed.temperature}
    write_json(folder / "config.json", {**config, **changes, MARK: mark})
    if form != "portable":
        (folder / OVERRIDES_FILE).write_text(json.dumps(changes), encoding="utf-8")
    return done


def _many_scales(architectures: list[str], classes: LengthClasses) -> dict[str, Any]:
    """What `clex.serving` looks for; a vLLM without it knows no such architecture."""
    if len(architectures) != 1 or architectures[0] not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"{', '.join(architectures)} is not served at several scales (valid:"
            f" {', '.join(ARCHITECTURES)})"
        )
    return {"architectures": [PREFIX + architectures[0]], CONFIG_KEY: classes.to_dict()}


def _lengthen_tokenizer(file: Path, length: int) -> None:
    """Some readers cut prompts at the tokenizer's own length."""
    if not file.is_file():
        return
    settings = read_json(file)
    if settings.get("model_max_length", length) < length:
        write_json(file, {**settings, "model_max_length": length})
