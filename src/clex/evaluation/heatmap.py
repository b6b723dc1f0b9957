"""Retrieval cells as a picture, as CSV and as a table on the terminal."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.image import AxesImage
from rich.table import Table

from ..files import new_file
from .report import short_length
from .retrieval import SCORES, Cell, Summary, effective_length

_TITLES = {
    "exact": "exact match of greedy generation",
    "choice": "right answer likelier than all distractors",
    "gain": "right answer raised most by the hidden text",
}
# Runs from dark blue to yellow: even in lightness, and told apart by the colour-blind.
_COLOURS = "cividis"


def scores_of(cells: Sequence[Cell]) -> tuple[str, ...]:
    """The scores that these cells have: generation may have been left out."""
    return tuple(score for score in SCORES if getattr(cells[0], score) is not None)


def write_cells(cells: Sequence[Cell], path: Path) -> None:
    """All cells as CSV, a row each."""
    records = [cell.to_dict() for cell in cells]
    with new_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(records[0]))
        writer.writeheader()
        writer.writerows(records)


def draw_heatmap(
    cells: Sequence[Cell], score: str, path: Path, native_length: int, chance: float
) -> dict[str, list[list[float]]]:
    """Draw one score as a map of length and depth for each method, side by side.

    Args:
        cells: of one run.
        score: one of `scores_of(cells)`.
        path: of the PNG.
        native_length: lengths up to here are left of the line.
        chance: share of right answers of a model that knows nothing.

    Returns:
        What was drawn: for each method one row a depth, one column a length.
    """
    methods = list(dict.fromkeys(cell.method for cell in cells))
    lengths = sorted({cell.length for cell in cells})
    depths = sorted({cell.depth for cell in cells})
    value = {(c.method, c.depth, c.length): float(getattr(c, score)) for c in cells}
    drawn = {
        method: [[value.get((method, d, n), float("nan")) for n in lengths] for d in depths]
        for method in methods
    }
    width = max(2.6, 0.62 * len(lengths) + 0.6)
    figure, axes = plt.subplots(
        1,
        len(methods),
        figsize=(width * len(methods) + 1.8, 0.36 * len(depths) + 1.7),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, method in zip(axes[0], methods, strict=True):
        image = _draw(axis, drawn[method], method)
        axis.set_xticks(range(len(lengths)), [short_length(n) for n in lengths], rotation=45)
        axis.set_yticks(range(len(depths)), [f"{100 * depth:g} %" for depth in depths])
        inside = sum(n <= native_length for n in lengths)
        axis.axvline(inside - 0.5, color="#d62728", linewidth=2.5)
        axis.set_xlabel("tokens")
    axes[0][0].set_ylabel("depth of the statement")
    note = f"; chance {chance:.2g}" if score != "exact" else ""
    figure.suptitle(
        f"{_TITLES[score]}{note}; red line: native window {short_length(native_length)}",
        fontsize=9,
    )
    figure.colorbar(image, ax=axes[0].tolist(), label="share of right answers")
    with new_file(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
    plt.close(figure)
    return drawn


def _draw(axis: Axes, rows: list[list[float]], method: str) -> AxesImage:
    image = axis.imshow(rows, cmap=_COLOURS, vmin=0, vmax=1, aspect="auto")
    for y, row in enumerate(rows):
        for x, value in enumerate(row):
            colour = "black" if value > 0.55 else "white"
            axis.text(x, y, f"{value:.2g}", ha="center", va="center", fontsize=7, color=colour)
    axis.set_title(method)
    return image


def summary_table(rows: Sequence[Summary], native_length: int) -> Table:
    """Means by length, with the share of depths above chance and how far the model finds things."""
    lengths = sorted({row.length for row in rows})
    result = Table(title="share of right answers (share of depths above chance)")
    result.add_column("score")
    result.add_column("method")
    for length in lengths:
        result.add_column(short_length(length), justify="right")
    result.add_column("0.9 of native up to", justify="right")
    for score, method in dict.fromkeys((row.score, row.method) for row in rows):
        chosen = [row for row in rows if (row.score, row.method) == (score, method)]
        by_length = {row.length: row for row in chosen}
        reach = effective_length(chosen, native_length)
        result.add_row(
            score,
            method,
            *(_share(by_length.get(length)) for length in lengths),
            "-" if reach is None else short_length(reach),
        )
    return result


def _share(row: Summary | None) -> str:
    return "-" if row is None else f"{row.mean:.2f} ({row.depths_above_chance:.2f})"
