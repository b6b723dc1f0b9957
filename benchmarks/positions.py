"""Placing tokens and computing cos and sin for 131,072 positions, against plain rotary.

    python -m benchmarks.positions --out DIR

``plain`` is transformers' rotary module over position_ids. ``tables`` draws positions by the
default sampler and computes cos and sin, each row at its own scale, as hosts that are not fused
get them; ``fused`` draws the positions and computes no tables, as the fused rotation needs none
(its angles are in the time of `benchmarks.rotary`). Frequencies are solved before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.models import pair
from benchmarks.report import Log, common_arguments, measured, relative_error
from benchmarks.timing import time_calls
from clex.hf.extend import at_scale
from clex.hf.rotary import ScaledRope
from clex.kernels import use
from clex.positions import sample_positions


def make_call(
    rope: ScaledRope, x: torch.Tensor, ids: torch.Tensor, t: torch.Tensor, kernels: bool
) -> Callable[[int], Any]:
    """Draw positions and compute what attention is given."""
    native = rope.native_length
    name = rope.clex_config.positions

    @torch.no_grad()
    def call(i: int) -> Any:
        seeds = torch.arange(len(t), device=t.device) + i
        with use(kernels):
            held = rope.held
            assert held is not None
            held.positions = sample_positions(name, ids.shape[1], t, seeds, native, 16.0)
            return rope(x, ids)

    return call


def run_case(log: Log, rows: int, length: int, args: Any) -> None:
    """`rows` texts of `length` tokens, each at a scale of its own."""
    shape = "tiny" if args.small else "Llama-3.2-1B"
    plain, extended = pair(shape, args.device)
    rope: Any = extended.model.rotary_emb
    x = torch.zeros(rows, 1, 1, device=args.device, dtype=torch.bfloat16)
    ids = torch.arange(length, device=args.device).expand(rows, -1)
    t = torch.linspace(2, 16, rows, device=args.device)
    with torch.no_grad(), at_scale(extended.eval(), t):
        stock = torch.no_grad()(lambda i: plain.model.rotary_emb(x, ids))
        calls = {"plain": stock, "tables": make_call(rope, x, ids, t, False)}
        if args.device == "cuda":
            calls["fused"] = make_call(rope, x, ids, t, True)
        cos, _ = calls["tables"](0)
        inv_freq, factor = rope.solve(t)["all"]
        angle = rope.held.positions.double()[..., None] * inv_freq.double()[:, None]
        exact = torch.cat([angle, angle], dim=-1).cos() * factor.double()[:, None, None]
        error = relative_error(cos, exact)
        if not error < 1e-2:
            raise AssertionError(f"the tables are off by {error:.2g}")
        del angle, exact, cos
        timings = time_calls(calls, torch.device(args.device), repeats=args.repeats)
    log.add(measured(f"{rows} x {length:,}", timings, {"tables": {"error": error}}))


def main(arguments: Sequence[str] | None = None) -> Log:
    """Run the benchmark that the arguments describe."""
    parser = common_arguments(__doc__.splitlines()[0])
    args = parser.parse_args(arguments)
    log = Log("positions", args.out, {"device": args.device, "dtype": "bfloat16"})
    for rows, length in [(2, 100)] if args.small else [(1, 131072), (8, 16384), (8, 131072)]:
        run_case(log, rows, length, args)
    return log


if __name__ == "__main__":
    main()
