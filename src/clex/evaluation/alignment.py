"""One text in the tokens of two tokenizers, matched by the bytes that each token stands for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import DataError
from .token_bytes import token_bytes


@dataclass(frozen=True)
class Alignment:
    """A text in the tokens of the judged model and in those of an evaluator.

    Attributes:
        ids: the evaluator's tokens, int64 (M,).
        own: byte at which each token of the judged model begins, and the end; int64 (N + 1,).
        other: the same of the evaluator; int64 (M + 1,).
    """

    ids: Tensor
    own: Tensor
    other: Tensor

    def inside(self, start: int, stop: int) -> tuple[int, int]:
        """First and one past the last of its tokens that lie inside own tokens [start, stop)."""
        first = int(torch.searchsorted(self.other, self.own[start]))
        last = int(torch.searchsorted(self.other, self.own[stop], right=True)) - 1
        return first, max(first, last)

    def own_tokens(self, positions: Tensor) -> Tensor:
        """Own tokens that share a byte with its tokens `positions`; int64, ascending."""
        begins, ends = self.other[positions], self.other[positions + 1]
        seen = ends > begins
        first = torch.searchsorted(self.own, begins[seen], right=True) - 1
        last = torch.searchsorted(self.own, ends[seen])
        marks = torch.zeros(len(self.own), dtype=torch.int64)
        marks.index_add_(0, first, torch.ones_like(first))
        marks.index_add_(0, last, -torch.ones_like(last))
        return (marks.cumsum(0)[:-1] > 0).nonzero()[:, 0]


class Aligner:
    """Makes the `Alignment` of documents.

    Args:
        own: tokenizer of the judged models.
        other: tokenizer of the evaluator.
    """

    def __init__(self, own: Any, other: Any) -> None:
        self.own, self.other = own, other
        self.own_bytes, self.other_bytes = token_bytes(own), token_bytes(other)

    def __call__(self, ids: Sequence[int]) -> Alignment:
        """Align a document of own tokens.

        Raises:
            DataError: one of the tokenizers changes the text, so that bytes do not tell the place.
        """
        text: str = self.own.decode(ids, clean_up_tokenization_spaces=False)
        others = self.other(text, add_special_tokens=False, verbose=False)["input_ids"]
        size = len(text.encode())
        edges = []
        for tokens, sizes in ((ids, self.own_bytes), (others, self.other_bytes)):
            ends = sizes[torch.tensor(tokens, dtype=torch.int64)].cumsum(0)
            # Some tokenizers put a space in front of every text.
            extra = int(ends[-1]) - size
            if extra not in (0, 1):
                raise DataError(
                    f"LongPPL cannot place the evaluator's tokens: a tokenizer makes"
                    f" {int(ends[-1])} bytes of a text of {size}; use an evaluator whose tokenizer"
                    f" keeps every byte"
                )
            edges.append(
                torch.cat([torch.zeros(1, dtype=torch.int64), (ends - extra).clamp(min=0)])
            )
        return Alignment(torch.tensor(others, dtype=torch.int64), *edges)
