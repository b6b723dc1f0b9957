"""`clex families`."""

from __future__ import annotations

from typing import Annotated

import typer

from .app import app, show


@app.command()
def families(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print docs/families.md.")] = False,
) -> None:
    """Try every decoder family of the installed transformers: which work, and why others do not."""
    from ..hf.families import families, families_markdown, families_table

    rows = families()
    if markdown:
        typer.echo(families_markdown(rows), nl=False)
    else:
        show([row.to_dict() for row in rows] if as_json else families_table(rows))
