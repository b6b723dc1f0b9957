"""`clex eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import Device, Field, Lengths, Rivals, evaluate, lengths_of, names


@evaluate.command("ppl")
def eval_ppl(
    model: Annotated[str, typer.Argument(help="A plain model, or a result of clex extend.")],
    data: Annotated[str, typer.Option(help="Text that the model was not trained on.")],
    out: Annotated[Path, typer.Option(help="Folder for results.json, results.csv and the PNG.")],
    rivals: Rivals = "base,yarn",
    max_scale: Annotated[float, typer.Option(help="For a plain model: longest scale.")] = 8.0,
    lengths: Lengths = None,
    documents: Annotated[int | None, typer.Option(help="Most documents.")] = None,
    windows: Annotated[int, typer.Option(help="Most windows of a document.")] = 1,
    field: Field = "text",
    device: Device = "auto",
) -> None:
    """Perplexity by length: first L tokens, and the same target tokens with growing context."""
    from ..run import EvalConfig, run_perplexity

    run_perplexity(
        model,
        data,
        out,
        max_scale=max_scale,
        evaluation=EvalConfig(
            lengths=lengths_of(lengths), documents=documents, windows=windows, rivals=names(rivals)
        ),
        field=field,
        device=device,
    )
