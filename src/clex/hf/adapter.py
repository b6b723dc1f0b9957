"""Loading the PEFT adapter of a checkpoint: safetensors only, and checked before PEFT builds it.

An adapter config is a file from somewhere, and PEFT does what it says: it makes matrices of the
ranks it names, imports the module that it calls ``megatron_core`` and reads the files that some
initialisations name. Ranks must be those of the stored tensors, the rest is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import peft
from safetensors import SafetensorError, safe_open
from torch import nn

from ..errors import CheckpointError
from ..files import read_json

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

# Whole numbers that are no ranks: sizes of other adapters, layer and token numbers.
_MOST_NUMBER = 2**20
_MOST_TEXT = 4096
# Those that start from nothing but the weights; the others read files, or data of their own.
_INITIALISATIONS = re.compile(r"gaussian|orthogonal|olora|pissa(_niter_\d{1,2})?")
_REFUSED = ("megatron_config", "corda_config", "eva_config", "lora_ga_config")


def load_adapter(model: nn.Module, folder: Path) -> nn.Module:
    """The PEFT model of `model` and the adapter in `folder`.

    Raises:
        CheckpointError: a file is missing or damaged, asks for what clex does not do, or does not
            fit the model.
    """
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (folder / name).is_file():
            raise CheckpointError(f"no {name} in {folder}")
    shapes = _shapes(folder / ADAPTER_WEIGHTS)
    check_adapter_config(folder / ADAPTER_CONFIG, shapes)
    host: Any = model
    try:
        loaded = peft.PeftModel.from_pretrained(host, str(folder))
        missing = sorted(peft.get_peft_model_state_dict(loaded).keys() - shapes.keys())
    except Exception as error:  # whatever PEFT makes of a config that it does not understand
        lines = str(error).strip().splitlines() or [""]
        raise CheckpointError(
            f"cannot load the adapter in {folder}: {type(error).__name__}: {lines[0][:200]}"
        ) from error
    if missing:
        raise CheckpointError(f"the adapter in {folder} is not whole: it lacks {missing[0]}")
    return loaded


def check_adapter_config(file: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse an adapter config that asks for more than its tensors, of these `shapes`, hold.

    Raises:
        CheckpointError: names the entry.
    """
    config = read_json(file)
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise CheckpointError(f"{file} is not an adapter's config: it has no peft_type")
    for name in _REFUSED:
        if config.get(name):
            raise CheckpointError(f"{file}: {name} is not supported")
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and not _INITIALISATIONS.fullmatch(start):
        raise CheckpointError(f"{file}: init_lora_weights = {start[:80]!r} is not supported")
    largest = max((min(shape) for shape in shapes.values() if shape), default=0)
    for name, value in _numbers(config):
        rank = name in ("r", "rank_pattern", "init_r", "target_r")
        most = largest if rank else max(_MOST_NUMBER, largest)
        if not -most <= value <= most:
            raise CheckpointError(
                f"{file}: {name} = {value} is out of range (the stored tensors give {most} at most)"
            )
    for name, value in config.items():
        if isinstance(value, str) and len(value) > _MOST_TEXT:
            raise CheckpointError(f"{file}: {name} has {len(value)} characters")


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(file, framework="pt") as tensors:
            return {key: tuple(tensors.get_slice(key).get_shape()) for key in list(tensors.keys())}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"cannot read {file}: {error}") from None


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, int | float]]:
    """Every number in a config with the name of the entry that it stands in."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _numbers(item, name or str(key))
    elif isinstance(value, list):
        for item in value:
            yield from _numbers(item, name)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield name, value
