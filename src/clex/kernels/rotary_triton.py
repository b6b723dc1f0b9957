"""The Triton side of `clex.kernels.rotary`: one kernel forward, one backward.

A program takes a block of tokens and some heads. It computes the angles of its tokens once and
keeps cos and sin in registers for all of its heads, so that memory sees the queries and keys alone.
Bytes: each of them is read and written once; backward with learned frequencies reads the outputs
as well.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton
from triton.language.extra import libdevice

from .layout import token_major

_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
# Programs that keep every multiprocessor of a large GPU busy.
_ENOUGH = 1024
_WARPS = 4
# Pairs of one head that a program holds at a time.
_PAIRS_AT_ONCE = 512
# The interpreter, in which tests run on a CPU, has no libdevice; nothing is fused there.
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


@triton.jit
def _product(x, y, FUSES: tl.constexpr):
    """x * y, rounded: never fused with a sum, for the host's operations are separate."""
    return libdevice.mul_rn(x, y) if FUSES else x * y


@triton.jit
def _tables(
    positions, inv_freq, factor, row, tokens, position_row, frequency_row, factor_row, length,
    PAIRS: tl.constexpr, BLOCK: tl.constexpr, TABLE: tl.constexpr, FUSES: tl.constexpr,
):  # fmt: skip
    """cos and sin of a block of tokens, rounded as a table of `TABLE` would be; and positions."""
    f = tl.arange(0, BLOCK)
    where = positions + row.to(tl.int64) * position_row + tokens
    position = tl.load(where, mask=tokens < length, other=0).to(tl.float32)
    frequency = tl.load(inv_freq + row * frequency_row + f, mask=f < PAIRS, other=0.0)
    a = tl.load(factor + row * factor_row)
    angle = _product(position[:, None], frequency[None, :], FUSES)
    cos = _product(tl.cos(angle), a, FUSES).to(TABLE).to(tl.float32)
    sin = _product(tl.sin(angle), a, FUSES).to(TABLE).to(tl.float32)
    return cos, sin, position, a


@triton.jit
def _turn(
    x, y, cos, sin, x_step, y_step, local, inside,
    PAIRS: tl.constexpr, BLOCK: tl.constexpr, SIZE: tl.constexpr, REST: tl.constexpr,
    INTERLEAVED: tl.constexpr, OUT: tl.constexpr, ROUND: tl.constexpr, FUSES: tl.constexpr,
):  # fmt: skip
    """Rotate a block of one head from `x` to `y`, both at their first token."""
    f = tl.arange(0, BLOCK)
    first = 2 * f if INTERLEAVED else f
    other = 2 * f + 1 if INTERLEAVED else f + PAIRS
    mask = inside[:, None] & (f < PAIRS)[None, :]
    x_rows, y_rows = x + local[:, None] * x_step, y + local[:, None] * y_step
    a = tl.load(x_rows + first[None, :], mask=mask, other=0.0).to(tl.float32)
    b = tl.load(x_rows + other[None, :], mask=mask, other=0.0).to(tl.float32)
    a_cos = _product(a, cos, FUSES).to(ROUND).to(tl.float32)
    b_cos = _product(b, cos, FUSES).to(ROUND).to(tl.float32)
    a_sin = _product(a, sin, FUSES).to(ROUND).to(tl.float32)
    b_sin = _product(b, sin, FUSES).to(ROUND).to(tl.float32)
    tl.store(y_rows + first[None, :], (a_cos - b_sin).to(ROUND).to(OUT), mask=mask)
    tl.store(y_rows + other[None, :], (b_cos + a_sin).to(ROUND).to(OUT), mask=mask)
    if REST > 0:
        e = 2 * PAIRS + tl.arange(0, REST)
        still = inside[:, None] & (e < SIZE)[None, :]
        kept = tl.load(x_rows + e[None, :], mask=still, other=0.0)
        tl.store(y_rows + e[None, :], kept.to(OUT), mask=still)
    return a, b


