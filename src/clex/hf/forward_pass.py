"""Hooks on the decoder that tell its rotary what only the decoder sees: padding and cache.

And on its attention, where each layer has frequencies of its own and takes its part of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from ..errors import ConfigError, UnsupportedModelError
from .cache_scale import mark_cache, require_scale, scale_of_cache, serving_scale
from .fused import opens_pair
from .rotary import ForwardPass, ScaledRope, of_layer

_HOOKS = "clex_hooks"
# The parameter of attention modules that takes what the decoder's rotary returned.
_PAIR = "position_embeddings"
_HIDDEN = "hidden_states"
# Buffer of an attention module with its number. A tensor, since the compiler would make a graph for
# each value of a plain number.
_LAYER = "clex_layer"


class DecoderHooks:
    """Choose the scale of each forward pass, and keep caches to the scale that they began with.

    While a scale is held it is only checked that the cache is of that scale; no operation runs on
    the device. Otherwise each row takes the scale of its own tokens: padding has no say.

    Args:
        decoder: the module whose `forward` calls the rotary.
        name: the attribute that holds the rotary. It is looked up at each call, since wrappers
            such as PEFT put copies in its place.
    """

    def __init__(self, decoder: nn.Module, name: str) -> None:
        self.name = name
        rope: Any = decoder._modules[name]
        self.parameters = tuple(inspect.signature(decoder.forward).parameters)
        self.handles = [
            decoder.register_forward_pre_hook(self.before, with_kwargs=True),
            decoder.register_forward_hook(self.after, with_kwargs=True, always_call=True),
        ]
        for attention in attention_layers(decoder, name, rope.layers) if rope.layers > 1 else []:
            number = torch.tensor([attention.layer_idx], device=_device(attention))
            attention.register_buffer(_LAYER, number, persistent=False)
            self.handles.append(attention.register_forward_pre_hook(_take_own, with_kwargs=True))

    def before(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Pre-hook: set the scale of the pass, or check the cache against the one that is held."""
        ropes = _ropes(decoder, self.name)
        inputs = {**dict(zip(self.parameters, args, strict=False)), **kwargs} if args else kwargs
        cache = inputs.get("past_key_values")
        if ropes[0].scale is None:
            scale = _scale(ropes[0], inputs, cache)
            for rope in ropes:
                rope.forward_pass = ForwardPass(scale)
            return
        # Compiled decoding gets here after an eager prefill, which has checked the cache.
        held = ropes[0].scale
        if torch.compiler.is_compiling() or cache is None or scale_of_cache(cache) is held:
            return
        require_scale(ropes[0], cache, held)
        mark_cache(cache, held)

    def after(
        self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Hook: mark the cache that the pass made, and forget the pass."""
        ropes = _ropes(decoder, self.name)
        scale = ropes[0].scale
        for rope in ropes:
            if rope.forward_pass is not None:
                scale = rope.forward_pass.scale if scale is None else scale
                rope.forward_pass = None
        if scale is None or torch.compiler.is_compiling():
            return
        cache = _cache_in(output)
        if cache is not None and scale_of_cache(cache) is not scale:
            mark_cache(cache, scale)


def attention_layers(decoder: nn.Module, name: str, layers: int) -> list[Any]:
    """The attention modules of a decoder whose layers can have frequencies of their own.

    Args:
        decoder: the module that holds a rotary under `name`.
        name: the attribute.
        layers: that the rotary has frequencies for.

    Raises:
        UnsupportedModelError: they do not say which layer they are, or are not given position
            embeddings as such.
    """
    rotary: Any = decoder._modules[name]
    inside = set(rotary.modules())
    found = [m for m in decoder.modules() if m not in inside and opens_pair(type(m))]
    numbers = [getattr(module, "layer_idx", None) for module in found]
    wanted = {_PAIR, _HIDDEN}
    named = all(wanted <= {*inspect.signature(module.forward).parameters} for module in found)
    if not found or not named or not all(n is not None and 0 <= n < layers for n in numbers):
        raise UnsupportedModelError(
            f"{type(decoder).__name__} does not give its layers position embeddings that each could"
            " replace; per_layer cannot be used with it"
        )
    return found


def _take_own(
    attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Pre-hook of an attention module: of the embeddings for all layers, those of its own."""
    if _PAIR not in kwargs:
        names = list(inspect.signature(attention.forward).parameters)
        args, kwargs = (), {**dict(zip(names, args, strict=False)), **kwargs}
    x = args[0] if args else kwargs[_HIDDEN]
    return args, {**kwargs, _PAIR: of_layer(getattr(attention, _LAYER), x, kwargs[_PAIR])}


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def add_hooks(decoder: nn.Module, name: str) -> None:
    """Watch the decoder that holds its rotary under `name`."""
    decoder.__dict__[_HOOKS] = DecoderHooks(decoder, name)


def remove_hooks(decoder: nn.Module) -> None:
    """Undo `add_hooks`; does nothing to any other module."""
    hooks = decoder.__dict__.pop(_HOOKS, None)
    for handle in [] if hooks is None else hooks.handles:
        handle.remove()
    for module in [] if hooks is None else decoder.modules():
        module._buffers.pop(_LAYER, None)


def _ropes(decoder: nn.Module, name: str) -> list[ScaledRope]:
    child = decoder._modules[name]
    if isinstance(child, ScaledRope):
        return [child]
    assert child is not None
    return [module for module in child.modules() if isinstance(module, ScaledRope)]


def _scale(rope: ScaledRope, inputs: Mapping[str, Any], cache: Any) -> Tensor | None:
    """Scale (B,) or (1,) of a pass for which none is held; `None`: the positions decide."""
    lengths = row_lengths(inputs.get("attention_mask"), inputs.get("position_ids"))
    tokens = inputs.get("input_ids")
    tokens = inputs.get("inputs_embeds") if tokens is None else tokens
    new = 0 if tokens is None else tokens.shape[1]
    if not isinstance(cache, Cache):
        _warn_beyond(rope, inputs, new)
        return None if lengths is None else rope.scale_for(lengths)
    if torch.compiler.is_compiling():
        raise ConfigError(
            "a compiled model with a cache cannot choose a scale for each token; hold one: with"
            " clex.at_scale(model, t)"
        )
    if lengths is None:
        new += int(cache.get_seq_length())
        lengths = torch.tensor([new])
    _warn_beyond(rope, inputs, new)
    return serving_scale(rope, cache, rope.scale_for(lengths))


def _warn_beyond(rope: ScaledRope, inputs: Mapping[str, Any], tokens: int) -> None:
    """Warn by the shapes, padding included: the real lengths may be on a device."""
    mask = inputs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        tokens = max(tokens, mask.shape[1])
    if not torch.compiler.is_compiling():
        rope.warn_beyond(tokens)


def row_lengths(attention_mask: Any, position_ids: Any) -> Tensor | None:
    """Tokens (B,) of each row up to the last real one; padding on either side does not count.

    Args:
        attention_mask: (B, all tokens seen), 0 for padding; anything but a 2-D tensor is ignored.
        position_ids: (B or 1, tokens of this call), where the user gave them; jumps in them count.

    Returns:
        `None` where neither says it.
    """
    padded = isinstance(attention_mask, Tensor) and attention_mask.dim() == 2
    if isinstance(position_ids, Tensor):
        if position_ids.dim() != 2:
            return None
        if padded and attention_mask.shape[1] >= position_ids.shape[1]:
            real = attention_mask[:, -position_ids.shape[1] :] != 0
            position_ids = torch.where(real, position_ids, 0)
        return position_ids.amax(dim=-1) + 1
    return (attention_mask != 0).sum(dim=-1) if padded else None


def _cache_in(output: Any) -> Cache | None:
    if isinstance(output, tuple):
        return next((part for part in output if isinstance(part, Cache)), None)
    cache = getattr(output, "past_key_values", None)
    return cache if isinstance(cache, Cache) else None
