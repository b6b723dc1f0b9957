"""CLEX: frequencies that follow a neural ODE over the length scale."""

from typing import Any

import torch
from torch import Tensor

from ..config import ClexConfig
from ..errors import ConfigError
from ..fields import ModulatedField, make_field
from ..kernels import active
from ..rope import RopeSpec
from ..solvers import solve
from .base import Scaling, get_scaling, register_scaling
from .dynamic_ntk import DynamicNtk

# Hidden units of a field that the kernel holds in the registers of a warp.
MAX_HIDDEN = 128


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
        self.has_kernel = (
            isinstance(self.field, ModulatedField)
            and isinstance(self.base, DynamicNtk)
            and config.solver == "rk4"
            and self.field.hidden <= MAX_HIDDEN
        )

    def ratio(self, t: Tensor) -> Tensor:
        solved = self._kernel if self.has_kernel and active(t) else self._solve
        return self.base.ratio(t) * solved(t).exp()

    def _kernel(self, t: Tensor) -> Tensor:
        """The residual from one kernel, which has no gradient of t; nothing here learns t."""
        from ..kernels.dynamics import residual

        field: Any = self.field
        base: Any = self.base
        network = (field.inner.weight, field.inner.bias, field.outer.weight, field.outer.bias)
        silu = self.config.activation == "silu"
        curve = (base.slope, field.log_turns, base.options.factor, field.bound)
        solved: Tensor = residual(t.detach(), *network, *curve, silu, self.config.steps)[0]
        return solved

    def _solve(self, t: Tensor) -> Tensor:
        def rate(clock: Tensor, residual: Tensor) -> Tensor:
            s = self.field.scale(clock)
            z = self.base.ratio(s).log() + residual
            return self.field(s, z, self.base.rate(s))

        return solve(
            rate,
            start=self.field.start,
            end=self.field.clock(t),
            size=self.inv_freq_native.numel(),
            method=self.config.solver,
            steps=self.config.steps,
        )
