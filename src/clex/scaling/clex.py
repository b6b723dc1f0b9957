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

# Hidden units of a field that the kernel holds in the registers of a warp.
MAX_HIDDEN = 128


@register_scaling("clex")
class Clex(Scaling):
    """CLEX: a closed form, and a learned ODE over the length for what it leaves open.

    log f(t) = log f(1) + base curve + residual, the residual being the ODE's solution.

    The base curve is exact and only the residual is integrated (r = 0 at t = 1), so an untrained
    field gives the base method bit for bit. Above `fitted_scale` the residual stays. Presets
    ``default`` and ``paper`` differ in the field and its settings only. With `per_layer`
    ``"curve"`` each layer has a residual of its own.
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
            and config.solver == "rk4"
            and self.field.hidden <= MAX_HIDDEN
        )

    def ratio(self, t: Tensor) -> Tensor:
        return self.base.ratio(t) * self._residual(t).mean(1).exp()

    def layer_ratio(self, t: Tensor) -> Tensor:
        return self.base.ratio(t)[:, None] * self._residual(t).exp()

    def _residual(self, t: Tensor) -> Tensor:
        """The solution of the ODE, (B, layers, F)."""
        if self.config.fitted_scale is not None:
            t = t.clamp(max=self.config.fitted_scale)
        solved = self._kernel if self.has_kernel and active(t) else self._solve
        return solved(t).view(len(t), self.field.layers, -1)

    def _kernel(self, t: Tensor) -> Tensor:
        """The residual from one kernel, which has no gradient of t; nothing here learns t."""
        from ..kernels.dynamics import residual

        field: Any = self.field
        steps = self.config.steps
        t = t.detach().contiguous()
        # RK4 looks at the base at both ends and in the middle of each step.
        points = torch.linspace(0, 1, 2 * steps + 1, device=t.device)
        s = (t.log()[:, None] * points).exp().flatten()
        curve, rate = self.base.ratio(s).log(), self.base.rate(s)
        base = (x.view(len(t), 2 * steps + 1, -1).contiguous() for x in (curve, rate))
        network = (field.inner.weight, field.inner.bias, field.outer.weight, field.biases())
        silu = self.config.activation == "silu"
        solved: Tensor = residual(t, *network, *base, field.log_turns, field.bound, silu, steps)[0]
        return solved

    def _solve(self, t: Tensor) -> Tensor:
        def rate(clock: Tensor, residual: Tensor) -> Tensor:
            s = self.field.scale(clock)
            z = self.base.ratio(s).log().repeat(1, self.field.layers) + residual
            return self.field(s, z, self.base.rate(s).repeat(1, self.field.layers))

        return solve(
            rate,
            start=self.field.start,
            end=self.field.clock(t),
            size=self.field.layers * self.inv_freq_native.numel(),
            method=self.config.solver,
            steps=self.config.steps,
        )
