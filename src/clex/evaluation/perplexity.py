"""Perplexity by length, in the protocols that answer different questions.

- ``window``: mean loss over the first L tokens of a text. Falls with L by itself, since later
  tokens have more before them.
- ``target``: loss of the same last tokens, with only the context before them growing. Any rise with
  the context is harm that length does. This is the curve to look at.
- ``position``: mean loss in bands of position of the longest text, at its one scale.
- ``sliding``: every token of a document, from a window of W tokens that moves by a stride (YaRN,
  arXiv 2309.00071, section 4.1). Comparable with published tables, and expensive.
- ``longppl``: mean loss over the tokens that need a long context, see `clex.evaluation.longppl`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import datasets
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from ..config import ClexConfig
from ..data import long_enough
from ..errors import ClexError, ConfigError, DataError, unknown
from ..hf.extend import at_scale, config_of, extend, extension_of, restore, scale_for
from ..hf.loss import TokenLoss
from .scores import PROTOCOLS, Cell, Row, Score, ScoreLog, rows_of

__all__ = [
    "PROTOCOLS",
    "KeyTokens",
    "PerplexityPlan",
    "Reader",
    "Row",
    "as_method",
    "cut_windows",
    "evaluate_extended",
    "evaluate_methods",
    "measure",
    "progress_bar",
    "select_documents",
]

# (document, number of its window) to the positions of the key tokens in that window, int64.
KeyTokens = Mapping[tuple[int, int], Tensor]


@dataclass(frozen=True)
class PerplexityPlan:
    """What is measured.

    Attributes:
        lengths: tokens, ascending; the longest sets the size of a window.
        target: scored tokens of protocol ``target``; shorter than the shortest length.
        windows: most windows of one document; they do not overlap.
        documents: most documents; ``None`` for all.
        protocols: some of `PROTOCOLS`.
        bands: equal parts of the longest length, of protocol ``position``.
        sliding: windows of protocol ``sliding``, tokens.
        stride: tokens by which they move; each scores this many, the first one all but its first.
        sliding_tokens: most tokens of a document for them; ``None`` for all.
        truncation: tokens of short context of protocol ``longppl``; lengths above it are measured.

    Raises:
        ConfigError: values contradict each other.
    """

    lengths: tuple[int, ...]
    target: int
    windows: int = 1
    documents: int | None = None
    protocols: tuple[str, ...] = ("window", "target")
    bands: int = 16
    sliding: tuple[int, ...] = ()
    stride: int = 256
    sliding_tokens: int | None = None
    truncation: int = 4096

    def __post_init__(self) -> None:
        for protocol in self.protocols:
            if protocol not in PROTOCOLS:
                raise ConfigError(unknown("protocol", protocol, PROTOCOLS))
        if not self.protocols:
            raise ConfigError(f"no protocol to measure (valid: {', '.join(PROTOCOLS)})")
        if "sliding" in self.protocols:
            for window in self.sliding:
                if not 1 <= self.stride <= window or window < 2:
                    raise ConfigError(
                        f"a sliding window of {window} tokens cannot move by {self.stride}"
                        f" (valid strides: 1 to {window})"
                    )
        if "longppl" in self.protocols and not 1 < self.truncation < self.lengths[-1]:
            raise ConfigError(
                f"truncation {self.truncation} leaves LongPPL no tokens"
                f" (valid: 2 to {self.lengths[-1] - 1}, below the longest length)"
            )

    @classmethod
    def for_model(
        cls,
        native_length: int,
        max_scale: float,
        lengths: Sequence[int] | None = None,
        **settings: Any,
    ) -> PerplexityPlan:
        """The usual plan for a model with a window of L tokens.

        Lengths L/4, L/2 (what short texts lose), L, 2L, 4L ... up to ``max_scale * L``; a target of
        a quarter of L; sliding windows of L and of the longest length; a truncation of L/2.

        Raises:
            DataError: a wanted length is too short to hold the target tokens.
            ConfigError: a setting contradicts another.
        """
        target = max(1, native_length // 4 - 1)
        if lengths is None:
            doublings = int(math.log2(max_scale) + 1e-6)
            short = [n for n in (native_length // 4, native_length // 2) if n > target]
            lengths = short + [native_length * 2**k for k in range(doublings + 1)]
        ordered = tuple(sorted(set(lengths)))
        if not ordered or ordered[0] <= target:
            raise DataError(
                f"evaluation lengths must be above the {target} target tokens, got {lengths}"
            )
        usual = {
            "sliding": tuple(sorted({native_length, ordered[-1]})),
            "truncation": native_length // 2,
        }
        given = {name: value for name, value in settings.items() if value is not None}
        return cls(lengths=ordered, target=target, **{**usual, **given})

    def reads_windows(self) -> bool:
        """Whether texts of the longest length are needed."""
        return any(protocol != "sliding" for protocol in self.protocols)

    def heads(self) -> list[int]:
        """Lengths at which the beginning of a window is read."""
        if "window" in self.protocols:
            return list(self.lengths)
        wanted = set()
        if "position" in self.protocols:
            wanted.add(self.lengths[-1])
        if "longppl" in self.protocols:
            wanted |= {length for length in self.lengths if length > self.truncation}
        return sorted(wanted)

    def tails(self) -> list[int]:
        """Lengths at which the end of a window is read, where its beginning is not the same."""
        if "target" not in self.protocols:
            return []
        return [n for n in self.lengths if n != self.lengths[-1] or n not in self.heads()]

    def cuts(self, tokens: int) -> Iterator[tuple[int, int]]:
        """First token and one past the last of each window in a document of so many tokens."""
        size = self.lengths[-1]
        if self.reads_windows():
            for k in range(min(self.windows, tokens // size)):
                yield k * size, (k + 1) * size

    def slides(self, tokens: int, window: int) -> Iterator[tuple[int, int, int]]:
        """Begin, end and number of scored last tokens of each step of a sliding window."""
        tokens = min(tokens, self.sliding_tokens or tokens)
        scored = 1  # nothing comes before the first token
        for begin in range(0, tokens, self.stride):
            end = min(begin + window, tokens)
            # A window does not score its first token: without overlap none does.
            count = min(end - scored, end - begin - 1)
            if count > 0:
                yield begin, end, count
            scored = end
            if end == tokens:
                return

    def work(self, tokens: int) -> int:
        """Tokens that a model reads for a document of so many tokens."""
        total = sum(1 for _ in self.cuts(tokens)) * (sum(self.heads()) + sum(self.tails()))
        if "sliding" in self.protocols:
            for window in self.sliding:
                total += sum(end - begin for begin, end, _ in self.slides(tokens, window))
        return total

    def band_edges(self) -> list[int]:
        """Borders of the bands of protocol ``position``: 0, ..., the longest length."""
        longest = self.lengths[-1]
        bands = min(self.bands, longest // 2)
        return [longest * k // bands for k in range(bands + 1)]


def select_documents(tokens: datasets.Dataset, plan: PerplexityPlan) -> list[int]:
    """Numbers of the documents that are read.

    Only documents that have the longest length are used, for all lengths and protocols alike, so
    that the cells of a table speak of the same text; sliding windows alone take any document.

    Raises:
        DataError: no document is long enough.
    """
    size = plan.lengths[-1] if plan.reads_windows() else 2
    lengths = list(tokens["length"])
    long_enough(lengths, size, "evaluation")
    return [i for i, n in enumerate(lengths) if n >= size][: plan.documents]


def cut_windows(tokens: datasets.Dataset, plan: PerplexityPlan) -> list[tuple[int, Tensor]]:
    """The texts that every method and length is measured on: (document number, (L_max,) int64).

    Raises:
        DataError: no document is that long.
    """
    windows = []
    for number in select_documents(tokens, plan):
        ids = _ids(tokens, number)
        windows += [(number, ids[start:stop]) for start, stop in plan.cuts(len(ids))]
    return windows


def _ids(tokens: datasets.Dataset, number: int) -> Tensor:
    return torch.tensor(tokens[number]["input_ids"], dtype=torch.int64)


@dataclass(frozen=True)
class Losses:
    """Losses of the last n tokens of a text, on the CPU: float64, bool, int64, each (n,)."""

    nll: Tensor
    hits: Tensor
    bytes: Tensor

    def part(self, chosen: slice | Tensor) -> Losses:
        """Some of the tokens."""
        return Losses(self.nll[chosen], self.hits[chosen], self.bytes[chosen])


class Reader:
    """Reads texts with one model; an extended one at the scale of a given length.

    Args:
        model: a plain or an extended model, in evaluation mode.
        token_bytes: from `clex.evaluation.token_bytes`; bytes are 0 without.
        advance: called with the number of tokens of each text that was read.
    """

    def __init__(
        self,
        model: nn.Module,
        token_bytes: Tensor | None = None,
        advance: Callable[[int], None] = lambda tokens: None,
    ) -> None:
        self.model, self.token_bytes, self.advance = model, token_bytes, advance
        self.device = next(model.parameters()).device
        self.losses = TokenLoss(getattr(model, "get_base_model", lambda: model)())
        self.extended = extension_of(model) is not None

    def scale(self, length: int) -> float:
        """The scale at which a text of `length` tokens is read; 1 for a plain model."""
        return scale_for(self.model, length) if self.extended else 1.0

    @torch.no_grad()
    def __call__(self, ids: Tensor, last: int, length: int | None = None) -> Losses:
        """Losses of the last `last` tokens of `ids` (T,), read at the scale of `length` (or T)."""
        scale = self.scale(length or len(ids))
        with at_scale(self.model, scale) if self.extended else nullcontext():
            nll, hits = self.losses(self.model, ids[None].to(self.device), last=last)
        size = torch.zeros(last, dtype=torch.int64)
        if self.token_bytes is not None:
            size = self.token_bytes[ids[-last:]]
        self.advance(len(ids))
        return Losses(nll[0].double().cpu(), hits[0].cpu(), size)


@dataclass
class _Sum:
    """Sums of one document in one cell, as they grow."""

    scale: float
    windows: int = 0
    nll: float = 0.0
    tokens: int = 0
    hits: int = 0
    bytes: int = 0

    def add(self, losses: Losses, windows: int = 1) -> None:
        self.windows += windows
        self.nll += losses.nll.sum().item()
        self.tokens += len(losses.nll)
        self.hits += int(losses.hits.sum())
        self.bytes += int(losses.bytes.sum())


def score_document(
    reader: Reader,
    texts: Sequence[Tensor],
    plan: PerplexityPlan,
    method: str,
    document: int,
    key_tokens: KeyTokens | None = None,
) -> list[Score]:
    """All cells of one document under one model.

    Args:
        reader: of the model.
        texts: the document, (N,) int64, or several pieces of it.
        plan: what is measured.
        method: name for the scores.
        document: number for the scores.
        key_tokens: of its windows, for protocol ``longppl``.

    Raises:
        ClexError: a loss is not a number.
    """
    sums: dict[Cell, _Sum] = {}

    def add(cell: Cell, losses: Losses) -> None:
        sums.setdefault(cell, _Sum(reader.scale(cell.length))).add(losses)

    windows = [ids[start:stop] for ids in texts for start, stop in plan.cuts(len(ids))]
    for number, window in enumerate(windows):
        keys = None
        if "longppl" in plan.protocols:
            keys = (key_tokens or {})[document, number]
        _score_window(reader, window, plan, keys, add)
    if "sliding" in plan.protocols:
        for size in plan.sliding:
            cell = Cell("sliding", size)
            for ids in texts:
                for begin, end, count in plan.slides(len(ids), size):
                    add(cell, reader(ids[begin:end], count, length=size))
    for cell, part in sums.items():
        if not math.isfinite(part.nll):
            raise ClexError(f"{method}: the loss at {cell.length} tokens is not a number")
    return [
        Score(method=method, document=document, **dataclasses.asdict(cell), **vars(part))
        for cell, part in sorted(sums.items(), key=lambda item: item[0].place)
    ]


def _score_window(
    reader: Reader,
    window: Tensor,
    plan: PerplexityPlan,
    keys: Tensor | None,
    add: Callable[[Cell, Losses], None],
) -> None:
    longest, heads, tails = plan.lengths[-1], plan.heads(), plan.tails()
    for length in heads:
        losses = reader(window[:length], length - 1)
        if "window" in plan.protocols:
            add(Cell("window", length), losses)
        if length == longest and "target" in plan.protocols:
            add(Cell("target", length), losses.part(slice(-plan.target, None)))
        if length == longest and "position" in plan.protocols:
            edges = plan.band_edges()
            for start, stop in pairwise(edges):
                # The loss of token p is number p - 1: nothing comes before the first token.
                band = losses.part(slice(max(start, 1) - 1, stop - 1))
                add(Cell("position", length, start, stop), band)
        if keys is not None and length > plan.truncation:
            add(Cell("longppl", length), losses.part(keys[keys < length] - 1))
    for length in tails:
        add(Cell("target", length), reader(window[-length:], plan.target))


def measure(
    model: nn.Module,
    texts: Sequence[tuple[int, Tensor]],
    plan: PerplexityPlan,
    method: str,
    advance: Callable[[int], None] = lambda tokens: None,
    *,
    token_bytes: Tensor | None = None,
    key_tokens: KeyTokens | None = None,
    log: ScoreLog | None = None,
) -> list[Row]:
    """Perplexity of one model on texts that are in memory.

    Args:
        model: a plain or an extended model; an extended one reads a text of length L at the scale
            of L.
        texts: (document number, (N,) int64); whole documents, or windows from `cut_windows`.
        plan: what is measured.
        method: name for the rows.
        advance: called with the number of tokens of each text that was read, for a progress bar.
        token_bytes: from `clex.evaluation.token_bytes`, for bits per byte.
        key_tokens: from `clex.evaluation.longppl`, for protocol ``longppl``.
        log: where the sums of each document are kept.

    Returns:
        A row for each cell: two for each length with the protocols ``window`` and ``target``.

    Raises:
        ClexError: a loss is not a number.
    """
    documents: dict[int, list[Tensor]] = {}
    for number, ids in texts:
        documents.setdefault(number, []).append(ids)
    reader = Reader(model, token_bytes, advance)
    log = ScoreLog() if log is None else log
    return _measure(reader, documents.items(), plan, method, key_tokens, log)


def _measure(
    reader: Reader,
    documents: Iterable[tuple[int, Sequence[Tensor]]],
    plan: PerplexityPlan,
    method: str,
    key_tokens: KeyTokens | None,
    log: ScoreLog,
) -> list[Row]:
    training = reader.model.training
    reader.model.eval()
    for number, texts in documents:
        log.add(method, number, score_document(reader, texts, plan, method, number, key_tokens))
    reader.model.train(training)
    return rows_of(score for score in log.scores if score.method == method)


@contextmanager
def as_method(model: nn.Module, config: ClexConfig | None) -> Iterator[nn.Module]:
    """The plain model extended in another way for the length of a block (``None``: not at all)."""
    extension = extension_of(model)
    if extension is not None:
        raise ValueError("as_method wants a plain model")
    try:
        yield model if config is None else extend(model, config)
    finally:
        restore(model)


def evaluate_methods(
    model: nn.Module,
    tokens: datasets.Dataset,
    plan: PerplexityPlan,
    methods: dict[str, ClexConfig | None],
    console: Console | None = None,
    *,
    token_bytes: Tensor | None = None,
    key_tokens: KeyTokens | None = None,
    log: ScoreLog | None = None,
) -> list[Row]:
    """Perplexity of a plain model under several training-free methods.

    One document is in memory at a time.

    Args:
        model: a plain model; it is plain again afterwards.
        tokens: documents, from `clex.data.load_tokens`.
        plan: what is measured.
        methods: row name to config; ``None`` is the model as it is.
        console: where progress is shown.
        token_bytes, key_tokens: see `measure`.
        log: where the sums of each document are kept; what it holds is not measured again.

    Raises:
        DataError: no document has the longest length.
        ClexError: a loss is not a number.
    """
    rows: list[Row] = []
    log = ScoreLog() if log is None else log
    missing, work = _missing(tokens, plan, methods, log)
    with _bar(work, console) as advance:
        for name, config in methods.items():
            with as_method(model, config) as changed:
                reader = Reader(changed, token_bytes, advance)
                documents = ((n, [_ids(tokens, n)]) for n in missing[name])
                rows += _measure(reader, documents, plan, name, key_tokens, log)
    return rows


def evaluate_extended(
    model: nn.Module,
    tokens: datasets.Dataset,
    plan: PerplexityPlan,
    method: str | None = None,
    console: Console | None = None,
    *,
    token_bytes: Tensor | None = None,
    key_tokens: KeyTokens | None = None,
    log: ScoreLog | None = None,
) -> list[Row]:
    """Perplexity of an extended model; rows are named after its method if no name is given."""
    name = method or config_of(model).method
    log = ScoreLog() if log is None else log
    missing, work = _missing(tokens, plan, [name], log)
    with _bar(work, console) as advance:
        reader = Reader(model, token_bytes, advance)
        documents = ((n, [_ids(tokens, n)]) for n in missing[name])
        return _measure(reader, documents, plan, name, key_tokens, log)


def _missing(
    tokens: datasets.Dataset, plan: PerplexityPlan, methods: Iterable[str], log: ScoreLog
) -> tuple[dict[str, list[int]], int]:
    """Documents that are still to be read under each method, and the tokens of all that."""
    chosen, lengths = select_documents(tokens, plan), list(tokens["length"])
    missing = {name: [n for n in chosen if not log.has(name, n)] for name in methods}
    return missing, sum(plan.work(lengths[n]) for part in missing.values() for n in part)


def progress_bar(
    plan: PerplexityPlan, windows: int, methods: int, console: Console | None
) -> AbstractContextManager[Callable[[int], None]]:
    """A bar over all windows that will be read; the block gets the function that advances it."""
    return _bar(methods * windows * plan.work(plan.lengths[-1]), console)


@contextmanager
def _bar(work: int, console: Console | None) -> Iterator[Callable[[int], None]]:
    with Progress(
        TextColumn("evaluating"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        console=console or Console(stderr=True),
    ) as progress:
        task = progress.add_task("evaluating", total=work)
        yield lambda tokens: progress.advance(task, tokens)
