"""How far float32 angles are from float64 ones, at positions up to two million.

    python -m benchmarks.angles

The angle of a dimension is position times frequency. Both are float32 in transformers and here: the
frequency is off by up to 2**-24 of itself, which turns queries and keys alike, and the product is
rounded to 2**-24 of itself, which does not. An angle of A radians may be off by A * 2**-23 in all.
That is a property of the host, at every scale; the fastest dimensions, whose angles are largest,
are those that clex leaves nearly as they are.
"""

from __future__ import annotations

import json

import torch

from clex.config import ClexConfig
from clex.rope import RopeSpec
from clex.scaling import get_scaling

POSITIONS = (2**12, 2**15, 2**17, 2**20, 2**21)
# Positions before each that are tried: every rounding of the product occurs among so many.
_TRIED = 4096


def angle_errors(
    theta: float, head_dim: int, t: float = 1.0
) -> list[tuple[int, float, float, float]]:
    """For each of `POSITIONS`: the largest error in radians below it, the part of it that is the
    rounding of the product, and what float32 allows.

    Args:
        theta: base of the frequencies.
        head_dim: all of it rotates.
        t: scale; the frequencies are then those of dynamic NTK.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    spec = RopeSpec((theta**-exponents).float(), 4096, theta)
    scaling = get_scaling("dynamic_ntk")(spec, ClexConfig(method="dynamic_ntk", max_scale=512))
    single = scaling.inv_freq(torch.tensor([t]))[0]
    exact = (theta**-exponents) * _ratio(exponents, head_dim, t)
    rows = []
    for last in POSITIONS:
        positions = torch.arange(last - _TRIED, last)
        angles = positions.float()[:, None] * single
        wanted = positions.double()[:, None] * exact
        error = (angles.double() - wanted).abs().max()
        rounding = (angles.double() - positions.double()[:, None] * single.double()).abs().max()
        # At t > 1 the closed form itself costs a few roundings.
        allowed = last * float(exact.max()) * 2.0**-23 * (1 if t == 1 else 2)
        rows.append((last, float(error), float(rounding), allowed))
    return rows


def _ratio(exponents: torch.Tensor, head_dim: int, t: float) -> torch.Tensor:
    """Dynamic NTK in float64: theta becomes theta * (2t - 1) ** (d / (d - 2))."""
    return (2 * t - 1) ** (-exponents * head_dim / (head_dim - 2))


def main() -> None:
    """Print the table."""
    for theta in (10_000.0, 500_000.0):
        for t in (1.0, 8.0, 512.0):
            for last, error, rounding, allowed in angle_errors(theta, 128, t):
                row = {"theta": theta, "t": t, "positions": last, "error": error}
                print(json.dumps({**row, "rounding": rounding, "allowed": allowed}))


if __name__ == "__main__":
    main()
