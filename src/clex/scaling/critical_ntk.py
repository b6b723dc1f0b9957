"""NTK-aware scaling that divides what turns once or less in the native window by t."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import ClexConfig
from ..errors import ConfigError
from ..rope import RopeSpec
from .base import Scaling, register_scaling

# A window in which even the fastest dimension hardly turns leaves nothing to keep.
_LEAST_SLOPE = 1e-3


@dataclass(frozen=True)
class CriticalNtkOptions:
    """`turns`: dimensions with so many turns or fewer in the native window are divided by t.

    `exponent` p, where given, takes its place: dimensions from slope 1/p on are divided by t.
    """

    turns: float = 1.0
    exponent: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("turns", self.turns), ("exponent", self.exponent)):
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"critical_ntk {name} must be above 0, not {value}")
        if self.exponent is not None and self.turns != 1:
            raise ConfigError(
                f"critical_ntk takes turns ({self.turns}) or an exponent ({self.exponent}),"
                " not both"
            )


@register_scaling("critical_ntk")
class CriticalNtk(Scaling):
    """f_i * t**(-min(p slope_i, 1)): NTK-aware up to the critical dimension, PI from there on.

    The critical dimension turns once in the native window. A slower one met only part of its
    angles there, and divided by t it meets no other at any length; p = 1 / slope of the critical
    dimension. `dynamic_ntk`, whose alpha = 2 t - 1 is a line where t**p is needed, falls behind it
    from t = 8 on.
    """

    source = "critical dimension: arXiv 2310.05209; the curve is ours"
    Options = CriticalNtkOptions
    default_temperature = "log_n"
    base_rate: Tensor

    def __init__(self, spec: RopeSpec, config: ClexConfig) -> None:
        super().__init__(spec, config)
        exponent = self.options.exponent or 1 / critical_slope(spec, self.options.turns)
        rate = (exponent * spec.slope().double()).clamp(max=1).float()
        self.register_buffer("base_rate", rate, persistent=False)

    def ratio(self, t: Tensor) -> Tensor:
        return torch.exp(-self.base_rate * t.log()[:, None])

    def rate(self, t: Tensor) -> Tensor:
        return self.base_rate * torch.ones_like(t)[:, None]


def critical_slope(spec: RopeSpec, turns: float) -> float:
    """Slope of the critical dimension (arXiv 2310.05209), between dimensions where it falls there.

    Args:
        spec: of the model.
        turns: full turns that it makes in the native window.

    Returns:
        Its share of the log range of `spec.inv_freq`, as `RopeSpec.slope`: above 0, at most 1. 1
        where no dimension turns so little; then the slowest is divided by t, as in NTK with
        alpha = t.
    """
    z = spec.log_inv_freq()[spec.rotates()].double()
    wanted = math.log(2 * math.pi * turns / spec.native_length)
    span = (z.max() - z.min()).clamp(min=torch.finfo(torch.float64).tiny)
    return min(1.0, max(_LEAST_SLOPE, ((z.max() - wanted) / span).item()))
