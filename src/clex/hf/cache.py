"""Moving the rotated keys of a live cache from one scale t to another.

Keys are cached after rotation by ``position * f(t)``. Rotations add up, so a key at position p
goes from t to t' by a further turn of ``p * (f(t') - f(t))`` and the ratio ``a(t') / a(t)`` of the
attention factors. For the first layer that is what a new prefill would give. Deeper layers, and
all values, were computed from what attention at the old t returned and stay as they are: a moved
cache is an approximation.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from ..errors import ConfigError, UnsupportedModelError
from ..kernels.cache_move import turn_keys
from .cache_scale import mark_cache, require_scale
from .extend import at_scale, config_of, require_extension
from .rotary import ScaledRope

# Where the probe token stands: far enough that a wrong layout is off by as much as the key itself.
_PROBE_POSITION = 100
# Largest relative error of the right layout. Rounding makes it 1e-5 in float32 and 0.004 in
# bfloat16; a wrong layout is off by about 1.
_FITS = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.05}


@dataclass(frozen=True, kw_only=True)
class KeyLayout:
    """Where a cache layer keeps its rotated numbers, and in what order.

    Attributes:
        frequencies: which frequency vector rotates them: a layer type, or `ALL_LAYERS`.
        where: ``"keys"``, or ``"values"`` for multi-head latent attention.
        start: first rotated entry of the last dimension.
        rotary_dim: number of rotated entries.
        interleaved: whether the pairs are neighbours (0, 1), (2, 3) ..., or halves (0, F) ...
        scaled: whether the attention factor is in them; a norm behind the rotation takes it out.
    """

    frequencies: str
    where: Literal["keys", "values"]
    start: int
    rotary_dim: int
    interleaved: bool
    scaled: bool = True

    def rotated(self, tensor: Tensor) -> Tensor:
        """View of the rotated entries, (..., rotary_dim)."""
        return tensor[..., self.start : self.start + self.rotary_dim]


@torch.no_grad()
def key_layouts(model: nn.Module) -> list[KeyLayout | None]:
    """How each layer of a cache of `model` holds what is rotated; `None`: nothing that follows t.

    Found by experiment: one token alone attends to itself only, so between two positions nothing
    changes in a layer but the rotation of its key. The layout that explains the change is the one.

    Raises:
        UnsupportedModelError: a layer changes in a way that no layout explains.
        ConfigError: the model is not extended.
    """
    rope = require_extension(model)
    t = config_of(model).max_scale
    still, turned = (_probe(model, t, position) for position in (0, _PROBE_POSITION))
    layouts = [
        _layout(model, rope, t, layer, *pair)
        for layer, pair in enumerate(zip(still, turned, strict=True))
    ]
    return _with_factor(rope, t, layouts, _probe(model, 1.0, 0), still)


def _with_factor(
    rope: ScaledRope,
    t: float,
    layouts: list[KeyLayout | None],
    short: list[dict[str, Tensor]],
    still: list[dict[str, Tensor]],
) -> list[KeyLayout | None]:
    """Fill in `scaled`, from keys at position 0 at t = 1 (`short`) and at `t` (`still`).

    The first layer of each kind decides: attention with sinks passes the factor on to the inputs
    of deeper layers.
    """
    scaled: dict[str, bool] = {}
    for layer, layout in enumerate(layouts):
        if layout is None or layout.frequencies in scaled:
            continue
        ends = rope.solve(torch.tensor([1.0, t]))[layout.frequencies]
        a = _of_layer(ends, layer)[1].tolist()
        norms = [layout.rotated(keys[layer][layout.where]).norm().item() for keys in (short, still)]
        grown = norms[1] / norms[0]
        scaled[layout.frequencies] = abs(grown - a[1] / a[0]) <= abs(grown - 1)
    return [x and dataclasses.replace(x, scaled=scaled[x.frequencies]) for x in layouts]


def _probe(model: nn.Module, t: float, position: int) -> list[dict[str, Tensor]]:
    """Cached keys and values of one token at `position`, layer by layer."""
    called: Any = model
    cache = DynamicCache(config=called.config.get_text_config(decoder=True))
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    try:
        with at_scale(model, t):
            called(
                input_ids=torch.ones(1, 1, dtype=torch.int64, device=device),
                position_ids=torch.full((1, 1), position, device=device),
                past_key_values=cache,
                use_cache=True,
            )
    finally:
        model.train(training)
    return [_stored(layer) for layer in cache.layers]


def _stored(layer: Any) -> dict[str, Tensor]:
    """Keys and values of a cache layer; nothing for recurrent, shared and empty ones."""
    found = {name: getattr(layer, name, None) for name in ("keys", "values")}
    return {name: x for name, x in found.items() if isinstance(x, Tensor) and x.numel()}


def _layout(
    model: nn.Module,
    rope: ScaledRope,
    t: float,
    layer: int,
    still: dict[str, Tensor],
    turned: dict[str, Tensor],
) -> KeyLayout | None:
    layouts = []
    for where in still:
        before, after = still[where], turned[where]
        tolerance = _FITS[before.dtype]
        before, after = before.float(), after.float()
        if (after - before).norm() <= tolerance * before.norm():
            continue
        fits = [
            (error, layout)
            for frequencies, inv_freq in _vectors(rope, t, layer).items()
            for layout in _candidates(frequencies, where, before.shape[-1], 2 * len(inv_freq))
            if (error := _misfit(layout, inv_freq, before, after)) < tolerance
        ]
        if not fits:
            raise UnsupportedModelError(
                f"layer {layer} of {type(model).__name__} holds its {where} in a form that clex"
                " cannot move to another scale; use on_growth='refill'"
            )
        layouts.append(min(fits, key=lambda fit: fit[0])[1])
    # Layers with frequencies of their own that were not extended do not follow t.
    follows = [layout for layout in layouts if layout.frequencies in rope.scalings]
    return follows[0] if follows else None


def _vectors(rope: ScaledRope, t: float, layer: int) -> dict[str, Tensor]:
    """Every frequency vector that `layer` may be rotated by at scale `t`, (F,) float32 each."""
    solved = rope.solve(torch.tensor([t]))
    found = {key: _of_layer(pair, layer)[0][0] for key, pair in solved.items()}
    for name, buffer in rope.stock.named_buffers(recurse=False):
        key = name.removesuffix("_inv_freq")
        if name.endswith("_inv_freq") and not name.endswith("original_inv_freq"):
            found.setdefault(key, buffer)
    return found


def _of_layer(solved: tuple[Tensor, Tensor], layer: int) -> tuple[Tensor, Tensor]:
    """inv_freq (B, F) and factor (B,) of one layer, from what all share or from its own."""
    inv_freq, factor = solved
    return (inv_freq[:, layer], factor[:, layer]) if inv_freq.dim() == 3 else solved


def _candidates(frequencies: str, where: Any, size: int, rotary_dim: int) -> list[KeyLayout]:
    if rotary_dim > size:
        return []
    return [
        KeyLayout(
            frequencies=frequencies,
            where=where,
            start=start,
            rotary_dim=rotary_dim,
            interleaved=interleaved,
        )
        for start in sorted({0, size - rotary_dim})
        for interleaved in (False, True)
    ]


def _misfit(layout: KeyLayout, inv_freq: Tensor, before: Tensor, after: Tensor) -> float:
    """Relative error of `after` as `before` turned from position 0 to the probe's."""
    expected = before.clone()
    turn_keys(
        [expected],
        layout.start,
        torch.full((1, 1), _PROBE_POSITION, dtype=torch.float64),
        inv_freq.double()[None],
        torch.ones(1),
        layout.interleaved,
        1,
    )
    return ((expected - after).norm() / before.norm()).item()


