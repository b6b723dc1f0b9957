"""Differences between methods of several result files, paired by document.

    python -m benchmarks.differences A-documents.csv B-documents.csv \\
        --of weights/twin-then-layers --to test/twin

The files hold summed losses in nats: columns set, method, seed, protocol, length, document, nll,
tokens. Methods are named SET/METHOD; losses are means over the seeds, and intervals 95 % bootstrap
intervals over the documents. `--seed` takes one seed of both alone.
"""

from __future__ import annotations

import argparse
import csv
from collections import defaultdict
from collections.abc import Iterator, Sequence
from math import exp
from pathlib import Path

from clex.comparison.statistics import Losses

Cell = tuple[str, int]  # protocol, length


def rows_of(files: Sequence[Path], name: str) -> Iterator[dict[str, str]]:
    """The rows of the method SET/METHOD."""
    for file in files:
        with file.open(newline="", encoding="utf-8") as lines:
            for row in csv.DictReader(lines):
                if f"{row['set']}/{row['method']}" == name:
                    yield row


def read(files: Sequence[Path], name: str, seed: str | None = None) -> dict[Cell, Losses]:
    """Losses of the method SET/METHOD by protocol and length, the mean of its seeds."""
    seeds: dict[Cell, dict[str, dict[int, tuple[float, int]]]] = defaultdict(dict)
    for row in rows_of(files, name):
        if seed in (None, row["seed"]):
            documents = seeds[row["protocol"], int(row["length"])].setdefault(row["seed"], {})
            documents[int(row["document"])] = (float(row["nll"]), int(row["tokens"]))
    if not seeds:
        raise SystemExit(f"no rows of {name} in {', '.join(map(str, files))}")
    cells = {}
    for cell, found in seeds.items():
        columns = [[one[key] for key in sorted(one)] for one in found.values()]
        cells[cell] = Losses.mean([Losses(*zip(*column, strict=True)) for column in columns])
    return cells


def main(arguments: Sequence[str] | None = None) -> None:
    """Print perplexities of both methods and what one is ahead of the other, %."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--of", required=True, metavar="SET/METHOD")
    parser.add_argument("--to", required=True, metavar="SET/METHOD")
    parser.add_argument("--seed", help="one seed of both; the mean of all if not given")
    args = parser.parse_args(arguments)
    ours, theirs = (read(args.files, name, args.seed) for name in (args.of, args.to))
    for cell in sorted(ours.keys() & theirs.keys()):
        one, other = ours[cell], theirs[cell]
        low, high = one.difference(other) or (float("nan"),) * 2
        percent = [100 * (exp(value) - 1) for value in (one.nll - other.nll, low, high)]
        print(
            f"{cell[0]:8} {cell[1]:7,}  {exp(one.nll):9.3f} {exp(other.nll):9.3f}"
            "  {:+.2f} % [{:+.2f}, {:+.2f}]".format(*percent)
        )


if __name__ == "__main__":
    main()
