"""The modulated field, solved by RK4 in one kernel; its gradient in another.

Every pair of a scale and a frequency has an equation of its own, and where layers have curves of
their own every layer too, so all are solved at the same time, with the state in registers. The base
curve enters as tables of its value and rate at the clocks that RK4 visits. The gradient is that of
the discrete steps, as back-propagation through them gives it: the adjoint goes back step by step
from the states that forward kept.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Equations for each program. A warp shares the hidden units of a few.
_FREQUENCIES = 2
_WARPS = 1


@triton.jit
def _tanh(x):
    # exp overflows to infinity for large x, which gives 1 as it should.
    return 1 - 2 / (1 + tl.exp(2 * x))


@triton.jit
def _activation(a, SILU: tl.constexpr):
    return a / (1 + tl.exp(-a)) if SILU else _tanh(a)


@triton.jit
def _slope_of(a, y, SILU: tl.constexpr):
    """Derivative of the activation at `a`, where it is `y`."""
    if SILU:
        gate = 1 / (1 + tl.exp(-a))
        return gate + y * (1 - gate)
    return 1 - y * y


@triton.jit
def _base(curve, rate, row, point, f, mask, width, STEPS: tl.constexpr):
    """z and rate of the base curve at one of the 2 * STEPS + 1 clocks, (equations,) each."""
    where = (row * (2 * STEPS + 1) + point) * width + f % width
    return tl.load(curve + where, mask=mask, other=0.0), tl.load(rate + where, mask=mask, other=0.0)


@triton.jit
def _hidden(u, z, still, on_u, on_z):
    """Inputs of the activations at clock `u`, (frequencies, hidden)."""
    return still + (u * on_u)[None, :] + z[:, None] * on_z[None, :]


@triton.jit
def _rate(u, z, base_rate, still, on_u, on_z, w2, b2, BOUND: tl.constexpr, SILU: tl.constexpr):
    y = _activation(_hidden(u, z, still, on_u, on_z), SILU)
    g = tl.sum(y * w2[None, :], axis=1) + b2
    return -base_rate * (tl.exp(BOUND * _tanh(g)) - 1)


@triton.jit
def _network(w1, b1, w2, log_turns, hidden, unit, HIDDEN: tl.constexpr):
    """What of the network does not change along the way; `unit` scales the inputs to about one."""
    j = tl.arange(0, HIDDEN)
    mask = j < hidden
    on_native = tl.load(w1 + 3 * j, mask=mask, other=0.0) * unit
    on_z = tl.load(w1 + 3 * j + 1, mask=mask, other=0.0) * unit
    on_u = tl.load(w1 + 3 * j + 2, mask=mask, other=0.0) * unit + on_z
    still = tl.load(b1 + j, mask=mask, other=0.0)[None, :]
    still += log_turns[:, None] * (on_native + on_z)[None, :]
    return still, on_u, on_z, tl.load(w2 + j, mask=mask, other=0.0)


@triton.jit
def _solve(
    t, curve, rate, log_turns, w1, b1, w2, b2, residual, states, size, width, hidden, unit,
    STEPS: tl.constexpr, BOUND: tl.constexpr, SILU: tl.constexpr,
    FREQUENCIES: tl.constexpr, HIDDEN: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    f = tl.program_id(1) * FREQUENCIES + tl.arange(0, FREQUENCIES)
    mask = f < size
    turns = tl.load(log_turns + f % width, mask=mask, other=0.0)
    still, on_u, on_z, w2 = _network(w1, b1, w2, turns, hidden, unit, HIDDEN)
    b2 = tl.load(b2 + f, mask=mask, other=0.0)
    h = tl.log(tl.load(t + row)) / STEPS
    r = tl.zeros((FREQUENCIES,), dtype=tl.float32)
    for k in range(STEPS):
        tl.store(states + (row * STEPS + k) * size + f, r, mask=mask)
        u = k * h
        m = u + h / 2
        z1, rate1 = _base(curve, rate, row, 2 * k, f, mask, width, STEPS)
        z2, rate2 = _base(curve, rate, row, 2 * k + 1, f, mask, width, STEPS)
        z4, rate4 = _base(curve, rate, row, 2 * k + 2, f, mask, width, STEPS)
        k1 = _rate(u, z1 + r, rate1, still, on_u, on_z, w2, b2, BOUND, SILU)
        k2 = _rate(m, z2 + r + h / 2 * k1, rate2, still, on_u, on_z, w2, b2, BOUND, SILU)
        k3 = _rate(m, z2 + r + h / 2 * k2, rate2, still, on_u, on_z, w2, b2, BOUND, SILU)
        k4 = _rate(u + h, z4 + r + h * k3, rate4, still, on_u, on_z, w2, b2, BOUND, SILU)
        r += h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    tl.store(residual + row * size + f, r, mask=mask)


@triton.jit
def _pull(
    pull, u, z, base_rate, still, on_u, on_z, w2, b2, d_a, d_au, d_az, d_w2, d_b2,
    BOUND: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Pull the gradient of one rate back to its state, and add to those of the network."""
    a = _hidden(u, z, still, on_u, on_z)
    y = _activation(a, SILU)
    share = _tanh(tl.sum(y * w2[None, :], axis=1) + b2)
    d_g = -pull * base_rate * tl.exp(BOUND * share) * BOUND * (1 - share * share)
    d_hidden = d_g[:, None] * w2[None, :] * _slope_of(a, y, SILU)
    d_a += d_hidden
    d_au += d_hidden * u
    d_az += d_hidden * (z + u)[:, None]
    d_w2 += d_g[:, None] * y
    d_b2 += d_g
    return tl.sum(d_hidden * on_z[None, :], axis=1), d_a, d_au, d_az, d_w2, d_b2


