"""The module that takes the place of a model's rotary embedding."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..scaling import Scaling

# Key of the only frequency vector of a model that has no layer types.
ALL_LAYERS = "all"


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
        scale: the scale in force: a float for all rows, a tensor (B,) for one scale a row, or
            ``None``: each row takes the scale of its largest position in the call.
        positions: table (B, T) float32 of sampled positions, indexed by `position_ids`; training
            only. It lives here because the host reads jumps in `position_ids` as document borders.
        plain_attention: name of the attention that `restore` puts back, where the method brought
            its own (ALiBi).
    """

    def __init__(self, stock: nn.Module, scalings: Mapping[str, Scaling]) -> None:
        super().__init__()
        self.stock = stock
        self.scalings = nn.ModuleDict(scalings)
        self.scale: float | Tensor | None = None
        self.positions: Tensor | None = None
        self.plain_attention: str | None = None
        self._memo: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}
        self._takes_rows = self._try_rows()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("stock"), name)

    def forward(self, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> Any:
        """What the host's rotary returns: cos and sin (or a complex table), in the dtype of `x`."""
        key = ALL_LAYERS if layer_type is None else layer_type
        if key not in self.scalings:
            extra = () if layer_type is None else (layer_type,)
            return self.stock(x, position_ids, *extra)
        scaling: Any = self.scalings[key]
        if self.scale is None:
            lengths = position_ids.amax(dim=-1) + 1
            t = scaling.scale_for(lengths if lengths.dim() == 1 else lengths.amax(dim=0))
        elif isinstance(self.scale, Tensor):
            t = self.scale
        else:
            t = torch.tensor([self.scale], device=x.device)
        rows = max(len(t), 1 if self.positions is None else len(self.positions))
        if rows > 1 and position_ids.shape[-2] == 1:
            position_ids = position_ids.expand(*position_ids.shape[:-2], rows, -1)
        if self.positions is not None:
            table = self.positions.to(x.device).expand(position_ids.shape[-2], -1)
            position_ids = table.gather(1, position_ids)
        inv_freq, factor = self._frequencies(key, scaling, t)
        return self._call(x, position_ids, inv_freq, factor, layer_type)

    def _frequencies(self, key: str, scaling: Scaling, t: Tensor) -> tuple[Tensor, Tensor]:
        """inv_freq (B, F) and attention factor (B,); solved once while a scale is held."""
        if torch.is_grad_enabled() or self.scale is None:
            return scaling.inv_freq(t), scaling.attention_factor(t)
        memo_key = (key, t.device, scaling.training)
        if memo_key not in self._memo:
            self._memo[memo_key] = (scaling.inv_freq(t), scaling.attention_factor(t))
        return self._memo[memo_key]

    def hold(self, scale: float | Tensor | None, positions: Tensor | None = None) -> None:
        """Set `scale` and `positions`, and forget what was solved for the scale before.

        Frequencies of a held scale are solved once, not for every token. They cannot be keyed on
        the state of the parameters: fused optimisers change those without raising their version.
        """
        self.scale, self.positions = scale, positions
        self._memo.clear()

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
        stock_factor = getattr(self.stock, f"{prefix}attention_scaling")
        view = _View(
            self.stock,
            {
                f"{prefix}inv_freq": inv_freq,
                f"{prefix}attention_scaling": factor * stock_factor,
            },
        )
        extra = () if layer_type is None else (layer_type,)
        raw_forward = inspect.unwrap(type(self.stock).forward)
        return raw_forward(view, x, position_ids, *extra)

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


class _View:
    """A stock module with some attributes replaced, without touching the module."""

    def __init__(self, stock: nn.Module, replaced: dict[str, Any]) -> None:
        self._stock = stock
        self._replaced = replaced

    def __getattr__(self, name: str) -> Any:
        if name in self._replaced:
            return self._replaced[name]
        return getattr(self._stock, name)
