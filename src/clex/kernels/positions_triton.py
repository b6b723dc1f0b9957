"""The sampler ``chunks`` of `clex.positions` in one kernel, the same positions number by number."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit
def _mix(x):
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def _uniform(seed, counter, stream: tl.constexpr):
    """See `clex.positions.uniform`; `counter` is any block of numbers."""
    x = _mix(seed * 0x2545F4914F6CDD1D + stream)
    x = _mix(x + (counter.to(tl.uint64) + 1) * 0x9E3779B97F4A7C15)
    return (x >> 11).to(tl.float64) * 1.1102230246251565e-16  # 2**-53


@triton.jit
def _chunks(span, seeds, out, n, MOST: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(1)
    seed = tl.load(seeds + row).to(tl.uint64, bitcast=True)
    j = tl.arange(0, MOST)
    first = tl.arange(0, 1)
    many = 2 + (_uniform(seed, first, 1) * (MOST - 1)).to(tl.int64)
    used = j + 1 < many
    cuts = tl.where(used, 1 + (_uniform(seed, j, 2) * (n - 1)).to(tl.int64), n)
    room = tl.load(span + row) - n + 1
    skips = tl.where(used, tl.floor(_uniform(seed, j, 3) * room), float("inf"))
    # The place of each skip among them, counted: so few need no sort.
    before = skips[None, :] < skips[:, None]
    before = before | ((skips[None, :] == skips[:, None]) & (j[None, :] < j[:, None]))
    place = tl.sum(before.to(tl.int32), axis=1)
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    piece = tl.sum((cuts[None, :] <= index[:, None]).to(tl.int32), axis=1)
    mine = (place[None, :] == piece[:, None] - 1) & used[None, :]
    skip = tl.sum(tl.where(mine, skips[None, :], 0.0), axis=1)
    where = out + row.to(tl.int64) * n + index
    tl.store(where, (index.to(tl.float64) + skip).to(tl.float32), mask=index < n)


def chunks(n: int, span: Tensor, seeds: Tensor, most: int) -> Tensor:
    """Positions of `clex.positions.chunks`, of up to `most` pieces, a power of two."""
    out = torch.empty(len(span), n, dtype=torch.float32, device=span.device)
    with torch.cuda.device_of(span):
        _chunks[(triton.cdiv(n, _BLOCK), len(span))](
            span.double(), seeds, out, n, MOST=most, BLOCK=_BLOCK
        )
    return out
