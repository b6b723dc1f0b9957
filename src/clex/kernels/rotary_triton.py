"""The Triton side of `clex.kernels.rotary`: one kernel forward, one backward.

A program takes a block of tokens and some heads. It computes the angles of its tokens once and
keeps cos and sin in registers for all of its heads, so that memory sees the queries and keys alone.
Bytes: each of them is read and written once; backward with learned frequencies reads the outputs
as well.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_TYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
# Programs that keep every multiprocessor of a large GPU busy.
_ENOUGH = 1024
_WARPS = 4
# Pairs of one head that a program holds at a time.
_PAIRS_AT_ONCE = 2048


@triton.jit
def _tables(
    positions, inv_freq, factor, row, tokens, position_row, position_step, frequency_row,
    factor_row, length, PAIRS: tl.constexpr, BLOCK: tl.constexpr, TABLE: tl.constexpr,
):  # fmt: skip
    """cos and sin of a block of tokens, rounded as a table of `TABLE` would be; and positions."""
    f = tl.arange(0, BLOCK)
    position = tl.load(
        positions + row.to(tl.int64) * position_row + tokens.to(tl.int64) * position_step,
        mask=tokens < length,
        other=0,
    ).to(tl.float32)
    frequency = tl.load(inv_freq + row * frequency_row + f, mask=f < PAIRS, other=0.0)
    a = tl.load(factor + row * factor_row)
    angle = position[:, None] * frequency[None, :]
    cos = (tl.cos(angle) * a).to(TABLE).to(tl.float32)
    sin = (tl.sin(angle) * a).to(TABLE).to(tl.float32)
    return cos, sin, position, a


@triton.jit
def _turn(
    x, y, cos, sin, x_step, x_entry, y_step, y_entry, local, inside, rest,
    PAIRS: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr, INTERLEAVED: tl.constexpr, OUT: tl.constexpr,
    ROUND: tl.constexpr,
):  # fmt: skip
    """Rotate a block of one head from `x` to `y`, both at their first token."""
    f = tl.arange(0, BLOCK)
    first = 2 * f if INTERLEAVED else f
    other = 2 * f + 1 if INTERLEAVED else f + PAIRS
    mask = inside[:, None] & (f < PAIRS)[None, :]
    x_rows, y_rows = x + local[:, None] * x_step, y + local[:, None] * y_step
    a = tl.load(x_rows + first[None, :] * x_entry, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(x_rows + other[None, :] * x_entry, mask=mask, other=0.0).to(tl.float32)
    # Each product is rounded, as separate operations of the host round it.
    y_a = (a * cos).to(ROUND).to(tl.float32) - (b * sin).to(ROUND).to(tl.float32)
    y_b = (b * cos).to(ROUND).to(tl.float32) + (a * sin).to(ROUND).to(tl.float32)
    tl.store(y_rows + first[None, :] * y_entry, y_a.to(ROUND).to(OUT), mask=mask)
    tl.store(y_rows + other[None, :] * y_entry, y_b.to(ROUND).to(OUT), mask=mask)
    if REST > 0:
        e = tl.arange(0, REST)
        mask_rest = inside[:, None] & (e < rest)[None, :]
        entries = (2 * PAIRS + e)[None, :]
        kept = tl.load(x_rows + entries * x_entry, mask=mask_rest, other=0.0)
        tl.store(y_rows + entries * y_entry, kept.to(OUT), mask=mask_rest)
    return a, b


@triton.jit
def _forward(
    q, k, q_out, k_out, positions, inv_freq, factor,
    q_row, q_head, q_step, q_entry, k_row, k_head, k_step, k_entry,
    qo_row, qo_head, qo_step, qo_entry, ko_row, ko_head, ko_step, ko_entry,
    position_row, position_step, frequency_row, factor_row,
    q_heads, k_heads, length, rest,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr, BLOCK: tl.constexpr,
    REST: tl.constexpr, INTERLEAVED: tl.constexpr, TABLE: tl.constexpr, Q_OUT: tl.constexpr, K_OUT: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0) * TOKENS
    group, row = tl.program_id(1), tl.program_id(2)
    local = tl.arange(0, TOKENS)
    inside = start + local < length
    cos, sin, _, _ = _tables(
        positions, inv_freq, factor, row, start + local, position_row, position_step,
        frequency_row, factor_row, length, PAIRS, BLOCK, TABLE,
    )  # fmt: skip
    row, start = row.to(tl.int64), start.to(tl.int64)
    for i in range(HEADS):
        head = group * HEADS + i
        if head < q_heads:
            _turn(
                q + row * q_row + head * q_head + start * q_step,
                q_out + row * qo_row + head * qo_head + start * qo_step,
                cos, sin, q_step, q_entry, qo_step, qo_entry, local, inside, rest,
                PAIRS, BLOCK, REST, INTERLEAVED, Q_OUT, Q_OUT,
            )  # fmt: skip
        elif head < q_heads + k_heads:
            head -= q_heads
            _turn(
                k + row * k_row + head * k_head + start * k_step,
                k_out + row * ko_row + head * ko_head + start * ko_step,
                cos, sin, k_step, k_entry, ko_step, ko_entry, local, inside, rest,
                PAIRS, BLOCK, REST, INTERLEAVED, K_OUT, K_OUT,
            )  # fmt: skip


@triton.jit
def _pull(
    g_a, g_b, out, step, entry, local, inside, PAIRS: tl.constexpr, BLOCK: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """What a block of one head adds to the gradients of its angles and of the factor."""
    f = tl.arange(0, BLOCK)
    first = 2 * f if INTERLEAVED else f
    other = 2 * f + 1 if INTERLEAVED else f + PAIRS
    mask = inside[:, None] & (f < PAIRS)[None, :]
    rows = out + local[:, None] * step
    a = tl.load(rows + first[None, :] * entry, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(rows + other[None, :] * entry, mask=mask, other=0.0).to(tl.float32)
    return g_b * a - g_a * b, g_a * a + g_b * b


@triton.jit
def _backward(
    q, k, q_out, k_out, q_rotated, k_rotated, parts, positions, inv_freq, factor,
    q_row, q_head, q_step, q_entry, k_row, k_head, k_step, k_entry,
    qo_row, qo_head, qo_step, qo_entry, ko_row, ko_head, ko_step, ko_entry,
    qr_row, qr_head, qr_step, qr_entry, kr_row, kr_head, kr_step, kr_entry,
    position_row, position_step, frequency_row, factor_row,
    q_heads, k_heads, length, rest,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr, BLOCK: tl.constexpr,
    REST: tl.constexpr, INTERLEAVED: tl.constexpr, TABLE: tl.constexpr, Q_OUT: tl.constexpr, K_OUT: tl.constexpr,
    Q_GRAD: tl.constexpr, K_GRAD: tl.constexpr, LEARNED: tl.constexpr,
):  # fmt: skip
    """`q` and `k` are the gradients that arrive, `q_out` and `k_out` those that leave."""
    start = tl.program_id(0) * TOKENS
    group, row = tl.program_id(1), tl.program_id(2)
    part = (row * tl.num_programs(0) + tl.program_id(0)) * tl.num_programs(1) + group
    local = tl.arange(0, TOKENS)
    inside = start + local < length
    cos, sin, position, a = _tables(
        positions, inv_freq, factor, row, start + local, position_row, position_step,
        frequency_row, factor_row, length, PAIRS, BLOCK, TABLE,
    )  # fmt: skip
    row, start = row.to(tl.int64), start.to(tl.int64)
    turn = tl.zeros((TOKENS, BLOCK), dtype=tl.float32)
    size = tl.zeros((TOKENS, BLOCK), dtype=tl.float32)
    for i in range(HEADS):
        head = group * HEADS + i
        if head < q_heads:
            g_a, g_b = _turn(
                q + row * q_row + head * q_head + start * q_step,
                q_out + row * qo_row + head * qo_head + start * qo_step,
                cos, -sin, q_step, q_entry, qo_step, qo_entry, local, inside, rest,
                PAIRS, BLOCK, REST, INTERLEAVED, Q_OUT, Q_GRAD,
            )  # fmt: skip
            if LEARNED:
                rotated = q_rotated + row * qr_row + head * qr_head + start * qr_step
                d_turn, d_size = _pull(
                    g_a,
                    g_b,
                    rotated,
                    qr_step,
                    qr_entry,
                    local,
                    inside,
                    PAIRS,
                    BLOCK,
                    INTERLEAVED,
                )
                turn += d_turn
                size += d_size
        elif head < q_heads + k_heads:
            head -= q_heads
            g_a, g_b = _turn(
                k + row * k_row + head * k_head + start * k_step,
                k_out + row * ko_row + head * ko_head + start * ko_step,
                cos, -sin, k_step, k_entry, ko_step, ko_entry, local, inside, rest,
                PAIRS, BLOCK, REST, INTERLEAVED, K_OUT, K_GRAD,
            )  # fmt: skip
            if LEARNED:
                rotated = k_rotated + row * kr_row + head * kr_head + start * kr_step
                d_turn, d_size = _pull(
                    g_a,
                    g_b,
                    rotated,
                    kr_step,
                    kr_entry,
                    local,
                    inside,
                    PAIRS,
                    BLOCK,
                    INTERLEAVED,
                )
                turn += d_turn
                size += d_size
    if LEARNED:
        f = tl.arange(0, BLOCK)
        into = parts + part.to(tl.int64) * (PAIRS + 1)
        tl.store(into + f, tl.sum(turn * position[:, None], axis=0), mask=f < PAIRS)
        tl.store(into + PAIRS, tl.sum(tl.sum(size, axis=1), axis=0) / a)


def _row(tensor: Tensor) -> int:
    """Stride between rows of the batch, 0 where all share one."""
    return 0 if len(tensor) == 1 else tensor.stride(0)


class _Launch:
    """Grid and arguments that both kernels share."""

    def __init__(self, q: Tensor, k: Tensor, positions: Tensor, inv_freq: Tensor) -> None:
        rows, self.q_heads, self.length, size = q.shape
        self.k_heads, self.pairs = k.shape[1], inv_freq.shape[1]
        self.rest = size - 2 * self.pairs
        block = triton.next_power_of_2(self.pairs)
        tokens = min(triton.next_power_of_2(self.length), max(1, _PAIRS_AT_ONCE // block))
        blocks = triton.cdiv(self.length, tokens)
        heads = self.q_heads + self.k_heads
        # As many heads for each program as leaves enough programs: their angles are shared.
        groups = min(heads, max(1, triton.cdiv(_ENOUGH, blocks * rows)))
        self.blocks = {
            "TOKENS": tokens,
            "HEADS": triton.cdiv(heads, groups),
            "PAIRS": self.pairs,
            "BLOCK": block,
            "REST": triton.next_power_of_2(self.rest) if self.rest else 0,
        }
        self.grid = (blocks, triton.cdiv(heads, self.blocks["HEADS"]), rows)

    def run(
        self,
        kernel: Any,
        tensors: tuple[Tensor, ...],
        strided: tuple[Tensor, ...],
        tables: tuple[Tensor, Tensor, Tensor],
        **constants: Any,
    ) -> None:
        positions, inv_freq, factor = tables
        with torch.cuda.device_of(tensors[0]):
            kernel[self.grid](
                *tensors, *tables,
                *(stride for tensor in strided for stride in tensor.stride()),
                _row(positions), positions.stride(1), _row(inv_freq), _row(factor),
                self.q_heads, self.k_heads, self.length, self.rest,
                **self.blocks, **constants, num_warps=_WARPS, enable_fp_fusion=False,
            )  # fmt: skip


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
    q_out, k_out = (torch.empty_like(x, dtype=torch.promote_types(x.dtype, dtype)) for x in (q, k))
    if q.numel():
        inv_freq = inv_freq.contiguous()
        _Launch(q, k, positions, inv_freq).run(
            _forward,
            (q, k, q_out, k_out),
            (q, k, q_out, k_out),
            (positions, inv_freq, factor),
            INTERLEAVED=interleaved,
            TABLE=_TYPES[dtype],
            Q_OUT=_TYPES[q_out.dtype],
            K_OUT=_TYPES[k_out.dtype],
        )
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
    q_out = torch.empty_like(grad_q, dtype=q_dtype)
    k_out = torch.empty_like(grad_k, dtype=k_dtype)
    inv_freq = inv_freq.contiguous()
    launch = _Launch(grad_q, grad_k, positions, inv_freq)
    rotated = out or [grad_q, grad_k]
    blocks, groups, rows = launch.grid
    parts = inv_freq.new_empty(rows if out else 0, blocks * groups, launch.pairs + 1)
    if grad_q.numel():
        launch.run(
            _backward,
            (grad_q, grad_k, q_out, k_out, *rotated, parts),
            (grad_q, grad_k, q_out, k_out, *rotated),
            (positions, inv_freq, factor),
            INTERLEAVED=interleaved,
            TABLE=_TYPES[dtype],
            Q_OUT=_TYPES[q_dtype],
            K_OUT=_TYPES[k_dtype],
            Q_GRAD=_TYPES[grad_q.dtype],
            K_GRAD=_TYPES[grad_k.dtype],
            LEARNED=bool(out),
        )
    return q_out, k_out, parts.sum(1)
