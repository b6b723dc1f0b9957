"""What an engine says about the tokens of a text."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Scores:
    """How an engine rates the last tokens of a text.

    Attributes:
        log_probs: of each token given all before it, nats, float64, shape (count,).
        best: the token that the engine holds most likely in its place, int64, shape (count,).
    """

    log_probs: Tensor
    best: Tensor
