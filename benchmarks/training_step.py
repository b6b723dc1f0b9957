"""A training step of an extended model against the same step with plain RoPE.

    python -m benchmarks.training_step --out DIR

One step: forward, chunked loss over all tokens, backward and AdamW on all weights, in bfloat16,
with random weights that both models share. The extended one trains its dynamics as well, at
another scale in every step and row. Compiled means that each decoder layer is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.models import pair, random_tokens
from benchmarks.report import Log, common_arguments, measured
from benchmarks.timing import time_calls
from clex.hf.extend import at_scale
from clex.hf.loss import TokenLoss

# Shape, windows and tokens of each. One window of the small model does not fill the GPU: the step
# waits for the host. Eight are the step of the runs in docs/results.md.
CASES = (
    ("SmolLM2-135M", 8, 8192),
    ("Llama-3.2-1B", 1, 16384),
    ("SmolLM2-135M", 1, 8192),
)


def make_step(model: Any, ids: torch.Tensor, extended: bool) -> Callable[[int], None]:
    """One training step; the number of the step chooses its scale."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=ids.is_cuda)
    loss = TokenLoss(model)
    scales = torch.linspace(1.5, 16, 7 * len(ids), device=ids.device).view(-1, 7)

    def losses(i: int) -> torch.Tensor:
        if not extended:
            return loss(model, ids)[0]
        with at_scale(model, scales[:, i % 7]):
            return loss(model, ids)[0]

    def step(i: int) -> None:
        losses(i).mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def run_case(log: Log, case: tuple[str, int, int], compiled: bool, args: Any) -> None:
    """Both models, in turn."""
    torch.compiler.reset()
    shape, rows, length = case
    ids = random_tokens(shape, rows * length, args.device).view(rows, length)
    models = dict(zip(("plain", "extended"), pair(shape, args.device), strict=True))
    steps = {}
    for name, model in models.items():
        model.train()
        if compiled:
            for layer in model.model.layers:
                layer.compile()
        steps[name] = make_step(model, ids, name == "extended")
    timings = time_calls(
        steps, torch.device(args.device), repeats=args.repeats, warmup=3, most_seconds=args.seconds
    )
    more = {name: {"tokens/s": round(ids.numel() / t.median * 1e3)} for name, t in timings.items()}
    more["extended"]["memory"] = timings["extended"].peak_bytes / max(
        1, timings["plain"].peak_bytes
    )
    form = "compiled" if compiled else "eager"
    log.add(measured(f"{shape}, {rows} x {length:,}, {form}", timings, more))


def main(arguments: Sequence[str] | None = None) -> Log:
    """Run the benchmark that the arguments describe."""
    parser = common_arguments(__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=15.0, help="most for each case")
    parser.add_argument("--forms", default="eager,compiled")
    parser.add_argument("--only", default="", help="cases whose name begins so")
    args = parser.parse_args(arguments)
    # The forms may be measured in two calls, which must not write into one file.
    log = Log(
        f"training_step-{args.forms.replace(',', '-')}",
        args.out,
        {"device": args.device, "dtype": "bfloat16"},
    )
    cases = (("tiny", 2, 50),) if args.small else CASES
    for case in cases:
        if not f"{case[0]}, {case[1]} x {case[2]:,}".startswith(args.only):
            continue
        for form in args.forms.split(","):
            run_case(log, case, form == "compiled", args)
    return log


if __name__ == "__main__":
    main()
