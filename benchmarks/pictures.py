"""Perplexity over length of some methods, as a picture of stored sums.

    python -m benchmarks.pictures A-documents.csv B-documents.csv --out frozen.png \\
        --title "SmolLM2-135M, weights frozen" --of "frozen/ntk=untrained" "frozen/clex=one curve"

The files are those of `benchmarks.differences`. A point is the mean over the seeds of a method's
losses, in perplexity, and its bar the range of the seeds; on the left the first L tokens, on the
right the same last tokens with L tokens of context.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from math import exp
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import StrMethodFormatter

from benchmarks.differences import Cell, read, rows_of
from clex.files import new_file

SIDES = {"window": "first L tokens", "target": "the same last tokens, L of context"}


def draw_method(
    axis: Axes, files: Sequence[Path], protocol: str, name: str, label: str, lengths: list[int]
) -> None:
    """The line of SET/METHOD."""
    mean = read(files, name)
    seeds = {row["seed"] for row in rows_of(files, name)}
    single = [read(files, name, seed) for seed in sorted(seeds)]
    cells: list[Cell] = [(protocol, length) for length in lengths if (protocol, length) in mean]
    middle = [exp(mean[cell].nll) for cell in cells]
    ranges = [[exp(one[cell].nll) for one in single] for cell in cells]
    bars = [
        [max(0.0, m - min(r)) for m, r in zip(middle, ranges, strict=True)],
        [max(0.0, max(r) - m) for m, r in zip(middle, ranges, strict=True)],
    ]
    axis.errorbar([length for _, length in cells], middle, bars, marker="o", capsize=2, label=label)


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw the methods that the arguments name."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--of", required=True, nargs="+", metavar="SET/METHOD=LABEL")
    parser.add_argument("--shortest", type=int, default=0, help="tokens")
    parser.add_argument("--title", default="")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(arguments)
    named = [pair.partition("=")[::2] for pair in args.of]
    lengths = sorted({length for name, _ in named for _, length in read(args.files, name)})
    lengths = [length for length in lengths if length >= args.shortest]
    figure, axes = plt.subplots(1, 2, figsize=(12.5, 5.6), dpi=100, layout="constrained")
    for axis, (protocol, title) in zip(axes, SIDES.items(), strict=True):
        axis.set(title=title, xlabel="tokens L", xscale="log", yscale="log")
        for name, label in named:
            draw_method(axis, args.files, protocol, name, label or name, lengths)
        axis.set_xticks(lengths, [f"{length:,}" for length in lengths], minor=False)
        axis.set_xticks([], minor=True)
        for formatted in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            formatted(StrMethodFormatter("{x:g}"))
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("perplexity (lower is better)")
    axes[0].legend(fontsize="small")
    figure.suptitle(args.title)
    with new_file(args.out) as temporary:
        figure.savefig(temporary, format="png")
    plt.close(figure)


if __name__ == "__main__":
    main()
