"""The modulated field around `dynamic_ntk`, solved by RK4 in one kernel; its gradient in another.

Every pair of a scale and a frequency has an equation of its own, so all are solved at the same
time, with the state in registers. The gradient is that of the discrete steps, as back-propagation
through them gives it: the adjoint goes back step by step from the states that forward kept.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Frequencies for each program. A warp shares the hidden units of a few frequencies.
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
def _hidden(u, r, slope, still, on_u, on_z, FACTOR: tl.constexpr):
    """Inputs of the activations, (frequencies, hidden), and rate of the base, at clock `u`."""
    s = tl.exp(u)
    alpha = FACTOR * s - (FACTOR - 1)
    z = r - slope * tl.log(alpha)
    a = still + (u * on_u)[None, :] + z[:, None] * on_z[None, :]
    return a, z, slope * (FACTOR * s / alpha)


@triton.jit
def _rate(
    u, r, slope, still, on_u, on_z, w2, b2, FACTOR: tl.constexpr, BOUND: tl.constexpr,
    SILU: tl.constexpr,
):  # fmt: skip
    a, _, base_rate = _hidden(u, r, slope, still, on_u, on_z, FACTOR)
    g = tl.sum(_activation(a, SILU) * w2[None, :], axis=1) + b2
    return -base_rate * (tl.exp(BOUND * _tanh(g)) - 1)


@triton.jit
def _network(w1, b1, w2, b2, log_turns, hidden, unit, HIDDEN: tl.constexpr):
    """What of the network does not change along the way; `unit` scales the inputs to about one."""
    j = tl.arange(0, HIDDEN)
    mask = j < hidden
    on_native = tl.load(w1 + 3 * j, mask=mask, other=0.0) * unit
    on_z = tl.load(w1 + 3 * j + 1, mask=mask, other=0.0) * unit
    on_u = tl.load(w1 + 3 * j + 2, mask=mask, other=0.0) * unit + on_z
    still = tl.load(b1 + j, mask=mask, other=0.0)[None, :]
    still += log_turns[:, None] * (on_native + on_z)[None, :]
    return still, on_u, on_z, tl.load(w2 + j, mask=mask, other=0.0), tl.load(b2)


@triton.jit
def _solve(
    t, slope, log_turns, w1, b1, w2, b2, residual, states, size, hidden, unit,
    STEPS: tl.constexpr, FACTOR: tl.constexpr, BOUND: tl.constexpr, SILU: tl.constexpr,
    FREQUENCIES: tl.constexpr, HIDDEN: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    f = tl.program_id(1) * FREQUENCIES + tl.arange(0, FREQUENCIES)
    mask = f < size
    slope = tl.load(slope + f, mask=mask, other=0.0)
    turns = tl.load(log_turns + f, mask=mask, other=0.0)
    still, on_u, on_z, w2, b2 = _network(w1, b1, w2, b2, turns, hidden, unit, HIDDEN)
    h = tl.log(tl.load(t + row)) / STEPS
    r = tl.zeros((FREQUENCIES,), dtype=tl.float32)
    for k in range(STEPS):
        tl.store(states + (row * STEPS + k) * size + f, r, mask=mask)
        u = k * h
        m = u + h / 2
        k1 = _rate(u, r, slope, still, on_u, on_z, w2, b2, FACTOR, BOUND, SILU)
        k2 = _rate(m, r + h / 2 * k1, slope, still, on_u, on_z, w2, b2, FACTOR, BOUND, SILU)
        k3 = _rate(m, r + h / 2 * k2, slope, still, on_u, on_z, w2, b2, FACTOR, BOUND, SILU)
        k4 = _rate(u + h, r + h * k3, slope, still, on_u, on_z, w2, b2, FACTOR, BOUND, SILU)
        r += h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    tl.store(residual + row * size + f, r, mask=mask)


@triton.jit
def _pull(
    pull, u, r, slope, still, on_u, on_z, w2, b2, d_a, d_au, d_az, d_w2, d_b2,
    FACTOR: tl.constexpr, BOUND: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Pull the gradient of one rate back to its state, and add to those of the network."""
    a, z, base_rate = _hidden(u, r, slope, still, on_u, on_z, FACTOR)
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
    t, slope, log_turns, w1, b1, w2, b2, states, grad, parts, size, hidden, unit,
    STEPS: tl.constexpr, FACTOR: tl.constexpr, BOUND: tl.constexpr, SILU: tl.constexpr,
    FREQUENCIES: tl.constexpr, HIDDEN: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    f = tl.program_id(1) * FREQUENCIES + tl.arange(0, FREQUENCIES)
    mask = f < size
    slope = tl.load(slope + f, mask=mask, other=0.0)
    turns = tl.load(log_turns + f, mask=mask, other=0.0)
    still, on_u, on_z, w2, b2 = _network(w1, b1, w2, b2, turns, hidden, unit, HIDDEN)
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
        r2 = r + h / 2 * _rate(u, r, slope, still, on_u, on_z, w2, b2, FACTOR, BOUND, SILU)
        r3 = r + h / 2 * _rate(m, r2, slope, still, on_u, on_z, w2, b2, FACTOR, BOUND, SILU)
        r4 = r + h * _rate(m, r3, slope, still, on_u, on_z, w2, b2, FACTOR, BOUND, SILU)
        d4, d_a, d_au, d_az, d_w2, d_b2 = _pull(
            h / 6 * left, u + h, r4, slope, still, on_u, on_z, w2, b2,
            d_a, d_au, d_az, d_w2, d_b2, FACTOR, BOUND, SILU,
        )  # fmt: skip
        d3, d_a, d_au, d_az, d_w2, d_b2 = _pull(
            h / 3 * left + h * d4, m, r3, slope, still, on_u, on_z, w2, b2,
            d_a, d_au, d_az, d_w2, d_b2, FACTOR, BOUND, SILU,
        )  # fmt: skip
        d2, d_a, d_au, d_az, d_w2, d_b2 = _pull(
            h / 3 * left + h / 2 * d3, m, r2, slope, still, on_u, on_z, w2, b2,
            d_a, d_au, d_az, d_w2, d_b2, FACTOR, BOUND, SILU,
        )  # fmt: skip
        d1, d_a, d_au, d_az, d_w2, d_b2 = _pull(
            h / 6 * left + h / 2 * d2, u, r, slope, still, on_u, on_z, w2, b2,
            d_a, d_au, d_az, d_w2, d_b2, FACTOR, BOUND, SILU,
        )  # fmt: skip
        left += d1 + d2 + d3 + d4
    j = tl.arange(0, HIDDEN)
    live = j < hidden
    into = parts + (row * tl.num_programs(1) + tl.program_id(1)) * (5 * hidden + 1)
    on_native = tl.sum(d_a * turns[:, None], axis=0)
    tl.store(into + 3 * j, unit * on_native, mask=live)
    tl.store(into + 3 * j + 1, unit * (on_native + tl.sum(d_az, axis=0)), mask=live)
    tl.store(into + 3 * j + 2, unit * tl.sum(d_au, axis=0), mask=live)
    tl.store(into + 3 * hidden + j, tl.sum(d_a, axis=0), mask=live)
    tl.store(into + 4 * hidden + j, tl.sum(d_w2, axis=0), mask=live)
    tl.store(into + 5 * hidden, tl.sum(d_b2, axis=0))


