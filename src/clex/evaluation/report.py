"""Perplexity rows as tables on the terminal, as JSON and CSV, and as a picture."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from rich.table import Table

from ..files import new_file, write_json
from .perplexity import PROTOCOLS, Row
from .scores import Difference

_TITLES = {
    "window": "first L tokens",
    "target": "same target tokens, L tokens of context",
    "position": "by position in the longest text",
    "longppl": "key tokens of the first L tokens",
    "sliding": "sliding window of L tokens",
}
# Training-free rivals are dashed; the cycle for the rest must not repeat their colours.
_RIVALS = {"base": "#888888", "yarn": "#1f77b4"}
_CYCLE = ("#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#e377c2", "#17becf", "#bcbd22")


def short_length(tokens: int) -> str:
    """512 as "512", 8192 as "8k"."""
    return f"{tokens // 1024}k" if tokens >= 1024 and tokens % 1024 == 0 else str(tokens)


def tables(
    rows: Sequence[Row], native_length: int | None, pairs: Sequence[Difference] = ()
) -> list[Table]:
    """All that is shown on the terminal.

    Args:
        rows: of any protocols; bands of ``position`` are left to the picture and the CSV.
        native_length: the trained window; the table of short texts needs it.
        pairs: from `clex.evaluation.scores.differences`.
    """
    measured = [p for p in PROTOCOLS if p != "position" and any(r.protocol == p for r in rows)]
    result = [table(rows, protocol) for protocol in measured]
    for protocol in ("target", "sliding"):
        if protocol in measured and pairs:
            result.append(_difference_table(pairs, protocol))
            break
    if any(row.bits_per_byte is not None for row in rows):
        result.append(_token_table(rows, measured[0] if measured else "position"))
    if native_length is not None and "window" in measured:
        result.append(retention_table(rows, native_length))
    return [part for part in result if part.row_count]


def table(rows: Sequence[Row], protocol: str) -> Table:
    """Perplexity, methods by lengths, for one protocol; 95 % intervals below where there are."""
    chosen = [row for row in rows if row.protocol == protocol]
    result = _by_length(f"perplexity, {protocol}: {_TITLES[protocol]}", chosen)
    for method, cells in _by_method(chosen).items():
        result.add_row(method, *(_ppl_cell(cells.get(n)) for n in _lengths(chosen)))
    return result


def retention_table(rows: Sequence[Row], native_length: int) -> Table:
    """What extending does to texts inside the native window: perplexity, and change in percent.

    The change is against ``base``, or the first method where the plain model was not measured.
    """
    chosen = [r for r in rows if r.protocol == "window" and r.length <= native_length]
    methods = _by_method(chosen)
    before = methods.get("base") or next(iter(methods.values()), {})
    title = f"short texts: first L tokens, window {short_length(native_length)}"
    result = _by_length(title, chosen)
    for method, cells in methods.items():
        parts = []
        for length in _lengths(chosen):
            row, old = cells.get(length), before.get(length)
            change = f" {row.ppl / old.ppl - 1:+.2%}" if row and old and row is not old else ""
            parts.append(_number(row.ppl if row else None) + change)
        result.add_row(method, *parts)
    return result


def _difference_table(pairs: Sequence[Difference], protocol: str) -> Table:
    """The last method against every other one: change of perplexity, paired by document."""
    last = pairs[-1].method
    chosen = [pair for pair in pairs if pair.protocol == protocol and pair.method == last]
    lengths = sorted({pair.length for pair in chosen})
    result = Table(title=f"{last}, change of {protocol} perplexity (95 %, paired by document)")
    result.add_column("against")
    for length in lengths:
        result.add_column(short_length(length), justify="right")
    for against in dict.fromkeys(pair.against for pair in chosen):
        cells = {pair.length: pair for pair in chosen if pair.against == against}
        result.add_row(against, *(_change_cell(cells.get(length)) for length in lengths))
    return result


def _token_table(rows: Sequence[Row], protocol: str) -> Table:
    chosen = [row for row in rows if row.protocol == protocol]
    result = _by_length(f"{protocol}: next-token accuracy, bits per byte", chosen)
    for method, cells in _by_method(chosen).items():
        parts = []
        for length in _lengths(chosen):
            row = cells.get(length)
            bits = "-" if row is None or row.bits_per_byte is None else f"{row.bits_per_byte:.3f}"
            parts.append("-" if row is None else f"{row.accuracy:.1%}\n{bits}")
        result.add_row(method, *parts)
    return result


def _by_length(title: str, rows: Sequence[Row]) -> Table:
    result = Table(title=title)
    result.add_column("method")
    for length in _lengths(rows):
        result.add_column(short_length(length), justify="right")
    return result


def _lengths(rows: Sequence[Row]) -> list[int]:
    return sorted({row.length for row in rows})


def _by_method(rows: Sequence[Row]) -> dict[str, dict[int, Row]]:
    result: dict[str, dict[int, Row]] = {}
    for row in rows:
        result.setdefault(row.method, {})[row.length] = row
    return result


def _ppl_cell(row: Row | None) -> str:
    if row is None:
        return "-"
    lines = [_number(row.ppl)]
    if row.ci_low is not None and row.ci_high is not None:
        lines.append(f"[dim]{row.ci_low:.3g}-{row.ci_high:.3g}[/dim]")
    if row.protocol == "longppl":  # so few that their number says what the mean is worth
        lines.append(f"[dim]{row.tokens} tokens[/dim]")
    return "\n".join(lines)


def _change_cell(pair: Difference | None) -> str:
    if pair is None:
        return "-"
    if pair.ci_low is None or pair.ci_high is None:
        return f"{pair.change:+.1%}"
    digits = 1 if max(abs(pair.ci_low), abs(pair.ci_high)) < 0.1 else 0
    low, high = (f"{100 * bound:+.{digits}f}" for bound in (pair.ci_low, pair.ci_high))
    return f"{pair.change:+.1%}\n[dim]{low} {high}[/dim]"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if value < 1000 else f"{value:.3g}"


def write_report(
    rows: Sequence[Row],
    folder: str | Path,
    native_length: int,
    pairs: Sequence[Difference] = (),
) -> None:
    """Write ``results.json``, ``results.csv``, ``perplexity.png`` and, with pairs of methods,
    ``differences.csv`` into `folder`; ``results.json`` last: it says that a run is done."""
    folder = Path(folder)
    records = [row.to_dict() for row in rows]
    _write_csv(folder / "results.csv", records)
    if pairs:
        _write_csv(folder / "differences.csv", [pair.to_dict() for pair in pairs])
    with new_file(folder / "perplexity.png") as path:
        _draw(rows, path, native_length)
    write_json(folder / "results.json", records)


def _write_csv(file: Path, records: Sequence[Mapping[str, Any]]) -> None:
    with new_file(file) as path, path.open("w", newline="", encoding="utf-8") as lines:
        writer = csv.DictWriter(lines, fieldnames=list(records[0]))
        writer.writeheader()
        writer.writerows(records)


def _draw(rows: Sequence[Row], path: Path, native_length: int) -> None:
    protocols = [p for p in PROTOCOLS if any(row.protocol == p for row in rows)]
    count = len(protocols)
    figure, grid = plt.subplots(
        1, count, figsize=(max(5.5 * count, 6.5), 4.4), squeeze=False, layout="constrained"
    )
    methods = list(dict.fromkeys(row.method for row in rows))
    for axis, protocol in zip(grid[0], protocols, strict=True):
        chosen = [row for row in rows if row.protocol == protocol]
        low, high = _limits(chosen)
        for method in methods:
            _draw_method(axis, [r for r in chosen if r.method == method], methods, 10 * high)
        axis.set_title(_TITLES[protocol])
        axis.set_xlabel("position" if protocol == "position" else "tokens")
        axis.set_yscale("log")
        axis.set_ylim(low, high)
        _whole_ticks(axis, low, high)
        if protocol != "position":
            lengths = _lengths(chosen)
            axis.set_xscale("log", base=2)
            axis.set_xticks(lengths, [short_length(n) for n in lengths])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        _mark_window(axis, native_length)
    grid[0][0].set_ylabel("perplexity (lower is better); shaded: 95 %")
    grid[0][0].legend(loc="upper left")
    figure.savefig(path, dpi=150, format="png")
    plt.close(figure)


def _limits(rows: Sequence[Row]) -> tuple[float, float]:
    """Broken models reach 10,000 and more; the picture is about the others."""
    best: dict[tuple[int, int], Row] = {}
    for row in rows:
        place = (row.length, row.band_start)
        best[place] = min(row, best.get(place, row), key=lambda one: one.ppl)
    low = min(row.ci_low or row.ppl for row in best.values())
    return 0.95 * low, 1.8 * max(row.ppl for row in best.values())


def _whole_ticks(axis: Axes, low: float, high: float) -> None:
    step = max(1, round((high - low) / 8))
    ticks = list(range(math.ceil(low), math.floor(high) + 1, step))
    axis.set_yticks(ticks, [str(tick) for tick in ticks])


def _mark_window(axis: Axes, native_length: int) -> None:
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


def _draw_method(axis: Axes, rows: Sequence[Row], methods: Sequence[str], ceiling: float) -> None:
    if not rows:
        return
    method = rows[0].method
    learned = [name for name in methods if name not in _RIVALS]
    rival = method in _RIVALS
    color = _RIVALS[method] if rival else _CYCLE[learned.index(method) % len(_CYCLE)]
    points = sorted(rows, key=lambda row: (row.length, row.band_start))
    # A band is drawn at its middle.
    x = [(r.band_start + r.band_stop) / 2 if r.band_stop else float(r.length) for r in points]
    y = [min(row.ppl, ceiling) for row in points]
    axis.plot(x, y, marker="o", label=method, color=color, linestyle="--" if rival else "-")
    if all(row.ci_low is not None for row in points):
        low = [min(row.ci_low or ceiling, ceiling) for row in points]
        high = [min(row.ci_high or ceiling, ceiling) for row in points]
        axis.fill_between(x, low, high, color=color, alpha=0.12, linewidth=0)
