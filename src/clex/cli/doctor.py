"""`clex doctor`."""

from __future__ import annotations

from typing import Annotated

import typer

from .app import app, show


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Look at versions, devices and engines, and try the library for ten seconds.

    The exit code is 1 where something that clex needs is broken.
    """
    from ..doctor import checks_table, examine, healthy, to_json

    checks = examine()
    show(to_json(checks) if as_json else checks_table(checks))
    if not healthy(checks):
        raise typer.Exit(1)
