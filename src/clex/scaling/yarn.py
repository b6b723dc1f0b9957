"""YaRN: fast dimensions stay, slow ones are interpolated, a ramp joins them."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import ClexConfig
from ..errors import ConfigError
from ..rope import RopeSpec
from .base import Scaling, register_scaling


@dataclass(frozen=True)
class YarnOptions:
    """Turns inside the native window above which a dimension stays, and below which it is divided.

    `truncate` rounds the ends of the ramp outwards to whole dimensions, as the authors' code and
    transformers do by default.
    """

    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def __post_init__(self) -> None:
        if not self.beta_fast > self.beta_slow > 0:
            raise ConfigError(
                f"yarn needs beta_fast > beta_slow > 0, got {self.beta_fast} and {self.beta_slow}"
            )


@register_scaling("yarn")
class Yarn(Scaling):
    """YaRN: fast dimensions stay, slow ones are divided by t, a ramp joins them.

    f_i ((1 - w_i) + w_i / t) with w from 0 (fast) to 1 (slow).
    """

    source = "Peng et al. 2023, arXiv 2309.00071; transformers 'yarn'"
    Options = YarnOptions
    default_temperature = "yarn"
    ramp: Tensor

    def __init__(self, spec: RopeSpec, config: ClexConfig) -> None:
        super().__init__(spec, config)
        self.register_buffer("ramp", self._ramp(spec), persistent=False)

    def _ramp(self, spec: RopeSpec) -> Tensor:
        """w_i, float32, shape (F,). Linear in the index, that is in the log of the turns."""
        options, turns = self.options, spec.turns().double()
        index = torch.arange(len(turns), dtype=torch.float64)
        log_theta = math.log(spec.rope_theta)
        geometric = torch.exp(-index / len(turns) * log_theta)
        if not torch.allclose(geometric, spec.inv_freq.double(), rtol=1e-5, atol=0):
            # The index of a given number of turns has no meaning on a curve that is already bent.
            fast, slow = math.log(options.beta_fast), math.log(options.beta_slow)
            log_turns = turns.clamp(min=1e-30).log()
            return ((fast - log_turns) / (fast - slow)).clamp(0, 1).float()

        def index_of(turns: float) -> float:
            return len(index) * math.log(spec.native_length / (2 * math.pi * turns)) / log_theta

        low, high = index_of(options.beta_fast), index_of(options.beta_slow)
        if options.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, spec.rotary_dim - 1)
        if low == high:
            high += 0.001
        return ((index - low) / (high - low)).clamp(0, 1).float()

    def ratio(self, t: Tensor) -> Tensor:
        return (1 - self.ramp) + self.ramp / t[:, None]

    def rate(self, t: Tensor) -> Tensor:
        return self.ramp / (self.ramp + (1 - self.ramp) * t[:, None])
