"""`clex plan`: every way to cut a run, as a table, and which one to take."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.table import Table
from transformers import PreTrainedConfig

from .errors import ConfigError
from .hf.models import load_host_config
from .planning import GB, Estimate, Sizes, best, estimate, layouts
from .shapes import SHAPES, shape


def plan_for(
    model: str, length: int, gpus: int, depth: str, *, batch: int = 1, rank: int = 16
) -> list[Estimate]:
    """What each way of cutting a training over `gpus` needs; no weights are read.

    Args:
        model: a shape of `clex.shapes`, a folder, a hub id, or the path of a config.json.
        length: tokens of a window.
        gpus: all of them.
        depth: ``"dynamics"``, ``"lora"`` or ``"full"``.
        batch: windows in a forward pass.
        rank: of the adapters.

    Raises:
        ConfigError: a number is out of range, or there is no such model.
    """
    given = {"length": length, "gpus": gpus, "batch size": batch, "LoRA rank": rank}
    for name, value in given.items():
        if value < 1:
            raise ConfigError(f"{name} must be at least 1, not {value}")
    sizes = Sizes.of(_config(model))
    return [
        estimate(sizes, length, depth, layout, rank=rank) for layout in layouts(gpus, length, batch)
    ]


def _config(model: str) -> PreTrainedConfig:
    if model in SHAPES:
        return shape(model)
    return load_host_config(model)


def plan_tables(estimates: list[Estimate], title: str) -> list[Table]:
    """Two tables with a row for each layout, which 80 columns hold: memory, and a step.

    Sizes are GiB of one GPU.
    """
    parts = ("weights", "gradients", "optimizer", "activations", "logits")
    memory = _table(f"{title}\nat the peak, GiB of one GPU", parts)
    step = _table(
        "all together, and a step",
        ("allocated", "with\nCUDA", "fits", "PFLOPs", "GB\nsent", "s/step", "tokens/s"),
    )
    for e in estimates:
        memory.add_row(str(e.layout), *(_number(getattr(e, name) / GB) for name in parts))
        step.add_row(
            str(e.layout),
            _number(e.allocated / GB),
            _number(e.memory / GB),
            "yes" if e.fits else "no",
            _number((e.linear_flops + e.attention_flops) / 1e15),
            _number(e.communication / 1e9),
            _number(e.seconds),
            _number(e.tokens_per_second),
        )
    return [memory, step]


def _table(title: str, columns: tuple[str, ...]) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("layout")
    for column in columns:
        # The layout breaks where a line is too long, between words; numbers never do.
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _number(value: float) -> str:
    """Three digits, or all of those before the point; no more than seven characters."""
    if value >= 1e6:
        return f"{value:.1e}"
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def advice(estimates: list[Estimate], tokens: float | None = None) -> str:
    """What to take, in words, and how long a run of `tokens` takes."""
    chosen = best(estimates)
    if chosen is None:
        nearest = min(estimates, key=lambda e: e.memory)
        return (
            f"nothing fits a {nearest.machine.name}: the smallest, {nearest.layout}, needs"
            f" {nearest.memory / GB:.0f} GiB; {_remedy(nearest)}"
        )
    shares: dict[str, Any] = {
        "products of weights": chosen.linear_flops / chosen.machine.matmul,
        "attention": chosen.attention_flops / chosen.machine.attention,
        "waiting for other GPUs": chosen.waiting,
    }
    rest = chosen.seconds - sum(shares.values())
    parts = ", ".join(
        f"{name} {part / chosen.seconds:.0%}" for name, part in {**shares, "rest": rest}.items()
    )
    lines = [
        f"take: {chosen.layout} ({chosen.memory / GB:.0f} of {chosen.machine.memory / GB:.0f} GiB)",
        f"time of a step: {parts}",
    ]
    if tokens:
        hours = tokens / chosen.tokens_per_second / 3600
        lines.append(f"{tokens:,.0f} tokens: {hours:,.1f} hours")
    return "\n".join(lines)


def _remedy(nearest: Estimate) -> str:
    held = nearest.weights + nearest.gradients + nearest.optimizer
    if held > nearest.activations + nearest.logits:
        return "weights and optimiser are most of it: more GPUs to shard them, or --train lora"
    return "activations are most of it: more GPUs to cut each text across, or shorter windows"
