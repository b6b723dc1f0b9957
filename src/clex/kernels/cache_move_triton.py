"""The Triton side of `clex.kernels.cache_move`: one launch for all layers that are alike.

A program computes the angles of a block of slots once and turns that block in every head of its
layers. Bytes: each key is read and written once, as in a copy of the cache.
"""

from __future__ import annotations

import math
from functools import reduce

import torch
import triton
import triton.language as tl
from torch import Tensor

_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
# Programs that keep every multiprocessor of a large GPU busy.
_ENOUGH = 1024
_WARPS = 4
# Pairs of one head that a program holds at a time.
_PAIRS_AT_ONCE = 1024


@triton.jit
def _turn(
    addresses, positions, turns, ratio, key_row, key_head, key_slot, key_entry,
    position_row, position_slot, turn_row, ratio_row, layers, heads, slots,
    SLOTS: tl.constexpr, LAYERS: tl.constexpr, PAIRS: tl.constexpr, BLOCK: tl.constexpr,
    INTERLEAVED: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0) * SLOTS
    group, row = tl.program_id(1), tl.program_id(2)
    local, f = tl.arange(0, SLOTS), tl.arange(0, BLOCK)
    inside = start + local < slots
    mask = inside[:, None] & (f < PAIRS)[None, :]
    where = positions + row.to(tl.int64) * position_row + (start + local) * position_slot
    position = tl.load(where, mask=inside, other=0.0)
    share = tl.load(turns + row * turn_row + f, mask=f < PAIRS, other=0.0)
    turn = position[:, None] * share[None, :]
    angle = ((turn - tl.floor(turn + 0.5)) * 6.283185307179586).to(tl.float32)
    a = tl.load(ratio + row * ratio_row)
    cos, sin = tl.cos(angle) * a, tl.sin(angle) * a
    first = local[:, None] * key_slot + (2 * f if INTERLEAVED else f)[None, :] * key_entry
    other = (2 * f + 1 if INTERLEAVED else f + PAIRS)[None, :] * key_entry
    other += local[:, None] * key_slot
    begin = row.to(tl.int64) * key_row + start.to(tl.int64) * key_slot
    for i in range(LAYERS):
        layer = group * LAYERS + i
        if layer < layers:
            keys = tl.load(addresses + layer).to(tl.pointer_type(TYPE))
            keys = tl.multiple_of(keys, ALIGNED) + begin
            for head in range(heads):
                here = keys + head * key_head
                x = tl.load(here + first, mask=mask, other=0.0).to(tl.float32)
                y = tl.load(here + other, mask=mask, other=0.0).to(tl.float32)
                tl.store(here + first, (x * cos - y * sin).to(TYPE), mask=mask)
                tl.store(here + other, (y * cos + x * sin).to(TYPE), mask=mask)


def turn_alike(
    keys: list[Tensor], positions: Tensor, delta: Tensor, ratio: Tensor, interleaved: bool
) -> None:
    """See `clex.kernels.cache_move.turn_keys`; `keys` share shape, strides, dtype and device."""
    rows, heads, slots, _ = keys[0].shape
    if not keys[0].numel():
        return
    turns = (delta / (2 * math.pi)).contiguous()
    pairs = turns.shape[1]
    addresses = [tensor.data_ptr() for tensor in keys]
    block = triton.next_power_of_2(pairs)
    count = min(triton.next_power_of_2(slots), max(1, _PAIRS_AT_ONCE // block))
    blocks = triton.cdiv(slots, count)
    groups = min(len(keys), max(1, triton.cdiv(_ENOUGH, blocks * rows)))
    layers = triton.cdiv(len(keys), groups)
    with torch.cuda.device_of(keys[0]):
        _turn[(blocks, triton.cdiv(len(keys), layers), rows)](
            torch.tensor(addresses, device=keys[0].device), positions, turns, ratio,
            *keys[0].stride(), _row(positions), positions.stride(1), _row(turns), _row(ratio),
            len(keys), heads, slots,
            SLOTS=count, LAYERS=layers, PAIRS=pairs, BLOCK=block,
            INTERLEAVED=interleaved, TYPE=_TYPES[keys[0].dtype],
            ALIGNED=reduce(math.gcd, addresses, 16), num_warps=_WARPS,
        )  # fmt: skip


def _row(tensor: Tensor) -> int:
    """Stride between rows of the batch, 0 where all share one."""
    return 0 if len(tensor) == 1 else tensor.stride(0)
