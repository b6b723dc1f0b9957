"""`clex eval ppl`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import Device, Field, Lengths, Rivals, TrustRemoteCode, evaluate, names, numbers_of


@evaluate.command("ppl")
def eval_ppl(
    model: Annotated[str, typer.Argument(help="A plain model, or a result of clex extend.")],
    data: Annotated[str, typer.Option(help="Text that the model was not trained on.")],
    out: Annotated[Path, typer.Option(help="Folder for results.json, results.csv and the PNG.")],
    rivals: Rivals = "base,yarn",
    max_scale: Annotated[float, typer.Option(help="For a plain model: longest scale.")] = 8.0,
    protocols: Annotated[
        str, typer.Option(help="Any of window, target, position, sliding, longppl.")
    ] = "window,target,position",
    lengths: Lengths = None,
    documents: Annotated[int | None, typer.Option(help="Most documents.")] = None,
    windows: Annotated[int, typer.Option(help="Most windows of a document.")] = 1,
    sliding: Annotated[
        str | None, typer.Option(help="Sliding windows in tokens; native and longest length.")
    ] = None,
    stride: Annotated[int, typer.Option(help="Tokens by which sliding windows move.")] = 256,
    sliding_tokens: Annotated[
        int | None, typer.Option(help="Most tokens of a document for sliding windows.")
    ] = None,
    evaluator: Annotated[
        str | None,
        typer.Option(
            help="Model that finds the key tokens of longppl, or native: the plain one inside its"
            " own window; the measured one by default."
        ),
    ] = None,
    truncation: Annotated[
        int | None, typer.Option(help="Short context of longppl; half the native window.")
    ] = None,
    field: Field = "text",
    device: Device = "auto",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete what is in --out and start anew.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Perplexity by length: first L tokens, and the same target tokens with growing context.

    The same command continues an interrupted measurement.
    """
    from ..run import EvalConfig, run_perplexity

    run_perplexity(
        model,
        data,
        out,
        max_scale=max_scale,
        evaluation=EvalConfig(
            lengths=numbers_of(lengths),
            documents=documents,
            windows=windows,
            rivals=names(rivals),
            protocols=names(protocols),
            sliding=numbers_of(sliding),
            stride=stride,
            sliding_tokens=sliding_tokens,
            evaluator=evaluator,
            truncation=truncation,
        ),
        field=field,
        overwrite=overwrite,
        device=device,
    )
