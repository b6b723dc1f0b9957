"""The module that takes the place of a model's rotary embedding."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config import ClexConfig
from ..errors import ConfigError
from ..kernels import active
from ..scaling import Scaling
from .fused import Angles, fuse

# Key of the only frequency vector of a model that has no layer types.
ALL_LAYERS = "all"


@dataclass
class ForwardPass:
    """A pass of the host that is under way while no scale is held.

    Attributes:
        scale: (B,) or (1,); ``None`` until the positions have decided.
    """

    scale: Tensor | None


class ScaledRope(nn.Module):
    """Calls the host's own rotary code with frequencies and temperature of the wanted scale.

    The host's formula (layout, partial rotation, complex form, half width) stays in charge: its
    undecorated forward runs on a view of the stock module in which `inv_freq` and
    `attention_scaling` are ours. The class name must not contain "RotaryEmbedding": transformers
    re-initialises every module that is called so.

    Args:
        stock: the rotary module of the host, kept unchanged for `restore`.
        scalings: a `Scaling` for each extended layer type, or one under `ALL_LAYERS`.

    Attributes:
        scale: the scale that is held, float32: (1,) for all rows or (B,) for one a row. ``None``:
            each row takes the scale of its own length in the call.
        forward_pass: set by `clex.hf.forward_pass` while the host's decoder runs and no scale is
            held; it knows the real tokens of each row, which positions alone do not tell.
        positions: table (B, T) float32 of sampled positions, indexed by `position_ids`; training
            only. It lives here because the host reads jumps in `position_ids` as document borders.
        interleaved: whether the pairs of the attention that `fuse` found are neighbours; ``None``:
            it was not fused, and always takes cos and sin.
        plain_attention: name of the attention that `restore` puts back, where the method brought
            its own (ALiBi).
    """

    def __init__(self, stock: nn.Module, scalings: Mapping[str, Scaling]) -> None:
        super().__init__()
        self.stock = stock
        self.scalings = nn.ModuleDict(scalings)
        self.scale: Tensor | None = None
        self.positions: Tensor | None = None
        self.forward_pass: ForwardPass | None = None
        self.plain_attention: str | None = None
        self.interleaved: bool | None = None
        self._solved: dict[str, tuple[Tensor, Tensor]] = {}
        self._solved_in_training = False
        self._takes_rows = self._try_rows()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("stock"), name)

    def forward(self, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> Any:
        """What the host's rotary returns: cos and sin (or a complex table), in the dtype of `x`.

        On a GPU fused attention gets (positions, `Angles`) instead.
        """
        key = ALL_LAYERS if layer_type is None else layer_type
        if key not in self.scalings:
            extra = () if layer_type is None else (layer_type,)
            return self.stock(x, position_ids, *extra)
        inv_freq, factor = self._frequencies(key, position_ids)
        rows = x.shape[-3]  # Gemma 3n stacks four streams before the batch
        if len(inv_freq) not in (1, rows):
            inv_freq, factor = spread(inv_freq, rows), spread(factor, rows)
        if position_ids.shape[-2] == 1 < rows and (len(inv_freq) > 1 or self.positions is not None):
            position_ids = position_ids.expand(*position_ids.shape[:-2], rows, -1)
        if self.positions is not None:
            table = self.positions.to(x.device).expand(position_ids.shape[-2], -1)
            position_ids = table.gather(1, position_ids)
        if self.interleaved is not None and active(x) and position_ids.dim() == 2:
            factor = self._with_stock(factor, layer_type)
            return position_ids, Angles(inv_freq, factor, self.interleaved, x.dtype)
        return self._call(x, position_ids, inv_freq, factor, layer_type)

    def _frequencies(self, key: str, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """inv_freq (B, F) and attention factor (B,); B is 1 where all rows share a scale."""
        solved = self._solved.get(key)
        if (
            solved is not None
            and not torch.is_grad_enabled()
            and self._solved_in_training == self.training
        ):
            return solved
        scaling: Any = self.scalings[key]
        t = self._scale_in_force(position_ids)
        return scaling.inv_freq(t), scaling.attention_factor(t)

    def _scale_in_force(self, position_ids: Tensor) -> Tensor:
        if self.scale is not None:
            return self.scale
        current = self.forward_pass
        if current is not None and current.scale is not None:
            return current.scale
        lengths = position_ids.amax(dim=-1) + 1
        scale = self.scale_for(lengths if lengths.dim() == 1 else lengths.amax(dim=0))
        if current is not None:
            current.scale = scale
        return scale

    @property
    def clex_config(self) -> ClexConfig:
        """The config of the extension."""
        config: ClexConfig = self._first.config
        return config

    @property
    def native_length(self) -> int:
        """Tokens that the host was trained to read."""
        return int(self._first.spec.native_length)

    @property
    def _first(self) -> Any:
        return next(iter(self.scalings.values()))

    def scale_for(self, lengths: Tensor) -> Tensor:
        """The scales for texts of `lengths` tokens, (B,), on the device of the frequencies."""
        first = self._first
        scale: Tensor = first.scale_for(lengths.to(first.inv_freq_native.device))
        return scale

    def solve(self, scale: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """inv_freq (B, F) and attention factor (B,) at `scale` (B,), for each extended part."""
        solved = {}
        for key, module in self.scalings.items():
            scaling: Any = module
            t = scale.to(scaling.inv_freq_native.device)
            solved[key] = scaling.inv_freq(t), scaling.attention_factor(t)
        return solved

    def hold(self, scale: float | Tensor | None, positions: Tensor | None = None) -> None:
        """Set `scale` and `positions`, and solve the frequencies of the scale once for inference.

        Now and not at the first use: that may be inside a compiled graph. They live until the next
        call and are not keyed on the state of the parameters, since fused optimisers change those
        without raising their version. With gradients each forward pass solves them anew.
        """
        if scale is not None:
            device = self._first.inv_freq_native.device
            scale = torch.as_tensor(scale, dtype=torch.float32, device=device).reshape(-1)
        self.scale, self.positions = scale, positions
        self._solved = {}
        if scale is None or (self.training and torch.is_grad_enabled()):
            return
        with torch.no_grad():
            self._solved, self._solved_in_training = self.solve(scale), self.training

    def _call(
        self,
        x: Tensor,
        position_ids: Tensor,
        inv_freq: Tensor,
        factor: Tensor,
        layer_type: str | None,
    ) -> Any:
        if len(inv_freq) == 1:
            return self._host(x, position_ids, inv_freq[0], factor[0], layer_type)
        if self._takes_rows:
            rows = inv_freq[:, None, :], factor[:, None, None]
            return self._host(x, position_ids, *rows, layer_type)
        parts = [
            self._host(x[i : i + 1], position_ids[..., i : i + 1, :], f, a, layer_type)
            for i, (f, a) in enumerate(zip(inv_freq, factor, strict=True))
        ]
        if isinstance(parts[0], Tensor):
            return torch.cat(parts, dim=-3)
        return tuple(torch.cat(part, dim=-3) for part in zip(*parts, strict=True))

    def _host(
        self,
        x: Tensor,
        position_ids: Tensor,
        inv_freq: Tensor,
        factor: Tensor,
        layer_type: str | None,
    ) -> Any:
        prefix = "" if layer_type is None else f"{layer_type}_"
        factor = self._with_stock(factor, layer_type)
        view = _View(
            self.stock,
            {
                f"{prefix}inv_freq": inv_freq,
                f"{prefix}attention_scaling": factor,
                # Phi-MoE computes its frequencies anew in each call.
                "rope_init_fn": lambda *_: (inv_freq, factor),
            },
        )
        extra = () if layer_type is None else (layer_type,)
        raw_forward = inspect.unwrap(type(self.stock).forward)
        return raw_forward(view, x, position_ids, *extra)

    def _with_stock(self, factor: Tensor, layer_type: str | None) -> Tensor:
        """`factor` times that of the host's own rotary, which is 1 in nearly all."""
        prefix = "" if layer_type is None else f"{layer_type}_"
        own = getattr(self.stock, f"{prefix}attention_scaling")
        return factor if own == 1 else factor * own

    def fuse(self, decoder: nn.Module) -> None:
        """Let the attention of `decoder` rotate in one kernel where the model is on a GPU."""
        key, scaling = next(iter(self.scalings.items()))
        layer_type = None if key == ALL_LAYERS else key
        native: Any = scaling.inv_freq_native

        def tables(x: Tensor, position_ids: Tensor, inv_freq: Tensor, factor: Tensor) -> Any:
            pair = self._call(x, position_ids, inv_freq, factor, layer_type)
            return pair, self._with_stock(factor, layer_type)

        with torch.no_grad():
            self.interleaved = fuse(decoder, self, tables, native)

    def _try_rows(self) -> bool:
        """Whether the host's code takes one frequency vector a row, as recent releases do."""
        key = next(iter(self.scalings))
        layer_type = None if key == ALL_LAYERS else key
        scaling: Any = self.scalings[key]
        native = scaling.inv_freq_native
        inv_freq = torch.stack([native, native / 2])
        factor = torch.tensor([1.0, 2.0], device=native.device)
        x = torch.zeros(2, 3, 1, device=native.device)
        position_ids = torch.arange(3, device=native.device).expand(2, 3)
        self._takes_rows = False
        with torch.no_grad():
            one_by_one = self._call(x, position_ids, inv_freq, factor, layer_type)
            self._takes_rows = True
            try:
                together = self._call(x, position_ids, inv_freq, factor, layer_type)
            except (RuntimeError, IndexError):
                return False
        one_by_one = [one_by_one] if isinstance(one_by_one, Tensor) else one_by_one
        together = [together] if isinstance(together, Tensor) else together
        return all(
            a.shape == b.shape and torch.allclose(a, b)
            for a, b in zip(one_by_one, together, strict=True)
        )


