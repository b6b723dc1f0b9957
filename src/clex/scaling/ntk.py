"""NTK-aware scaling by one fixed factor."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import ClexConfig
from ..errors import ConfigError
from ..rope import RopeSpec
from .base import Scaling, register_scaling


@dataclass(frozen=True)
class NtkOptions:
    """`factor` alpha, by which the slowest frequency is divided; `max_scale` if not given."""

    factor: float | None = None

    def __post_init__(self) -> None:
        if self.factor is not None and not (self.factor >= 1 and math.isfinite(self.factor)):
            raise ConfigError(f"ntk factor must be at least 1, not {self.factor}")


@register_scaling("ntk")
class Ntk(Scaling):
    """NTK-aware with a fixed factor: the same larger base at every length beyond the window.

    f_i * alpha**(-slope_i) with the same alpha at every t > 1, the model's own f_i at t = 1.

    The same as a larger base, b * alpha**(d/(d-2)). The step at t = 1 has no rate, so this is no
    base curve for learned dynamics; `dynamic_ntk` is the form that follows the length.
    """

    source = "bloc97 2023, NTK-aware scaled RoPE"
    Options = NtkOptions
    slope: Tensor

    def __init__(self, spec: RopeSpec, config: ClexConfig) -> None:
        super().__init__(spec, config)
        self.alpha = float(self.options.factor or config.max_scale)
        self.register_buffer("slope", spec.slope().float(), persistent=False)

    def ratio(self, t: Tensor) -> Tensor:
        scaled = torch.exp(-self.slope * math.log(self.alpha))
        return torch.where(t[:, None] > 1, scaled, torch.ones_like(scaled))
