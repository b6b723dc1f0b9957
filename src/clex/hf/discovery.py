"""Which module of a model is the rotary and what it does. The only reader of host configs."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from ..config import ClexConfig
from ..errors import ConfigError, UnsupportedModelError
from ..rope import RopeSpec
from .rotary import ALL_LAYERS

# Checked by tests; others of the same skeleton are found as well.
CHECKED_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gpt_neox")

_SUFFIX = "original_inv_freq"


def find_rotary(model: nn.Module) -> tuple[nn.Module, str, nn.Module]:
    """The parent, attribute name and module of the text decoder's rotary embedding."""
    decoder: nn.Module = model
    if callable(getattr(model, "get_decoder", None)):
        decoder = model.get_decoder() or model  # type: ignore[operator]
    found = [
        (parent, name, child)
        for parent in decoder.modules()
        for name, child in parent.named_children()
        if _is_rotary(child)
    ]
    supported = f"checked families: {', '.join(CHECKED_FAMILIES)}, and others of the same form"
    if not found:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no rotary module that clex can extend ({supported})"
        )
    if len(found) > 1:
        names = ", ".join(name for _, name, _ in found)
        raise UnsupportedModelError(
            f"{type(model).__name__} has {len(found)} rotary modules ({names}) and clex extends"
            f" models with one ({supported})"
        )
    return found[0]


def _is_rotary(module: nn.Module) -> bool:
    """The common skeleton: forward(x, position_ids, ...) around a frequency buffer of its own."""
    if not any(name.endswith(_SUFFIX) for name, _ in module.named_buffers(recurse=False)):
        return False
    parameters = list(inspect.signature(inspect.unwrap(type(module).forward)).parameters)
    return parameters[:3] == ["self", "x", "position_ids"]


def rope_specs(model: nn.Module, stock: nn.Module, config: ClexConfig) -> dict[str, RopeSpec]:
    """Read the rotary settings of a host. The only function that knows its config fields.

    Returns:
        A `RopeSpec` under `ALL_LAYERS`, or one for each layer type that is to be extended.

    Raises:
        UnsupportedModelError: the rotary changes its frequencies by itself (dynamic, longrope).
        ConfigError: the native length is not known, or a wanted layer type does not exist.
    """
    host: Any = getattr(stock, "config", None) or model.config
    parameters: dict[str, Any] = getattr(host, "rope_parameters", None) or {}
    prefixes = [
        name.removesuffix(_SUFFIX)
        for name, _ in stock.named_buffers(recurse=False)
        if name.endswith(_SUFFIX)
    ]
    layer_types = [prefix.removesuffix("_") for prefix in prefixes if prefix]
    if not layer_types:
        if config.layer_types:
            raise ConfigError(
                f"{type(model).__name__} has no layer types, got {', '.join(config.layer_types)}"
            )
        return {ALL_LAYERS: _rope_spec(model, stock, host, parameters, "", config)}
    wanted = config.layer_types or tuple(n for n in layer_types if "sliding" not in n)
    for name in wanted:
        if name not in layer_types:
            raise ConfigError(f"unknown layer type {name!r} (valid: {', '.join(layer_types)})")
    return {
        name: _rope_spec(model, stock, host, parameters.get(name, {}), f"{name}_", config)
        for name in wanted
    }


def _rope_spec(
    model: nn.Module,
    stock: nn.Module,
    host: Any,
    parameters: dict[str, Any],
    prefix: str,
    config: ClexConfig,
) -> RopeSpec:
    rope_type = parameters.get("rope_type", "default")
    if "dynamic" in rope_type or rope_type == "longrope":
        raise UnsupportedModelError(
            f"{type(model).__name__} uses rope_type {rope_type!r}, whose frequencies change with"
            " the length already; load it with the default rope_type first"
        )
    inv_freq: Tensor = getattr(stock, f"{prefix}inv_freq")
    if inv_freq.dtype != torch.float32:
        # model.to(bfloat16) rounds the buffer, which costs whole radians: make it anew.
        inv_freq = _fresh_inv_freq(stock, host, prefix, inv_freq.device)
    length = (
        config.native_length
        or parameters.get("original_max_position_embeddings")
        or getattr(host, "max_position_embeddings", None)
    )
    if not length:
        raise ConfigError(
            f"{type(model).__name__} does not say how long a text it was trained on;"
            " give native_length"
        )
    return RopeSpec(
        inv_freq=inv_freq.detach().cpu().clone(),
        native_length=int(length),
        rope_theta=float(parameters.get("rope_theta", getattr(host, "rope_theta", 10_000.0))),
        attention_scaling=float(getattr(stock, f"{prefix}attention_scaling")),
    )


def _fresh_inv_freq(stock: nn.Module, host: Any, prefix: str, device: torch.device) -> Tensor:
    with torch.device(device):
        fresh: Any = type(stock)(host)
    inv_freq: Tensor = getattr(fresh, f"{prefix}inv_freq")
    if inv_freq.dtype != torch.float32:
        raise UnsupportedModelError(
            f"{type(stock).__name__} keeps its frequencies in {inv_freq.dtype}, not float32"
        )
    return inv_freq


def freq_name(key: str) -> str:
    return "inv_freq" if key == ALL_LAYERS else f"{key}_inv_freq"
