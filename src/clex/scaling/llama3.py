"""The three bands of Llama 3: keep, blend, divide."""

import math
from dataclasses import dataclass

from torch import Tensor

from ..config import ClexConfig
from ..errors import ConfigError
from ..rope import RopeSpec
from .base import Scaling, register_scaling


@dataclass(frozen=True)
class Llama3Options:
    """Turns inside the native window below which a dimension is divided, above which it stays."""

    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def __post_init__(self) -> None:
        if not math.inf > self.high_freq_factor > self.low_freq_factor > 0:
            raise ConfigError(
                "llama3 needs high_freq_factor > low_freq_factor > 0, got"
                f" {self.high_freq_factor} and {self.low_freq_factor}"
            )


@register_scaling("llama3")
class Llama3(Scaling):
    """Llama 3.1: three bands, the fast stay, the slow are divided by t.

    f_i (g_i + (1 - g_i) / t), g from 1 (fast) to 0 (slow), linear in the turns of a dimension.

    The published models fix the factor at 8; here it is t, so every length has its own.
    """

    source = "Llama 3.1 (Meta 2024); transformers 'llama3'"
    Options = Llama3Options
    keep: Tensor

    def __init__(self, spec: RopeSpec, config: ClexConfig) -> None:
        super().__init__(spec, config)
        low, high = self.options.low_freq_factor, self.options.high_freq_factor
        keep = ((spec.turns().double() - low) / (high - low)).clamp(0, 1).float()
        self.register_buffer("keep", keep, persistent=False)

    def ratio(self, t: Tensor) -> Tensor:
        return self.keep + (1 - self.keep) / t[:, None]

    def rate(self, t: Tensor) -> Tensor:
        divided = 1 - self.keep
        return divided / (divided + self.keep * t[:, None])
