"""The command line application, and what its commands share."""

from __future__ import annotations

import json
from enum import StrEnum
from typing import Annotated, Any

import typer

from ..errors import ConfigError
from ..version import __version__

app = typer.Typer(
    name="clex",
    help="Make a RoPE language model read further than it was trained to.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
evaluate = typer.Typer(help="Measure a model.", no_args_is_help=True)
app.add_typer(evaluate, name="eval")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"clex {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


def _trust_remote_code(trusted: bool) -> bool:
    if trusted:
        from ..hf.models import allow_remote_code

        allow_remote_code()
    return trusted


class Depth(StrEnum):
    """How much of the model is trained."""

    dynamics = "dynamics"
    lora = "lora"
    full = "full"


Model = Annotated[
    str, typer.Argument(help="Folder, hub id, or tiny-llama, tiny-neox, smollm2.", metavar="MODEL")
]
Lengths = Annotated[
    str | None, typer.Option(help="Evaluation lengths in tokens, such as 4096,8192,16384.")
]
Rivals = Annotated[
    str, typer.Option(help="Training-free methods to compare with; base is the plain model.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        callback=_trust_remote_code,
        help="Run code that the model brings along, with all that it may do.",
    ),
]
Field = Annotated[str, typer.Option(help="Column or key that holds the text.")]


def show(what: Any) -> None:
    """A table, as wide as the terminal is; anything else as JSON."""
    from rich.console import Console
    from rich.table import Table

    if isinstance(what, Table):
        Console().print(what)
    else:
        typer.echo(json.dumps(what, indent=2))


def names(text: str) -> tuple[str, ...]:
    """The parts of ``a, b, c``."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def numbers_of(text: str | None, what: str = "lengths") -> tuple[int, ...] | None:
    """The numbers of ``8192,16384``.

    Raises:
        ConfigError: a part is not a whole number.
    """
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(
            f"{what} must be whole numbers with commas between, not {text!r}"
        ) from None


def scales_of(text: str | None) -> tuple[float, ...] | None:
    """The numbers of ``1,2.5,4``.

    Raises:
        ConfigError: a part is not a number.
    """
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"scales must be numbers with commas between, not {text!r}") from None


def settings_of(pairs: list[str]) -> dict[str, Any]:
    """``name=value`` pairs; values are read as JSON where they are JSON.

    Raises:
        ConfigError: a pair has no equals sign.
    """
    result = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ConfigError(f"--set wants name=value, not {pair!r}")
        try:
            result[name] = json.loads(value)
        except ValueError:
            result[name] = value
    return result