@torch.library.custom_op("clex::residual", mutates_args=())
def residual(
    t: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    slope: Tensor,
    log_turns: Tensor,
    factor: float,
    bound: float,
    silu: bool,
    steps: int,
) -> tuple[Tensor, Tensor]:
    """The residual of the modulated field at scales `t`, and the states on the way to it.

    Args:
        t: (B,) float32, at least 1; no gradient goes to it.
        w1, b1, w2, b2: (H, 3), (H,), (1, H), (1,); the network of the field, float32.
        slope: (F,), that of `dynamic_ntk`, whose alpha is ``factor * t - (factor - 1)``.
        log_turns: (F,), log of the turns in the native window.
        bound: of the field.
        silu: whether its activation is SiLU, not tanh.
        steps: of RK4 from log 1 to log t.

    Returns:
        The residual of the log frequencies, (B, F) float32; and the state before each step,
        (B, steps, F), which only the gradient needs.
    """
    rows, size = len(t), len(slope)
    out = t.new_empty(rows, size)
    states = t.new_empty(rows, steps, size)
    network = (w1, b1, w2, b2)
    _launch(_solve, t, network, slope, log_turns, (out, states), factor, bound, silu, steps)
    return out, states


@residual.register_fake
def _(
    t: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    slope: Tensor,
    log_turns: Tensor,
    factor: float,
    bound: float,
    silu: bool,
    steps: int,
) -> tuple[Tensor, Tensor]:
    rows, size = len(t), len(slope)
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
    slope: Tensor,
    log_turns: Tensor,
    factor: float,
    bound: float,
    silu: bool,
    steps: int,
) -> Tensor:
    """Gradients of w1, b1, w2 and b2, flat and in this order, (5 H + 1,)."""
    programs = len(t) * triton.cdiv(len(slope), _FREQUENCIES)
    parts = t.new_empty(programs, 5 * len(b1) + 1)
    work = (states, grad.contiguous(), parts)
    _launch(_adjoint, t, (w1, b1, w2, b2), slope, log_turns, work, factor, bound, silu, steps)
    return parts.sum(0)


@residual_backward.register_fake
def _(
    grad: Tensor,
    states: Tensor,
    t: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    slope: Tensor,
    log_turns: Tensor,
    factor: float,
    bound: float,
    silu: bool,
    steps: int,
) -> Tensor:
    return t.new_empty(5 * len(b1) + 1)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.settings = inputs[7:]
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], *inputs[:7])


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
    network: tuple[Tensor, Tensor, Tensor, Tensor],
    slope: Tensor,
    log_turns: Tensor,
    work: tuple[Tensor, ...],
    factor: float,
    bound: float,
    silu: bool,
    steps: int,
) -> None:
    hidden, size = len(network[1]), len(slope)
    with torch.cuda.device_of(t):
        kernel[(len(t), triton.cdiv(size, _FREQUENCIES))](
            t, slope, log_turns, *network, *work, size, hidden, 1 / math.log(32),
            STEPS=steps, FACTOR=factor, BOUND=bound, SILU=silu,
            FREQUENCIES=_FREQUENCIES, HIDDEN=triton.next_power_of_2(hidden), num_warps=_WARPS,
        )  # fmt: skip
