"""Reading a long prompt with an extended model, against plain RoPE.

    python -m benchmarks.prefill --out DIR

One forward pass over the prompt with a fresh cache, in chunks as `clex generate` reads it, or at
once. Random weights, bfloat16; the extended model holds the scale of the prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import DynamicCache

from benchmarks.models import pair, random_tokens
from benchmarks.report import Log, common_arguments, measured
from benchmarks.timing import time_calls
from clex.hf.extend import at_scale

CASES = {"SmolLM2-135M": 131072, "Llama-3.2-1B": 131072}


def make_prefill(model: Any, ids: torch.Tensor) -> Callable[[int], None]:
    """One pass over all of `ids`, logits of the last token only."""

    @torch.no_grad()
    def prefill(_: int) -> None:
        model(ids, past_key_values=DynamicCache(config=model.config), logits_to_keep=1)

    return prefill


def main(arguments: Sequence[str] | None = None) -> Log:
    """Run the benchmark that the arguments describe."""
    parser = common_arguments(__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=15.0, help="most for each model")
    args = parser.parse_args(arguments)
    log = Log("prefill", args.out, {"device": args.device, "dtype": "bfloat16"})
    for shape, length in {"tiny": 1000}.items() if args.small else CASES.items():
        plain, extended = pair(shape, args.device)
        ids = random_tokens(shape, length, args.device)
        with at_scale(extended.eval(), 16.0), torch.no_grad():
            calls = {
                "plain": make_prefill(plain.eval(), ids),
                "extended": make_prefill(extended, ids),
            }
            timings = time_calls(
                calls,
                torch.device(args.device),
                repeats=args.repeats,
                warmup=1,
                most_seconds=args.seconds,
            )
        more = {name: {"tokens/s": round(length / t.median * 1e3)} for name, t in timings.items()}
        log.add(measured(f"{shape}, {length:,}", timings, more))
    return log


if __name__ == "__main__":
    main()