@triton.jit
def _forward(
    q, k, q_out, k_out, positions, inv_freq, factor,
    q_row, q_head, q_step, k_row, k_head, k_step, position_row, frequency_row, factor_row, length,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, SIZE: tl.constexpr, PAIRS: tl.constexpr,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr,
    INTERLEAVED: tl.constexpr, TABLE: tl.constexpr, Q_OUT: tl.constexpr, K_OUT: tl.constexpr,
    FUSES: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0) * TOKENS
    group, row = tl.program_id(1), tl.program_id(2)
    local = tl.arange(0, TOKENS)
    inside = start + local < length
    cos, sin, _, _ = _tables(
        positions, inv_freq, factor, row, start + local, position_row, frequency_row, factor_row,
        length, PAIRS, BLOCK, TABLE, FUSES,
    )  # fmt: skip
    row, start = row.to(tl.int64), start.to(tl.int64)
    token = row * length + start
    for i in range(HEADS):
        head = group * HEADS + i
        if head < Q_HEADS:
            _turn(
                q + row * q_row + head * q_head + start * q_step,
                q_out + (token * Q_HEADS + head) * SIZE,
                cos, sin, q_step, Q_HEADS * SIZE, local, inside,
                PAIRS, BLOCK, SIZE, REST, INTERLEAVED, Q_OUT, Q_OUT, FUSES,
            )  # fmt: skip
        elif head < Q_HEADS + K_HEADS:
            head -= Q_HEADS
            _turn(
                k + row * k_row + head * k_head + start * k_step,
                k_out + (token * K_HEADS + head) * SIZE,
                cos, sin, k_step, K_HEADS * SIZE, local, inside,
                PAIRS, BLOCK, SIZE, REST, INTERLEAVED, K_OUT, K_OUT, FUSES,
            )  # fmt: skip


