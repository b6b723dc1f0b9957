"""An extended model at one scale: all that an engine without our code needs to know."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, UnsupportedModelError
from ..hf.extend import require_extension, scale_for
from ..hf.rotary import ALL_LAYERS
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
    rope = require_extension(model)
    if list(rope.scalings) != [ALL_LAYERS]:
        raise UnsupportedModelError(
            f"{type(model).__name__} has a rotary for each layer type"
            f" ({', '.join(rope.scalings)}), and engines take one set of factors"
        )
    scaling: Any = rope.scalings[ALL_LAYERS]
    if not scaling.rotates:
        raise UnsupportedModelError(
            f"method {scaling.name!r} does not rotate; engines have no frequency factor for that"
        )
    native, most = scaling.spec.native_length, scaling.config.max_scale
    if (scale is None) == (length is None):
        raise ConfigError("give the scale or the length of the export, and not both")
    if length is None:
        assert scale is not None
        t, length = float(scale), math.floor(native * float(scale) + 1e-6)
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
        with torch.no_grad():
            held = torch.tensor([t], device=scaling.inv_freq_native.device)
            wanted = scaling.inv_freq(held)[0].cpu()
            factor = float(scaling.attention_factor(held)[0]) * scaling.spec.attention_scaling
        factors = rope_factors(wanted=wanted, rope_theta=theta, rotary_dim=rotary_dim)
        return factors, factor**2

    training = scaling.training
    scaling.eval()
    factors, temperature = at(t)
    native_factors, native_temperature = at(1.0)
    scaling.train(training)
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
