"""What the position samplers cost, against a training step.

    python -m benchmarks.samplers [--device cuda] [--step-ms 4200] [--out FILE.json]

Each sampler places `--tokens` tokens (131,072) in rows of that native window at scale `--scale`
(4), for 1 and 8 rows, and the 8 x 256 tokens that the measured step needs. The step is a forward
and backward pass and AdamW over all weights of the bundled tiny-llama with 8 x 256 tokens, far
smaller than one that 131,072 tokens belong to. `percent_by_token` sets time by token against time
by token; as the step of a longer row takes longer by token, that is still too high. `--step-ms` is
for the time of the step that you have. Times are medians of `--repeats`, in
microseconds, each waiting for the device at its end.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from clex.config import ClexConfig
from clex.files import write_json
from clex.hf.extend import at_scale, config_of, extend
from clex.hf.loss import TokenLoss
from clex.hf.models import load_base
from clex.positions import SAMPLERS, sample_positions
from clex.run import autocast, choose_device
from clex.run_folder import versions

MIXTURE = "chunks:0.7,contiguous:0.3"
STEP_ROWS, STEP_TOKENS = 8, 256


def median_us(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median time of a call in microseconds, after three that warm up."""
    times = []
    for i in range(repeats + 3):
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if i >= 3:
            times.append((time.perf_counter() - started) * 1e6)
    return statistics.median(times)


def sampler_call(
    name: str, rows: int, tokens: int, native: int, scale: float, device: torch.device
) -> Callable[[], object]:
    """A call that draws positions for `rows` sequences, as training does."""
    t = torch.full((rows,), scale, device=device)
    seeds = torch.arange(rows, device=device)
    return lambda: sample_positions(name, tokens, t, seeds, native, scale)


def step_call(device: torch.device) -> Callable[[], object]:
    """A training step of tiny-llama, its positions given."""
    model = extend(load_base("tiny-llama", device=device), ClexConfig(max_scale=8)).train()
    native = config_of(model).native_length
    assert native is not None
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    ids = torch.randint(model.config.vocab_size, (STEP_ROWS, STEP_TOKENS), device=device)
    t = torch.linspace(1, 8, STEP_ROWS, device=device)
    seeds = torch.arange(STEP_ROWS, device=device)
    positions = sample_positions("chunks", STEP_TOKENS, t, seeds, native, 8)
    token_loss = TokenLoss(model)

    def step() -> None:
        with at_scale(model, t, positions), autocast(device):
            losses, _ = token_loss(model, ids)
        losses.mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def hardware() -> str:
    """The name of the processor and how many threads PyTorch uses on it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def main() -> None:
    """Measure, print, and write what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=131_072)
    parser.add_argument("--scale", type=float, default=4.0)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--step-ms", type=float, help="time of your own training step")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.repeats < 10:
        parser.error("--repeats must be at least 10")
    device = choose_device(args.device)
    step_us = median_us(step_call(device), device, args.repeats)
    rows: list[dict[str, Any]] = []
    for name in (*SAMPLERS, MIXTURE):
        for batch, tokens in ((1, args.tokens), (8, args.tokens), (STEP_ROWS, STEP_TOKENS)):
            call = sampler_call(name, batch, tokens, tokens, args.scale, device)
            us = median_us(call, device, args.repeats)
            row = {"sampler": name, "rows": batch, "tokens": tokens, "us": round(us, 1)}
            row["percent_of_tiny_step"] = round(100 * us / step_us, 3)
            share = STEP_ROWS * STEP_TOKENS / (batch * tokens)
            row["percent_by_token"] = round(100 * us * share / step_us, 4)
            if args.step_ms:
                row["percent_of_given_step"] = round(us / (10 * args.step_ms), 3)
            rows.append(row)
    table = Table(title=f"{device}; step of tiny-llama, 8 x 256 tokens: {step_us:,.0f} us")
    for column in rows[0]:
        table.add_column(column, justify="left" if column == "sampler" else "right")
    for row in rows:
        table.add_row(*(f"{v:,}" if isinstance(v, int | float) else v for v in row.values()))
    Console(width=120).print(table)
    if args.out:
        about = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "hardware": hardware(),
            "versions": versions(),
            "device": str(device),
            "repeats": args.repeats,
            "scale": args.scale,
            "step": {"model": "tiny-llama", "rows": STEP_ROWS, "tokens": STEP_TOKENS},
            "step_us": round(step_us, 1),
            "step_ms_given": args.step_ms,
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.out, {**about, "samplers": rows})


if __name__ == "__main__":
    main()
