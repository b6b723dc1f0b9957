"""NTK-aware scaling whose strength follows the length."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import ClexConfig
from ..errors import ConfigError
from ..rope import RopeSpec
from .base import Scaling, register_scaling


@dataclass(frozen=True)
class DynamicNtkOptions:
    """`factor` s in alpha = s t - (s - 1); 2 is the curve that CLEX starts from.

    `exponent` p, where given, takes its place: alpha = t**p, but no frequency is divided by more
    than t. A line falls behind at large t.
    """

    factor: float = 2.0
    exponent: float | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.factor < math.inf:
            raise ConfigError(f"dynamic_ntk factor must be at least 1, not {self.factor}")
        if self.exponent is not None and not 0 < self.exponent < math.inf:
            raise ConfigError(f"dynamic_ntk exponent must be above 0, not {self.exponent}")
        if self.exponent is not None and self.factor != 2:
            raise ConfigError(
                f"dynamic_ntk takes a factor ({self.factor}) or an exponent ({self.exponent}),"
                " not both"
            )


@register_scaling("dynamic_ntk")
class DynamicNtk(Scaling):
    """NTK-aware: the base grows with the length, the fastest dimension stays.

    f_i * alpha**(-slope_i) with alpha = s t - (s - 1), or f_i * t**(-min(p slope_i, 1)).

    The fastest frequency stays, the slowest is divided by alpha. With s = 2 this is the drift of
    the released CLEX, alpha = 2 t - 1. With an exponent p dimensions from slope 1/p on are divided
    by t, as in PI. If a dimension there turns once in the native window, no slower one meets an
    angle that it never saw: the critical dimension of Liu et al.
    """

    source = "bloc97 and emozilla 2023; transformers 'dynamic'; exponent: arXiv 2310.05209"
    Options = DynamicNtkOptions
    slope: Tensor

    def __init__(self, spec: RopeSpec, config: ClexConfig) -> None:
        super().__init__(spec, config)
        self.register_buffer("slope", spec.slope().float(), persistent=False)

    def ratio(self, t: Tensor) -> Tensor:
        factor, exponent = self.options.factor, self.options.exponent
        if exponent is not None:
            return torch.exp(-(exponent * self.slope).clamp(max=1) * t.log()[:, None])
        return torch.exp(-self.slope * (factor * t - (factor - 1)).log()[:, None])

    def rate(self, t: Tensor) -> Tensor:
        factor, exponent = self.options.factor, self.options.exponent
        if exponent is not None:
            return (exponent * self.slope).clamp(max=1) * torch.ones_like(t)[:, None]
        return self.slope * (factor * t / (factor * t - (factor - 1)))[:, None]
