"""`clex compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import Device, TrustRemoteCode, app, names, numbers_of


@app.command()
def compare(
    recipe: Annotated[Path, typer.Argument(help="TOML file, see recipes/quick.toml.")],
    out: Annotated[Path, typer.Option(help="Folder for the results, pictures and report.html.")],
    only: Annotated[
        list[str] | None,
        typer.Option(
            help="Run only these methods, NAME or NAME,NAME, and those that they build on.",
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Training text in place of the recipe's.")
    ] = None,
    eval_data: Annotated[
        str | None,
        typer.Option(help="Held-out text in place of the recipe's; a tenth of --data by default."),
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(help="Seeds in place of the recipe's, such as 0,1,2.")
    ] = None,
    join: Annotated[
        list[Path] | None,
        typer.Option(help="Folder of another part of the comparison, whose results are copied."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be run, with tokens and shares.")
    ] = False,
    device: Device = "auto",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete what is there of these methods first.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Train and measure several methods at equal budget; one folder with a page that shows all.

    The same command continues an interrupted comparison. Exit code 1: a method has failed, which
    is told in the report; the others are complete.
    """
    from ..comparison.runner import run_compare

    failures = run_compare(
        recipe,
        out,
        only=tuple(name for text in only or () for name in names(text)),
        data=data,
        eval_data=eval_data,
        seeds=numbers_of(seeds, "seeds") or (),
        join=tuple(join or ()),
        dry_run=dry_run,
        overwrite=overwrite,
        device=device,
    )
    if failures:
        raise typer.Exit(1)
