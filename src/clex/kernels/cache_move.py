"""Turning keys that are rotated already by a further angle, in place, for all layers at once.

Angles are reduced to one turn in float64 and applied in float32; the keys are rounded once.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from .switch import active


def turn_keys(
    keys: Sequence[Tensor],
    start: int,
    positions: Tensor,
    delta: Tensor,
    ratio: Tensor,
    interleaved: bool,
    block: int,
) -> None:
    """Turn what is rotated in each of `keys` by ``positions * delta`` and multiply it by `ratio`.

    It takes whole tensors and no views: to make one for each layer takes the host longer than all
    of its other work here.

    Args:
        keys: (B, heads, >= slots, >= start + 2 F) each, any strides.
        start: first rotated entry of the last dimension.
        positions: (B or 1, slots) float64, of the token in each of the first slots.
        delta: (B or 1, F) float64, radians a token.
        ratio: (B or 1,) float32.
        interleaved: whether pairs are neighbours (0, 1), (2, 3) ..., or halves (0, F) ...
        block: slots that the plain implementation turns at a time; bounds its working memory.
    """
    alike = defaultdict(list)
    for tensor in keys:
        alike[tensor.device, tensor.dtype, tensor.shape, tensor.stride()].append(tensor)
    for (device, _, (rows, _, slots, size), _), tensors in alike.items():
        lengths = {len(positions), len(delta), len(ratio)}
        end = start + 2 * delta.shape[1]
        if not lengths <= {1, rows} or positions.shape[1] > slots or end > size:
            raise ValueError(
                f"positions {tuple(positions.shape)} and {max(lengths)} rows of turns, to entry"
                f" {end}, for keys of {rows} rows, {slots} slots and {size} entries"
            )
        here, turn, grown = (table.to(device) for table in (positions, delta, ratio))
        if active(tensors[0]):
            from .cache_move_triton import turn_alike

            turn_alike(tensors, start, here, turn, grown, interleaved)
        else:
            _turn_plain(tensors, start, here, turn, grown, interleaved, block)


def _turn_plain(
    keys: list[Tensor],
    start: int,
    positions: Tensor,
    delta: Tensor,
    ratio: Tensor,
    interleaved: bool,
    block: int,
) -> None:
    half = delta.shape[1]
    for begin in range(0, positions.shape[1], block):
        here = positions[:, begin : begin + block]
        angle = torch.remainder(here[:, :, None] * delta[:, None, :], 2 * math.pi).float()
        tables = (table * ratio[:, None, None] for table in (angle.cos(), angle.sin()))
        cos, sin = (table[:, None] for table in tables)
        for tensor in keys:
            slots = tensor[:, :, begin : begin + here.shape[1], start : start + 2 * half]
            first = slots[..., 0::2] if interleaved else slots[..., :half]
            second = slots[..., 1::2] if interleaved else slots[..., half:]
            turned = first * cos - second * sin, second * cos + first * sin
            first.copy_(turned[0])
            second.copy_(turned[1])
