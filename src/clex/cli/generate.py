"""`clex generate` and `clex chat`."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..decoding import clean, read_text
from ..errors import ClexError, ConfigError, DataError
from .app import Device, TrustRemoteCode, app

if TYPE_CHECKING:
    from ..conversation import Conversation
    from ..hf.session import Session


class OnGrowth(StrEnum):
    """What happens to the cache where the text outgrows its scale."""

    refill = "refill"
    rerotate = "rerotate"
    hold = "hold"


class Truncate(StrEnum):
    """Which part of a long prompt is cut away."""

    start = "start"
    middle = "middle"
    end = "end"


AnyModel = Annotated[
    str, typer.Argument(help="A plain model, or a result of clex extend.", metavar="MODEL")
]
NewTokens = Annotated[int, typer.Option(help="Most tokens of an answer.")]
Method = Annotated[
    str | None, typer.Option(help="For a plain model: a training-free method, such as yarn.")
]
MaxScale = Annotated[float | None, typer.Option(help="For --method: longest scale (8).")]
Scale = Annotated[float | None, typer.Option(help="Hold this scale t, whatever the length.")]
Temperature = Annotated[float, typer.Option(help="Of sampling; 0 takes the likeliest token.")]
TopP = Annotated[float | None, typer.Option(help="Sample from this share of probability.")]
TopK = Annotated[int | None, typer.Option(help="Sample from so many tokens.")]
Penalty = Annotated[float | None, typer.Option(help="Repetition penalty, such as 1.1.")]
Seed = Annotated[int | None, typer.Option(help="Of sampling.")]
Chunk = Annotated[int, typer.Option(help="Tokens of a prompt that are read at a time.")]


@app.command()
def generate(
    model: AnyModel,
    prompt: Annotated[str | None, typer.Option(help="Text to go on with.")] = None,
    file: Annotated[
        Path | None, typer.Option(help="File with the text; stdin if neither is given.")
    ] = None,
    max_new_tokens: NewTokens = 256,
    truncate: Annotated[
        Truncate | None, typer.Option(help="Cut this part of a prompt that is too long.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Use the model's chat template.")] = False,
    scale: Scale = None,
    method: Method = None,
    max_scale: MaxScale = None,
    temperature: Temperature = 0.0,
    top_p: TopP = None,
    top_k: TopK = None,
    repetition_penalty: Penalty = None,
    seed: Seed = None,
    chunk: Chunk = 2048,
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Go on with a text of any length that fits the window; the new text goes to stdout.

    The scale t is chosen once, from prompt and new tokens. A prompt that does not fit is refused.
    """
    from ..conversation import (
        TextWriter,
        describe_window,
        encode,
        encode_messages,
        end_tokens,
        fit,
        load_for_text,
    )
    from ..hf.extend import extension_of, scale_for
    from ..hf.session import Session

    options = _sampling(temperature, top_p, top_k, repetition_penalty, seed)
    text = _prompt(prompt, file)
    loaded, tokenizer = load_for_text(model, method=method, max_scale=max_scale, device=device)
    session = Session(loaded, scale=scale, chunk=chunk)
    ids = (
        encode_messages(tokenizer, [{"role": "user", "content": text}])
        if chat
        else encode(tokenizer, text)
    )
    room = f"{describe_window(session)}, less {max_new_tokens:,} new tokens"
    ids = fit(ids, session.limit - max_new_tokens, truncate and truncate.value, room)
    if scale is None and extension_of(loaded) is not None:
        scale = scale_for(loaded, len(ids) + max_new_tokens)
        session = Session(loaded, scale=scale, chunk=chunk)
    session.append(ids)
    with _progress(len(ids)) as advance:
        session.prefill(advance)
    writer = TextWriter(tokenizer, _write)
    options["eos_token_id"] = end_tokens(loaded, tokenizer) or None
    with _status(session):
        try:
            session.generate(max_new_tokens, on_token=writer.token, **options)
        finally:
            writer.end()


