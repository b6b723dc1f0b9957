"""How long a user waits before anything happens: import, help, the first use of a model.

    python -m benchmarks.start_up --runs 20

Each run is a process of its own. Best and median of the wall time, and the best of the processor's
time: another program on the machine makes the first two longer and leaves the last nearly alone.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time

WHAT = {
    "python alone": "",
    "import clex": "import clex",
    "clex --help": "from clex.cli import main; import sys; sys.argv = ['clex', '--help']; main()",
    "clex extend --help": (
        "from clex.cli import main; import sys; sys.argv = ['clex', 'extend', '--help']; main()"
    ),
    "torch and transformers": "import torch, transformers",
    "the first use of clex.extend": "import clex; clex.extend",
}


def seconds(code: str) -> tuple[float, float]:
    """Wall time and processor time of one new interpreter that runs `code`."""
    begun, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
    wall, after = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def main() -> None:
    """Print one line for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=20)
    args = parser.parse_args()
    for name, code in WHAT.items():
        runs = [seconds(code) for _ in range(args.runs)]
        walls, processor = [wall for wall, _ in runs], min(cpu for _, cpu in runs)
        print(
            f"{name:30} best {min(walls):6.2f} s, median {statistics.median(walls):6.2f} s,"
            f" processor {processor:6.2f} s"
        )


if __name__ == "__main__":
    main()
