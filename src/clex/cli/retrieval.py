"""`clex eval passkey` and `clex eval needle`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import ConfigError
from .app import Device, Field, Lengths, Rivals, TrustRemoteCode, evaluate, names, numbers_of

_Model = Annotated[str, typer.Argument(help="A plain model, or a result of clex extend.")]
_Out = Annotated[Path, typer.Option(help="Folder for results.json, cells.csv and heat maps.")]
_MaxScale = Annotated[float, typer.Option(help="For a plain model: longest scale.")]
_Depths = Annotated[int, typer.Option(help="Depths, evenly from the start to the end.")]
_Needles = Annotated[int | None, typer.Option(help="Different statements in every cell.")]
_Distractors = Annotated[int, typer.Option(help="Wrong answers that the right one competes with.")]
_Generate = Annotated[bool, typer.Option(help="Also score greedy generation.")]
_Overwrite = Annotated[bool, typer.Option(help="Delete what an earlier run left in --out.")]
_Seed = Annotated[int, typer.Option(help="Of text, statements and answers.")]


@evaluate.command("passkey")
def eval_passkey(
    model: _Model,
    out: _Out,
    rivals: Rivals = "base,yarn",
    max_scale: _MaxScale = 8.0,
    lengths: Lengths = None,
    depths: _Depths = 11,
    needles: _Needles = None,
    distractors: _Distractors = 9,
    generate: _Generate = True,
    seed: _Seed = 0,
    overwrite: _Overwrite = False,
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """A number hidden in repeated filler: length by depth. A smoke test; good models saturate."""
    from ..needles import RetrievalConfig, run_needles

    config = RetrievalConfig(
        task="passkey",
        lengths=numbers_of(lengths),
        depths=_spread(depths),
        needles=needles,
        distractors=distractors,
        seed=seed,
        generate=generate,
        rivals=names(rivals),
    )
    run_needles(model, out, config, max_scale=max_scale, overwrite=overwrite, device=device)


@evaluate.command("needle")
def eval_needle(
    model: _Model,
    out: _Out,
    data: Annotated[
        str | None, typer.Option(help="Text to hide needles in; bundled books if not given.")
    ] = None,
    rivals: Rivals = "base,yarn",
    max_scale: _MaxScale = 8.0,
    lengths: Lengths = None,
    depths: _Depths = 11,
    needles: _Needles = None,
    hidden: Annotated[int, typer.Option(help="Statements hidden at once; one is asked.")] = 1,
    distractors: _Distractors = 9,
    generate: _Generate = True,
    seed: _Seed = 0,
    field: Field = "text",
    overwrite: _Overwrite = False,
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Facts hidden in real text: length by depth, by likelihood and by generation."""
    from ..needles import RetrievalConfig, run_needles

    config = RetrievalConfig(
        task="needle",
        lengths=numbers_of(lengths),
        depths=_spread(depths),
        needles=needles,
        hidden=hidden,
        distractors=distractors,
        seed=seed,
        generate=generate,
        rivals=names(rivals),
    )
    run_needles(
        model,
        out,
        config,
        data=data,
        max_scale=max_scale,
        field=field,
        overwrite=overwrite,
        device=device,
    )


def _spread(count: int) -> tuple[float, ...]:
    if count < 2:
        raise ConfigError(f"depths must be at least 2, not {count}")
    return tuple(round(i / (count - 1), 4) for i in range(count))
