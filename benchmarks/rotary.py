"""Rotating q and k, forward and backward: the fused kernel, transformers in eager mode, Liger.

    python -m benchmarks.rotary --out DIR

Queries and keys as a host makes them, (B, T, heads, D) in memory and transposed. transformers and
Liger are given tables of cos and sin that are there already; the fused kernel computes its angles.
Backward includes the gradient of the frequencies for ``fused, learned``. `graph` is the time on the
device alone, of a CUDA graph. Liger rotates in place, into the memory of its inputs.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from benchmarks.report import Log, common_arguments, measured, relative_error
from benchmarks.timing import copy_bandwidth, graphed, time_calls
from clex.kernels.rotary import rotate

# Heads of queries, heads of keys, and their size: SmolLM2-135M, Llama-3.2-1B, Llama-3-8B.
SHAPES = {"9+3 x 64": (9, 3, 64), "32+8 x 64": (32, 8, 64), "32+8 x 128": (32, 8, 128)}
# Inputs that are rotated through hold at least this much, beyond any cache.
INPUT_BYTES = 2**28


class Case:
    """Inputs of one shape, enough of them that none is in a cache when it comes again."""

    def __init__(self, heads: tuple[int, int, int], position_ids: Tensor, sets: int) -> None:
        q_heads, k_heads, size = heads
        device, length = position_ids.device, position_ids.shape[1]
        generator = torch.Generator(device).manual_seed(0)

        def random(many: int) -> Tensor:
            x = torch.randn(1, length, many, size, generator=generator, device=device)
            return x.to(torch.bfloat16).transpose(1, 2)

        self.q = [random(q_heads).requires_grad_() for _ in range(sets)]
        self.k = [random(k_heads).requires_grad_() for _ in range(sets)]
        self.grads = [(random(q_heads), random(k_heads)) for _ in range(sets)]
        self.position_ids = position_ids
        index = torch.arange(0, size, 2, dtype=torch.float32, device=device)
        self.inv_freq = (1.0 / 10_000.0 ** (index / size))[None]
        self.factor = torch.full((1,), 1.1, device=device)
        angle = self.position_ids[..., None].float() * self.inv_freq[:, None]
        angle = torch.cat([angle, angle], dim=-1)
        self.cos = (angle.cos() * self.factor).bfloat16()
        self.sin = (angle.sin() * self.factor).bfloat16()
        self.sets = sets

    def ways(self) -> dict[str, Any]:
        """Who rotates."""
        ways: dict[str, Any] = {"transformers": self.eager, "fused": self.fused}
        if self.cos.is_cuda and importlib.util.find_spec("liger_kernel"):
            ways["liger"] = self.liger
        return ways

    def eager(self, q: Tensor, k: Tensor) -> Any:
        return apply_rotary_pos_emb(q, k, self.cos, self.sin)

    def fused(self, q: Tensor, k: Tensor) -> Any:
        tables = self.position_ids, self.inv_freq, self.factor
        return rotate(q, k, *tables, False, torch.bfloat16)

    def liger(self, q: Tensor, k: Tensor) -> Any:
        from liger_kernel.transformers.rope import liger_rotary_pos_emb

        return liger_rotary_pos_emb(q, k, self.cos, self.sin)

    def exact(self, q: Tensor, k: Tensor) -> list[Tensor]:
        """float64 throughout, from float64 angles."""
        angle = self.position_ids[..., None].double() * self.inv_freq.double()[:, None]
        cos, sin = (x * self.factor.double() for x in (angle.cos(), angle.sin()))
        half = q.shape[-1] // 2
        turned = []
        for x in (q.double(), k.double()):
            a, b = x[..., :half], x[..., half:]
            turned.append(torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1))
        return turned


def errors(case: Case) -> dict[str, dict[str, float]]:
    """Relative errors of outputs and gradients against float64; Liger gets copies to write into."""
    ways = case.ways()
    q, k = (x[0].detach().double().requires_grad_() for x in (case.q, case.k))
    exact = case.exact(q, k)
    grads = torch.autograd.grad(exact, (q, k), [g.double() for g in case.grads[0]])
    found = {}
    for name, rotated in ways.items():
        leaves = [x[0].detach().clone().requires_grad_() for x in (case.q, case.k)]
        out = rotated(*(leaf + 0 for leaf in leaves))
        out_error = max(relative_error(a, b) for a, b in zip(out, exact, strict=True))
        own = torch.autograd.grad(out, leaves, [g.clone() for g in case.grads[0]])
        grad_error = max(relative_error(a, b) for a, b in zip(own, grads, strict=True))
        found[name] = {"error": out_error, "gradient error": grad_error}
        if not (out_error < 2e-2 and grad_error < 2e-2):
            raise AssertionError(f"{name} is wrong: {found[name]}")
    return found


def run_case(log: Log, name: str, length: int, device: str, repeats: int, peak: float) -> None:
    """Forward, and forward with backward, of one shape and length."""
    heads = SHAPES[name]
    moved = 2 * 2 * length * (heads[0] + heads[1]) * heads[2]  # bytes read and written, bf16
    position_ids = torch.arange(length, device=device)[None]
    wrong = errors(Case(heads, position_ids[:, :: max(1, length // 512)], sets=1))
    case = Case(heads, position_ids, sets=max(2, min(8, INPUT_BYTES // (2 * moved))))
    ways = case.ways()

    def forward(rotated: Any) -> Any:
        def call(i: int) -> None:
            with torch.no_grad():
                rotated(case.q[i % case.sets], case.k[i % case.sets])

        return call

    def both(rotated: Any, learned: Tensor | None = None) -> Any:
        def call(i: int) -> None:
            q, k = case.q[i % case.sets], case.k[i % case.sets]
            leaves = (q, k) if learned is None else (q, k, learned)
            # Liger writes into its inputs, which leaves may not be; views of them may.
            views = (q.view_as(q), k.view_as(k)) if rotated == case.liger else (q, k)
            torch.autograd.grad(rotated(*views), leaves, case.grads[i % case.sets])

        return call

    calls = {way: forward(rotated) for way, rotated in ways.items()}
    more = {way: dict(wrong[way]) for way in ways}
    if device == "cuda":
        calls |= {f"{way}, graph": graphed(calls[way], case.sets) for way in ways}
    timings = time_calls(calls, torch.device(device), repeats=repeats)
    if device == "cuda":
        for way in ways:
            seconds = timings[f"{way}, graph"].median / 1e3
            more[f"{way}, graph"] = {"of copy bandwidth": moved / seconds / peak}
    log.add(measured(f"{name}, {length:,}, forward", timings, more))

    calls = {way: both(rotated) for way, rotated in ways.items()}
    case.inv_freq.requires_grad_()
    learned = both(case.fused, case.inv_freq)
    case.inv_freq.requires_grad_(False)

    def with_learned(i: int) -> None:
        case.inv_freq.requires_grad_()
        learned(i)
        case.inv_freq.requires_grad_(False)

    calls["fused, learned"] = with_learned
    if device == "cuda":
        calls |= {
            f"{way}, graph": graphed(calls[way], case.sets) for way in (*ways, "fused, learned")
        }
    timings = time_calls(calls, torch.device(device), repeats=repeats)
    log.add(measured(f"{name}, {length:,}, forward + backward", timings))


def main(arguments: Sequence[str] | None = None) -> Log:
    """Run the benchmark that the arguments describe."""
    parser = common_arguments(__doc__.splitlines()[0])
    parser.add_argument("--lengths", default="4096,32768,131072")
    args = parser.parse_args(arguments)
    lengths = [64] if args.small else [int(x) for x in args.lengths.split(",")]
    log = Log("rotary", args.out, {"device": args.device, "dtype": "bfloat16"})
    peak = copy_bandwidth(torch.device(args.device), 16 if args.small else 1024)
    log.settings["copy_bytes_per_second"] = f"{peak:.3g}"
    for length in lengths:
        for name in list(SHAPES)[:1] if args.small else SHAPES:
            run_case(log, name, length, args.device, args.repeats, peak)
    return log


if __name__ == "__main__":
    main()
