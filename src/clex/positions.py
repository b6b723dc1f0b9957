"""Where training tokens are said to stand: position samplers, made on the device.

A sampler places n tokens inside a span of ``t * native_length`` positions, so that a model meets
the distances of long texts in short ones. All draw from a counter-based generator: the numbers
depend on the seed of the row and nothing else, neither the device, nor the batch around it, nor
the number of processes. In a mixture the seed of the row also says which sampler places it.

Positions rise strictly along a row. They are a table that `position_ids` index, so a packed
document, whose `position_ids` restart at 0, gets the first of them and they rise along it as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .errors import ConfigError, unknown
from .kernels import has_kernels

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
    return (x >> 11).bitwise_and_((1 << 53) - 1).double().div_(1 << 53)


def _mix(x: Tensor) -> Tensor:
    # In place on the shifted copy: on a CPU new memory costs more than the arithmetic.
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x = (x >> shift).bitwise_and_((1 << (64 - shift)) - 1).bitwise_xor_(x).mul_(factor)
    return (x >> 31).bitwise_and_((1 << 33) - 1).bitwise_xor_(x)


def contiguous(n: int, span: Tensor, seeds: Tensor, native_length: int, longest: int) -> Tensor:
    """0, 1, ..., n-1, whatever the span is."""
    return torch.arange(n, dtype=torch.float32, device=span.device).repeat(len(span), 1)


def stretched(n: int, span: Tensor, seeds: Tensor, native_length: int, longest: int) -> Tensor:
    """Real positions at equal distances from 0 to span - 1 (the CLEX paper's alternative)."""
    steps = torch.arange(n, dtype=torch.float64, device=span.device)
    return (steps * ((span[:, None].double() - 1) / (n - 1))).float()


def random_subset(n: int, span: Tensor, seeds: Tensor, native_length: int, longest: int) -> Tensor:
    """A sorted random subset with both ends in it (CLEX, released code; RandomPos).

    Where n exceeds the native window by a whole factor k, positions are multiples of 1/k, as in the
    released code, so that n of them fit into the span of t = 1.

    Time and memory follow `longest`, for as many keys are drawn; a larger one changes no position.
    """
    fraction = max(1, n // native_length)
    places = (span.double() * fraction).round().clamp(min=float(n))  # (B,)
    keys = uniform(seeds, max(n, longest * fraction))
    inner = torch.arange(keys.shape[1], device=span.device)
    outside = (inner < 1) | (inner >= places[:, None] - 1)
    keys.masked_fill_(outside, 2.0)
    chosen = keys.topk(n - 2, dim=1, largest=False, sorted=False).indices.sort(dim=1).values
    ends = torch.zeros_like(places)[:, None], places[:, None] - 1
    return (torch.cat([ends[0], chosen.double(), ends[1]], dim=1) / fraction).float()


def chunks(n: int, span: Tensor, seeds: Tensor, native_length: int, longest: int) -> Tensor:
    """Contiguous pieces with random skips between them (PoSE, arXiv 2309.10400, with M chunks).

    M is uniform in 2 to 16, the cuts are uniform, and so are the skips in front of each piece,
    sorted, at most span - n. Nearly all local distances stay exact, which a random subset of a long
    span never shows.
    """
    if has_kernels(span):
        from .kernels.positions_triton import chunks as kernel

        return kernel(n, span, seeds, MAX_CHUNKS)
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


Sampler = Callable[[int, Tensor, Tensor, int, int], Tensor]

SAMPLERS: dict[str, Sampler] = {
    "contiguous": contiguous,
    "random": random_subset,
    "uniform": stretched,
    "chunks": chunks,
}


def get_sampler(name: str) -> Sampler:
    """The sampler called `name`.

    It is called with n tokens, span (B,), seeds (B,), native_length, and a whole number that no
    span is above; it returns positions, float32, shape (B, n).

    Raises:
        ConfigError: there is no such sampler.
    """
    if name not in SAMPLERS:
        raise ConfigError(unknown("position sampler", name, SAMPLERS))
    return SAMPLERS[name]


def parse_mixture(text: str) -> dict[str, float]:
    """Samplers and the share of rows that each places; the shares sum to 1.

    Args:
        text: name of a sampler, or several with weights: ``"chunks:0.7,contiguous:0.3"``. A weight
            is any positive number, 1 where none is given.

    Raises:
        ConfigError: a sampler is unknown or named twice, or a weight is no positive number.
    """
    weights: dict[str, float] = {}
    for part in text.split(","):
        name, colon, number = (piece.strip() for piece in part.partition(":"))
        get_sampler(name)
        if name in weights:
            raise ConfigError(f"position sampler {name!r} is named twice in {text!r}")
        try:
            weights[name] = float(number) if colon else 1.0
        except ValueError:
            weights[name] = math.nan
        if not 0 < weights[name] < math.inf:
            raise ConfigError(
                f"the weight of position sampler {name!r} must be a positive number, not {number!r}"
            )
    total = math.fsum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


def sample_positions(
    name: str,
    n: int,
    t: Tensor,
    seeds: Tensor,
    native_length: int,
    max_scale: float | None = None,
) -> Tensor:
    """Positions for a batch of n-token sequences at scales `t`.

    Args:
        name: of the sampler, or a mixture of some (`parse_mixture`): then one is drawn for each
            row by its seed.
        n: tokens of each sequence, at least 3.
        t: scale of each sequence, shape (B,). A sequence at t = 1 that fits the native window keeps
            its plain positions, whatever the sampler.
        seeds: int64, shape (B,).
        native_length: the unit of t, tokens.
        max_scale: a number that no `t` is above. If it is not given it is read from `t`, for which
            the host waits for the device; the positions are the same.

    Returns:
        Strictly increasing positions, float32, shape (B, n), on the device of `t`.
    """
    if max_scale is None:
        max_scale = float(t.max())
    longest = max(n, math.ceil(max_scale * native_length))
    span = t.double() * native_length

    def draw(sampler: str) -> Tensor:
        # "random" and "uniform" can place tokens between whole positions.
        room = span if sampler in ("random", "uniform") else span.clamp(min=float(n))
        return get_sampler(sampler)(n, room, seeds, native_length, longest)

    (sampler, passed), *others = parse_mixture(name).items()
    positions = draw(sampler)
    if others:
        coin = uniform(seeds, 1, stream=4)
        # Each row overwrites until the sampler that its coin stands for: to know on the host which
        # rows need which sampler would cost more than to draw all of them.
        for sampler, share in others:
            positions = torch.where(coin >= passed, draw(sampler), positions)
            passed += share
    if n > native_length:
        return positions
    plain = contiguous(n, span, seeds, native_length, longest)
    return torch.where((t <= 1)[:, None], plain, positions)
