"""The Triton side of `clex.kernels.cache_move`: one launch for all layers that are alike.

A program computes the angles of a block of slots once and turns that block in many heads of many
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
# Programs for each launch: many times what a large GPU runs at once, so that its last ones leave
# little of it idle, and few enough that angles are shared by many heads.
_PROGRAMS = 32768
_WARPS = 4
# Pairs of one head that a program holds at a time, and heads.
_PAIRS_AT_ONCE = 1024
_HEADS_AT_ONCE = 2


@triton.jit(do_not_specialize=["slots", "heads", "each", "total"])
def _turn(
    addresses, positions, turns, ratio, key_row, key_head, key_slot, key_entry,
    position_row, position_slot, turn_row, ratio_row, slots, heads, each, total,
    SLOTS: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr, BLOCK: tl.constexpr,
    INTERLEAVED: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Heads are counted through all layers: `heads` of each, `total` in all, `each` a program."""
    start, row = tl.program_id(0) * SLOTS, tl.program_id(2)
    local, f = tl.arange(0, SLOTS), tl.arange(0, BLOCK)
    inside = start + local < slots
    mask = inside[:, None] & (f < PAIRS)[None, :]
    where = positions + row.to(tl.int64) * position_row + (start + local) * position_slot
    position = tl.load(where, mask=inside, other=0.0)
    share = tl.load(turns + row * turn_row + f, mask=f < PAIRS, other=0.0)
    turn = position[:, None] * share[None, :]
    angle = ((turn - tl.floor(turn + 0.5)) * 6.283185307179586).to(tl.float32)
    a = tl.load(ratio + row * ratio_row)
    cos, sin = (tl.cos(angle) * a)[:, None, :], (tl.sin(angle) * a)[:, None, :]
    first = local[:, None] * key_slot + (2 * f if INTERLEAVED else f)[None, :] * key_entry
    other = (2 * f + 1 if INTERLEAVED else f + PAIRS)[None, :] * key_entry
    other += local[:, None] * key_slot
    begin = row.to(tl.int64) * key_row + start.to(tl.int64) * key_slot
    from_head = tl.program_id(1) * each
    to_head = tl.minimum(from_head + each, total)
    for one in range(from_head, to_head, HEADS):
        head = one + tl.arange(0, HEADS)
        wanted = (head < to_head)[None, :, None] & mask[:, None, :]
        layer = tl.load(addresses + head // heads, mask=head < to_head, other=0)
        keys = tl.multiple_of(layer.to(tl.pointer_type(TYPE)), ALIGNED)
        keys += begin + (head % heads).to(tl.int64) * key_head
        x_at = keys[None, :, None] + first[:, None, :]
        y_at = keys[None, :, None] + other[:, None, :]
        x = tl.load(x_at, mask=wanted, other=0.0).to(tl.float32)
        y = tl.load(y_at, mask=wanted, other=0.0).to(tl.float32)
        tl.store(x_at, (x * cos - y * sin).to(TYPE), mask=wanted)
        tl.store(y_at, (y * cos + x * sin).to(TYPE), mask=wanted)


def turn_alike(
    keys: list[Tensor],
    start: int,
    positions: Tensor,
    delta: Tensor,
    ratio: Tensor,
    interleaved: bool,
) -> None:
    """See `clex.kernels.cache_move.turn_keys`; `keys` share shape, strides, dtype and device."""
    one = keys[0]
    rows, heads, _, _ = one.shape
    slots, pairs = positions.shape[1], delta.shape[1]
    total = heads * len(keys)
    if not rows * total * slots:
        return
    offset = start * one.stride(3) * one.element_size()
    addresses = [tensor.data_ptr() + offset for tensor in keys]
    block = triton.next_power_of_2(pairs)
    count = min(triton.next_power_of_2(slots), max(1, _PAIRS_AT_ONCE // block))
    blocks = triton.cdiv(slots, count)
    steps = triton.cdiv(total, _HEADS_AT_ONCE)
    each = _HEADS_AT_ONCE * triton.cdiv(steps, triton.cdiv(_PROGRAMS, blocks * rows))
    turns = (delta / (2 * math.pi)).contiguous()
    with torch.cuda.device_of(one):
        # From pageable memory, but so few bytes that the host does not wait for the device.
        table = torch.tensor(addresses).to(one.device, non_blocking=True)
        _turn[(blocks, triton.cdiv(total, each), rows)](
            table, positions, turns, ratio,
            *one.stride(), _row(positions), positions.stride(1), _row(turns), _row(ratio),
            slots, heads, each, total,
            SLOTS=count, HEADS=_HEADS_AT_ONCE, PAIRS=pairs, BLOCK=block,
            INTERLEAVED=interleaved, TYPE=_TYPES[one.dtype],
            ALIGNED=reduce(math.gcd, addresses, 16), num_warps=_WARPS,
        )  # fmt: skip


def _row(tensor: Tensor) -> int:
    """Stride between rows of the batch, 0 where all share one."""
    return 0 if len(tensor) == 1 else tensor.stride(0)
