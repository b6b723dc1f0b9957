"""LongPPL: perplexity over the tokens that need a long context (arXiv 2410.23771).

An evaluator model reads each text twice: with all that comes before, and from a short context of
between K and 1.25 K tokens (windows that move by K / 4). A key token is one that the long context
makes likely and the short one does not: ``l_short - l_long > 2`` and ``l_long < 2``, losses in
nats. The first K tokens have none. LongPPL of a judged model is exp of its mean loss over the key
tokens, in full context.

The paper has K = 4,096. Here K is half the native window unless it is set, so that the short
context is always one that the evaluator was trained on; for a window of 8,192 the two agree.

An evaluator that is itself extended favours models that read like it. The plain model inside its
own window (`Evaluator.window`) favours none: its long context is the last 0.8 to 1 native windows,
so its key tokens need more than K tokens but never more than the native window.

An evaluator with a tokenizer of its own reads the same text in its own tokens; a token of the
judged models is a key token where it shares a byte with one of the evaluator's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from ..errors import CheckpointError, ConfigError
from ..files import read_json, write_json
from .alignment import Aligner
from .perplexity import PerplexityPlan, Reader, select_documents

KEYS_FILE = "key_tokens.json"
GAIN = 2.0
MOST_LOSS = 2.0


@dataclass(frozen=True)
class Evaluator:
    """Who finds the key tokens.

    Attributes:
        model: plain or extended.
        aligner: where its tokenizer is not that of the judged models.
        window: most tokens that it reads at a time; all of a text if not given.
    """

    model: nn.Module
    aligner: Aligner | None = None
    window: int | None = None


def local_losses(read: Reader, ids: Tensor, context: int) -> Tensor:
    """Losses from the context that is close.

    Args:
        read: reader of the evaluator.
        ids: (N,), N above `context`.
        context: K, tokens of context at least.

    Returns:
        float64 (N - K,): losses of the tokens K, K + 1 ... Token p sees the tokens from the last
        multiple of K / 4 that is at least K before it.
    """
    step = max(1, context // 4)
    parts = []
    for start in range(0, len(ids) - context, step):
        text = ids[start : start + context + step]
        parts.append(read(text, len(text) - context).nll)
    return torch.cat(parts)


def find_key_tokens(
    read: Reader, ids: Tensor, truncation: int, window: int | None = None
) -> Tensor:
    """Positions of the key tokens of a text.

    Args:
        read: reader of the evaluator.
        ids: (N,), N above `truncation`.
        truncation: K.
        window: most tokens that the evaluator reads at a time; all if not given.

    Returns:
        int64, ascending, each at least K.

    Raises:
        ConfigError: four fifths of `window` are not more than `truncation`.
    """
    if window is None or len(ids) <= window:
        long = read(ids, len(ids) - truncation).nll
    else:
        context = window * 4 // 5
        if truncation >= context:
            raise ConfigError(
                f"truncation {truncation} is no short context for an evaluator that reads {window}"
                f" tokens (valid: 2 to {context - 1})"
            )
        first = read(ids[:context], context - truncation).nll
        long = torch.cat([first, local_losses(read, ids, context)])
    short = local_losses(read, ids, truncation)
    return ((short - long > GAIN) & (long < MOST_LOSS)).nonzero()[:, 0] + truncation


def key_tokens_of(
    evaluator: Evaluator,
    tokens: datasets.Dataset,
    plan: PerplexityPlan,
    file: Path | None = None,
    console: Console | None = None,
) -> dict[tuple[int, int], Tensor]:
    """Key tokens of every window of a plan.

    Args:
        evaluator: the model that finds them.
        tokens: documents in the tokens of the judged models, from `clex.data.load_tokens`.
        plan: lengths and documents, and the truncation K, which counts the evaluator's tokens.
        file: what is found is kept there after every document, and taken from there.
        console: where progress is shown.

    Returns:
        (document, number of its window) to int64 positions.

    Raises:
        CheckpointError: `file` is damaged.
        DataError: a tokenizer changes the text, so that tokens cannot be matched.
    """
    found = {} if file is None or not file.is_file() else _read(file)
    missing = [n for n in select_documents(tokens, plan) if (n, 0) not in found]
    if not missing:
        return found
    training = evaluator.model.training
    evaluator.model.eval()
    read = Reader(evaluator.model)
    for number in track(missing, "finding key tokens", console=console or Console(stderr=True)):
        ids = tokens[number]["input_ids"]
        for k, keys in enumerate(_document(read, evaluator, ids, plan)):
            found[number, k] = keys
        if file is not None:
            write_json(
                file,
                [
                    {"document": n, "window": k, "positions": positions.tolist()}
                    for (n, k), positions in found.items()
                ],
            )
    evaluator.model.train(training)
    return found


def _document(
    read: Reader, evaluator: Evaluator, ids: list[int], plan: PerplexityPlan
) -> Iterator[Tensor]:
    """Key tokens of each window of a document."""
    cuts, own = list(plan.cuts(len(ids))), torch.tensor(ids, dtype=torch.int64)
    if evaluator.aligner is None:
        for start, stop in cuts:
            yield find_key_tokens(read, own[start:stop], plan.truncation, evaluator.window)
        return
    text = evaluator.aligner(ids)
    for start, stop in cuts:
        first, last = text.inside(start, stop)
        if last - first <= plan.truncation:
            yield torch.zeros(0, dtype=torch.int64)
            continue
        keys = find_key_tokens(read, text.ids[first:last], plan.truncation, evaluator.window)
        yield text.own_tokens(first + keys) - start


def _read(file: Path) -> dict[tuple[int, int], Tensor]:
    try:
        return {
            (int(part["document"]), int(part["window"])): torch.tensor(
                part["positions"], dtype=torch.int64
            )
            for part in read_json(file)
        }
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{file} is damaged; delete it to find the key tokens anew") from None
