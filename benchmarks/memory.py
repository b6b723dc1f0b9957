"""Speed and peak memory of training SmolLM2-135M on long texts, on one GPU.

    python -m benchmarks.memory --out DIR

As `clex extend` trains it: all layers checkpointed, loss in chunks, all weights and the dynamics in
AdamW. Random weights, bfloat16. Lengths that do not fit are noted as such.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from benchmarks.models import pair, random_tokens
from benchmarks.report import Log, common_arguments, measured
from benchmarks.timing import time_calls
from benchmarks.training_step import make_step


def main(arguments: Sequence[str] | None = None) -> Log:
    """Run the benchmark that the arguments describe."""
    parser = common_arguments(__doc__.splitlines()[0])
    parser.add_argument("--lengths", default="8192,16384,32768,65536,131072")
    parser.add_argument("--seconds", type=float, default=8.0, help="most for each length")
    args = parser.parse_args(arguments)
    shape = "tiny" if args.small else "SmolLM2-135M"
    lengths = [64, 128] if args.small else [int(x) for x in args.lengths.split(",")]
    log = Log("memory", args.out, {"device": args.device, "dtype": "bfloat16"})
    _, extended = pair(shape, args.device)
    extended.train()
    extended.gradient_checkpointing_enable({"use_reentrant": False})
    for length in lengths:
        step = make_step(extended, random_tokens(shape, length, args.device), True)
        try:
            timings = time_calls(
                {"extended": step},
                torch.device(args.device),
                repeats=args.repeats,
                warmup=2,
                most_seconds=args.seconds,
            )
        except torch.cuda.OutOfMemoryError as error:
            print(f"{length}: {error}".splitlines()[0], flush=True)
            break
        speed = round(length / timings["extended"].median * 1e3)
        more = {"tokens/s": speed, "allocated MiB": torch.cuda.max_memory_allocated() // 2**20}
        log.add(measured(f"{shape}, {length:,}", timings, {"extended": more}))
    return log


if __name__ == "__main__":
    main()
