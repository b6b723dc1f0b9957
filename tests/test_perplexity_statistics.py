"""Bootstrap intervals against drawing one document after another."""

from __future__ import annotations

import random

import numpy as np
import pytest

from clex.evaluation.statistics import (
    RESAMPLES,
    difference_interval,
    draws,
    mean_interval,
    resampled_means,
)

GENERATOR = np.random.default_rng(7)
COUNTS = GENERATOR.integers(50, 500, 12).tolist()
SUMS = [n * (3 + 0.4 * GENERATOR.standard_normal()) for n in COUNTS]
# Another method: better by 0.05 nats, with little noise beside what differs between documents.
OTHERS = [
    s - n * (0.05 + 0.01 * GENERATOR.standard_normal()) for s, n in zip(SUMS, COUNTS, strict=True)
]


def brute_force(
    sums: list[float], counts: list[int], resamples: int = 20_000
) -> tuple[float, float]:
    dice = random.Random(11)
    means = []
    for _ in range(resamples):
        chosen = [dice.randrange(len(sums)) for _ in sums]
        means.append(sum(sums[i] for i in chosen) / sum(counts[i] for i in chosen))
    means.sort()
    return means[int(0.025 * resamples)], means[int(0.975 * resamples)]


def test_resamples_by_hand() -> None:
    weights = draws(len(SUMS))
    assert weights.shape == (RESAMPLES, len(SUMS)) == (2000, 12)
    assert (weights.sum(axis=1) == 12).all()
    means = resampled_means(SUMS, COUNTS)
    for k in (0, 1, 1999):
        drawn = [i for i, n in enumerate(weights[k]) for _ in range(int(n))]
        by_hand = sum(SUMS[i] for i in drawn) / sum(COUNTS[i] for i in drawn)
        assert means[k] == pytest.approx(by_hand, rel=1e-12)
    # Each document as often as another: 2,000 draws of 12, mean 1, standard error 0.02.
    assert np.abs(weights.mean(axis=0) - 1).max() < 0.1


def test_interval_of_a_mean() -> None:
    ours, wanted = mean_interval(SUMS, COUNTS), brute_force(SUMS, COUNTS)
    assert ours is not None
    width = wanted[1] - wanted[0]
    # The ends of 2,000 and 20,000 resamples differ by a few percent of the width.
    assert ours == pytest.approx(wanted, abs=0.05 * width)
    assert ours[0] < sum(SUMS) / sum(COUNTS) < ours[1]
    assert mean_interval(SUMS, COUNTS) == ours, "the seed is fixed"


def test_interval_of_a_difference_is_paired() -> None:
    ours = difference_interval(OTHERS, SUMS, COUNTS)
    assert ours is not None
    gains = [a - b for a, b in zip(OTHERS, SUMS, strict=True)]
    wanted = brute_force(gains, COUNTS)
    assert ours == pytest.approx(wanted, abs=0.05 * (wanted[1] - wanted[0]))
    assert ours[1] < 0, "clear for the pair"
    one, other = mean_interval(SUMS, COUNTS), mean_interval(OTHERS, COUNTS)
    assert one is not None and other is not None
    assert other[1] > one[0], "and not for the two intervals beside each other"


def test_edges() -> None:
    assert mean_interval([3.0], [2]) is None
    assert difference_interval([3.0], [2.0], [2]) is None
    assert mean_interval([0.0, 0.0], [0, 0]) is None
    # One document with tokens is one document, whatever stands beside it.
    assert mean_interval([6.0, 0.0], [2, 0]) is None
    assert mean_interval([6.0, 0.0, 6.0], [2, 0, 2]) == (3.0, 3.0)
    assert mean_interval([4.0, 4.0, 4.0], [2, 2, 2]) == (2.0, 2.0)