def move_cache(
    model: nn.Module,
    cache: Any,
    t_from: float | Sequence[float] | Tensor,
    t_to: float | Sequence[float] | Tensor,
    *,
    attention_mask: Tensor | None = None,
    layouts: Sequence[KeyLayout | None] | None = None,
    block: int = 8192,
) -> None:
    """Turn the cached keys of an extended model from scale `t_from` to `t_to`, in place.

    Exact for the first layer, an approximation for the others (see the top of this file). Angles
    are reduced in float64 and applied in float32; each move rounds the cache once to its dtype.

    Args:
        model: the extended model that filled the cache.
        cache: `DynamicCache` or `StaticCache`, sliding-window layers included.
        t_from: the scale that the cache was filled at; one for all rows, or one for each.
        t_to: the scale that it is to serve, likewise.
        attention_mask: (B, tokens seen) or longer, 0 for padding; needed for padded rows only.
            Position is the number of real tokens before, as in `generate`.
        layouts: from `key_layouts(model)`, to save its three forward passes of one token.
        block: slots that are turned at a time on a CPU; bounds the working memory.

    Raises:
        UnsupportedModelError: the cache is quantised or indexed, or no layout explains the keys.
        ConfigError: the model is not extended, a scale is below 1, or the cache is known to be of
            another scale than `t_from`.
    """
    rope = require_extension(model)
    old, new = _scales(t_from), _scales(t_to)
    require_scale(rope, cache, old)
    if torch.equal(*torch.broadcast_tensors(old, new)):
        return
    layouts = key_layouts(model) if layouts is None else layouts
    # In it the tensors of a cache may be written, whether they were made in inference mode or not.
    with torch.inference_mode():
        _move(rope, cache, old, new, attention_mask, layouts, block)
    mark_cache(cache, new)


