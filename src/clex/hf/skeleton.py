"""A model without its weights: all that is needed to look at, or to extend, its rotary module."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from ..config import ClexConfig
from .checkpoint import (
    WEIGHTS_FILE,
    base_name,
    is_checkpoint,
    load_extension_state,
    read_about,
    require_loadable,
    result_folder,
)
from .extend import extend
from .models import load_host_config


def skeleton_of(config: PreTrainedConfig) -> nn.Module:
    """The model that `config` describes: weights on the meta device, buffers real, on the CPU.

    It can be extended and asked for its frequencies, in megabytes whatever its size; it cannot be
    run.
    """
    with init_empty_weights(include_buffers=False):
        model: nn.Module = AutoModelForCausalLM.from_config(config)
    # `extend` puts the extension where the model's first parameter is, and a module's own
    # parameters come before those of its parts.
    model.register_parameter("place", nn.Parameter(torch.empty(0), requires_grad=False))
    return model.eval()


def count_weights(config: PreTrainedConfig) -> int:
    """Weights of the model that `config` describes, tied ones once; none are made."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    count: int = sum(p.numel() for p in model.parameters())
    return count


def load_skeleton(name: str | Path) -> nn.Module:
    """The skeleton of a plain model, or of a result of ``clex extend`` with its extension.

    Args:
        name: what `clex.hf.models.load_base` or `clex.load` take; no weights are read, and of a
            hub id only the config is downloaded.

    Raises:
        ConfigError: there is no such model.
        CheckpointError: a file of the extension is missing or damaged.
    """
    if not is_checkpoint(name):
        return skeleton_of(load_host_config(name))
    folder = result_folder(name)
    about = read_about(folder)
    full = about.get("weights") == "full"
    model = skeleton_of(load_host_config(folder if full else base_name(folder)))
    require_loadable(folder, model)
    # An adapter has no part in the frequencies, so it is left out.
    extend(model, ClexConfig.from_dict(about["clex"]))
    load_extension_state(model, folder / WEIGHTS_FILE)
    return model.eval()
