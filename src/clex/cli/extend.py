"""`clex extend` and `clex demo`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ConfigError
from .app import (
    Depth,
    Device,
    Field,
    Lengths,
    Model,
    Rivals,
    TrustRemoteCode,
    app,
    names,
    numbers_of,
    settings_of,
)


class Preset(StrEnum):
    """Which formulation is used."""

    default = "default"
    paper = "paper"


@app.command()
def extend(
    model: Model,
    data: Annotated[
        list[str],
        typer.Option(
            help=".txt, .md, .jsonl(.gz), .parquet, a folder, a datasets id, or what clex tokenize"
            " made. Several with weights: --data BOOKS=0.7 --data CODE=0.3."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the result.")],
    train: Annotated[
        Depth, typer.Option(help="dynamics: weights frozen; lora; full: all weights.")
    ] = Depth.dynamics,
    eval_data: Annotated[
        str | None, typer.Option(help="Held-out text; a tenth of --data if not given.")
    ] = None,
    max_scale: Annotated[float, typer.Option(help="Longest text over the native window.")] = 8.0,
    method: Annotated[str, typer.Option(help="Scaling method, see clex methods.")] = "clex",
    preset: Annotated[Preset, typer.Option(help="Formulation.")] = Preset.default,
    base: Annotated[
        str,
        typer.Option(
            help="Closed form to start from; auto goes on with that of --start, or tries which one"
            " is best."
        ),
    ] = "auto",
    per_layer: Annotated[
        str | None,
        typer.Option(
            help="What each layer learns of its own: none, temperature, or curve (the best, but not"
            " for engines that take one set of factors). none if not given."
        ),
    ] = None,
    native_length: Annotated[
        int | None, typer.Option(help="Window of the model, if its config does not say it.")
    ] = None,
    train_length: Annotated[
        int | None,
        typer.Option(help="Tokens of a window (lora, full); native window if not given."),
    ] = None,
    true_lengths: Annotated[
        bool | None,
        typer.Option(
            help="Windows of the true length of their scale, as at depth dynamics. For lora and"
            " full they are the end of a training, with --start: four windows by default, which"
            " need the memory of the longest."
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Windows in a forward pass.")] = None,
    accumulation: Annotated[
        int | None,
        typer.Option(help="Forward passes of each process in a step; 4 at depth dynamics, else 1."),
    ] = None,
    global_batch: Annotated[
        int | None,
        typer.Option(help="Windows in a step of all processes; replaces --accumulation."),
    ] = None,
    rate: Annotated[float | None, typer.Option(help="Learning rate of the weights.")] = None,
    dynamics_rate: Annotated[
        float | None,
        typer.Option(
            help="Learning rate of the dynamics: 3e-3 on windows of true lengths; on sampled"
            " positions 0, which holds them, or 1e-4 with --preset paper."
        ),
    ] = None,
    positions: Annotated[
        str | None,
        typer.Option(help="contiguous, random, uniform, chunks, or a mix: chunks:0.7,random:0.3."),
    ] = None,
    temperature: Annotated[str | None, typer.Option(help="none, log_n, yarn or learned.")] = None,
    post: Annotated[
        list[str] | None, typer.Option(help="clip, resonance or p_rope, on top of the method.")
    ] = None,
    scale_power: Annotated[
        float | None,
        typer.Option(
            help="Above 1: large scales are drawn more often in training. 2 for lora and full."
        ),
    ] = None,
    span_margin: Annotated[
        float | None,
        typer.Option(help="For lora and full: how much farther positions reach than t says; 0.25."),
    ] = None,
    curriculum: Annotated[
        float, typer.Option(help="Share of the training over which the largest scale grows.")
    ] = 0.0,
    select_windows: Annotated[
        int | None,
        typer.Option(
            help="Long windows that choose between the start and six moments of a run with"
            " windows of true lengths; 0 keeps the last step. 6 at depth dynamics."
        ),
    ] = None,
    native_share: Annotated[
        float | None, typer.Option(help="Share of training windows left as they are.")
    ] = None,
    long_factor: Annotated[
        float,
        typer.Option(help="How much more often documents that fill a window are drawn."),
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 0,
    start: Annotated[
        Path | None,
        typer.Option(help="Result to go on from: its extension, and its weights or adapter."),
    ] = None,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 50,
    precision: Annotated[str, typer.Option(help="auto, bf16 or fp32.")] = "auto",
    checkpointing: Annotated[str, typer.Option(help="auto, on or off.")] = "auto",
    compile: Annotated[bool, typer.Option("--compile", help="Use torch.compile.")] = False,
    lora_rank: Annotated[int, typer.Option(help="Rank of the adapters.")] = 16,
    report_to: Annotated[
        str | None,
        typer.Option(
            help="Trainer integrations, such as tensorboard,wandb; none; TensorBoard if installed."
        ),
    ] = None,
    eval_lengths: Lengths = None,
    rivals: Rivals = "base,yarn",
    eval_documents: Annotated[int | None, typer.Option(help="Most held-out documents.")] = None,
    eval_windows: Annotated[int, typer.Option(help="Most windows of a document.")] = 1,
    field: Field = "text",
    device: Device = "auto",
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any other setting of ClexConfig, as name=value."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Insist on going on with the run in --out.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete what is in --out and start anew.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Extend a model's context window, train it, and measure it before and after.

    The same command continues an interrupted run.
    """
    from ..config import ClexConfig
    from ..run import EvalConfig, run_extend
    from ..run_folder import RUN_FILE
    from ..training import TrainConfig

    if resume and overwrite:
        raise ConfigError("--resume and --overwrite contradict each other")
    if resume and not (out / RUN_FILE).is_file():
        raise ConfigError(f"--resume: there is no run in {out}")
    auto = base == "auto" or method != "clex"
    given = {
        "base": None if auto else base,
        "per_layer": per_layer,
        "positions": positions,
        "temperature": temperature,
        "post": post or None,
        **settings_of(set_ or []),
    }
    clex = ClexConfig.from_dict(
        {
            "preset": preset.value,
            "method": method,
            "max_scale": max_scale,
            "native_length": native_length,
            **{name: value for name, value in given.items() if value is not None},
        }
    )
    chosen: dict[str, Any] = {
        "train_length": train_length,
        "true_lengths": true_lengths,
        "steps": steps,
        "rate": rate,
        "dynamics_rate": dynamics_rate,
        "batch_size": batch_size,
        "accumulation": accumulation,
        "native_share": native_share,
        "scale_power": scale_power,
        "span_margin": span_margin,
        "select_windows": select_windows,
    }
    training = TrainConfig(
        **{name: value for name, value in chosen.items() if value is not None},
        depth=train.value,
        curriculum=curriculum,
        global_batch=global_batch,
        long_factor=long_factor,
        lora_rank=lora_rank,
        seed=seed,
        save_every=save_every,
        precision=precision,
        checkpointing=checkpointing,
        compile=compile,
        report_to=None if report_to is None else names(report_to),
    )
    run_extend(
        model,
        data,
        out,
        clex=clex,
        training=training,
        evaluation=EvalConfig(
            lengths=numbers_of(eval_lengths),
            documents=eval_documents,
            windows=eval_windows,
            rivals=names(rivals),
        ),
        eval_data=eval_data,
        choose_start=base == "auto" and preset is Preset.default,
        field=field,
        start=start,
        overwrite=overwrite,
        device=device,
    )


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the result.")] = Path("demo"),
    model: Annotated[
        str, typer.Option(help="tiny-llama is extended; smollm2 reads with ready-made dynamics.")
    ] = "tiny-llama",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete what is in --out and start anew.")
    ] = False,
) -> None:
    """Extend the bundled tiny-llama from 256 to 2,048 tokens: minutes on two CPU cores.

    Or read a book with SmolLM2 and the dynamics that come with the package, to 16,384 tokens.
    """
    from ..demo import run_demo

    run_demo(out, model=model, overwrite=overwrite)
