"""Bootstrap over documents: how far a mean would move with other documents of the same kind.

Tokens of one document are not independent, documents are. So whole documents are drawn with
replacement, and what is drawn is the same for every method: differences are paired.
(Percentile bootstrap: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

RESAMPLES = 2000
CONFIDENCE = 0.95
SEED = 0

Array = np.ndarray[Any, np.dtype[np.float64]]


@lru_cache(maxsize=4)
def draws(documents: int) -> Array:
    """How often each document is in each resample: float64 (RESAMPLES, documents), fixed seed."""
    random = np.random.default_rng(SEED)
    share = np.full(documents, 1 / documents)
    return random.multinomial(documents, share, size=RESAMPLES).astype(np.float64)


def resampled_means(sums: Sequence[float], counts: Sequence[int]) -> Array:
    """Mean loss of each resample.

    Args:
        sums: sum of the losses of each document.
        counts: scored tokens of each document.

    Returns:
        float64 (RESAMPLES,): sum of the drawn sums over sum of the drawn counts; nan where only
        documents without a scored token were drawn.
    """
    weights = draws(len(sums))
    total, tokens = weights @ np.asarray(sums, float), weights @ np.asarray(counts, float)
    return np.divide(total, tokens, out=np.full_like(total, np.nan), where=tokens > 0)


def mean_interval(sums: Sequence[float], counts: Sequence[int]) -> tuple[float, float] | None:
    """95 % interval of the mean loss over tokens.

    ``None`` where fewer than two documents have a scored token: nothing could vary.
    """
    return _interval(resampled_means(sums, counts)) if np.count_nonzero(counts) > 1 else None


def difference_interval(
    sums: Sequence[float], other_sums: Sequence[float], counts: Sequence[int]
) -> tuple[float, float] | None:
    """95 % interval of the difference of two mean losses over the same tokens, first less second.

    Args:
        sums: sum of the losses of each document under one method.
        other_sums: the same under another method, documents in the same order.
        counts: scored tokens of each document, the same for both.

    Returns:
        Nats a token, or ``None`` where fewer than two documents have a scored token.
    """
    return mean_interval(np.subtract(sums, other_sums).tolist(), counts)


def _interval(means: Array) -> tuple[float, float] | None:
    means = means[~np.isnan(means)]
    if len(means) == 0:
        return None
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)
