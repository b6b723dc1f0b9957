"""Where training tokens are said to stand: position samplers, made on the device.

A sampler places n tokens inside a span of ``t * native_length`` positions, so that a model meets
the distances of long texts in short ones. All draw from a counter-based generator: the numbers
depend on the seed of the row and nothing else, neither the device, nor the batch around it, nor
the number of processes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .errors import ConfigError, unknown

MAX_CHUNKS = 16


def uniform(seeds: Tensor, n: int, stream: int = 0) -> Tensor:
    """Independent numbers in [0, 1), float64, shape (B, n), a pure function of its arguments.

    Args:
        seeds: int64, shape (B,), on the device where the numbers are wanted.
        n: numbers for each seed.
        stream: draws of one seed in different streams are independent.
    """
    counter = torch.arange(n, dtype=torch.int64, device=seeds.device)
    # SplitMix64 (Steele, Lea, Flood 2014) on seed and counter; int64 wraps as uint64 would.
    x = _mix(seeds[:, None] * 0x2545F4914F6CDD1D + stream)
    x = _mix(x + (counter + 1) * -0x61C8864680B583EB)
    return ((x >> 11) & ((1 << 53) - 1)).double() / (1 << 53)


def _mix(x: Tensor) -> Tensor:
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def contiguous(n: int, span: Tensor, seeds: Tensor, native_length: int) -> Tensor:
    """0, 1, ..., n-1, whatever the span is."""
    return torch.arange(n, dtype=torch.float32, device=span.device).expand(len(span), n)


def stretched(n: int, span: Tensor, seeds: Tensor, native_length: int) -> Tensor:
    """Real positions at equal distances from 0 to span - 1 (the CLEX paper's alternative)."""
    steps = torch.arange(n, dtype=torch.float64, device=span.device)
    return (steps * ((span[:, None].double() - 1) / (n - 1))).float()


def random_subset(n: int, span: Tensor, seeds: Tensor, native_length: int) -> Tensor:
    """A sorted random subset with both ends in it (CLEX, released code; RandomPos).

    Where n exceeds the native window by a whole factor k, positions are multiples of 1/k, as in the
    released code, so that n of them fit into the span of t = 1.
    """
    fraction = max(1, n // native_length)
    places = (span.double() * fraction).round().clamp(min=float(n))  # (B,)
    most = int(places.max().item())
    keys = uniform(seeds, most)
    inner = torch.arange(most, device=span.device)
    outside = (inner < 1) | (inner >= places[:, None] - 1)
    keys = keys.masked_fill(outside, 2.0)
    chosen = keys.topk(n - 2, dim=1, largest=False).indices.sort(dim=1).values
    ends = torch.zeros_like(places)[:, None], places[:, None] - 1
    return (torch.cat([ends[0], chosen.double(), ends[1]], dim=1) / fraction).float()


def chunks(n: int, span: Tensor, seeds: Tensor, native_length: int) -> Tensor:
    """Contiguous pieces with random skips between them (PoSE, arXiv 2309.10400, with M chunks).

    M is uniform in 2 to 16, the cuts are uniform, and so are the skips in front of each piece,
    sorted, at most span - n. Nearly all local distances stay exact, which a random subset of a long
    span never shows.
    """
    rows = len(span)
    many = (2 + uniform(seeds, 1, stream=1) * (MAX_CHUNKS - 1)).long()  # (B, 1)
    unused = torch.arange(1, MAX_CHUNKS, device=span.device) >= many  # (B, MAX_CHUNKS - 1)
    cuts = 1 + (uniform(seeds, MAX_CHUNKS - 1, stream=2) * (n - 1)).long()
    cuts = cuts.masked_fill(unused, n).sort(dim=1).values
    room = (span.double() - n + 1)[:, None]
    skips = (uniform(seeds, MAX_CHUNKS - 1, stream=3) * room).floor()
    # Unused skips sort to the end, where no cut leads to them.
    skips = skips.masked_fill(unused, torch.inf).sort(dim=1).values
    skips = torch.cat([torch.zeros(rows, 1, dtype=skips.dtype, device=skips.device), skips], dim=1)
    index = torch.arange(n, device=span.device).expand(rows, n).contiguous()
    piece = torch.searchsorted(cuts, index, right=True)
    return (index + skips.gather(1, piece)).float()


Sampler = Callable[[int, Tensor, Tensor, int], Tensor]

SAMPLERS: dict[str, Sampler] = {
    "contiguous": contiguous,
    "random": random_subset,
    "uniform": stretched,
    "chunks": chunks,
}


def get_sampler(name: str) -> Sampler:
    """The sampler called `name`: ``(n, span (B,), seeds (B,), native_length) -> (B, n) float32``.

    Raises:
        ConfigError: there is no such sampler.
    """
    if name not in SAMPLERS:
        raise ConfigError(unknown("position sampler", name, SAMPLERS))
    return SAMPLERS[name]


def sample_positions(name: str, n: int, t: Tensor, seeds: Tensor, native_length: int) -> Tensor:
    """Positions for a batch of n-token sequences at scales `t`.

    Args:
        name: of the sampler.
        n: tokens of each sequence, at least 3.
        t: scale of each sequence, shape (B,). A sequence at t = 1 that fits the native window keeps
            its plain positions, whatever the sampler.
        seeds: int64, shape (B,).
        native_length: the unit of t, tokens.

    Returns:
        Strictly increasing positions, float32, shape (B, n), on the device of `t`.
    """
    span = t.double() * native_length
    if name not in ("random", "uniform"):  # these two can place tokens between whole positions
        span = span.clamp(min=float(n))
    plain = contiguous(n, span, seeds, native_length)
    drawn = get_sampler(name)(n, span, seeds, native_length)
    keep = (t <= 1) if n <= native_length else torch.zeros_like(t, dtype=torch.bool)
    return torch.where(keep[:, None], plain, drawn)