@triton.jit
def _adjoint(
    t, curve, rate, log_turns, w1, b1, w2, b2, states, grad, parts, d_bias,
    size, width, hidden, unit,
    STEPS: tl.constexpr, BOUND: tl.constexpr, SILU: tl.constexpr,
    FREQUENCIES: tl.constexpr, HIDDEN: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    f = tl.program_id(1) * FREQUENCIES + tl.arange(0, FREQUENCIES)
    mask = f < size
    turns = tl.load(log_turns + f % width, mask=mask, other=0.0)
    still, on_u, on_z, w2 = _network(w1, b1, w2, turns, hidden, unit, HIDDEN)
    b2 = tl.load(b2 + f, mask=mask, other=0.0)
    h = tl.log(tl.load(t + row)) / STEPS
    left = tl.load(grad + row * size + f, mask=mask, other=0.0)
    d_a = tl.zeros((FREQUENCIES, HIDDEN), dtype=tl.float32)
    d_au, d_az, d_w2 = d_a, d_a, d_a
    d_b2 = tl.zeros((FREQUENCIES,), dtype=tl.float32)
    for back in range(STEPS):
        k = STEPS - 1 - back
        r = tl.load(states + (row * STEPS + k) * size + f, mask=mask, other=0.0)
        u = k * h
        m = u + h / 2
        z1, rate1 = _base(curve, rate, row, 2 * k, f, mask, width, STEPS)
        z2, rate2 = _base(curve, rate, row, 2 * k + 1, f, mask, width, STEPS)
        z4, rate4 = _base(curve, rate, row, 2 * k + 2, f, mask, width, STEPS)
        z1 += r
        z3 = z2 + r
        z2 = z3 + h / 2 * _rate(u, z1, rate1, still, on_u, on_z, w2, b2, BOUND, SILU)
        z3 = z3 + h / 2 * _rate(m, z2, rate2, still, on_u, on_z, w2, b2, BOUND, SILU)
        z4 += r + h * _rate(m, z3, rate2, still, on_u, on_z, w2, b2, BOUND, SILU)
        d4, d_a, d_au, d_az, d_w2, d_b2 = _pull(
            h / 6 * left, u + h, z4, rate4, still, on_u, on_z, w2, b2,
            d_a, d_au, d_az, d_w2, d_b2, BOUND, SILU,
        )  # fmt: skip
        d3, d_a, d_au, d_az, d_w2, d_b2 = _pull(
            h / 3 * left + h * d4, m, z3, rate2, still, on_u, on_z, w2, b2,
            d_a, d_au, d_az, d_w2, d_b2, BOUND, SILU,
        )  # fmt: skip
        d2, d_a, d_au, d_az, d_w2, d_b2 = _pull(
            h / 3 * left + h / 2 * d3, m, z2, rate2, still, on_u, on_z, w2, b2,
            d_a, d_au, d_az, d_w2, d_b2, BOUND, SILU,
        )  # fmt: skip
        d1, d_a, d_au, d_az, d_w2, d_b2 = _pull(
            h / 6 * left + h / 2 * d2, u, z1, rate1, still, on_u, on_z, w2, b2,
            d_a, d_au, d_az, d_w2, d_b2, BOUND, SILU,
        )  # fmt: skip
        left += d1 + d2 + d3 + d4
    j = tl.arange(0, HIDDEN)
    live = j < hidden
    into = parts + (row * tl.num_programs(1) + tl.program_id(1)) * 5 * hidden
    on_native = tl.sum(d_a * turns[:, None], axis=0)
    tl.store(into + 3 * j, unit * on_native, mask=live)
    tl.store(into + 3 * j + 1, unit * (on_native + tl.sum(d_az, axis=0)), mask=live)
    tl.store(into + 3 * j + 2, unit * tl.sum(d_au, axis=0), mask=live)
    tl.store(into + 3 * hidden + j, tl.sum(d_a, axis=0), mask=live)
    tl.store(into + 4 * hidden + j, tl.sum(d_w2, axis=0), mask=live)
    tl.store(d_bias + row * size + f, d_b2, mask=mask)


@torch.library.custom_op("clex::residual", mutates_args=())
def residual(
    t: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    curve: Tensor,
    rate: Tensor,
    log_turns: Tensor,
    bound: float,
    silu: bool,
    steps: int,
) -> tuple[Tensor, Tensor]:
    """The residual of the modulated field at scales `t`, and the states on the way to it.

    Args:
        t: (B,) float32, at least 1; no gradient goes to it.
        w1, b1, w2: (H, 3), (H,), (1, H); the network of the field, float32.
        b2: (N,), its output's bias in each equation; N is a multiple of F, F equations a layer.
        curve: (B, 2 steps + 1, F) float32, log of the base's ratio at equal distances from log 1
            to log t.
        rate: the base's rate there, likewise.
        log_turns: (F,), log of the turns in the native window.
        bound: of the field.
        silu: whether its activation is SiLU, not tanh.
        steps: of RK4 from log 1 to log t.

    Returns:
        The residual of the log frequencies, (B, N) float32; and the state before each step,
        (B, steps, N), which only the gradient needs.
    """
    rows, size = len(t), len(b2)
    out = t.new_empty(rows, size)
    states = t.new_empty(rows, steps, size)
    network = (w1, b1, w2, b2)
    base = (curve, rate, log_turns)
    _launch(_solve, t, base, network, (out, states), bound, silu, steps)
    return out, states


@residual.register_fake
def _(
    t: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    curve: Tensor,
    rate: Tensor,
    log_turns: Tensor,
    bound: float,
    silu: bool,
    steps: int,
) -> tuple[Tensor, Tensor]:
    rows, size = len(t), len(b2)
    return t.new_empty(rows, size), t.new_empty(rows, steps, size)


@torch.library.custom_op("clex::residual_backward", mutates_args=())
def residual_backward(
    grad: Tensor,
    states: Tensor,
    t: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    curve: Tensor,
    rate: Tensor,
    log_turns: Tensor,
    bound: float,
    silu: bool,
    steps: int,
) -> Tensor:
    """Gradients of w1, b1, w2 and b2, flat and in this order, (5 H + N,)."""
    programs = len(t) * triton.cdiv(len(b2), _FREQUENCIES)
    parts = t.new_empty(programs, 5 * len(b1))
    bias = t.new_empty(len(t), len(b2))
    work = (states, grad.contiguous(), parts, bias)
    base = (curve, rate, log_turns)
    _launch(_adjoint, t, base, (w1, b1, w2, b2), work, bound, silu, steps)
    return torch.cat([parts.sum(0), bias.sum(0)])


@residual_backward.register_fake
def _(
    grad: Tensor,
    states: Tensor,
    t: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    curve: Tensor,
    rate: Tensor,
    log_turns: Tensor,
    bound: float,
    silu: bool,
    steps: int,
) -> Tensor:
    return t.new_empty(5 * len(b1) + len(b2))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.settings = inputs[8:]
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], *inputs[:8])


