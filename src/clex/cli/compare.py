"""`clex compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import Device, TrustRemoteCode, app


@app.command()
def compare(
    recipe: Annotated[Path, typer.Argument(help="TOML file, see recipes/quick.toml.")],
    out: Annotated[Path, typer.Option(help="Folder for the results, pictures and report.html.")],
    only: Annotated[
        list[str] | None, typer.Option(help="Run only this method; may be given several times.")
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
        only=tuple(only or ()),
        dry_run=dry_run,
        overwrite=overwrite,
        device=device,
    )
    if failures:
        raise typer.Exit(1)
