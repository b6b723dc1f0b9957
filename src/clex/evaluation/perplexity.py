"""Perplexity by length, in the two protocols that answer different questions.

- ``window``: mean loss over the first L tokens of a text. Falls with L by itself, since later
  tokens have more before them.
- ``target``: loss of the same last tokens, with only the context before them growing. Any rise with
  the context is harm that length does. This is the curve to look at.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import datasets
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from ..config import ClexConfig
from ..data import long_enough
from ..errors import ClexError, DataError
from ..hf.extend import at_scale, config_of, extend, extension_of, restore, scale_for
from ..hf.loss import TokenLoss

PROTOCOLS = ("window", "target")


@dataclass(frozen=True)
class Row:
    """One cell of a perplexity table.

    Attributes:
        method: what was measured: ``base``, ``yarn``, ``clex``, ...
        length: tokens that the model saw, the context of protocol ``target`` included.
        protocol: ``window`` or ``target``.
        ppl: exp of the mean loss over all scored tokens.
        documents: documents that were read.
        windows: texts that were scored, one or more of each document.
        tokens: tokens that were scored.
        scale: length scale t that the model used (1 for the base model).
        nll: mean loss in nats a token.
        accuracy: share of scored tokens that were the model's first choice.
    """

    method: str
    length: int
    protocol: str
    ppl: float
    documents: int
    windows: int
    tokens: int
    scale: float
    nll: float
    accuracy: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


@dataclass(frozen=True)
class PerplexityPlan:
    """What is measured.

    Attributes:
        lengths: tokens, ascending; the longest sets the size of a window.
        target: scored tokens of protocol ``target``; shorter than the shortest length.
        windows: most windows of one document; they do not overlap.
        documents: most documents; ``None`` for all.
    """

    lengths: tuple[int, ...]
    target: int
    windows: int = 1
    documents: int | None = None

    @classmethod
    def for_model(
        cls,
        native_length: int,
        max_scale: float,
        lengths: Sequence[int] | None = None,
        **settings: Any,
    ) -> PerplexityPlan:
        """Lengths L, 2L, 4L ... up to ``max_scale * L``, and a target of a quarter of L.

        Raises:
            DataError: a wanted length is too short to hold the target tokens.
        """
        target = max(1, native_length // 4 - 1)
        if lengths is None:
            doublings = int(math.log2(max_scale) + 1e-6)
            lengths = [native_length * 2**k for k in range(doublings + 1)]
        ordered = tuple(sorted(set(lengths)))
        if not ordered or ordered[0] <= target:
            raise DataError(
                f"evaluation lengths must be above the {target} target tokens, got {lengths}"
            )
        return cls(lengths=ordered, target=target, **settings)


def cut_windows(tokens: datasets.Dataset, plan: PerplexityPlan) -> list[tuple[int, Tensor]]:
    """The texts that every method and length is measured on: (document number, (L_max,) int64).

    Only documents that have the longest length are used, for all lengths alike, so that the cells
    of a table speak of the same text.

    Raises:
        DataError: no document is that long.
    """
    size = plan.lengths[-1]
    lengths = list(tokens["length"])
    long_enough(lengths, size, "evaluation")
    chosen = [i for i, n in enumerate(lengths) if n >= size][: plan.documents]
    windows = []
    for number in chosen:
        ids = torch.tensor(tokens[number]["input_ids"], dtype=torch.int64)
        for k in range(min(plan.windows, len(ids) // size)):
            windows.append((number, ids[k * size : (k + 1) * size]))
    return windows


@torch.no_grad()
def measure(
    model: nn.Module,
    windows: Sequence[tuple[int, Tensor]],
    plan: PerplexityPlan,
    method: str,
    advance: Callable[[], None] = lambda: None,
) -> list[Row]:
    """Perplexity of one model at all lengths of `plan`, in both protocols.

    Args:
        model: a plain or an extended model; an extended one reads a text of length L at the scale
            of L.
        windows: from `cut_windows`.
        plan: what is measured.
        method: name for the rows.
        advance: called after each text that was read, for a progress bar.

    Returns:
        Two rows for each length.
    """
    training, device = model.training, next(model.parameters()).device
    model.eval()
    losses_of = TokenLoss(getattr(model, "get_base_model", lambda: model)())
    extended = extension_of(model) is not None
    rows = []
    for length in plan.lengths:
        scale = scale_for(model, length) if extended else 1.0
        sums = {protocol: [0.0, 0, 0] for protocol in PROTOCOLS}
        for _, ids in windows:
            head, tail = ids[:length], ids[-length:]
            same = len(ids) == length
            for protocol, text in (("window", head), ("target", tail)):
                if same and protocol == "target":
                    continue
                last = length - 1 if protocol == "window" or same else plan.target
                with at_scale(model, scale) if extended else _nothing():
                    loss, hit = losses_of(model, text[None].to(device), last=last)
                _add(sums[protocol], loss, hit)
                if same:
                    _add(sums["target"], loss[:, -plan.target :], hit[:, -plan.target :])
                advance()
        for protocol, (total, hits, count) in sums.items():
            mean = total / count
            if not math.isfinite(mean):
                raise ClexError(f"{method}: the loss at {length} tokens is not a number")
            rows.append(
                Row(
                    method=method,
                    length=length,
                    protocol=protocol,
                    ppl=math.exp(min(mean, 700.0)),
                    documents=len({number for number, _ in windows}),
                    windows=len(windows),
                    tokens=int(count),
                    scale=scale,
                    nll=mean,
                    accuracy=hits / count,
                )
            )
    model.train(training)
    return rows


def _add(sums: list[float], loss: Tensor, hit: Tensor) -> None:
    sums[0] += loss.double().sum().item()
    sums[1] += int(hit.sum().item())
    sums[2] += loss.numel()


@contextmanager
def _nothing() -> Iterator[None]:
    yield


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
) -> list[Row]:
    """Perplexity of a plain model under several training-free methods.

    Args:
        model: a plain model; it is plain again afterwards.
        tokens: documents, from `clex.data.load_tokens`.
        plan: what is measured.
        methods: row name to config; ``None`` is the model as it is.
        console: where progress is shown.

    Raises:
        DataError: no document has the longest length.
    """
    windows = cut_windows(tokens, plan)
    rows: list[Row] = []
    with progress_bar(plan, len(windows), len(methods), console) as advance:
        for name, config in methods.items():
            with as_method(model, config):
                rows += measure(model, windows, plan, name, advance)
    return rows


def evaluate_extended(
    model: nn.Module,
    tokens: datasets.Dataset,
    plan: PerplexityPlan,
    method: str | None = None,
    console: Console | None = None,
) -> list[Row]:
    """Perplexity of an extended model; rows are named after its method if no name is given."""
    windows = cut_windows(tokens, plan)
    with progress_bar(plan, len(windows), 1, console) as advance:
        return measure(model, windows, plan, method or config_of(model).method, advance)


def progress_bar(
    plan: PerplexityPlan, windows: int, methods: int, console: Console | None
) -> AbstractContextManager[Callable[[], None]]:
    """A bar over all texts that will be read; the block gets the function that advances it."""

    @contextmanager
    def bar() -> Iterator[Callable[[], None]]:
        with Progress(
            TextColumn("evaluating"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console or Console(stderr=True),
        ) as progress:
            texts = methods * windows * (2 * len(plan.lengths) - 1)
            task = progress.add_task("evaluating", total=texts)
            yield lambda: progress.advance(task)

    return bar()
