"""The solver, on problems whose solution is known."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from clex.errors import ConfigError
from clex.solvers import solve
from references import assert_close

ENDS = torch.tensor([1.0, 1.5, 2.0, 4.0], dtype=torch.float64)


def cosine(s: Tensor, r: Tensor) -> Tensor:
    """r' = (r + 1) cos(s), whose solution from r(1) = 0 is exp(sin s - sin 1) - 1."""
    return (r + 1) * s.cos()[:, None]


def exact(end: Tensor, size: int) -> Tensor:
    return ((end.sin() - math.sin(1)).exp() - 1)[:, None].expand(-1, size)


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_each_row_ends_at_its_own_end(method: str) -> None:
    result = solve(cosine, 1.0, ENDS, 3, method=method, steps=64)
    assert result.dtype == torch.float64 and result.shape == (4, 3)
    assert torch.equal(result[0], torch.zeros(3, dtype=torch.float64)), "a row of no length moved"
    # 64 steps of at most 3/64 leave about (3/64)**4 / 100; dopri5 is set to 1e-9 a step.
    assert_close(result[1:], exact(ENDS[1:], 3).numpy(), 1e-6)


def test_rk4_is_of_order_four() -> None:
    end = torch.tensor([3.0], dtype=torch.float64)
    errors = []
    for steps in (8, 16, 32, 64):
        error = solve(cosine, 1.0, end, 1, method="rk4", steps=steps) - exact(end, 1)
        errors.append(math.log2(float(error.abs())))
    slopes = [a - b for a, b in itertools.pairwise(errors)]
    # The next term of the error shifts the slope by about 1/steps.
    assert all(abs(slope - 4) < 0.3 for slope in slopes), slopes


def test_rows_do_not_depend_on_each_other() -> None:
    together = solve(cosine, 1.0, ENDS, 2, method="rk4", steps=8)
    alone = torch.cat([solve(cosine, 1.0, e[None], 2, method="rk4", steps=8) for e in ENDS])
    assert torch.equal(together, alone)


def test_float32_stays_float32() -> None:
    result = solve(cosine, 1.0, ENDS.float(), 2, method="rk4", steps=16)
    assert result.dtype == torch.float32
    # 16 steps of 3/16 in float32 for a solution of size one.
    assert_close(result[1:], exact(ENDS[1:], 2).numpy(), 1e-4)


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_gradients(method: str) -> None:
    weight = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    end = torch.tensor([1.0, 2.0], dtype=torch.float64)

    def final(weight: Tensor) -> Tensor:
        def rate(s: Tensor, r: Tensor) -> Tensor:
            return torch.tanh((r + 1) @ weight) * s[:, None]

        return solve(rate, 1.0, end, 2, method=method, steps=4)

    # dopri5 chooses steps from the values, so its numerical derivative carries its tolerance.
    assert torch.autograd.gradcheck(final, weight, atol=1e-6 if method == "rk4" else 1e-4)


def test_adaptive_steps_have_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clex.solvers._MOST_STEPS", 50)
    solve(cosine, 1.0, ENDS, 2, method="dopri5", steps=4)

    def wild(s: Tensor, r: Tensor) -> Tensor:
        return (1e6 * (1e6 * s).cos())[:, None].expand_as(r)

    with pytest.raises(ConfigError, match="'dopri5' cannot solve these dynamics"):
        solve(wild, 1.0, ENDS, 2, method="dopri5", steps=4)
