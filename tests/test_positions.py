"""Position samplers: where they put tokens, and what they depend on."""

import math

import pytest
import torch

from clex.errors import ConfigError
from clex.positions import SAMPLERS, get_sampler, random_subset, sample_positions, uniform
from references import assert_close

NATIVE = 64
SEEDS = torch.arange(7, 7 + 40)
SCALES = torch.linspace(1.0, 16.0, len(SEEDS))


@pytest.mark.parametrize("n", [3, 50, 64, 65, 200])
@pytest.mark.parametrize("name", SAMPLERS)
def test_increasing_and_inside_the_span(name: str, n: int) -> None:
    positions = sample_positions(name, n, SCALES, SEEDS, NATIVE)
    assert positions.shape == (len(SEEDS), n) and positions.dtype == torch.float32
    steps = positions.diff(dim=1)
    assert (steps > 0).all(), f"smallest step {steps.min()} at {int(steps.argmin())}"
    assert (positions[:, 0] == 0).all()
    # A text that is longer than its span is placed at least one position for each token.
    span = (SCALES * NATIVE).clamp(min=n)
    assert (positions[:, -1] < span).all(), (positions[:, -1] - span).max()


@pytest.mark.parametrize("name", SAMPLERS)
def test_scale_one_keeps_plain_positions(name: str) -> None:
    t = torch.tensor([1.0, 4.0, 1.0])
    positions = sample_positions(name, NATIVE, t, torch.tensor([1, 2, 3]), NATIVE)
    plain = torch.arange(NATIVE, dtype=torch.float32)
    assert torch.equal(positions[0], plain) and torch.equal(positions[2], plain)
    assert torch.equal(positions[1], plain) == (name == "contiguous")


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_row_depends_on_its_own_seed_and_scale_alone(name: str) -> None:
    together = sample_positions(name, 50, SCALES, SEEDS, NATIVE)
    for row in (0, 1, 17, 39):
        alone = sample_positions(name, 50, SCALES[row : row + 1], SEEDS[row : row + 1], NATIVE)
        assert torch.equal(alone[0], together[row]), f"row {row}"
    torch.manual_seed(99)
    assert torch.equal(sample_positions(name, 50, SCALES, SEEDS, NATIVE), together)


@pytest.mark.parametrize("name", ["random", "chunks"])
def test_another_seed_gives_other_positions(name: str) -> None:
    t = torch.full((20,), 8.0)
    positions = sample_positions(name, 50, t, torch.arange(20), NATIVE)
    assert len({tuple(row.tolist()) for row in positions}) == 20


def test_uniform_numbers() -> None:
    x = uniform(torch.arange(200), 500)
    assert x.shape == (200, 500) and x.dtype == torch.float64
    assert x.min() >= 0 and x.max() < 1
    n = x.numel()
    # Five standard errors of the mean, of the variance and of a correlation.
    assert abs(float(x.mean()) - 0.5) < 5 * math.sqrt(1 / 12 / n)
    assert abs(float(x.var()) - 1 / 12) < 5 * math.sqrt(1 / 180 / n)
    pairs = {
        "counters": (x[:, 1:], x[:, :-1]),
        "seeds": (x[1:], x[:-1]),
        "streams": (x, uniform(torch.arange(200), 500, stream=1)),
    }
    for name, (a, b) in pairs.items():
        correlation = float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])
        assert abs(correlation) < 5 / math.sqrt(a.numel()), f"{name}: {correlation}"
    counts = torch.histc(x.float(), 64, 0, 1).double()
    # 63 degrees of freedom: mean 63, standard deviation 11.2.
    assert ((counts - n / 64) ** 2 / (n / 64)).sum() < 63 + 5 * 11.2


def test_uniform_numbers_are_pinned() -> None:
    """A run that is continued on another machine or release must draw the same numbers."""
    expected = _splitmix_by_hand(seed=12345, stream=3, count=4)
    assert uniform(torch.tensor([12345]), 4, stream=3)[0].tolist() == expected


def _splitmix_by_hand(seed: int, stream: int, count: int) -> list[float]:
    mask = 2**64 - 1

    def mix(x: int) -> int:
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & mask
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB & mask
        return x ^ (x >> 31)

    start = mix(seed * 0x2545F4914F6CDD1D + stream & mask)
    return [(mix(start + k * 0x9E3779B97F4A7C15 & mask) >> 11) / 2**53 for k in range(1, count + 1)]


def test_random_subset_is_uniform() -> None:
    rows, n, span = 4000, 10, 40
    positions = random_subset(n, torch.full((rows,), float(span)), torch.arange(rows), 40)
    assert (positions[:, 0] == 0).all() and (positions[:, -1] == span - 1).all()
    counts = torch.bincount(positions[:, 1:-1].long().flatten(), minlength=span)[1 : span - 1]
    expected = rows * (n - 2) / (span - 2)
    statistic = float(((counts - expected) ** 2 / expected).sum())
    # Draws without return vary less than chi-square: about 37 * (1 - 8/38) = 29, deviation 7.
    assert 5 < statistic < 29 + 5 * 7, statistic


def test_random_subset_of_a_text_longer_than_the_window_uses_fractions() -> None:
    positions = sample_positions(
        "random", 2 * NATIVE, torch.tensor([4.0]), torch.tensor([5]), NATIVE
    )
    assert torch.equal(positions * 2, (positions * 2).round())
    assert not torch.equal(positions, positions.round())


def test_stretched_positions_are_equally_spaced() -> None:
    positions = sample_positions("uniform", 64, torch.tensor([4.0]), torch.tensor([0]), NATIVE)
    assert_close(positions[0, 1:], [k * 255 / 63 for k in range(1, 64)], 1e-7)


def test_chunks_keep_neighbours_together() -> None:
    n, rows = 256, 500
    t = torch.full((rows,), 32.0)
    positions = sample_positions("chunks", n, t, torch.arange(rows), NATIVE)
    skips = positions.diff(dim=1) - 1
    jumps = (skips > 0).sum(dim=1)
    assert jumps.max() <= 15 and jumps.min() >= 1
    assert (skips == 0).double().mean() > 0.95
    assert skips.sum(dim=1).max() <= 32 * NATIVE - n
    # The last of M - 1 sorted uniform skips; averaged over M = 2 to 16 its mean share is this.
    share = float((skips.sum(dim=1) / (32 * NATIVE - n)).mean())
    expected = sum((m - 1) / m for m in range(2, 17)) / 15
    # One row varies by less than 0.25, so 500 rows by 0.011; five of these.
    assert abs(share - expected) < 0.055, (share, expected)
    # The negative: a random subset shows few neighbours at this scale.
    scattered = sample_positions("random", n, t, torch.arange(rows), NATIVE).diff(dim=1)
    assert (scattered == 1).double().mean() < 0.5


def test_unknown_sampler() -> None:
    with pytest.raises(ConfigError, match="did you mean 'chunks'"):
        get_sampler("chunk")