def _backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    states, *inputs = ctx.saved_tensors
    flat = residual_backward(grad, states, *inputs, *ctx.settings)
    _, w1, b1, w2, b2, *_ = inputs
    sizes = [x.numel() for x in (w1, b1, w2, b2)]
    parts = zip(flat.split(sizes), (w1, b1, w2, b2), strict=True)
    grads = tuple(part.view(x.shape) for part, x in parts)
    return None, *grads, *(None,) * 6


residual.register_autograd(_backward, setup_context=_setup)


def _launch(
    kernel: Any,
    t: Tensor,
    base: tuple[Tensor, Tensor, Tensor],
    network: tuple[Tensor, Tensor, Tensor, Tensor],
    work: tuple[Tensor, ...],
    bound: float,
    silu: bool,
    steps: int,
) -> None:
    hidden, size, width = len(network[1]), len(network[3]), len(base[2])
    with torch.cuda.device_of(t):
        kernel[(len(t), triton.cdiv(size, _FREQUENCIES))](
            t, *base, *network, *work, size, width, hidden, 1 / math.log(32),
            STEPS=steps, BOUND=bound, SILU=silu,
            FREQUENCIES=_FREQUENCIES, HIDDEN=triton.next_power_of_2(hidden), num_warps=_WARPS,
        )  # fmt: skip
