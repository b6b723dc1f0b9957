"""The files of a comparison: JSON, CSV, pictures and the page."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from ..evaluation.page import finite, write_page
from ..evaluation.report import short_length
from ..files import new_file, write_json

_COLUMNS = (
    "method",
    "seed",
    "protocol",
    "length",
    "band_start",
    "band_stop",
    "scale",
    "ppl",
    "ci_low",
    "ci_high",
    "nll",
    "accuracy",
    "bits_per_byte",
    "documents",
    "windows",
    "tokens",
)
_COLOURS = ("#5d6570", "#0067ac", "#c44900", "#007a5a", "#a0307c", "#8a6300", "#2b8fb8", "#3c2f8f")
_MARKERS = "os^Dv"
# Perplexities above so many times the best at a length are cut off: such a model has broken down.
_CEILING = 1.7


def write_comparison(summary: Mapping[str, Any], out: Path) -> None:
    """Write ``results.json``, ``results.csv``, a PNG for each protocol, and ``report.html``."""
    write_json(out / "results.json", finite(summary))
    with (
        new_file(out / "results.csv") as path,
        path.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, fieldnames=_COLUMNS, extrasaction="ignore", restval="")
        writer.writeheader()
        writer.writerows(summary["rows"])
    for protocol in dict.fromkeys(cell["protocol"] for cell in summary["perplexity"]):
        with new_file(out / f"{protocol}.png") as path:
            _draw(summary, protocol, path)
    write_page(summary, out / "report.html")


def _draw(summary: Mapping[str, Any], protocol: str, path: Path) -> None:
    native = summary["model"]["native_length"]
    cells = [c for c in summary["perplexity"] if c["protocol"] == protocol]
    cells = [c for c in cells if c["length"] >= native] or cells
    lengths = sorted({c["length"] for c in cells})
    best = [min(c["ppl"] for c in cells if c["length"] == n) for n in lengths]
    figure, axis = plt.subplots(figsize=(7.5, 4.6), layout="constrained")
    for index, method in enumerate(summary["methods"]):
        own = sorted(
            (c for c in cells if c["method"] == method["name"]), key=lambda c: int(c["length"])
        )
        if own:
            _draw_method(axis, index, method, own)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_ylim(0.97 * min(c["low"] or c["ppl"] for c in cells), _CEILING * max(best))
    axis.set_xticks(lengths, [short_length(n) for n in lengths])
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("{x:g}")
    axis.tick_params(axis="y", which="minor", labelsize=8)
    axis.axvline(native, color="black", linewidth=0.8, linestyle=":")
    axis.set_title(f"{summary['title']}: {protocol}")
    axis.set_xlabel("tokens")
    axis.set_ylabel("perplexity (lower is better)")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=150, format="png")
    plt.close(figure)


def _draw_method(
    axis: Axes, index: int, method: Mapping[str, Any], cells: list[dict[str, Any]]
) -> None:
    ppl = [c["ppl"] for c in cells]
    spread = [
        [c["ppl"] - c["low"] if c["low"] is not None else 0.0 for c in cells],
        [c["high"] - c["ppl"] if c["high"] is not None else 0.0 for c in cells],
    ]
    axis.errorbar(
        [c["length"] for c in cells],
        ppl,
        yerr=spread,
        capsize=2,
        marker=_MARKERS[index % len(_MARKERS)],
        color=_COLOURS[index % len(_COLOURS)],
        linestyle="-" if method["trained"] else "--",
        label=method["label"],
    )
