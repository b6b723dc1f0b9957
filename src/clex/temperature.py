"""The temperature of attention as a function of the length scale.

A longer text gives each query more keys, and the softmax flattens. All rules here multiply the
logits by a(t)**2, done by multiplying cos and sin of queries and keys by a(t). At t = 1 every rule
is exactly 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .config import OWN_GAIN
from .errors import ConfigError, unknown


class Temperature(nn.Module):
    """a(t), the factor on cos and sin. The base class is the rule ``"none"``: always 1."""

    def __init__(self, native_length: int) -> None:
        super().__init__()
        self.native_length = native_length

    def forward(self, t: Tensor) -> Tensor:
        """a(t), float32, same shape as `t`; `t` is at least 1."""
        return torch.ones_like(t)

    def layer_factors(self, t: Tensor) -> Tensor:
        """a(t) of each layer, (B, layers) for `t` (B, 1); the mean of their logs is log a(t)."""
        return self(t)


class LogN(Temperature):
    """a**2 = ln(N) / ln(native_length) with N = t * native_length keys, never below 1.

    The same number as LongRoPE's attention factor. The released CLEX uses the keys that are in the
    cache so far, without the lower limit, which flattens prompts shorter than the window.
    """

    def forward(self, t: Tensor) -> Tensor:
        return (1 + t.log() / math.log(self.native_length)).sqrt()


class YarnTemperature(Temperature):
    """a = 0.1 ln(t) + 1 (YaRN, arXiv 2309.00071, section 3.4)."""

    def forward(self, t: Tensor) -> Tensor:
        return 0.1 * t.log() + 1


class Learned(Temperature):
    """log-n with two learned numbers, its size p and its curvature q.

    ``ln a**2 = e**p * ln(1 + e**q * ln(t) / ln(native_length))``, log-n itself at p = q = 0, where
    it starts. For any p and q it is 0 at t = 1 and never falls with t, so it extrapolates soundly.
    Both are kept within +-2 by a tanh, far outside of what is ever useful. Where layers have curves
    of their own each adds a number times ln t to its ``ln a``, so that a layer may also fall.
    Above `fitted_scale` it grows as log-n does.
    """

    def __init__(self, native_length: int, layers: int = 1, fitted_scale: float = math.inf) -> None:
        super().__init__(native_length)
        self.fitted_scale = fitted_scale
        # Of one entry, since DeepSpeed cannot send a parameter without a dimension.
        self.log_gain = nn.Parameter(torch.zeros(1))
        self.log_rate = nn.Parameter(torch.zeros(1))
        self.own = nn.Parameter(torch.zeros(layers)) if layers > 1 else None

    def forward(self, t: Tensor) -> Tensor:
        return self._factor(t, None if self.own is None else self.own.mean())

    def layer_factors(self, t: Tensor) -> Tensor:
        return self._factor(t, self.own)

    def _factor(self, t: Tensor, own: Tensor | None) -> Tensor:
        p, q = 2 * torch.tanh(self.log_gain[0] / 2), 2 * torch.tanh(self.log_rate[0] / 2)
        fitted = t.clamp(max=self.fitted_scale)
        growth = q.exp() * fitted.log() / math.log(self.native_length)
        log_factor = 0.5 * p.exp() * growth.log1p()
        if own is not None:
            log_factor = log_factor + OWN_GAIN * own * fitted.log()
        # log-n(t) over log-n(fitted): exactly 1 inside the fitted range.
        native = math.log(self.native_length)
        return log_factor.exp() * ((native + t.log()) / (native + fitted.log())).sqrt()


TEMPERATURES: dict[str, type[Temperature]] = {
    "none": Temperature,
    "log_n": LogN,
    "yarn": YarnTemperature,
    "learned": Learned,
}


def make_temperature(
    name: str, native_length: int, layers: int = 1, fitted_scale: float = math.inf
) -> Temperature:
    """The rule called `name` for a model trained on `native_length` tokens.

    Args:
        name: of the rule.
        native_length: the unit of t.
        layers: how many have a temperature of their own, where the rule is a learned one.
        fitted_scale: largest t that a learned rule is fitted for, see `ClexConfig`.

    Raises:
        ConfigError: there is no such rule.
    """
    if name not in TEMPERATURES:
        raise ConfigError(unknown("temperature", name, TEMPERATURES))
    rule = TEMPERATURES[name]
    if rule is Learned:
        return Learned(native_length, layers, fitted_scale)
    return rule(native_length)
