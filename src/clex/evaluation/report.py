"""Perplexity rows as a table on the terminal, as JSON and CSV, and as a picture."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from rich.table import Table

from ..files import new_file, write_json
from .perplexity import PROTOCOLS, Row

_TITLES = {
    "window": "first L tokens",
    "target": "same target tokens, L tokens of context",
}
# Training-free rivals are dashed; the cycle for the rest must not repeat their colours.
_RIVALS = {"base": "#888888", "yarn": "#1f77b4"}
_CYCLE = ("#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#e377c2", "#17becf", "#bcbd22")


def short_length(tokens: int) -> str:
    """512 as "512", 8192 as "8k"."""
    return f"{tokens // 1024}k" if tokens >= 1024 and tokens % 1024 == 0 else str(tokens)


def table(rows: Sequence[Row], protocol: str) -> Table:
    """Methods by lengths, for one protocol."""
    chosen = [row for row in rows if row.protocol == protocol]
    lengths = sorted({row.length for row in chosen})
    result = Table(title=f"perplexity, {protocol}: {_TITLES[protocol]}")
    result.add_column("method")
    for length in lengths:
        result.add_column(short_length(length), justify="right")
    for method in dict.fromkeys(row.method for row in chosen):
        cells = {row.length: row.ppl for row in chosen if row.method == method}
        result.add_row(method, *(_number(cells.get(length)) for length in lengths))
    return result


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if value < 1000 else f"{value:.3g}"


def write_report(rows: Sequence[Row], folder: str | Path, native_length: int) -> None:
    """Write ``results.json``, ``results.csv`` and ``perplexity.png`` into `folder`."""
    folder = Path(folder)
    records = [row.to_dict() for row in rows]
    write_json(folder / "results.json", records)
    with (
        new_file(folder / "results.csv") as path,
        path.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, fieldnames=list(records[0]))
        writer.writeheader()
        writer.writerows(records)
    with new_file(folder / "perplexity.png") as path:
        _draw(rows, path, native_length)


def _draw(rows: Sequence[Row], path: Path, native_length: int) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), sharey=True, layout="constrained")
    lengths = sorted({row.length for row in rows})
    # Broken models reach 10,000 and more; the picture is about the others.
    best = [
        min(r.ppl for r in rows if r.length == n and r.protocol == p)
        for n in lengths
        for p in PROTOCOLS
    ]
    low, high = 0.95 * min(best), 1.8 * max(best)
    for axis, protocol in zip(axes, PROTOCOLS, strict=True):
        _draw_protocol(axis, rows, protocol, high)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(lengths, [short_length(n) for n in lengths])
        axis.minorticks_off()
        axis.axvline(native_length, color="black", linewidth=0.8, linestyle=":")
        axis.annotate(
            "trained window",
            (native_length, 0.98),
            xycoords=("data", "axes fraction"),
            rotation=90,
            ha="right",
            va="top",
            fontsize=8,
        )
        axis.set_title(_TITLES[protocol])
        axis.set_xlabel("tokens")
        axis.grid(alpha=0.3)
    axes[0].set_ylim(low, high)
    step = max(1, round((high - low) / 8))
    ticks = list(range(math.ceil(low), math.floor(high) + 1, step))
    axes[0].set_yticks(ticks, [str(tick) for tick in ticks])
    axes[0].set_ylabel("perplexity (lower is better)")
    axes[0].legend(loc="upper left")
    figure.savefig(path, dpi=150, format="png")
    plt.close(figure)


def _draw_protocol(axis: Axes, rows: Sequence[Row], protocol: str, ceiling: float) -> None:
    chosen = [row for row in rows if row.protocol == protocol]
    methods = list(dict.fromkeys(row.method for row in chosen))
    learned = [method for method in methods if method not in _RIVALS]
    for method in methods:
        points = sorted((r.length, min(r.ppl, 10 * ceiling)) for r in chosen if r.method == method)
        rival = method in _RIVALS
        axis.plot(
            [length for length, _ in points],
            [ppl for _, ppl in points],
            marker="o",
            label=method,
            color=_RIVALS[method] if rival else _CYCLE[learned.index(method) % len(_CYCLE)],
            linestyle="--" if rival else "-",
        )
