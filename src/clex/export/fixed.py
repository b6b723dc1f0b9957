"""An extended model at one scale: all that an engine without our code needs to know."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, UnsupportedModelError
from ..hf.extend import require_extension, scale_for
from ..hf.rotary import ALL_LAYERS
from ..serving.length_classes import LengthClasses, length_at
from .factors import plain_inv_freq, rope_factors


@dataclass(frozen=True, kw_only=True)
class FixedScale:
    """Frequencies and temperature at one scale.

    Attributes:
        method: scaling method that they come from.
        t: the scale.
        length: longest text in tokens, L.
        native_length: window of the plain model in tokens.
        rope_theta: base of the model's config.
        rotary_dim: rotated entries of a head.
        head_dim: all entries of a head; more than `rotary_dim` in partial rotary.
        factors: see `rope_factors`, float64, shape (rotary_dim / 2,).
        native_factors: the same at t = 1, which are not all 1 where the model ships scaled.
        temperature: s, the factor on the logits: (a(t) times the model's own factor)**2.
        native_temperature: the same at t = 1.
    """

    method: str
    t: float
    length: int
    native_length: int
    rope_theta: float
    rotary_dim: int
    head_dim: int
    factors: Tensor
    native_factors: Tensor
    temperature: float
    native_temperature: float

    @property
    def partial(self) -> bool:
        """Whether only a part of each head rotates."""
        return self.rotary_dim < self.head_dim


def fixed_scale(
    model: nn.Module, *, scale: float | None = None, length: int | None = None
) -> FixedScale:
    """Hold an extended model at one scale.

    Args:
        model: an extended model, or its skeleton.
        scale: t itself; the longest text is then t times the native window.
        length: longest text in tokens; t is then what the model would take for it.

    Raises:
        ConfigError: not exactly one of the two is given, or it is out of the extension's range.
        UnsupportedModelError: no single vector says what the model does.
    """
    scaling = _only_scaling(model)
    native, most = scaling.spec.native_length, scaling.config.max_scale
    if (scale is None) == (length is None):
        raise ConfigError("give the scale or the length of the export, and not both")
    if length is None:
        assert scale is not None
        t, length = float(scale), length_at(native, float(scale))
    else:
        t = scale_for(model, length)
    if not (1 < t <= most and native < length <= native * most):
        raise ConfigError(
            f"scale {t:g} (length {length:,}) cannot be exported (valid: above 1, up to {most:g};"
            f" {native + 1:,} to {math.floor(native * most):,} tokens); at 1 the model is the"
            " plain one"
        )
    theta, rotary_dim = scaling.spec.rope_theta, scaling.spec.rotary_dim
    _require_own_theta(model, scaling.spec.inv_freq, theta)

    def at(t: float) -> tuple[Tensor, float]:
        wanted, factor = _frequencies_at(scaling, t)
        factors = rope_factors(wanted=wanted, rope_theta=theta, rotary_dim=rotary_dim)
        return factors, factor**2

    factors, temperature = at(t)
    native_factors, native_temperature = at(1.0)
    return FixedScale(
        method=scaling.name,
        t=t,
        length=length,
        native_length=native,
        rope_theta=theta,
        rotary_dim=rotary_dim,
        head_dim=_head_dim(model),
        factors=factors,
        native_factors=native_factors,
        temperature=temperature,
        native_temperature=native_temperature,
    )


def length_classes(model: nn.Module, scales: Sequence[float]) -> LengthClasses:
    """Hold an extended model at several scales, for a server that gives each request its own.

    Args:
        model: an extended model, or its skeleton.
        scales: t of each class, rising; 1 is the plain model.

    Raises:
        ConfigError: they do not rise, or are out of the extension's range.
        UnsupportedModelError: no single vector says what the model does at one scale.
    """
    scaling = _only_scaling(model)
    most = scaling.config.max_scale
    rising = all(a < b for a, b in pairwise(scales))
    if len(scales) < 2 or not rising or not (scales[0] >= 1 and scales[-1] <= most):
        raise ConfigError(
            f"scales {', '.join(f'{t:g}' for t in scales)} cannot be exported (valid: two or more,"
            f" rising, from 1 to {most:g})"
        )
    found = [_frequencies_at(scaling, float(t)) for t in scales]
    return LengthClasses(
        native_length=scaling.spec.native_length,
        scales=tuple(float(t) for t in scales),
        inv_freq=tuple(tuple(inv_freq.tolist()) for inv_freq, _ in found),
        attention_factors=tuple(factor for _, factor in found),
    )


def _only_scaling(model: nn.Module) -> Any:
    """The scaling of a model that has one rotary for all layers."""
    rope = require_extension(model)
    if list(rope.scalings) != [ALL_LAYERS]:
        raise UnsupportedModelError(
            f"{type(model).__name__} has a rotary for each layer type"
            f" ({', '.join(rope.scalings)}), and engines take one set of factors"
        )
    scaling: Any = rope.scalings[ALL_LAYERS]
    if scaling.spec.layers > 1:
        raise UnsupportedModelError(
            f"each of the {scaling.spec.layers} layers has numbers of its own, and engines take one"
            " set of factors; fit the dynamics with --per-layer none to export them"
        )
    if not scaling.rotates:
        raise UnsupportedModelError(
            f"method {scaling.name!r} does not rotate; engines have no frequency factor for that"
        )
    return scaling


def _frequencies_at(scaling: Any, t: float) -> tuple[Tensor, float]:
    """inv_freq (rotary_dim / 2,) and the factor on cos and sin, the model's own one included."""
    training = scaling.training
    scaling.eval()
    with torch.no_grad():
        held = torch.tensor([t], device=scaling.inv_freq_native.device)
        inv_freq = scaling.inv_freq(held)[0].cpu()
        factor = float(scaling.attention_factor(held)[0]) * scaling.spec.attention_scaling
    scaling.train(training)
    return inv_freq, factor


def _head_dim(model: nn.Module) -> int:
    config: Any = model.config
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def _require_own_theta(model: nn.Module, inv_freq: Tensor, rope_theta: float) -> None:
    """An engine makes the plain curve from the config's theta: it must be the model's own."""
    config: Any = model.config
    kind = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    plain = plain_inv_freq(rope_theta, 2 * len(inv_freq))
    if kind == "default" and not torch.allclose(inv_freq.double(), plain, rtol=1e-6, atol=0):
        raise UnsupportedModelError(
            f"the frequencies of {type(model).__name__} are not those of its rope_theta"
            f" {rope_theta:g}; an engine would start from another curve"
        )
