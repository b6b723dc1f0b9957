"""Turning keys that are rotated already by a further angle, in place, for all layers at once.

Angles are reduced to one turn in float64 and applied in float32; the keys are rounded once.
"""

from __future__ import annotations

import math
from collections import defaultdict

import torch
from torch import Tensor

from .switch import active


@torch.library.custom_op("clex::turn_keys", mutates_args={"keys"})
def turn_keys(
    keys: list[Tensor],
    positions: Tensor,
    delta: Tensor,
    ratio: Tensor,
    interleaved: bool,
    block: int,
) -> None:
    """Turn each of `keys` by ``positions * delta`` and multiply it by `ratio`.

    Args:
        keys: (B, heads, slots, 2 F) each, any strides; views of what is rotated in a cache.
        positions: (B or 1, slots) float64, of the token in each slot.
        delta: (B or 1, F) float64, radians a token.
        ratio: (B or 1,) float32.
        interleaved: whether pairs are neighbours (0, 1), (2, 3) ..., or halves (0, F) ...
        block: slots that the plain implementation turns at a time; bounds its working memory.
    """
    alike = defaultdict(list)
    for tensor in keys:
        rows, slots = tensor.shape[0], tensor.shape[2]
        lengths = {len(positions), len(delta), len(ratio)}
        if not lengths <= {1, rows} or positions.shape[1] != slots:
            raise ValueError(
                f"positions {tuple(positions.shape)} and {max(lengths)} rows of turns for keys of"
                f" {rows} rows and {slots} slots"
            )
        alike[tensor.device, tensor.dtype, tensor.shape, tensor.stride()].append(tensor)
    for (device, *_), tensors in alike.items():
        here, turn, grown = (table.to(device) for table in (positions, delta, ratio))
        if active(tensors[0]):
            from .cache_move_triton import turn_alike

            turn_alike(tensors, here, turn, grown, interleaved)
        else:
            _turn_plain(tensors, here, turn, grown, interleaved, block)


@turn_keys.register_fake
def _(
    keys: list[Tensor],
    positions: Tensor,
    delta: Tensor,
    ratio: Tensor,
    interleaved: bool,
    block: int,
) -> None:
    return None


def _turn_plain(
    keys: list[Tensor],
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
            slots = tensor[:, :, begin : begin + block]
            first = slots[..., 0::2] if interleaved else slots[..., :half]
            second = slots[..., 1::2] if interleaved else slots[..., half:]
            turned = first * cos - second * sin, second * cos + first * sin
            first.copy_(turned[0])
            second.copy_(turned[1])
