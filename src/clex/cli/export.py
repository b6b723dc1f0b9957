"""`clex export`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ..errors import ConfigError
from .app import TrustRemoteCode, app, numbers_of, scales_of, settings_of


class Target(StrEnum):
    """What will read the export."""

    hf = "hf"
    vllm = "vllm"
    gguf = "gguf"


@app.command()
def export(
    source: Annotated[
        str,
        typer.Argument(help="A result of clex extend, or a plain model with --method."),
    ],
    target: Annotated[
        Target, typer.Option(help="hf: transformers; vllm; gguf: llama.cpp, Ollama.")
    ],
    out: Annotated[Path, typer.Option(help="New folder for the export.")],
    scale: Annotated[
        float | None, typer.Option(help="Scale t to hold: longest text over the native window.")
    ] = None,
    length: Annotated[
        int | None, typer.Option(help="Longest text in tokens, instead of --scale.")
    ] = None,
    scales: Annotated[
        str | None,
        typer.Option(help="Several t for one server, such as 1,2,4,8 (vllm with clex's plugin)."),
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="Scaling method for a plain model, see clex methods.")
    ] = None,
    native_length: Annotated[
        int | None, typer.Option(help="Window of a plain model, if its config does not say it.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="For a plain model: a setting of ClexConfig, as name=value."),
    ] = None,
    gguf: Annotated[
        Path | None, typer.Option(help="GGUF file of the base model, copied as it is.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="auto (as stored), float32, bfloat16 or float16.")
    ] = "auto",
    quantize: Annotated[
        str | None, typer.Option(help="Type for llama-quantize of llama.cpp, such as Q4_K_M.")
    ] = None,
    keep_weights: Annotated[
        bool,
        typer.Option("--keep-weights", help="Temperature as attention factor (hf, vllm)."),
    ] = False,
    two_scales: Annotated[
        bool, typer.Option("--two-scales", help="The native window beside the long one (vllm).")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare with the live model in the real engine.")
    ] = False,
    verify_lengths: Annotated[
        str | None, typer.Option(help="Prompts for --verify in tokens, such as 64,4096.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the export in --out.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Hold an extended model at one scale, for engines that have none of our code.

    --scales is for one vLLM server that gives each request the scale of its length.

    With --verify the exit code is 1 where the engine and the live model disagree.
    """
    from rich.console import Console

    from .. import export as exporting
    from ..config import ClexConfig
    from ..export.engines import engine_for

    if keep_weights and two_scales:
        raise ConfigError("--keep-weights and --two-scales are two forms; give one")
    if verify_lengths is not None and not verify:
        raise ConfigError("--verify-lengths needs --verify")
    clex = None
    if method is not None:
        given = {"native_length": native_length, "max_scale": 4096.0, **settings_of(set_ or [])}
        settings = {"method": method, "grid": "none", **given}
        clex = ClexConfig.from_dict({k: v for k, v in settings.items() if v is not None})
    elif native_length is not None or set_:
        raise ConfigError("--native-length and --set are for a plain model; give --method")
    if verify:
        engine_for(target.value)
    console = Console(stderr=True)
    record = exporting.export(
        source,
        out,
        target=target.value,
        scale=scale,
        length=length,
        scales=scales_of(scales),
        clex=clex,
        form="keep_weights" if keep_weights else "two_scales" if two_scales else "portable",
        gguf=gguf,
        dtype=dtype,
        quantize=quantize,
        overwrite=overwrite,
        console=console,
    )
    held = ", ".join(f"{t:g}" for t in record.scales) or f"{record.scale:g}"
    console.print(
        f"in [bold]{out}[/bold]: {record.length:,} tokens at scale {held},"
        f" {record.weights}; queries: {record.queries}"
    )
    if verify:
        parity = exporting.verify(out, lengths=numbers_of(verify_lengths), console=console)
        Console().print(parity.table())
        if not parity.agrees:
            raise typer.Exit(1)