@app.command()
def chat(
    model: AnyModel,
    system: Annotated[str | None, typer.Option(help="What the model is told first.")] = None,
    on_growth: Annotated[
        OnGrowth,
        typer.Option(help="At a border of the scale: read all anew, turn the keys, or hold."),
    ] = OnGrowth.refill,
    plain: Annotated[
        bool, typer.Option("--plain", help="No chat template: go on with the text as it is.")
    ] = False,
    forget: Annotated[
        bool, typer.Option("--forget", help="Drop the oldest turns when the window is full.")
    ] = False,
    max_new_tokens: NewTokens = 512,
    scale: Scale = None,
    method: Method = None,
    max_scale: MaxScale = None,
    temperature: Temperature = 0.7,
    top_p: TopP = None,
    top_k: TopK = None,
    repetition_penalty: Penalty = None,
    seed: Seed = None,
    chunk: Chunk = 2048,
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Talk with a model; the window grows with the conversation.

    /file PATH says what is in a file, /save PATH writes the conversation as JSON, /reset starts
    anew. Ctrl-C stops an answer, Ctrl-D ends.
    """
    from ..conversation import Conversation, describe, end_tokens, load_for_text
    from ..hf.session import Session

    options = _sampling(temperature, top_p, top_k, repetition_penalty, seed)
    loaded, tokenizer = load_for_text(model, method=method, max_scale=max_scale, device=device)
    session = Session(loaded, on_growth=on_growth.value, scale=scale, chunk=chunk)
    talk = Conversation(session, tokenizer, system=system, plain=plain, forget=forget)
    options["eos_token_id"] = end_tokens(loaded, tokenizer) or None
    typer.echo(describe(session), err=True)
    for line in _lines():
        try:
            said = _obey(talk, line)
            if said is not None:
                _turn(talk, said, max_new_tokens, options)
        except KeyboardInterrupt:  # while the turn was read
            typer.echo("\nstopped; the turn is forgotten", err=True)
        except ClexError as error:
            typer.echo(f"clex: {error}", err=True)


def _turn(talk: Conversation, said: str, max_new_tokens: int, options: dict[str, Any]) -> None:
    session = talk.session
    moves = len(session.moves)
    with _progress(None) as advance:
        talk.say(said, max_new_tokens, advance)
    with _status(session):
        talk.answer(max_new_tokens, write=_write, **options)
    for move in session.moves[moves:]:
        typer.echo(
            f"t {move.t_from:.3g} to {move.t_to:.3g} at {move.length:,} tokens:"
            f" {session.on_growth}",
            err=True,
        )


def _obey(talk: Conversation, line: str) -> str | None:
    """Do what a line with a slash asks for; what is to be said otherwise."""
    command, _, rest = line.partition(" ")
    rest = rest.strip()
    if not command.startswith("/"):
        return line
    if command == "/reset" and not rest:
        talk.reset()
        typer.echo("a new conversation", err=True)
    elif command == "/save" and rest:
        talk.save(Path(rest))
        typer.echo(f"written: {rest}", err=True)
    elif command == "/file" and rest:
        return _file_text(Path(rest))
    else:
        raise ConfigError(f"{line!r} is not one of /file PATH, /save PATH, /reset")
    return None


def _lines() -> Iterator[str]:
    """What the user types, until the end of input or Ctrl-C at the prompt; empty lines are not."""
    prompt = ""
    if sys.stdin.isatty():
        import readline  # noqa: F401  (gives `input` its line editing and history)

        prompt = "> "
    while True:
        try:
            line = input(prompt)
        except (EOFError, KeyboardInterrupt):
            typer.echo(err=True)
            return
        if line.strip():
            yield line


def _prompt(prompt: str | None, file: Path | None) -> str:
    if prompt is not None and file is not None:
        raise ConfigError("--prompt and --file contradict each other")
    if prompt is None and file is None:
        text = sys.stdin.read()
    else:
        text = prompt if prompt is not None else _file_text(file or Path())
    if not text:
        raise DataError("the prompt is empty")
    return text


def _file_text(path: Path) -> str:
    try:
        return clean(read_text(path), str(path))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None


def _sampling(
    temperature: float,
    top_p: float | None,
    top_k: int | None,
    repetition_penalty: float | None,
    seed: int | None,
) -> dict[str, Any]:
    """Options for the `generate` of transformers."""
    if temperature < 0:
        raise ConfigError(f"--temperature must be at least 0, not {temperature:g}")
    if temperature == 0 and (top_p is not None or top_k is not None):
        raise ConfigError("--top-p and --top-k need a --temperature above 0")
    if seed is not None:
        import torch

        torch.manual_seed(seed)
    options: dict[str, Any] = {"do_sample": temperature > 0}
    given = {"top_p": top_p, "top_k": top_k, "repetition_penalty": repetition_penalty}
    if temperature > 0:
        given["temperature"] = temperature
    return {**options, **{name: value for name, value in given.items() if value is not None}}


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


@contextmanager
def _progress(total: int | None) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal while a prompt is read; the block gets the function that advances it."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    with Progress(
        TextColumn("reading"),
        BarColumn(),
        TextColumn("{task.completed:,.0f} tokens"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    ) as progress:
        task = progress.add_task("reading", total=total)
        yield lambda tokens: progress.advance(task, tokens)


@contextmanager
def _status(session: Session) -> Iterator[None]:
    """Around an answer: Ctrl-C ends it; a line then says how long the text is, and its speed."""
    from ..conversation import describe

    before, started = len(session.ids), time.perf_counter()
    stopped = ""
    try:
        yield
    except KeyboardInterrupt:
        stopped = ", stopped"
    finally:
        _write("\n")
    new, seconds = len(session.ids) - before, time.perf_counter() - started
    typer.echo(
        f"[{describe(session)}, {new:,} new at {new / seconds:.1f} tokens/s{stopped}]", err=True
    )