def _move(
    rope: ScaledRope,
    cache: Any,
    old: Tensor,
    new: Tensor,
    attention_mask: Tensor | None,
    layouts: Sequence[KeyLayout | None],
    block: int,
) -> None:
    device = next(rope.scalings.buffers()).device
    # Both ends in one go, without waiting for the device.
    solved = rope.solve(torch.cat([old, new]).to(device, non_blocking=True))
    # Layers that share frequencies and slots share their angles; `own` tells the others apart.
    groups: dict[tuple[KeyLayout, int, int, int], list[Tensor]] = defaultdict(list)
    for number, (layer, layout) in enumerate(zip(cache.layers, layouts, strict=False)):
        if layout is None or not getattr(layer, "is_initialized", False):
            continue
        _require_plain(layer)
        tensor = getattr(layer, layout.where)
        seen = int(layer.get_seq_length())
        own = number if rope.layers > 1 else 0
        groups[layout, own, seen, min(seen, tensor.shape[-2])].append(tensor)
    for (layout, own, seen, kept), keys in groups.items():
        inv_freq, factor = _of_layer(solved[layout.frequencies], own)
        f_old, f_new = inv_freq.double().split([len(old), len(new)])
        a_old, a_new = factor.split([len(old), len(new)])
        ratio = a_new / a_old if layout.scaled else torch.ones_like(a_new)
        positions = _positions(attention_mask, seen, device)[:, seen - kept :]
        turn_keys(keys, layout.start, positions, f_new - f_old, ratio, layout.interleaved, block)


def _scales(t: float | Sequence[float] | Tensor) -> Tensor:
    scales = torch.as_tensor(t, dtype=torch.float32).detach().reshape(-1).cpu()
    if not (scales >= 1).all():
        raise ConfigError(f"the scale must be at least 1, not {scales.min().item():g}")
    return scales


def _positions(attention_mask: Tensor | None, seen: int, device: torch.device) -> Tensor:
    """Position of each token seen, float64, (B, seen), or (1, seen) without a mask."""
    if attention_mask is None:
        return torch.arange(seen, device=device, dtype=torch.float64)[None]
    if attention_mask.shape[-1] < seen:
        raise ConfigError(
            f"attention_mask covers {attention_mask.shape[-1]} of the {seen} tokens in the cache"
        )
    real = attention_mask[:, :seen].to(device, torch.int64)
    return (real.cumsum(1) - 1).clamp(min=0).double()


def _require_plain(layer: Any) -> None:
    quantised = hasattr(layer, "_quantized_keys")
    if quantised or getattr(layer, "is_indexer_initialized", False):
        raise UnsupportedModelError(
            f"{type(layer).__name__} cannot be moved to another scale; use on_growth='refill'"
        )
