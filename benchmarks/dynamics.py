"""Solving the dynamics, forward and backward: the kernel, the plain solver, the released recipe.

    python -m benchmarks.dynamics --out DIR

Head size 128, a batch of 8 scales up to t = 16. One time is that of frequencies at all scales and
of the gradient of every parameter. The released recipe is the field of the released CLEX under
torchdiffeq's rk4 at steps of 0.01 in t, one scale after another, as that code solves it; here at
the largest scale alone, times nothing, so that it is compared at its best.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchdiffeq import odeint

from benchmarks.report import Log, common_arguments, measured, relative_error
from benchmarks.solver import in_float64, make
from benchmarks.timing import graphed, time_calls
from clex.kernels import use
from clex.scaling.clex import Clex


def step(scaling: Clex, t: Tensor, weights: Tensor) -> list[Tensor]:
    """Frequencies at scales `t`, their gradients, and nothing kept."""
    inv_freq = scaling.inv_freq(t)
    parameters = list(scaling.field.parameters())
    grads = torch.autograd.grad((inv_freq * weights).sum(), parameters)
    # A graph that lives on ties the parameters to its stream, and no other could be captured.
    return [inv_freq.detach(), *grads]


def released_step(scaling: Clex, t: Tensor, weights: Tensor) -> list[Tensor]:
    """The recipe of the released code for one scale: odeint over a grid of 0.01 up to `t`."""

    def rate(s: Tensor, residual: Tensor) -> Tensor:
        here = s.reshape(1)
        z = scaling.base.ratio(here).log() + residual
        return scaling.field(here, z, scaling.base.rate(here))

    start = torch.zeros(1, scaling.inv_freq_native.numel(), device=t.device)
    clock = torch.cat([torch.ones(1, device=t.device), t])
    residual = odeint(rate, start, clock, method="rk4", options={"step_size": 0.01})[-1]
    inv_freq = scaling.inv_freq_native * scaling.base.ratio(t) * residual.exp()
    parameters = list(scaling.field.parameters())
    return [inv_freq, *torch.autograd.grad((inv_freq * weights).sum(), parameters)]


def main(arguments: Sequence[str] | None = None) -> Log:
    """Run the benchmark that the arguments describe."""
    parser = common_arguments(__doc__.splitlines()[0])
    args = parser.parse_args(arguments)
    device = torch.device(args.device)
    ours, released = (make(preset, 0.02).to(device) for preset in ("default", "paper"))
    generator = torch.Generator(device).manual_seed(0)
    most = 2.0 if args.small else 16.0
    scales = [
        1 + (most - 1) * torch.rand(8, generator=generator, device=device).sort().values
        for _ in range(4)
    ]
    for t in scales:
        t[-1] = most
    weights = torch.randn(8, 64, generator=generator, device=device)
    weights = weights / ours.inv_freq_native

    exact = step(in_float64(ours), scales[0].double().cpu(), weights.double().cpu())

    def kernel(i: int) -> list[Tensor]:
        return step(ours, scales[i % 4], weights)

    def plain(i: int) -> list[Tensor]:
        with use(kernels=False):
            return kernel(i)

    ways: dict[str, Any] = {"plain": plain}
    if device.type == "cuda":
        ways = {"kernel": kernel, "plain": plain}
    more = {}
    for way, call in ways.items():
        found = call(0)
        more[way] = {
            "error": relative_error(found[0], exact[0]),
            "gradient error": max(map(relative_error, found[1:], exact[1:])),
        }
        if not more[way]["error"] < 1e-5 or not more[way]["gradient error"] < 1e-3:
            raise AssertionError(f"{way} is wrong: {more[way]}")
    if device.type == "cuda":
        ways["kernel, graph"] = graphed(kernel, 4)
    log = Log("dynamics", args.out, {"device": args.device, "head_dim": 128, "scales": 8})
    log.add(measured("8 scales to t = 16", time_calls(ways, device, repeats=args.repeats), more))
    first = next(iter(ways))

    def recipe(i: int) -> list[Tensor]:
        return released_step(released, scales[i % 4][-1:], weights[:1])

    slow = time_calls(
        {first: ways[first], "released recipe, one scale": recipe},
        device,
        repeats=args.repeats,
        warmup=1,
    )
    log.add(measured("against the released recipe", slow))
    return log


if __name__ == "__main__":
    main()
