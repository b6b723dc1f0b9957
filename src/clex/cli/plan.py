"""`clex plan`."""

from __future__ import annotations

import math
from typing import Annotated

import typer

from ..errors import ConfigError
from .app import Depth, TrustRemoteCode, app, show


@app.command()
def plan(
    model: Annotated[
        str,
        typer.Argument(
            help="Folder, hub id, config.json, or a shape: smollm2-135m, llama-1b, llama-8b,"
            " llama-70b.",
            metavar="MODEL",
        ),
    ],
    length: Annotated[int, typer.Option(help="Tokens of a training window.")],
    gpus: Annotated[int, typer.Option(help="Number of GPUs.")] = 1,
    train: Annotated[Depth, typer.Option(help="dynamics, lora or full.")] = Depth.full,
    batch_size: Annotated[int, typer.Option(help="Windows in a forward pass.")] = 1,
    tokens: Annotated[
        float | None, typer.Option(help="Tokens of the whole run, for its time.")
    ] = None,
    lora_rank: Annotated[int, typer.Option(help="Rank of the adapters.")] = 16,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Memory and time of a training on H100 GPUs before it is started, and how to cut it up."""
    from ..plan_report import advice, plan_for, plan_tables

    if tokens is not None and not 0 < tokens < math.inf:
        raise ConfigError(f"tokens must be a positive number, not {tokens:g}")
    estimates = plan_for(model, length, gpus, train.value, batch=batch_size, rank=lora_rank)
    if as_json:
        show([estimate.to_dict() for estimate in estimates])
        return
    for table in plan_tables(estimates, f"{model}, {train.value}, windows of {length:,} tokens"):
        show(table)
    typer.echo(advice(estimates, tokens))
