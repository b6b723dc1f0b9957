"""Which module of a model is the rotary and what it does. The only reader of host configs."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..config import ClexConfig
from ..errors import ConfigError, UnsupportedModelError
from ..rope import RopeSpec
from .rotary import ALL_LAYERS

_SUFFIX = "original_inv_freq"


def find_rotary(model: nn.Module) -> tuple[nn.Module, str, nn.Module]:
    """The parent, attribute name and module of the text decoder's rotary embedding.

    Raises:
        UnsupportedModelError: there is none of the common form, or more than one.
    """
    found = {path: module for path, module in _decoder(model).named_modules() if _is_rotary(module)}
    if len(found) != 1:
        several = f"{len(found)} rotary modules ({', '.join(found)}) where clex extends one"
        raise UnsupportedModelError(
            f"{type(model).__name__} has {several if found else 'no rotary module of the form'}"
            f"{'' if found else ' that clex extends'} (see: clex families)"
        )
    ((path, module),) = found.items()
    parent, _, name = path.rpartition(".")
    return _decoder(model).get_submodule(parent), name, module


def _decoder(model: nn.Module) -> nn.Module:
    """The part of a model that reads text."""
    if callable(getattr(model, "get_decoder", None)):
        decoder: Any = model.get_decoder()  # type: ignore[operator]
        # Some have a layer called "decoder", the head, and answer with that.
        if decoder is not None and any(decoder.children()):
            return cast(nn.Module, decoder)
    return model


def _is_rotary(module: nn.Module) -> bool:
    """The common skeleton: forward(x, position_ids, ...) around a frequency buffer of its own."""
    if not any(name.endswith(_SUFFIX) for name, _ in module.named_buffers(recurse=False)):
        return False
    return has_rotary_forward(type(module))


def has_rotary_forward(module_type: type[nn.Module]) -> bool:
    """Whether a class of modules has the common forward(x, position_ids, ...)."""
    parameters = list(inspect.signature(inspect.unwrap(module_type.forward)).parameters)
    return parameters[:3] == ["self", "x", "position_ids"]


def layer_types(stock: nn.Module) -> tuple[str, ...]:
    """Layer types that have a frequency vector of their own; empty where all share one."""
    prefixes = (
        name.removesuffix(_SUFFIX)
        for name, _ in stock.named_buffers(recurse=False)
        if name.endswith(_SUFFIX)
    )
    return tuple(prefix.removesuffix("_") for prefix in prefixes if prefix)


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
    types = layer_types(stock)
    own = config.per_layer not in (None, "none")
    if not types:
        if config.layer_types:
            raise ConfigError(
                f"{type(model).__name__} has no layer types, got {', '.join(config.layer_types)}"
            )
        spec = _rope_spec(model, stock, host, parameters, "", config)
        return {ALL_LAYERS: replace(spec, layers=_layers(model, host) if own else 1)}
    if own:
        raise UnsupportedModelError(
            f"{type(model).__name__} has a rotary for each layer type; per_layer needs one rotary"
            " for all layers"
        )
    # Sliding-window layers never see a distance above their window.
    wanted = config.layer_types or tuple(n for n in types if "sliding" not in n)
    if not wanted:
        raise UnsupportedModelError(
            f"{type(model).__name__} has a rotary in its sliding-window layers only"
            f" ({', '.join(types)}); give layer_types to extend those"
        )
    for name in wanted:
        if name not in types:
            raise ConfigError(f"unknown layer type {name!r} (valid: {', '.join(types)})")
    return {
        name: _rope_spec(model, stock, host, parameters.get(name) or {}, f"{name}_", config)
        for name in wanted
    }


def _layers(model: nn.Module, host: Any) -> int:
    layers = getattr(host, "num_hidden_layers", None)
    if not layers:
        raise UnsupportedModelError(
            f"the config of {type(model).__name__} does not say how many layers it has, which"
            " per_layer needs"
        )
    return int(layers)


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
    length = config.native_length or _window(host, parameters)
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


def _window(host: Any, parameters: dict[str, Any]) -> int | None:
    """Tokens that the model reads as it is, in the window that its own rope type gives it."""
    window: int | None = getattr(host, "max_position_embeddings", None)
    original = parameters.get("original_max_position_embeddings")
    if original:
        # Configs differ in whether max_position_embeddings is the window before or after.
        window = max(window or 0, int(original * (parameters.get("factor") or 1)))
    return window


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
    """The frequency buffer of a layer type, or of `ALL_LAYERS`, in the host's rotary module."""
    return "inv_freq" if key == ALL_LAYERS else f"{key}_inv_freq"
