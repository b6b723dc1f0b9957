"""Results of a benchmark: dated JSON for machines and Markdown for people."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import Timing
from clex.files import new_file, write_json
from clex.run_folder import versions


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One way of doing one thing.

    Attributes:
        case: what is done, at which size.
        way: who does it.
        median_ms, low_ms, high_ms: of the repetitions.
        repeats: how many there were.
        peak_bytes: most memory during the call beyond what was there before.
        share: median ratio of this time to that of the case's first way, repetition by repetition.
        more: other numbers, such as errors and bytes a second.
    """

    case: str
    way: str
    median_ms: float
    low_ms: float
    high_ms: float
    repeats: int
    peak_bytes: int
    share: float
    more: dict[str, Any] = field(default_factory=dict)


def measured(
    case: str, timings: dict[str, Timing], more: dict[str, dict[str, Any]] | None = None
) -> list[Measured]:
    """Rows of a case; the first way is what the others are compared with."""
    first = next(iter(timings.values()))
    return [
        Measured(
            case=case,
            way=way,
            median_ms=timing.median,
            low_ms=min(timing.times),
            high_ms=max(timing.times),
            repeats=len(timing.times),
            peak_bytes=timing.peak_bytes,
            share=timing.ratio_to(first),
            more=(more or {}).get(way, {}),
        )
        for way, timing in timings.items()
    ]


def measured_table(rows: Sequence[Measured]) -> str:
    """Markdown: a line for each row."""
    lines = [
        "| case | way | ms (range) | time / first | times faster | peak MiB | more |",
        "| --- | --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for row in rows:
        more = ", ".join(
            f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.more.items()
        )
        lines.append(
            f"| {row.case} | {row.way} | {row.median_ms:.4g} ({row.low_ms:.4g} to"
            f" {row.high_ms:.4g}) | {row.share:.4f} | {1 / row.share:.2f}"
            f" | {row.peak_bytes / 2**20:,.0f} | {more} |"
        )
    return "\n".join(lines) + "\n"


def write_result(
    out: Path, name: str, settings: dict[str, Any], rows: Sequence[Any], table: str
) -> str:
    """``DATE-DEVICE-MODEL-NAME`` .json and .md in `out`; returns that stem.

    Args:
        settings: what was asked for; `device` is needed, `model` (if any) goes into the name.
        rows: dataclasses.
    """
    about = versions() | {"commit": _commit()}
    device = "cpu" if settings["device"] == "cpu" else about["device"].split()[1].lower()
    model = Path(settings.get("model", "")).name
    stem = "-".join(filter(None, (f"{datetime.now(UTC):%Y-%m-%d}", device, model, name)))
    write_json(
        out / f"{stem}.json",
        {"settings": settings, "versions": about, "rows": [asdict(row) for row in rows]},
    )
    facts = ", ".join(f"{k} {v}" for k, v in {**settings, **about}.items())
    with new_file(out / f"{stem}.md") as temporary:
        title = f"{model}: {name}" if model else name
        temporary.write_text(f"# {title}\n\n{facts}\n\n{table}", encoding="utf-8")
    return stem


def _commit() -> str:
    """The commit that runs; a copy without a repository says so in a file COMMIT."""
    here = Path(__file__).parent.parent
    if (here / "COMMIT").is_file():
        return (here / "COMMIT").read_text(encoding="utf-8").strip()
    command = ["git", "-C", str(here), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


class Log:
    """Rows of a benchmark, written again after each case: a machine may stop at any time."""

    def __init__(self, name: str, out: Path, settings: dict[str, Any]) -> None:
        self.name, self.out, self.settings = name, out, settings
        self.settings["command"] = " ".join([f"python -m benchmarks.{name}", *sys.argv[1:]])
        self.rows: list[Measured] = []

    def add(self, rows: Sequence[Measured]) -> None:
        """Keep, write and show the rows of one case."""
        self.rows += rows
        write_result(self.out, self.name, self.settings, self.rows, measured_table(self.rows))
        print("\n".join(measured_table(rows).splitlines()[2:]), flush=True)


def common_arguments(description: str) -> argparse.ArgumentParser:
    """A parser with what all benchmarks of kernels take."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--small", action="store_true", help="tiny sizes, to see that it runs")
    return parser


def relative_error(found: torch.Tensor, reference: torch.Tensor) -> float:
    """||found - reference|| / ||reference|| in float64."""
    reference = reference.detach().double()
    found = found.detach().to(reference)
    return float((found - reference).norm() / reference.norm())
