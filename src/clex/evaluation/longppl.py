"""LongPPL: perplexity over the tokens that need a long context (arXiv 2410.23771).

An evaluator model reads each text twice: with all that comes before, and from a short context of
between K and 1.25 K tokens (windows that move by K / 4). A key token is one that the long context
makes likely and the short one does not: ``l_short - l_long > 2`` and ``l_long < 2``, losses in
nats. The first K tokens have none. LongPPL of a judged model is exp of its mean loss over the key
tokens, in full context.

The paper has K = 4,096. Here K is half the native window unless it is set, so that the short
context is always one that the evaluator was trained on; for a window of 8,192 the two agree.
"""

from __future__ import annotations

from pathlib import Path

import datasets
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from ..errors import CheckpointError
from ..files import read_json, write_json
from .perplexity import PerplexityPlan, Reader, select_documents

KEYS_FILE = "key_tokens.json"
GAIN = 2.0
MOST_LOSS = 2.0


def short_losses(read: Reader, ids: Tensor, truncation: int) -> Tensor:
    """Losses from a short context.

    Args:
        read: reader of the evaluator.
        ids: (N,), N above `truncation`.
        truncation: K, tokens of context at least.

    Returns:
        float64 (N - K,): losses of the tokens K, K + 1 ... Token p sees the tokens from the last
        multiple of K / 4 that is at least K before it.
    """
    step = max(1, truncation // 4)
    parts = []
    for start in range(0, len(ids) - truncation, step):
        text = ids[start : start + truncation + step]
        parts.append(read(text, len(text) - truncation).nll)
    return torch.cat(parts)


def find_key_tokens(read: Reader, ids: Tensor, truncation: int) -> Tensor:
    """Positions of the key tokens of a text.

    Args:
        read: reader of the evaluator.
        ids: (N,), N above `truncation`.
        truncation: K.

    Returns:
        int64, ascending, each at least K.
    """
    long = read(ids, len(ids) - truncation).nll
    short = short_losses(read, ids, truncation)
    return ((short - long > GAIN) & (long < MOST_LOSS)).nonzero()[:, 0] + truncation


def key_tokens_of(
    model: nn.Module,
    tokens: datasets.Dataset,
    plan: PerplexityPlan,
    file: Path | None = None,
    console: Console | None = None,
) -> dict[tuple[int, int], Tensor]:
    """Key tokens of every window of a plan.

    Args:
        model: the evaluator: plain or extended, with the tokenizer of the judged models.
        tokens: documents, from `clex.data.load_tokens`.
        plan: lengths and documents, and the truncation K.
        file: what is found is kept there after every document, and taken from there.
        console: where progress is shown.

    Returns:
        (document, number of its window) to int64 positions.

    Raises:
        CheckpointError: `file` is damaged.
    """
    found = {} if file is None or not file.is_file() else _read(file)
    missing = [n for n in select_documents(tokens, plan) if (n, 0) not in found]
    if not missing:
        return found
    training = model.training
    model.eval()
    read = Reader(model)
    for number in track(missing, "finding key tokens", console=console or Console(stderr=True)):
        ids = torch.tensor(tokens[number]["input_ids"], dtype=torch.int64)
        for k, (start, stop) in enumerate(plan.cuts(len(ids))):
            found[number, k] = find_key_tokens(read, ids[start:stop], plan.truncation)
        if file is not None:
            write_json(
                file,
                [
                    {"document": n, "window": k, "positions": positions.tolist()}
                    for (n, k), positions in found.items()
                ],
            )
    model.train(training)
    return found


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
