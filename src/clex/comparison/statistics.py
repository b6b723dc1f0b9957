"""Losses of one cell of a table with seeds averaged, and what a difference leaves standing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..evaluation.statistics import difference_interval, mean_interval

# Below this many documents a bootstrap has hardly anything to draw from.
FEW_DOCUMENTS = 8
Interval = tuple[float, float] | None


@dataclass(frozen=True)
class Losses:
    """Losses of one method at one length, by document.

    Attributes:
        sums: summed loss of each document, nats; of several seeds their mean.
        tokens: scored tokens of each document.
    """

    sums: tuple[float, ...]
    tokens: tuple[int, ...]

    @classmethod
    def mean(cls, seeds: Sequence[Losses]) -> Losses:
        """The mean over seeds, all measured on the same tokens."""
        columns = zip(*(one.sums for one in seeds), strict=True)
        return cls(tuple(sum(column) / len(seeds) for column in columns), seeds[0].tokens)

    @property
    def nll(self) -> float:
        """Mean loss over all tokens, nats."""
        return sum(self.sums) / sum(self.tokens)

    def interval(self) -> Interval:
        """95 % interval of `nll` over documents."""
        return mean_interval(self.sums, self.tokens)

    def difference(self, other: Losses) -> Interval:
        """95 % interval of the difference of `nll` to another's, paired by document."""
        return difference_interval(self.sums, other.sums, self.tokens)


def level(difference: Interval, seeds: Sequence[float], best_seeds: Sequence[float]) -> bool:
    """Whether a method cannot be told from the best one.

    It cannot if the paired interval over documents of its loss difference to the best includes 0,
    or if its range over seeds and the best one's overlap; nor if there is no interval at all.

    Args:
        difference: from `Losses.difference`.
        seeds: loss of each seed.
        best_seeds: the same of the best method.
    """
    if difference is None or difference[0] <= 0 <= difference[1]:
        return True
    many = len(seeds) > 1 or len(best_seeds) > 1
    return many and min(seeds) <= max(best_seeds)
