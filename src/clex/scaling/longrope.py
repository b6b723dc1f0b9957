"""LongRoPE: a searched factor for each dimension."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import ClexConfig
from ..errors import ConfigError
from ..rope import RopeSpec
from .base import Scaling, register_scaling


@dataclass(frozen=True)
class LongRopeOptions:
    """`long_factor`: the divisor of each of the F frequencies, found elsewhere.

    One list holds at every t > 1, as published models use it. A mapping from scale to list, such as
    ``{"4": [...], "8": [...]}`` (text keys survive JSON), gives a curve in t.
    """

    long_factor: Sequence[float] | Mapping[Any, Sequence[float]]

    def __post_init__(self) -> None:
        for scale, factors in self.tables().items():
            if not (scale >= 1 and math.isfinite(scale)):
                raise ConfigError(f"longrope scales must be above 1, not {scale}")
            if not all(factor > 0 and math.isfinite(factor) for factor in factors):
                raise ConfigError("longrope factors must be positive numbers")

    def tables(self) -> dict[float, list[float]]:
        """Known scales, rising, and their factors; a list without a scale starts from 1."""
        known: Any = self.long_factor
        if not isinstance(known, Mapping):
            return {1.0: _numbers(known)}
        if not known:
            raise ConfigError("longrope needs factors for at least one scale")
        try:
            tables = {float(scale): _numbers(factors) for scale, factors in known.items()}
        except ValueError:
            raise ConfigError(f"longrope scales must be numbers, got {list(known)}") from None
        if min(tables) <= 1:
            raise ConfigError(f"longrope scales must be above 1, not {min(tables):g}")
        return dict(sorted(tables.items()))


def _numbers(values: Any) -> list[float]:
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise ConfigError(f"longrope factors must be a list of numbers, not {values!r}")
    if any(isinstance(value, bool) or not isinstance(value, int | float) for value in values):
        raise ConfigError("longrope factors must be a list of numbers")
    return [float(value) for value in values]


@register_scaling("longrope")
class LongRope(Scaling):
    """LongRoPE: a factor for every dimension, given or found by search.

    f_i / m_i(t) for given m_i; t = 1 keeps the model's own frequencies (no short factors).

    Between known scales log m_i is linear in log t, starting from m_i = 1 at t = 1. Beyond the last
    one log m_i / log t stays what it is there: a dimension that is interpolated in full goes on so,
    one that is left alone stays alone, whatever the noise between the last two lists is. The
    published method also leaves the first few positions unscaled; this one does not.
    """

    source = "Ding et al. 2024, arXiv 2402.13753; transformers 'longrope'"
    Options = LongRopeOptions
    default_temperature = "log_n"
    start: Tensor
    start_log: Tensor
    slopes: Tensor

    def __init__(self, spec: RopeSpec, config: ClexConfig) -> None:
        super().__init__(spec, config)
        tables = self.options.tables()
        for factors in tables.values():
            if len(factors) != spec.inv_freq.numel():
                raise ConfigError(
                    f"longrope needs {spec.inv_freq.numel()} factors for this model,"
                    f" not {len(factors)}"
                )
        u = torch.tensor(list(tables), dtype=torch.float64).log()
        log_m = torch.tensor(list(tables.values()), dtype=torch.float64).log()
        self.follows_length = isinstance(self.options.long_factor, Mapping)
        if self.follows_length:
            u, log_m = torch.cat([u.new_zeros(1), u]), torch.cat([0 * log_m[:1], log_m])
            slopes = torch.cat([log_m.diff(dim=0) / u.diff()[:, None], log_m[-1:] / u[-1]])
        else:
            slopes = torch.zeros_like(log_m)
        # Segment k of the curve starts at log t = start[k] with log m = start_log[k].
        self.register_buffer("start", u.float(), persistent=False)
        self.register_buffer("start_log", log_m.float(), persistent=False)
        self.register_buffer("slopes", slopes.float(), persistent=False)

    def _segment(self, u: Tensor) -> Tensor:
        return torch.searchsorted(self.start.to(u.dtype), u, right=True).clamp(min=1) - 1

    def ratio(self, t: Tensor) -> Tensor:
        u = t.log()
        k = self._segment(u)
        log_m = self.start_log[k] + self.slopes[k] * (u - self.start[k])[:, None]
        return torch.where(t[:, None] > 1, torch.exp(-log_m), torch.ones_like(log_m))

    def rate(self, t: Tensor) -> Tensor:
        if not self.follows_length:
            # One list is a step at t = 1.
            return super().rate(t)
        return self.slopes[self._segment(t.log())]
