"""The one interface of every method: a frequency vector and a temperature as functions of t."""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..config import ClexConfig
from ..errors import ConfigError, unknown
from ..rope import RopeSpec
from ..temperature import make_temperature
from .post import make_posts


@dataclass(frozen=True)
class NoOptions:
    """Options of a method that has none."""


class Scaling(nn.Module):
    """Frequencies and temperature of one rotary embedding at any scale t.

    A subclass writes `ratio`, and where it can `rate`. It is a module because the learned method
    has parameters; closed forms simply have none. Everything is float32 whatever the model is.

    Class attributes:
        name: set by `register_scaling`.
        source: paper or code that the formula comes from.
        Options: frozen dataclass of the method's own settings.
        default_temperature: rule that belongs to the method (`clex.temperature`).
        exact_at_one: whether t = 1 gives the model's own frequencies, bit for bit.
        rotates: whether positions enter through the rotation; if not, all frequencies are 0.
    """

    name: ClassVar[str]
    source: ClassVar[str] = ""
    Options: ClassVar[type] = NoOptions
    default_temperature: ClassVar[str] = "none"
    exact_at_one: ClassVar[bool] = True
    rotates: ClassVar[bool] = True

    inv_freq_native: Tensor

    def __init__(self, spec: RopeSpec, config: ClexConfig) -> None:
        super().__init__()
        self.spec = spec
        self.config = config
        self.options = parse_options(self.name, self.Options, config.options)
        # Not persistent: it belongs to the model, and the extension must not save it a second time.
        self.register_buffer("inv_freq_native", spec.inv_freq.float(), persistent=False)
        self.temperature = make_temperature(
            config.temperature or self.default_temperature,
            spec.native_length,
            spec.layers,
            config.fitted_scale or math.inf,
        )
        self.posts = nn.ModuleList(make_posts(config.post, spec))

    def ratio(self, t: Tensor) -> Tensor:
        """f(t) / f(1) for scales `t` of shape (B,), all >= 1; float32, shape (B, F)."""
        raise NotImplementedError

    def layer_ratio(self, t: Tensor) -> Tensor:
        """f(t) / f(1) of each layer, (B, layers, F), or (B, 1, F) where they share one curve.

        The geometric mean over layers is `ratio`.
        """
        return self.ratio(t)[:, None]

    def rate(self, t: Tensor) -> Tensor:
        """Compression rate -d ln f / d ln t for `t` of shape (B,); shape (B, F).

        Only methods that can be the base curve of learned dynamics have one.
        """
        raise ConfigError(f"method {self.name!r} has no rate and cannot be the base of 'clex'")

    def inv_freq(self, t: Tensor) -> Tensor:
        """Frequencies at scales `t` of shape (B,); float32, shape (B, F), differentiable.

        The method's curve and, for t > 1, the post-operations on it. Where layers have curves of
        their own it is the mean one, which no layer uses.
        """
        return self._finished(t, self.ratio)

    def layer_inv_freq(self, t: Tensor) -> Tensor:
        """Like `inv_freq` for each layer, (B, layers, F)."""
        return self._finished(t, self.layer_ratio).expand(-1, self.spec.layers, -1)

    def _finished(self, t: Tensor, ratio: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.autocast(t.device.type, enabled=False):
            t = t.float()
            scaled = self.inv_freq_native * ratio(t)
            # exp(log f) is off by up to 4e-7, which is 0.004 rad at position 131,072. `where` keeps
            # the graph, so that gradients at t = 1 are zeros and not missing.
            at_one = self.inv_freq_native if self.exact_at_one else scaled
            for post in self.posts:
                scaled = post(scaled)
            beyond = (t > 1).view(-1, *[1] * (scaled.dim() - 1))
            return torch.where(beyond, scaled, at_one)

    def attention_factor(self, t: Tensor) -> Tensor:
        """Factor on cos and sin at scales `t` (B,), float32, (B,); see `inv_freq`."""
        return self._at_temperature(t, self.temperature)

    def layer_attention_factor(self, t: Tensor) -> Tensor:
        """Like `attention_factor` for each layer, (B, layers)."""
        factors = self._at_temperature(t[:, None], self.temperature.layer_factors)
        return factors.expand(-1, self.spec.layers)

    def _at_temperature(self, t: Tensor, factors: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.autocast(t.device.type, enabled=False):
            t = t.float()
            if self.training and not self.config.temperature_in_training:
                return torch.ones_like(t)
            return torch.where(t > 1, factors(t), torch.ones_like(t))

    def scale_for(self, length: Tensor) -> Tensor:
        """The scale t for texts of `length` tokens: length / native_length, rounded up on the grid.

        Never below 1 nor above `max_scale`; always `fixed_scale` where the config has one.
        `length` may have any shape; float32 result, no host-device synchronisation.
        """
        if self.config.fixed_scale is not None:
            return torch.full_like(length, self.config.fixed_scale, dtype=torch.float32)
        t = (length.float() / self.spec.native_length).clamp(min=1.0)
        if self.config.grid == "integer":
            t = t.ceil()
        elif self.config.grid == "quarter_octave":
            # The tolerance keeps a length that lies on the grid from moving up by rounding.
            t = ((t.log2() * 4 - 1e-4).ceil() / 4).exp2()
        return t.clamp(max=self.config.max_scale)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Scaling:
        """Follow device moves, ignore casts: bfloat16 frequencies are wrong by whole radians."""

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.dtype == tensor.dtype or not tensor.is_floating_point():
                return moved
            return tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)


_REGISTRY: dict[str, type[Scaling]] = {}


def register_scaling(name: str) -> Callable[[type[Scaling]], type[Scaling]]:
    """Class decorator that makes a `Scaling` available as ``method=name`` everywhere.

    Raises:
        ConfigError: the name is taken by another class.
    """

    def register(cls: type[Scaling]) -> type[Scaling]:
        taken = _REGISTRY.get(name)
        if taken is not None and taken.__qualname__ != cls.__qualname__:
            raise ConfigError(f"scaling method {name!r} is already {taken.__qualname__}")
        cls.name = name
        _REGISTRY[name] = cls
        return cls

    return register


def scaling_methods() -> dict[str, type[Scaling]]:
    """All registered methods by name. A file in `clex.scaling` is found without another list."""
    package = importlib.import_module(__package__ or "clex.scaling")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    return dict(sorted(_REGISTRY.items()))


def get_scaling(name: str) -> type[Scaling]:
    """The class registered as `name`.

    Raises:
        ConfigError: there is none; the message gives the nearest names.
    """
    methods = scaling_methods()
    if name not in methods:
        raise ConfigError(unknown("method", name, methods))
    return methods[name]


def parse_options(method: str, options_type: type, values: Any) -> Any:
    """`values` as an instance of the method's options dataclass.

    Raises:
        ConfigError: an option is unknown or missing.
    """
    names = [f.name for f in fields(options_type)]
    for key in values:
        if key not in names:
            raise ConfigError(
                unknown(f"option of {method!r}", key, names)
                if names
                else f"method {method!r} has no options, got {key!r}"
            )
    try:
        return options_type(**values)
    except TypeError as error:
        raise ConfigError(f"method {method!r}: {error}") from None
