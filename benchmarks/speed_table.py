"""All benchmarks of speed, one after the other, each within its own time.

    python -m benchmarks.speed_table --out DIR

A failure or an overrun ends one benchmark and not the others; each writes its result after every
case. The whole takes about nine minutes on one H100.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

# Command and the most seconds that it may take, the most wanted first.
ROWS: tuple[tuple[str, int], ...] = (
    ("dynamics", 40),
    ("rotary --lengths 4096,131072 --repeats 10", 90),
    ("cache_move", 40),
    ("positions", 40),
    ("training_step --forms eager --seconds 12", 75),
    ("decoding SmolLM2-135M --contexts 65536 --tokens 32 --repeats 10 --chunk 8192", 60),
    ("decoding SmolLM2-135M --contexts 65536 --cache static --graph --repeats 10 --chunk 8192", 45),
    ("decoding Llama-3.2-1B --contexts 65536 --cache static --graph --repeats 10 --chunk 8192", 50),
    ("training_step --forms compiled --seconds 12", 110),
    ("prefill --seconds 12 --repeats 10", 100),
    ("memory --seconds 5", 60),
)
SMALL = ("dynamics", "rotary", "cache_move", "positions", "training_step", "prefill", "memory")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all rows; the exit code is the number of those that failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--seconds", type=float, default=540, help="most for all of them")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to see that all run")
    args = parser.parse_args(arguments)
    rows = tuple((f"{name} --small --repeats 5", 300) for name in SMALL) if args.small else ROWS
    started, failed = time.monotonic(), []
    for command, most in rows:
        left = args.seconds - (time.monotonic() - started)
        if left < 15:
            failed.append(f"{command}: no time left")
            continue
        words = [sys.executable, "-m", *f"benchmarks.{command}".split(), "--out", str(args.out)]
        print(f"== {command}", flush=True)
        began = time.monotonic()
        try:
            code = subprocess.run(words, timeout=min(most, left), check=False).returncode
        except subprocess.TimeoutExpired:
            code = "out of time"
        print(f"== {time.monotonic() - began:.0f} s, {code or 'ok'}", flush=True)
        if code:
            failed.append(f"{command}: {code}")
    print("\n".join(["failed:", *failed] if failed else ["all done"]), flush=True)
    sys.exit(len(failed))


if __name__ == "__main__":
    main()
