"""Adjusted base frequency: the model's base replaced by a larger one."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import ClexConfig
from ..errors import ConfigError
from ..rope import RopeSpec
from .base import Scaling, register_scaling


@dataclass(frozen=True)
class AbfOptions:
    """`rope_theta`, the new base; Code Llama took 1e6, Llama 2 Long 5e5."""

    rope_theta: float = 1e6

    def __post_init__(self) -> None:
        if not (self.rope_theta > 1 and math.isfinite(self.rope_theta)):
            raise ConfigError(f"abf rope_theta must be above 1, not {self.rope_theta}")


@register_scaling("abf")
class Abf(Scaling):
    """Adjusted base frequency: a larger rope_theta at every length, as in CodeLLaMA.

    f_i (b'/b)**(-2i/d) at every t, b being the model's own base and b' the new one.

    A model is trained with the new base at all lengths and is used with it at all lengths, so t
    has no part in it and t = 1 is not the model's own curve: `exact_at_one` is false, and a model
    that is not trained after the change reads its own window less well. Having no rate, it is no
    base curve for learned dynamics.

    2i/d is taken as the slope times the largest such exponent. That is the same number on a
    geometric curve, with dimensions that do not rotate at its end or without; on a bent one the
    fastest dimension stays, as it does on a geometric curve.
    """

    source = "Roziere et al. 2023, arXiv 2308.12950; Xiong et al. 2023, arXiv 2309.16039"
    Options = AbfOptions
    exact_at_one = False
    constant: Tensor

    def __init__(self, spec: RopeSpec, config: ClexConfig) -> None:
        super().__init__(spec, config)
        if not self.options.rope_theta > spec.rope_theta:
            raise ConfigError(
                f"abf rope_theta must be above the model's own {spec.rope_theta:g}, not"
                f" {self.options.rope_theta:g}"
            )
        largest = (int(spec.rotates().sum()) - 1) / spec.inv_freq.numel()
        growth = math.log(self.options.rope_theta / spec.rope_theta)
        constant = torch.exp(-spec.slope().double() * (largest * growth)).float()
        self.register_buffer("constant", constant, persistent=False)

    def ratio(self, t: Tensor) -> Tensor:
        return self.constant.expand(len(t), -1)
