"""`clex eval harness`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from .app import Device, TrustRemoteCode, evaluate, names, numbers_of


@evaluate.command("harness")
def eval_harness(
    model: Annotated[str, typer.Argument(help="A plain model, or a result of clex extend.")],
    out: Annotated[Path, typer.Option(help="Folder for the scores; a second run adds to it.")],
    tasks: Annotated[
        str,
        typer.Option(
            help="Tasks of lm-evaluation-harness; longbench, longbench_<category or task> by the"
            " authors' rules; retention for short tasks."
        ),
    ] = "",
    longbench: Annotated[
        Path | None, typer.Option(help="Folder with LongBench items; the hub if not given.")
    ] = None,
    texts: Annotated[
        list[str] | None,
        typer.Option(
            "--jsonl", help="File of text (perplexity) or of question, choices, answer (accuracy)."
        ),
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="For a plain model: a training-free method.")
    ] = None,
    rivals: Annotated[
        str, typer.Option(help="Training-free methods to compare with; base is the plain model.")
    ] = "",
    max_scale: Annotated[float, typer.Option(help="For a plain model: longest scale.")] = 8.0,
    max_length: Annotated[
        int | None, typer.Option(help="Most tokens of a request; the whole window if not given.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="First items of each task.")] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Use the tokenizer's chat template.")
    ] = False,
    ruler_lengths: Annotated[
        str | None, typer.Option(help="Lengths of RULER items in tokens, such as 4096,8192.")
    ] = None,
    batch_tokens: Annotated[int, typer.Option(help="Most tokens of a batch.")] = 65_536,
    precision: Annotated[str, typer.Option(help="auto, bf16 or fp32.")] = "auto",
    device: Device = "auto",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete what is in --out and start anew.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """LongBench, RULER and other tasks of lm-evaluation-harness, every request at its own scale.

    The same command continues an interrupted run.
    """
    # Read when tqdm is imported; our own bar says how far a task is.
    os.environ.setdefault("TQDM_DISABLE", "1")
    from ..evaluation.harness import HarnessConfig, run_harness
    from ..run import choose_device

    config = HarnessConfig(
        tasks=names(tasks),
        longbench=None if longbench is None else str(longbench),
        texts=tuple(texts or ()),
        rivals=names(rivals),
        method=method,
        max_scale=max_scale,
        max_length=max_length,
        limit=limit,
        chat=chat,
        ruler_lengths=numbers_of(ruler_lengths) or (),
        batch_tokens=batch_tokens,
        precision=precision,
    )
    run_harness(model, out, config, device=choose_device(device), overwrite=overwrite)
