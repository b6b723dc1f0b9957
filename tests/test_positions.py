"""Position samplers: where they put tokens, and what they depend on."""

import math

import pytest
import torch

import clex
import tiny
from clex.data import collate
from clex.errors import ConfigError
from clex.hf.rotary import ScaledRope
from clex.positions import (
    SAMPLERS,
    get_sampler,
    parse_mixture,
    random_subset,
    sample_positions,
    uniform,
)
from references import assert_close

NATIVE = 64
SEEDS = torch.arange(7, 7 + 40)
SCALES = torch.linspace(1.0, 16.0, len(SEEDS))
MIXTURE = "chunks:3,random:1,uniform,contiguous:2"
NAMES = [*SAMPLERS, MIXTURE]


@pytest.mark.parametrize("n", [3, 50, 64, 65, 200])
@pytest.mark.parametrize("name", NAMES)
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


@pytest.mark.parametrize("name", NAMES)
def test_a_row_depends_on_its_own_seed_and_scale_alone(name: str) -> None:
    """Neither the batch around it, nor its place there, nor which process has it, matters."""
    together = sample_positions(name, 50, SCALES, SEEDS, NATIVE)
    for row in (0, 1, 17, 39):
        alone = sample_positions(name, 50, SCALES[row : row + 1], SEEDS[row : row + 1], NATIVE)
        assert torch.equal(alone[0], together[row]), f"row {row}"
    order = torch.randperm(len(SEEDS))
    for rows in (*order.split(7), torch.arange(0, 40, 2), torch.arange(1, 40, 2)):
        part = sample_positions(name, 50, SCALES[rows], SEEDS[rows], NATIVE, max_scale=99.5)
        assert torch.equal(part, together[rows]), rows
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
    positions = random_subset(n, torch.full((rows,), float(span)), torch.arange(rows), 40, span)
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


@pytest.mark.parametrize("n", [50, 200])
@pytest.mark.parametrize("name", NAMES)
def test_the_host_does_not_wait_for_the_device(name: str, n: int) -> None:
    """Tensors on `meta` have no values, so any that is read on the host raises."""
    t, seeds = SCALES.to("meta"), SEEDS.to("meta")
    assert sample_positions(name, n, t, seeds, NATIVE, 16.0).shape == (len(SEEDS), n)
    with pytest.raises((RuntimeError, NotImplementedError)):
        sample_positions(name, n, t, seeds, NATIVE)  # the largest scale is read from `t`


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", NAMES)
def test_the_host_does_not_wait_for_the_gpu(name: str) -> None:
    t, seeds = SCALES.cuda(), SEEDS.cuda()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        positions = sample_positions(name, 50, t, seeds, NATIVE, 16.0)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert torch.equal(positions.cpu(), sample_positions(name, 50, SCALES, SEEDS, NATIVE))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("n", [50, 200])
def test_the_largest_scale_changes_no_position(name: str, n: int) -> None:
    positions = sample_positions(name, n, SCALES, SEEDS, NATIVE)
    for most in (16.0, 17.3, 64.0):
        assert torch.equal(sample_positions(name, n, SCALES, SEEDS, NATIVE, most), positions)


# Mixtures.


def test_weights() -> None:
    assert parse_mixture("chunks") == {"chunks": 1.0}
    assert parse_mixture(" chunks : 7, contiguous : 3 ") == {"chunks": 0.7, "contiguous": 0.3}
    assert parse_mixture("chunks,random") == {"chunks": 0.5, "random": 0.5}
    assert parse_mixture("chunks:1e-3,random:3e-3")["random"] == pytest.approx(0.75)


def test_one_sampler_places_a_row() -> None:
    rows = 4000
    t, seeds = torch.full((rows,), 8.0), torch.arange(rows)
    text = "chunks:0.5,random:0.3,contiguous:0.2"
    mixed = sample_positions(text, 32, t, seeds, NATIVE)
    found = {}
    for name, share in parse_mixture(text).items():
        same = (mixed == sample_positions(name, 32, t, seeds, NATIVE)).all(dim=1)
        found[name] = same
        # Four standard deviations of a share.
        assert abs(float(same.double().mean()) - share) < 4 * math.sqrt(share / rows), name
    assert torch.stack(list(found.values())).any(dim=0).all()
    # The negative: which sampler a row gets says nothing about where it would put the tokens.
    ends = sample_positions("chunks", 32, t, seeds, NATIVE)[:, -1]
    apart = ends[found["chunks"]].mean() - ends[~found["chunks"]].mean()
    assert abs(float(apart)) < 4 * float(ends.std()) * math.sqrt(4 / rows)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "unknown position sampler ''"),
        ("chunks:0.7,contigous:0.3", "did you mean 'contiguous'"),
        ("chunks:0.7,", "unknown position sampler ''"),
        ("chunks:1,chunks:2", "'chunks' is named twice"),
        ("chunks:", "weight of position sampler 'chunks' must be a positive number, not ''"),
        ("chunks:0,random:1", "must be a positive number, not '0'"),
        ("chunks:-1,random:1", "must be a positive number, not '-1'"),
        ("chunks:nan", "must be a positive number, not 'nan'"),
        ("chunks:inf", "must be a positive number, not 'inf'"),
        ("chunks:much", "must be a positive number, not 'much'"),
        ("chunks:1:2", "must be a positive number, not '1:2'"),
    ],
)
def test_bad_mixtures(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_mixture(text)
    with pytest.raises(ConfigError, match=words):
        sample_positions(text, 50, SCALES, SEEDS, NATIVE)


# Packing.


@pytest.mark.parametrize("name", NAMES)
def test_packed_documents_rise(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What reaches the rotary code of the host, in a batch of one packed and one whole window."""
    lengths = (30, 20, 14)
    restarting = torch.cat([torch.arange(n) for n in lengths])
    items = [
        {"input_ids": tiny.make_ids(1, 64)[0], "position_ids": ids, "scale": 4.0, "seed": seed}
        for ids, seed in ((restarting, 5), (torch.arange(64), 6))
    ]
    batch = collate([{**item, "packed": item["seed"] == 5} for item in items])
    table = sample_positions(name, 64, batch["scale"], batch["seed"], NATIVE)
    seen = []
    call = ScaledRope._call

    def watch(self: ScaledRope, x: torch.Tensor, position_ids: torch.Tensor, *rest: object) -> None:
        seen.append(position_ids)
        return call(self, x, position_ids, *rest)  # type: ignore[arg-type]

    model = clex.extend(tiny.make_model(), clex.ClexConfig(max_scale=4))
    monkeypatch.setattr(ScaledRope, "_call", watch)
    with clex.at_scale(model, batch["scale"], table):
        tiny.logits(model, batch["input_ids"], position_ids=batch["position_ids"])
    (used,) = seen
    assert torch.equal(used[1], table[1])
    for document in used[0].split(lengths):
        assert document[0] == 0 and (document.diff() > 0).all()
        assert torch.equal(document, table[0, : len(document)])


def test_unknown_sampler() -> None:
    with pytest.raises(ConfigError, match="did you mean 'chunks'"):
        get_sampler("chunk")
