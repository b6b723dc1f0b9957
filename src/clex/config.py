"""What an extension is: one frozen dataclass, its presets, and its round trip through a dict."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import ConfigError, unknown

GRIDS = ("none", "integer", "quarter_octave")
ACTIVATIONS = ("tanh", "silu")
SOLVERS = ("rk4", "dopri5")
PER_LAYER = ("none", "temperature", "curve")

# How much faster than the field's network the numbers of single dimensions and layers move: each
# has a gradient of its own, while all of the network moves every rate (docs/log.md).
OWN_GAIN = 3.0

# Limits that keep a config file from asking for unbounded memory or time.
_LIMITS = {
    "max_scale": (1.0, 4096.0),
    "fixed_scale": (1.0, 4096.0),
    "fitted_scale": (1.0, 4096.0),
    "native_length": (2, 2**27),
    "width": (0.01, 16.0),
    "bound": (0.0, 8.0),
    "steps": (1, 4096),
}

# A list of names in a config file is no longer than this.
_MOST_NAMES = 64
_TEXTS = (
    *("preset", "method", "grid", "temperature", "positions"),
    *("field", "base", "activation", "solver", "per_layer"),
)

# How the whole of training and inference looks; every method uses these.
_REGIME: dict[str, dict[str, Any]] = {
    "default": {
        "grid": "quarter_octave",
        "positions": "chunks",
        "integer_scales": False,
        "temperature_in_training": True,
    },
    "paper": {
        "grid": "integer",
        "positions": "random",
        "integer_scales": True,
        "temperature_in_training": False,
    },
}

# How the learned dynamics look; only the method "clex" uses these.
_DYNAMICS: dict[str, dict[str, Any]] = {
    # Our formulation: the field modulates the compression rate of a base curve, in log t.
    "default": {
        "field": "modulated",
        "base": "critical_ntk",
        "width": 0.5,
        "activation": "tanh",
        "per_layer": "none",
        "bound": 1.0,
        "solver": "rk4",
        "steps": 16,
        "temperature": "learned",
    },
    # Exactly what the authors of arXiv 2310.16450 released (their repository, March 2024),
    # solved in 64 steps where they take 100 for each unit of t: the same to float32 rounding.
    "paper": {
        "field": "released",
        "base": "dynamic_ntk",
        "width": 1.0,
        "activation": "tanh",
        "per_layer": "none",
        "bound": 0.0,
        "solver": "rk4",
        "steps": 64,
        "temperature": "log_n",
    },
}
PRESETS = tuple(_REGIME)

_FROM_PRESET: Any = None


@dataclass(frozen=True, kw_only=True)
class ClexConfig:
    """How a model is extended. Immutable; every value is checked on construction.

    A value that is not given is taken from the preset. Those of the learned dynamics (`field` to
    `steps`) exist for the method ``"clex"`` only; giving one with another method is an error.

    Args:
        preset: ``"default"`` (our formulation) or ``"paper"`` (CLEX as its authors released it).
        method: name of a registered scaling method; ``"clex"`` is the learned one.
        max_scale: largest length scale t. The longest text is ``max_scale * native_length`` tokens.
        fixed_scale: one t for every text, whatever its length; for a model that is to be static.
        fitted_scale: largest t that the learned part is fitted for; above it the learned part stays
            as it is there and the closed form goes on alone. Training below `max_scale` sets it.
        native_length: tokens that the model was trained to read, the unit of t; read from the
            model where it is not given.
        layer_types: layer types to extend in models with one rotary per type; all types with
            full attention where it is not given.
        options: settings of the closed-form method (for ``"clex"``: of its base curve).
        post: operations on the frequencies of any method, for t > 1, in this order: ``"clip"``,
            ``"resonance"``, ``"p_rope"`` (`clex.scaling.post`).
        grid: how t is rounded up outside training: ``"none"``, ``"integer"``, or
            ``"quarter_octave"`` (powers of 2**(1/4)), so that near lengths share one table.
        temperature: ``"none"``, ``"log_n"``, ``"yarn"`` or ``"learned"`` (`clex.temperature`); a
            closed-form method brings its own where it is not given.
        temperature_in_training: whether the temperature acts in training as well.
        positions: how training positions are drawn (`clex.positions`): a sampler, or a mixture of
            some with weights, such as ``"chunks:0.7,contiguous:0.3"``.
        integer_scales: whether training draws whole numbers for t.
        field: ``"modulated"`` or ``"released"`` (`clex.fields`).
        base: closed-form method around which the field acts.
        width: hidden width of the field over the rotary dimension, the paper's lambda.
        activation: ``"tanh"`` or ``"silu"``.
        per_layer: what each layer has of its own, around one field for all: ``"none"``,
            ``"temperature"``, or ``"curve"`` (frequencies and temperature), which is nearest to
            what models need but cannot be exported to engines that take one set of factors.
        bound: the modulated field keeps each rate within a factor exp(+-bound) of the base's.
        solver: ``"rk4"`` (fixed steps, all scales at once) or ``"dopri5"`` (torchdiffeq, adaptive).
        steps: RK4 steps from t = 1 to the wanted t.

    Raises:
        ConfigError: a value is unknown, out of range, or given for a method that has no use for it.
    """

    preset: str = "default"
    method: str = "clex"
    max_scale: float = 16.0
    fixed_scale: float | None = None
    fitted_scale: float | None = None
    native_length: int | None = None
    layer_types: tuple[str, ...] | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    post: tuple[str, ...] = ()
    grid: str = _FROM_PRESET
    temperature: str | None = None
    temperature_in_training: bool = _FROM_PRESET
    positions: str = _FROM_PRESET
    integer_scales: bool = _FROM_PRESET
    field: str = _FROM_PRESET
    base: str = _FROM_PRESET
    width: float = _FROM_PRESET
    activation: str = _FROM_PRESET
    per_layer: str = _FROM_PRESET
    bound: float = _FROM_PRESET
    solver: str = _FROM_PRESET
    steps: int = _FROM_PRESET

    def __post_init__(self) -> None:
        for name in _TEXTS:
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise ConfigError(f"{name} must be a name, not {value!r}")
        if self.preset not in PRESETS:
            raise ConfigError(unknown("preset", self.preset, PRESETS))
        self._fill(_REGIME[self.preset])
        dynamics = _DYNAMICS[self.preset]
        if self.method == "clex":
            self._fill(dynamics)
        else:
            stray = [n for n in dynamics if n != "temperature" and getattr(self, n) is not None]
            if self.temperature != "learned" and self.fitted_scale is not None:
                stray.append("fitted_scale")
            if stray:
                raise ConfigError(f"{stray[0]} belongs to method 'clex', not to {self.method!r}")
        for name, valid in (
            ("grid", GRIDS),
            ("activation", ACTIVATIONS),
            ("solver", SOLVERS),
            ("per_layer", PER_LAYER),
        ):
            value = getattr(self, name)
            if value is not None and value not in valid:
                raise ConfigError(unknown(name, value, valid))
        for name, (low, high) in _LIMITS.items():
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ConfigError(f"{name} must be a number, not {value!r}")
            if not (math.isfinite(value) and low <= value <= high):
                raise ConfigError(f"{name} = {value} is out of range (valid: {low:g} to {high:g})")
        if self.per_layer == "curve" and self.field == "released":
            raise ConfigError("per_layer 'curve' needs the field 'modulated', not 'released'")
        if self.per_layer == "temperature" and self.temperature != "learned":
            raise ConfigError(
                f"per_layer 'temperature' needs a learned temperature, not {self.temperature!r}"
            )
        if self.fixed_scale is not None and self.fixed_scale > self.max_scale:
            raise ConfigError(
                f"fixed_scale {self.fixed_scale:g} is above max_scale {self.max_scale:g}"
            )
        for name in ("native_length", "steps"):
            value = getattr(self, name)
            if value is not None and int(value) != value:
                raise ConfigError(f"{name} must be a whole number, not {value}")
        for name in ("temperature_in_training", "integer_scales"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be true or false, not {getattr(self, name)!r}")
        if not isinstance(self.options, Mapping) or not all(
            isinstance(key, str) for key in self.options
        ):
            raise ConfigError(f"options must be a mapping from names, not {self.options!r}")
        for name in ("post", "layer_types"):
            value = getattr(self, name)
            if value is None and name == "layer_types":
                continue
            if not isinstance(value, list | tuple) or not all(isinstance(v, str) for v in value):
                raise ConfigError(f"{name} must be a list of names, not {value!r}")
            if len(value) > _MOST_NAMES:
                raise ConfigError(f"{name} has {len(value)} names (valid: up to {_MOST_NAMES})")
            object.__setattr__(self, name, tuple(value))
        object.__setattr__(self, "options", dict(self.options))

    def _fill(self, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

    def replace(self, **changes: Any) -> ClexConfig:
        """A copy with some values changed, checked like a new one.

        A new preset or method brings its own values, but for those that were given on purpose.
        """
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        if {"preset", "method"} & changes.keys():
            plain = ClexConfig(preset=self.preset, method=self.method)
            for name in (*_REGIME[self.preset], *_DYNAMICS[self.preset]):
                if values[name] == getattr(plain, name):
                    values[name] = None
        return ClexConfig(**{**values, **changes})

    def to_dict(self) -> dict[str, Any]:
        """Every value that is set, as plain JSON types."""
        values = dataclasses.asdict(self)
        return {name: value for name, value in values.items() if value is not None}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ClexConfig:
        """The inverse of `to_dict`.

        Raises:
            ConfigError: a key is unknown (named with its nearest valid names), or a value is bad.
        """
        names = [f.name for f in dataclasses.fields(cls)]
        for key in values:
            if key not in names:
                raise ConfigError(unknown("setting", key, names))
        return cls(**values)
