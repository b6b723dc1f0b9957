"""What whole fits of the dynamics cost, by the windows that `benchmarks.fit_cost` measured.

    python -m benchmarks.whole_fit DIR/DATE-DEVICE-MODEL-fit_cost.json

For a fit up to each length that was measured from 8 times the native window on: the seconds of 48
windows and of the default number, and those of the windows that choose a step. Scales are uniform
from 1; between two lengths the logarithm of the time is linear in that of the length.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.models import SHAPES
from clex.selection import LOOKS
from clex.training import TrainConfig


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a line for each largest length."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("result", type=Path, help="JSON file of benchmarks.fit_cost")
    found = json.loads(parser.parse_args(arguments).result.read_text(encoding="utf-8"))
    native = SHAPES[found["settings"]["model"]]["max_position_embeddings"]
    seconds: dict[str, dict[float, float]] = {"reading": {}, "window": {}}
    for row in found["rows"]:
        length = int(row["case"].split(", ")[1].replace(",", ""))
        seconds[row["way"]][length / native] = row["median_ms"] / 1e3

    def at(way: str, scales: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
        known = sorted(seconds[way].items())
        scale, time = np.log(known).T
        return np.exp(np.interp(np.log(scales), scale, time))

    config = TrainConfig(depth="dynamics")
    default = config.steps * config.windows_per_step
    for largest in sorted(scale for scale in seconds["window"] if scale >= 8):
        window = at("window", np.linspace(1, largest, 10_001)).mean()
        spread = 1 + (largest - 1) * np.arange(1, config.select_windows + 1) / config.select_windows
        chosen = (LOOKS + 1) * at("reading", spread).sum()  # once before the first step
        print(
            f"{native * largest:,.0f} tokens: 48 windows {48 * window:.0f} s,"
            f" {default} windows {default * window:.0f} s, choosing {chosen:.0f} s"
        )


if __name__ == "__main__":
    main()
