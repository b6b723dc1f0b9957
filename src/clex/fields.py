"""The learned vector fields: how fast each log frequency leaves the base curve.

A field is written for z = log f - log f(1) and returns the rate of the residual r = z - z_base in
its own clock: log t for our field, t for the released one. With its output layer at zero, as it is
initialised, the residual stays 0 and the method is its base curve, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from .config import OWN_GAIN, ClexConfig
from .errors import ConfigError, unknown
from .rope import RopeSpec

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "silu": nn.functional.silu,
}


class Field(nn.Module):
    """Rate of the residual. Parameters are float32 always, see `Scaling._apply`.

    Class attributes:
        start: the clock at t = 1, where the residual is 0.

    Attributes:
        layers: curves that the field describes; its states are those of the first layer's
            dimensions, then the second's, and so on.
    """

    start: ClassVar[float]
    layers: int = 1

    def __init__(self, spec: RopeSpec, config: ClexConfig) -> None:
        super().__init__()
        self.hidden = max(1, round(config.width * spec.rotary_dim))
        self.activation = _ACTIVATIONS[config.activation]

    def clock(self, t: Tensor) -> Tensor:
        """The variable that is integrated over, for scales `t`; 0-dim or (B,)."""
        raise NotImplementedError

    def scale(self, clock: Tensor) -> Tensor:
        """The inverse of `clock`."""
        raise NotImplementedError

    def forward(self, t: Tensor, z: Tensor, base_rate: Tensor) -> Tensor:
        """dr/dclock, (B, N), for `t` (B,), `z` = log f(t)/f(1) and the base's rate, both (B, N).

        N is F for one curve, and F times the layers where each has its own.
        """
        raise NotImplementedError


class ModulatedField(Field):
    """Our field: the compression rate of the base curve, made larger or smaller.

        dz_i/du = -kappa_base_i(u) exp(B tanh(g_i)),    u = log t

    g is one small network shared by all dimensions, fed with what makes dimensions alike: turns in
    the native window, turns in the window of t, and u; plus a number of each dimension's own, in
    each layer where layers have curves of their own. So few parameters describe all t, and the
    result is smooth over t. By construction no frequency ever rises with t, what the base leaves
    alone stays alone, and each rate stays within exp(+-B) of the base's.
    """

    start = 0.0
    log_turns: Tensor

    def __init__(self, spec: RopeSpec, config: ClexConfig) -> None:
        super().__init__(spec, config)
        self.bound = config.bound
        self.layers = spec.layers if config.per_layer == "curve" else 1
        log_turns = torch.where(spec.rotates(), spec.turns(), torch.ones(())).log().float()
        self.register_buffer("log_turns", log_turns, persistent=False)
        self.inner = nn.Linear(3, self.hidden)
        self.outer = nn.Linear(self.hidden, 1)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)
        self.own = nn.Parameter(torch.zeros(self.layers, len(log_turns)))

    def clock(self, t: Tensor) -> Tensor:
        return t.log()

    def scale(self, clock: Tensor) -> Tensor:
        return clock.exp()

    def forward(self, t: Tensor, z: Tensor, base_rate: Tensor) -> Tensor:
        u = t.log()[:, None].expand_as(z)
        native = self.log_turns.to(z.dtype).repeat(self.layers).expand_as(z)
        # Dividing by ln 32, where YaRN's ramp starts, brings all three inputs to about one.
        inputs = torch.stack([native, native + u + z, u], dim=-1) / math.log(32)
        g = (self.outer.weight[0] * self.activation(self.inner(inputs))).sum(-1) + self.biases()
        return -base_rate * torch.expm1(self.bound * torch.tanh(g))

    def biases(self) -> Tensor:
        """What is added to the network's last sum in each equation, (layers * F,)."""
        return self.outer.bias + OWN_GAIN * self.own.flatten()


class ReleasedField(Field):
    """The field of the released CLEX: dr/dt = W2^T act(W1^T (z + ell(t))), no biases.

    z is the log of the frequencies themselves here, and ell(t) the log of the NTK-aware curve with
    alpha = 2t - 1, always with base 10,000. Both names of the weights are those of the paper's
    "up" and "down" projections. The network's drift is not in here but in the base curve, exactly.
    """

    start = 1.0
    log_inv_freq: Tensor
    rotates: Tensor
    ntk_log: Tensor
    ntk_slope: Tensor

    def __init__(self, spec: RopeSpec, config: ClexConfig) -> None:
        super().__init__(spec, config)
        d = spec.rotary_dim
        if d < 4:
            raise ConfigError(f"the released field needs a rotary dimension of 4 or more, not {d}")
        self.register_buffer("log_inv_freq", spec.log_inv_freq().float(), persistent=False)
        # The network mixes dimensions, and those that do not rotate must not reach the others.
        self.register_buffer("rotates", spec.rotates().float(), persistent=False)
        i2 = torch.arange(0, d, 2, dtype=torch.float64)
        self.register_buffer("ntk_log", (-i2 / d * math.log(10_000)).float(), persistent=False)
        self.register_buffer("ntk_slope", (i2 / (d - 2)).float(), persistent=False)
        self.up = nn.Linear(d // 2, self.hidden, bias=False)
        self.down = nn.Linear(self.hidden, d // 2, bias=False)
        nn.init.zeros_(self.down.weight)

    def clock(self, t: Tensor) -> Tensor:
        return t

    def scale(self, clock: Tensor) -> Tensor:
        return clock

    def forward(self, t: Tensor, z: Tensor, base_rate: Tensor) -> Tensor:
        ell = self.ntk_log - self.ntk_slope * (2 * t - 1).log()[:, None]
        log_freq = (self.log_inv_freq + z + ell) * self.rotates
        return self.down(self.activation(self.up(log_freq)))


FIELDS: dict[str, type[Field]] = {"modulated": ModulatedField, "released": ReleasedField}


def make_field(spec: RopeSpec, config: ClexConfig) -> Field:
    """The field that `config.field` names.

    Raises:
        ConfigError: there is no such field.
    """
    if config.field not in FIELDS:
        raise ConfigError(unknown("field", config.field, FIELDS))
    return FIELDS[config.field](spec, config)
