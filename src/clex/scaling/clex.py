"""CLEX: frequencies that follow a neural ODE over the length scale."""

import torch
from torch import Tensor

from ..config import ClexConfig
from ..errors import ConfigError
from ..fields import make_field
from ..rope import RopeSpec
from ..solvers import solve
from .base import Scaling, get_scaling, register_scaling


@register_scaling("clex")
class Clex(Scaling):
    """CLEX: a closed form, and a learned ODE over the length for what it leaves open.

    log f(t) = log f(1) + base curve + residual, the residual being the ODE's solution.

    The base curve is exact and only the residual is integrated (r = 0 at t = 1), so an untrained
    field gives the base method bit for bit. Presets ``default`` and ``paper`` differ in the field
    and its settings only.
    """

    source = "Chen et al. 2023, arXiv 2310.16450, equations 7 to 14"

    def __init__(self, spec: RopeSpec, config: ClexConfig) -> None:
        if config.base == self.name:
            raise ConfigError("the base of 'clex' must be a closed form, not 'clex'")
        super().__init__(spec, config.replace(options={}))
        base_config = ClexConfig(
            method=config.base,
            preset=config.preset,
            max_scale=config.max_scale,
            options=config.options,
        )
        self.base = get_scaling(config.base)(spec, base_config)
        self.base.rate(torch.ones(1))  # raises where the method cannot be a base
        self.field = make_field(spec, config)

    def ratio(self, t: Tensor) -> Tensor:
        def rate(clock: Tensor, residual: Tensor) -> Tensor:
            s = self.field.scale(clock)
            z = self.base.ratio(s).log() + residual
            return self.field(s, z, self.base.rate(s))

        residual = solve(
            rate,
            start=float(self.field.clock(torch.ones(()))),
            end=self.field.clock(t),
            size=self.inv_freq_native.numel(),
            method=self.config.solver,
            steps=self.config.steps,
        )
        return self.base.ratio(t) * residual.exp()
