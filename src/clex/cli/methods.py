"""`clex methods`, `inspect`, `search-longrope` and `import-official`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import Device, Field, Model, TrustRemoteCode, app, names, show


@app.command()
def methods(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List the scaling methods: what each is, where it comes from, what it can do."""
    from ..catalogue import method_rows, methods_table

    rows = method_rows()
    show([row.to_dict() for row in rows] if as_json else methods_table(rows))


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="A plain model, or a result of clex extend.")],
    out: Annotated[Path, typer.Option(help="Folder for inspect.json and inspect.png.")],
    methods: Annotated[str, typer.Option(help="Methods to compare.")] = "linear,yarn,critical_ntk",
    scale: Annotated[
        float | None, typer.Option(help="Largest scale; 8, or that of the result.")
    ] = None,
    native_length: Annotated[
        int | None, typer.Option(help="Window of the model, if its config does not say it.")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Show which rotary modules would be replaced, and every method's frequencies as a picture."""
    from ..inspection import inspect_model, modules_table, write_inspection

    found = inspect_model(model, names(methods), scale=scale, native_length=native_length)
    write_inspection(found, out)
    show(modules_table(found))
    typer.echo(f"picture: {out / 'inspect.png'}", err=True)


@app.command("search-longrope")
def search_longrope(
    model: Model,
    data: Annotated[str, typer.Option(help="Text for the objective; not what you measure on.")],
    out: Annotated[Path, typer.Option(help="Folder for longrope.json and the state.")],
    scale: Annotated[float, typer.Option(help="Target length over the native window.")] = 4.0,
    evaluations: Annotated[int, typer.Option(help="Candidates that are measured.")] = 64,
    population: Annotated[int, typer.Option(help="Candidates of a generation.")] = 8,
    windows: Annotated[int, typer.Option(help="Texts that each candidate reads.")] = 4,
    temperature: Annotated[str, typer.Option(help="none, log_n or yarn.")] = "log_n",
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 0,
    field: Field = "text",
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Search LongRoPE factors by perplexity at the target length.

    The same command continues an interrupted search.
    """
    from ..run import choose_device
    from ..search import SearchConfig, run_search

    config = SearchConfig(
        scale=scale,
        evaluations=evaluations,
        population=population,
        windows=windows,
        temperature=temperature,
        seed=seed,
    )
    run_search(model, data, out, search=config, field=field, device=choose_device(device))


@app.command("import-official")
def import_official(
    folder: Annotated[Path, typer.Argument(help="Checkpoint of the authors' code.", metavar="DIR")],
    out: Annotated[Path, typer.Option(help="New folder for the result.")],
    native_length: Annotated[
        int | None, typer.Option(help="Window of the plain model, if its config is wrong about it.")
    ] = None,
) -> None:
    """Turn a CLEX checkpoint of the authors (LLaMA, Mixtral, Phi-2) into one that clex loads."""
    from ..hf.official import import_official

    import_official(folder, out, native_length=native_length)
    typer.echo(f"written: {out}", err=True)