def spread(per_row: Tensor, rows: int) -> Tensor:
    """One entry for each of `rows`: beams and returned sequences stand beside their prompt.

    Raises:
        ConfigError: the batch is not a multiple of the entries.
    """
    if len(per_row) == rows:
        return per_row
    if rows % len(per_row):
        raise ConfigError(f"{len(per_row)} scales are held for a batch of {rows} rows")
    return per_row.repeat_interleave(rows // len(per_row), dim=0)


def ropes_of(model: nn.Module) -> list[ScaledRope]:
    """Every extended rotary of `model`, found anew: wrappers such as PEFT copy modules."""
    return [module for module in model.modules() if isinstance(module, ScaledRope)]


@contextmanager
def holding(
    model: nn.Module, scale: float | Tensor, positions: Tensor | None = None
) -> Iterator[None]:
    """Hold a scale in every rotary of `model` inside the block; see `clex.at_scale`."""
    ropes = ropes_of(model)
    before = [(rope.scale, rope.positions) for rope in ropes]
    try:
        for rope in ropes:
            rope.hold(scale, positions)
        yield
    finally:
        for rope, (old_scale, old_positions) in zip(ropes, before, strict=True):
            rope.hold(old_scale, old_positions)


class _View:
    """A stock module with some attributes replaced, without touching the module."""

    def __init__(self, stock: nn.Module, replaced: dict[str, Any]) -> None:
        self._stock = stock
        self._replaced = replaced

    def __getattr__(self, name: str) -> Any:
        if name in self._replaced:
            return self._replaced[name]
        return getattr(self._stock, name)
