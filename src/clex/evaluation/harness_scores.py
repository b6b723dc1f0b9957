"""What lm-eval says of one task, as rows with confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from numbers import Real
from statistics import fmean
from typing import Any

from rich.table import Table

from .statistics import mean_interval


@dataclass(frozen=True)
class Score:
    """One metric of one task.

    Attributes:
        method: what was measured: ``base``, ``yarn``, ``clex``, ...
        task: name of the task.
        metric: lm-eval's name of it, with the filter of the answers where there is one.
        value: over all items; LongBench's ``score`` from 0 to 100, all others as lm-eval has them.
        low: lower end of the 95 % bootstrap interval over items; ``None`` for a single item, and
            for metrics that are no function of a mean over items.
        high: its upper end.
        items: items that were scored.
        cut: items whose text was longer than the window.
        longest: most tokens that the model read of one item.
        scale: largest length scale t that it read one at.
        seconds: that the task took, all its metrics together.
    """

    method: str
    task: str
    metric: str
    value: float
    low: float | None
    high: float | None
    items: int
    cut: int
    longest: int
    scale: float
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


def interval(
    values: Sequence[Any], aggregate: Callable[[list[Any]], float]
) -> tuple[float, float] | None:
    """95 % bootstrap interval of a metric over items.

    Args:
        values: one for each item: a number, or a sum with its count (log-likelihood and words).
        aggregate: from a list of them to the metric. It must depend on their mean alone, as
            accuracy, perplexity and bits per byte do; this is tried.

    Returns:
        Both ends; ``None`` for fewer than two items and for metrics of any other kind.
    """
    pairs = all(isinstance(v, tuple | list) and len(v) == 2 for v in values)
    flat = [part for v in values for part in v] if pairs else values
    if not all(isinstance(part, Real) for part in flat):
        return None
    sums = [v[0] for v in values] if pairs else list(values)
    counts = [v[1] for v in values] if pairs else [1] * len(values)
    ends = mean_interval(sums, counts)
    if ends is None:
        return None

    def metric(mean: float) -> float:
        return float(aggregate([(mean, 1)] if pairs else [mean]))

    try:
        if not math.isclose(metric(sum(sums) / sum(counts)), aggregate(list(values)), rel_tol=1e-6):
            return None
    except (TypeError, ValueError, ZeroDivisionError):
        return None
    low, high = sorted(metric(end) for end in ends)
    return low, high


def metric_rows(
    task: Any, results: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Metric, value, interval and number of items of each metric of a task.

    RULER scores each item at its own length only and marks the others with -1; those are no
    values, and lengths without any item have no row.
    """
    rows = []
    for name, value in results.items():
        metric, comma, chosen = name.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, Real):
            continue
        values = [s[metric] for s in samples if s.get("filter") == chosen and metric in s]
        if metric.isdigit():
            values = [v for v in values if v != -1]
        if not values:
            continue
        # For a length that the task does not list, lm-eval takes the mean of all, -1 included.
        aggregate = fmean if metric.isdigit() else task.aggregation().get(metric, fmean)
        value = fmean(values) if metric.isdigit() else value
        low, high = interval(values, aggregate) or (None, None)
        label = metric if chosen == "none" else f"{metric},{chosen}"
        rows.append(
            {"metric": label, "value": float(value), "low": low, "high": high, "items": len(values)}
        )
    return rows


def score_table(scores: Sequence[Score]) -> Table:
    """Tasks and metrics by methods, with intervals and numbers of items."""
    methods = list(dict.fromkeys(score.method for score in scores))
    table = Table(title="scores, 95 % bootstrap interval over items")
    for title in ("task", "metric", "items", *methods):
        text = title in ("task", "metric")
        table.add_column(title, justify="left" if text else "right", overflow="fold")
    cells = {(score.task, score.metric, score.method): score for score in scores}
    for task, metric in dict.fromkeys((score.task, score.metric) for score in scores):
        found = [cells.get((task, metric, method)) for method in methods]
        items = "/".join(dict.fromkeys(str(score.items) for score in found if score is not None))
        table.add_row(task, metric, items, *(_cell(score) for score in found))
    return table


def _cell(score: Score | None) -> str:
    if score is None:
        return "-"
    if score.low is None or score.high is None:
        return f"{score.value:.4g}"
    return f"{score.value:.4g} [{score.low:.4g}, {score.high:.4g}]".replace("[", r"\[")
