"""Error and time of the few-step solver against torchdiffeq.

    python -m benchmarks.solver [--model DIR] [--out FILE.json]

Reference: torchdiffeq dopri5 at rtol = atol = 1e-9 in float64. Weights: random output layers of
several sizes, and the trained dynamics in DIR, a result of `clex extend`, if it is given.
The released recipe is torchdiffeq rk4 with step 0.01 in t on the released field.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torchdiffeq import odeint

from clex.config import ClexConfig
from clex.files import write_json
from clex.hf.checkpoint import load
from clex.hf.extend import require_extension
from clex.rope import RopeSpec
from clex.run_folder import versions
from clex.scaling.clex import Clex


def make(preset: str, std: float, head_dim: int = 128) -> Clex:
    """A learned scaling with a random output layer of the given size, seed 0."""
    index = torch.arange(0, head_dim, 2, dtype=torch.float32)
    spec = RopeSpec(1.0 / (10_000.0 ** (index / head_dim)), 4096, 10_000.0)
    torch.manual_seed(0)
    scaling = Clex(spec, ClexConfig(preset=preset, base="dynamic_ntk", max_scale=64))
    last: Any = scaling.field.outer if preset == "default" else scaling.field.down
    torch.nn.init.normal_(last.weight, std=std)
    return scaling


def remade(scaling: Clex, **changes: Any) -> Clex:
    """The same numbers under a config with some values changed."""
    config = scaling.config.replace(options=scaling.base.config.options, **changes)
    copy = Clex(scaling.spec, config)
    copy.load_state_dict(scaling.state_dict())
    return copy


def in_float64(scaling: Clex) -> Clex:
    """The same in float64 under dopri5; `Module.double` leaves a scaling alone on purpose."""
    copy = remade(scaling, solver="dopri5")
    for module in copy.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is not None:
                    with torch.no_grad():
                        value = tensor.double()
                    is_parameter = isinstance(tensor, torch.nn.Parameter)
                    table[name] = torch.nn.Parameter(value) if is_parameter else value
    return copy


def milliseconds(work: Callable[[], Any], repeats: int = 15) -> tuple[float, float]:
    """Median and spread (max - min) over `repeats` runs after three to warm up."""
    times = []
    for k in range(repeats + 3):
        started = time.perf_counter()
        work()
        if k >= 3:
            times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times), max(times) - min(times)


def forward_backward(scaling: Clex, t: Tensor) -> None:
    """One solution with its gradient."""
    scaling.inv_freq(t).sum().backward()


def released(scaling: Clex, t: float) -> Callable[[], Tensor]:
    """The released recipe for one scale: torchdiffeq rk4, step 0.01 in t."""
    grid = torch.tensor([1.0, t])
    start = torch.zeros(1, scaling.inv_freq_native.numel())

    def rate(s: Tensor, residual: Tensor) -> Tensor:
        at = s.reshape(1)
        z = scaling.base.ratio(at).log() + residual
        return scaling.field(at, z, scaling.base.rate(at))

    return lambda: odeint(rate, start, grid, method="rk4", options={"step_size": 0.01})[-1]


def main() -> None:
    """Print the two tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    t = torch.tensor([2.0, 4.0, 8.0, 16.0])
    rows: list[dict[str, Any]] = []
    cases: list[tuple[str, Clex]] = [
        *((f"default, std {std}", make("default", std)) for std in (0.03, 0.1, 0.3)),
        *((f"paper, std {std}", make("paper", std)) for std in (0.001, 0.005, 0.02)),
    ]
    if args.model:
        trained: Any = next(iter(require_extension(load(args.model)).scalings.values()))
        std = trained.field.outer.weight.std().item()
        cases.append((f"trained, std {std:.3f}", trained))
    for name, fitted in cases:
        with torch.no_grad():
            exact = in_float64(fitted)
            reference = exact.inv_freq_native * exact.ratio(t.double())
        for n in (8, 16, 32, 64):
            scaling = remade(fitted, steps=n)
            with torch.no_grad():
                error = ((scaling.inv_freq(t).double() - reference) / reference).abs()
                forward, spread = milliseconds(partial(scaling.inv_freq, t))
            both, _ = milliseconds(partial(forward_backward, scaling, t))
            rows.append(
                {
                    "weights": name,
                    "steps": n,
                    "default": n == fitted.config.steps,
                    "error_t16": error[-1].max().item(),
                    "forward_ms": forward,
                    "spread_ms": spread,
                    "forward_backward_ms": both,
                }
            )
    with torch.no_grad():
        paper = make("paper", 0.005)
        old_ms, old_spread = milliseconds(released(paper, 16.0), repeats=10)
        exact_ms, _ = milliseconds(partial(in_float64(paper).ratio, t.double()), repeats=10)
    console = Console(width=110)
    table = Table(title="relative error of inv_freq at t = 16 against dopri5 (rtol 1e-9, float64)")
    for column in rows[0]:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()))
    console.print(table)
    console.print(
        f"released recipe, t = 16, forward: {old_ms:.0f} ms (spread {old_spread:.0f});"
        f" dopri5 in float64, four scales: {exact_ms:.0f} ms; one CPU thread"
    )
    if args.out:
        write_json(
            args.out,
            {
                "command": " ".join(["python -m benchmarks.solver", *sys.argv[1:]]),
                "date": datetime.date.today().isoformat(),
                "versions": versions(),
                "threads": 1,
                "rows": rows,
                "released_forward_ms": old_ms,
                "released_spread_ms": old_spread,
                "dopri5_forward_ms": exact_ms,
            },
        )


if __name__ == "__main__":
    main()
