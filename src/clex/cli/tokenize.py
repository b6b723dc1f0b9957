"""`clex tokenize`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import Field, TrustRemoteCode, app


@app.command()
def tokenize(
    data: Annotated[
        str, typer.Argument(help=".txt, .md, .jsonl(.gz), .parquet, or a folder.", metavar="DATA")
    ],
    tokenizer: Annotated[str, typer.Option(help="Model whose tokens are wanted.")],
    out: Annotated[Path, typer.Option(help="Folder for the tokens; --data of other commands.")],
    field: Field = "text",
    shard_tokens: Annotated[int, typer.Option(help="Tokens in a file.")] = 2**26,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete what is in --out and start anew.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Tokenise a large corpus once, into memory-mapped files.

    The same command goes on after an interruption.
    """
    from ..data import find_files, read_documents
    from ..errors import ConfigError
    from ..hf.models import load_tokenizer
    from ..shards import write_shards

    if shard_tokens < 1:
        raise ConfigError(f"shard_tokens must be at least 1, not {shard_tokens}")
    files = find_files(data)
    stamps = [[str(file.resolve()), file.stat().st_size] for file in files]
    about = write_shards(
        read_documents(files, field),
        load_tokenizer(tokenizer),
        out,
        {"files": stamps, "field": field},
        shard_tokens=shard_tokens,
        overwrite=overwrite,
    )
    typer.echo(
        f"{out}: {about['documents']:,} documents, {about['tokens']:,} tokens in"
        f" {len(about['shards'])} files"
    )
