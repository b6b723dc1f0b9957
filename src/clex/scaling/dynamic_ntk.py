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
    """`factor` s in alpha = s t - (s - 1); 2 is the curve that the released CLEX starts from."""

    factor: float = 2.0

    def __post_init__(self) -> None:
        if not 1 <= self.factor < math.inf:
            raise ConfigError(f"dynamic_ntk factor must be at least 1, not {self.factor}")


@register_scaling("dynamic_ntk")
class DynamicNtk(Scaling):
    """NTK-aware: the base grows with the length, the fastest dimension stays.

    f_i * alpha**(-slope_i) with alpha = s t - (s - 1).

    The fastest frequency stays, the slowest is divided by alpha. With s = 2 this is the drift of
    the released CLEX, alpha = 2 t - 1.
    """

    source = "bloc97 and emozilla 2023; transformers 'dynamic'"
    Options = DynamicNtkOptions
    slope: Tensor

    def __init__(self, spec: RopeSpec, config: ClexConfig) -> None:
        super().__init__(spec, config)
        self.register_buffer("slope", spec.slope().float(), persistent=False)

    def ratio(self, t: Tensor) -> Tensor:
        factor = self.options.factor
        return torch.exp(-self.slope * (factor * t - (factor - 1)).log()[:, None])

    def rate(self, t: Tensor) -> Tensor:
        factor = self.options.factor
        return self.slope * (factor * t / (factor * t - (factor - 1)))[:, None]