@triton.jit
def _pull(
    g_a, g_b, out, step, local, inside,
    PAIRS: tl.constexpr, BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """What a block of one head adds to the gradients of its angles and of the factor."""
    f = tl.arange(0, BLOCK)
    first = 2 * f if INTERLEAVED else f
    other = 2 * f + 1 if INTERLEAVED else f + PAIRS
    mask = inside[:, None] & (f < PAIRS)[None, :]
    rows = out + local[:, None] * step
    a = tl.load(rows + first[None, :], mask=mask, other=0.0).to(tl.float32)
    b = tl.load(rows + other[None, :], mask=mask, other=0.0).to(tl.float32)
    return g_b * a - g_a * b, g_a * a + g_b * b


@triton.jit
def _backward(
    q, k, q_out, k_out, q_rotated, k_rotated, parts, positions, inv_freq, factor,
    q_row, q_head, q_step, k_row, k_head, k_step, position_row, frequency_row, factor_row, length,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, SIZE: tl.constexpr, PAIRS: tl.constexpr,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr,
    INTERLEAVED: tl.constexpr, TABLE: tl.constexpr, Q_OUT: tl.constexpr, K_OUT: tl.constexpr,
    FUSES: tl.constexpr, Q_GRAD: tl.constexpr, K_GRAD: tl.constexpr, LEARNED: tl.constexpr,
):  # fmt: skip
    """`q` and `k` are the gradients that arrive, `q_out` and `k_out` those that leave."""
    start = tl.program_id(0) * TOKENS
    group, row = tl.program_id(1), tl.program_id(2)
    part = (row * tl.num_programs(0) + tl.program_id(0)) * tl.num_programs(1) + group
    local = tl.arange(0, TOKENS)
    inside = start + local < length
    cos, sin, position, a = _tables(
        positions, inv_freq, factor, row, start + local, position_row, frequency_row, factor_row,
        length, PAIRS, BLOCK, TABLE, FUSES,
    )  # fmt: skip
    row, start = row.to(tl.int64), start.to(tl.int64)
    token = row * length + start
    turn = tl.zeros((TOKENS, BLOCK), dtype=tl.float32)
    size = tl.zeros((TOKENS, BLOCK), dtype=tl.float32)
    for i in range(HEADS):
        head = group * HEADS + i
        if head < Q_HEADS:
            place = (token * Q_HEADS + head) * SIZE
            g_a, g_b = _turn(
                q + row * q_row + head * q_head + start * q_step, q_out + place,
                cos, -sin, q_step, Q_HEADS * SIZE, local, inside,
                PAIRS, BLOCK, SIZE, REST, INTERLEAVED, Q_OUT, Q_GRAD, FUSES,
            )  # fmt: skip
            if LEARNED:
                d_turn, d_size = _pull(
                    g_a, g_b, q_rotated + place, Q_HEADS * SIZE, local, inside,
                    PAIRS, BLOCK, INTERLEAVED,
                )  # fmt: skip
                turn += d_turn
                size += d_size
        elif head < Q_HEADS + K_HEADS:
            head -= Q_HEADS
            place = (token * K_HEADS + head) * SIZE
            g_a, g_b = _turn(
                k + row * k_row + head * k_head + start * k_step, k_out + place,
                cos, -sin, k_step, K_HEADS * SIZE, local, inside,
                PAIRS, BLOCK, SIZE, REST, INTERLEAVED, K_OUT, K_GRAD, FUSES,
            )  # fmt: skip
            if LEARNED:
                d_turn, d_size = _pull(
                    g_a, g_b, k_rotated + place, K_HEADS * SIZE, local, inside,
                    PAIRS, BLOCK, INTERLEAVED,
                )  # fmt: skip
                turn += d_turn
                size += d_size
    if LEARNED:
        f = tl.arange(0, BLOCK)
        into = parts + part.to(tl.int64) * (PAIRS + 1)
        tl.store(into + f, tl.sum(turn * position[:, None], axis=0), mask=f < PAIRS)
        tl.store(into + PAIRS, tl.sum(tl.sum(size, axis=1), axis=0) / a)


def _blocks(q: Tensor, k: Tensor, pairs: int) -> tuple[tuple[int, int, int], dict[str, int]]:
    """Grid and block sizes of both kernels."""
    rows, q_heads, length, size = q.shape
    heads, rest = q_heads + k.shape[1], size - 2 * pairs
    block = triton.next_power_of_2(pairs)
    tokens = min(triton.next_power_of_2(length), max(1, _PAIRS_AT_ONCE // block))
    blocks = -(-length // tokens)
    # As many heads for each program as leaves enough programs: their angles are shared.
    groups = min(heads, max(1, -(-_ENOUGH // (blocks * rows))))
    each = -(-heads // groups)
    return (blocks, -(-heads // each), rows), {
        "Q_HEADS": q_heads,
        "K_HEADS": heads - q_heads,
        "SIZE": size,
        "PAIRS": pairs,
        "TOKENS": tokens,
        "HEADS": each,
        "BLOCK": block,
        "REST": triton.next_power_of_2(rest) if rest else 0,
        "FUSES": not _INTERPRETED,
        "num_warps": _WARPS,
    }


def _strides(
    q: Tensor, k: Tensor, positions: Tensor, inv_freq: Tensor, factor: Tensor
) -> tuple[int, ...]:
    by_row = (0 if len(x) == 1 else x.stride(0) for x in (positions, inv_freq, factor))
    return *q.stride()[:3], *k.stride()[:3], *by_row, q.shape[2]


def _dense(x: Tensor) -> Tensor:
    """The kernels want the entries of a head, tokens and frequencies side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def forward(
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    inv_freq: Tensor,
    factor: Tensor,
    interleaved: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """See `clex.kernels.rotary.rotate`."""
    q, k, positions, inv_freq = _dense(q), _dense(k), _dense(positions), _dense(inv_freq)
    q_out, k_out = (token_major(x, torch.promote_types(x.dtype, dtype)) for x in (q, k))
    grid, blocks = _blocks(q, k, inv_freq.shape[1])
    if q_out.numel():
        with torch.cuda.device_of(q):
            wrap_triton(_forward)[grid](
                q, k, q_out, k_out, positions, inv_freq, factor,
                *_strides(q, k, positions, inv_freq, factor),
                INTERLEAVED=interleaved, TABLE=_TYPES[dtype],
                Q_OUT=_TYPES[q_out.dtype], K_OUT=_TYPES[k_out.dtype], **blocks,
            )  # fmt: skip
    return q_out, k_out


def backward(
    grad_q: Tensor,
    grad_k: Tensor,
    out: list[Tensor],
    positions: Tensor,
    inv_freq: Tensor,
    factor: Tensor,
    interleaved: bool,
    dtype: torch.dtype,
    q_dtype: torch.dtype,
    k_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `clex.kernels.rotary.rotate_backward`."""
    q, k, positions, inv_freq = map(_dense, (grad_q, grad_k, positions, inv_freq))
    q_out, k_out = token_major(q, q_dtype), token_major(k, k_dtype)
    grid, blocks = _blocks(q, k, inv_freq.shape[1])
    parts = inv_freq.new_empty(grid[2] if out else 0, grid[0] * grid[1], inv_freq.shape[1] + 1)
    if q_out.numel():
        with torch.cuda.device_of(q):
            wrap_triton(_backward)[grid](
                q, k, q_out, k_out, *(out or (q, k)), parts, positions, inv_freq, factor,
                *_strides(q, k, positions, inv_freq, factor),
                INTERLEAVED=interleaved, TABLE=_TYPES[dtype],
                Q_OUT=_TYPES[q_dtype], K_OUT=_TYPES[k_dtype],
                Q_GRAD=_TYPES[q.dtype], K_GRAD=_TYPES[k.dtype], LEARNED=bool(out), **blocks,
            )  # fmt: skip
    return q_out, k_out, parts.sum(1)
