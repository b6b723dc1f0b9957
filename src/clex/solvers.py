"""Solving the dynamics for many end points at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torchdiffeq import odeint

from .errors import ConfigError

Rate = Callable[[Tensor, Tensor], Tensor]

# Steps after which `dopri5` gives up; the fields of trained models take a few dozen.
_MOST_STEPS = 2048


def solve(rate: Rate, start: float, end: Tensor, size: int, *, method: str, steps: int) -> Tensor:
    """Integrate dr/ds = rate(s, r) from r(start) = 0 to s = end, one end for each row.

    Args:
        rate: takes s of shape (B,) and r of shape (B, size), returns (B, size).
        start: where all rows begin.
        end: where each row ends, shape (B,). A row with ``end == start`` stays exactly 0.
        size: entries of r.
        method: ``"rk4"``, classical Runge-Kutta in `steps` equal steps for each row (4 * steps
            evaluations, whatever B is); or ``"dopri5"``, the adaptive reference of torchdiffeq at
            rtol = atol = 1e-9, for float64 (1e-6 for float32).
        steps: number of RK4 steps; `dopri5` chooses its own.

    Returns:
        r(end), shape (B, size), dtype of `end`, differentiable by plain back-propagation.

    Raises:
        ConfigError: `dopri5` cannot keep its tolerance, or only in thousands of steps.
    """
    state = torch.zeros(len(end), size, dtype=end.dtype, device=end.device)
    span = end - start
    if method == "dopri5":
        tolerance = 1e-9 if end.dtype == torch.float64 else 1e-6

        def unit_rate(share: Tensor, state: Tensor) -> Tensor:
            return span[:, None] * rate(start + share * span, state)

        unit = torch.tensor([0.0, 1.0], dtype=end.dtype, device=end.device)
        most = {"max_num_steps": _MOST_STEPS}
        try:
            return odeint(
                unit_rate,
                state,
                unit,
                rtol=tolerance,
                atol=tolerance,
                method="dopri5",
                options=most,
            )[-1]
        except AssertionError as error:
            raise ConfigError(
                f"solver 'dopri5' cannot solve these dynamics ({error}); use solver 'rk4'"
            ) from error
    step = span / steps
    h = step[:, None]
    for k in range(steps):
        s = start + k * step
        k1 = rate(s, state)
        k2 = rate(s + step / 2, state + h / 2 * k1)
        k3 = rate(s + step / 2, state + h / 2 * k2)
        k4 = rate(s + step, state + h * k3)
        state = state + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return state
