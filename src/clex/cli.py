"""The command line. Each command imports its workflow when it is called, so that help is fast."""

from __future__ import annotations

import os
import sys
import warnings
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import ClexError, ConfigError
from .version import __version__

app = typer.Typer(
    name="clex",
    help="Make a RoPE language model read further than it was trained to.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
evaluate = typer.Typer(help="Measure a model.", no_args_is_help=True)
app.add_typer(evaluate, name="eval")


class Depth(StrEnum):
    """How much of the model is trained."""

    dynamics = "dynamics"
    lora = "lora"
    full = "full"


class Preset(StrEnum):
    """Which formulation is used."""

    default = "default"
    paper = "paper"


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
Field = Annotated[str, typer.Option(help="Column or key that holds the text.")]


@app.command()
def extend(
    model: Model,
    data: Annotated[
        str, typer.Option(help=".txt, .md, .jsonl(.gz), .parquet, a folder, or a datasets id.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the result.")],
    train: Annotated[
        Depth, typer.Option(help="dynamics: weights frozen; lora; full: all weights.")
    ] = Depth.dynamics,
    eval_data: Annotated[
        str | None, typer.Option(help="Held-out text; a tenth of --data if not given.")
    ] = None,
    max_scale: Annotated[float, typer.Option(help="Longest text over the native window.")] = 8.0,
    method: Annotated[str, typer.Option(help="Scaling method, see clex methods.")] = "clex",
    preset: Annotated[Preset, typer.Option(help="Formulation.")] = Preset.default,
    base: Annotated[
        str, typer.Option(help="Closed form to start from; auto tries which one is best.")
    ] = "auto",
    native_length: Annotated[
        int | None, typer.Option(help="Window of the model, if its config does not say it.")
    ] = None,
    train_length: Annotated[
        int | None,
        typer.Option(help="Tokens of a window (lora, full); native window if not given."),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Windows in a forward pass.")] = None,
    accumulation: Annotated[int, typer.Option(help="Forward passes in a step.")] = 1,
    rate: Annotated[float | None, typer.Option(help="Learning rate of the weights.")] = None,
    dynamics_rate: Annotated[
        float | None, typer.Option(help="Learning rate of the dynamics.")
    ] = None,
    positions: Annotated[
        str | None,
        typer.Option(help="contiguous, random, uniform, chunks, or a mix: chunks:0.7,random:0.3."),
    ] = None,
    temperature: Annotated[str | None, typer.Option(help="none, log_n, yarn or learned.")] = None,
    post: Annotated[
        list[str] | None, typer.Option(help="clip, resonance or p_rope, on top of the method.")
    ] = None,
    curriculum: Annotated[
        float, typer.Option(help="Share of the training over which the largest scale grows.")
    ] = 0.0,
    native_share: Annotated[
        float | None, typer.Option(help="Share of training windows left as they are.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 0,
    start: Annotated[
        Path | None, typer.Option(help="Extended model to go on from (its dynamics).")
    ] = None,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 50,
    precision: Annotated[str, typer.Option(help="auto, bf16 or fp32.")] = "auto",
    checkpointing: Annotated[str, typer.Option(help="auto, on or off.")] = "auto",
    compile: Annotated[bool, typer.Option("--compile", help="Use torch.compile.")] = False,
    lora_rank: Annotated[int, typer.Option(help="Rank of the adapters.")] = 16,
    report_to: Annotated[
        str | None, typer.Option(help="Trainer integrations, such as tensorboard,wandb.")
    ] = None,
    eval_lengths: Lengths = None,
    rivals: Rivals = "base,yarn",
    eval_documents: Annotated[int | None, typer.Option(help="Most held-out documents.")] = None,
    eval_windows: Annotated[int, typer.Option(help="Most windows of a document.")] = 1,
    field: Field = "text",
    device: Device = "auto",
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any other setting of ClexConfig, as name=value."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Insist on going on with the run in --out.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete what is in --out and start anew.")
    ] = False,
) -> None:
    """Extend a model's context window, train it, and measure it before and after.

    The same command continues an interrupted run.
    """
    from .config import ClexConfig
    from .run import RUN_FILE, EvalConfig, run_extend
    from .training import TrainConfig

    if resume and overwrite:
        raise ConfigError("--resume and --overwrite contradict each other")
    if resume and not (out / RUN_FILE).is_file():
        raise ConfigError(f"--resume: there is no run in {out}")
    auto = base == "auto" or method != "clex"
    given = {
        "base": None if auto else base,
        "positions": positions,
        "temperature": temperature,
        "post": post or None,
        **_settings(set_ or []),
    }
    clex = ClexConfig.from_dict(
        {
            "preset": preset.value,
            "method": method,
            "max_scale": max_scale,
            "native_length": native_length,
            **{name: value for name, value in given.items() if value is not None},
        }
    )
    chosen: dict[str, Any] = {
        "train_length": train_length,
        "steps": steps,
        "rate": rate,
        "dynamics_rate": dynamics_rate,
        "batch_size": batch_size,
        "native_share": native_share,
    }
    training = TrainConfig(
        **{name: value for name, value in chosen.items() if value is not None},
        depth=train.value,
        curriculum=curriculum,
        accumulation=accumulation,
        lora_rank=lora_rank,
        seed=seed,
        save_every=save_every,
        precision=precision,
        checkpointing=checkpointing,
        compile=compile,
        report_to=_names(report_to or ""),
    )
    run_extend(
        model,
        data,
        out,
        clex=clex,
        training=training,
        evaluation=EvalConfig(
            lengths=_lengths(eval_lengths),
            documents=eval_documents,
            windows=eval_windows,
            rivals=_names(rivals),
        ),
        eval_data=eval_data,
        choose_start=base == "auto" and preset is Preset.default,
        field=field,
        start=start,
        overwrite=overwrite,
        device=device,
    )


@evaluate.command("ppl")
def eval_ppl(
    model: Annotated[str, typer.Argument(help="A plain model, or a result of clex extend.")],
    data: Annotated[str, typer.Option(help="Text that the model was not trained on.")],
    out: Annotated[Path, typer.Option(help="Folder for results.json, results.csv and the PNG.")],
    rivals: Rivals = "base,yarn",
    max_scale: Annotated[float, typer.Option(help="For a plain model: longest scale.")] = 8.0,
    lengths: Lengths = None,
    documents: Annotated[int | None, typer.Option(help="Most documents.")] = None,
    windows: Annotated[int, typer.Option(help="Most windows of a document.")] = 1,
    field: Field = "text",
    device: Device = "auto",
) -> None:
    """Perplexity by length: first L tokens, and the same target tokens with growing context."""
    from .run import EvalConfig, run_perplexity

    run_perplexity(
        model,
        data,
        out,
        max_scale=max_scale,
        evaluation=EvalConfig(
            lengths=_lengths(lengths), documents=documents, windows=windows, rivals=_names(rivals)
        ),
        field=field,
        device=device,
    )


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the result.")] = Path("demo"),
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete what is in --out and start anew.")
    ] = False,
) -> None:
    """Extend the bundled tiny-llama from 256 to 2,048 tokens: minutes on two CPU cores."""
    from .demo import run_demo

    run_demo(out, overwrite=overwrite)


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
) -> None:
    """Search LongRoPE factors by perplexity at the target length.

    The same command continues an interrupted search.
    """
    from .run import choose_device
    from .search import SearchConfig, run_search

    config = SearchConfig(
        scale=scale,
        evaluations=evaluations,
        population=population,
        windows=windows,
        temperature=temperature,
        seed=seed,
    )
    run_search(model, data, out, search=config, field=field, device=choose_device(device))


@app.command()
def methods(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List the scaling methods: what each is, where it comes from, what it can do."""
    from .catalogue import method_rows, methods_table

    rows = method_rows()
    _show([row.to_dict() for row in rows] if as_json else methods_table(rows))


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="A plain model, or a result of clex extend.")],
    out: Annotated[Path, typer.Option(help="Folder for inspect.json and inspect.png.")],
    methods: Annotated[str, typer.Option(help="Methods to compare.")] = "linear,yarn,dynamic_ntk",
    scale: Annotated[
        float | None, typer.Option(help="Largest scale; 8, or that of the result.")
    ] = None,
    native_length: Annotated[
        int | None, typer.Option(help="Window of the model, if its config does not say it.")
    ] = None,
) -> None:
    """Show which rotary modules would be replaced, and every method's frequencies as a picture."""
    from .inspection import inspect_model, modules_table, write_inspection

    found = inspect_model(model, _names(methods), scale=scale, native_length=native_length)
    write_inspection(found, out)
    _show(modules_table(found))
    typer.echo(f"picture: {out / 'inspect.png'}", err=True)


@app.command("import-official")
def import_official(
    folder: Annotated[Path, typer.Argument(help="Checkpoint of the authors' code.", metavar="DIR")],
    out: Annotated[Path, typer.Option(help="New folder for the result.")],
    native_length: Annotated[
        int | None, typer.Option(help="Window of the plain model, if its config is wrong about it.")
    ] = None,
) -> None:
    """Turn a CLEX checkpoint of the authors (LLaMA, Mixtral, Phi-2) into one that clex loads."""
    from .hf.official import import_official

    import_official(folder, out, native_length=native_length)
    typer.echo(f"written: {out}", err=True)


def _show(what: Any) -> None:
    """A table, as wide as the terminal is; anything else as JSON."""
    import json

    from rich.console import Console
    from rich.table import Table

    if isinstance(what, Table):
        Console().print(what)
    else:
        typer.echo(json.dumps(what, indent=2))


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _lengths(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(
            f"lengths must be whole numbers with commas between, not {text!r}"
        ) from None


def _settings(pairs: list[str]) -> dict[str, Any]:
    """``name=value`` pairs; values are read as JSON where they are JSON."""
    import json

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


def main() -> None:
    """Run the command line; expected errors are one line on stderr and exit code 2."""
    # Our own bars and lines say what happens; these libraries' ones are read at their import.
    for name in ("TRANSFORMERS_VERBOSITY", "DATASETS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    try:
        app(standalone_mode=True)
    except ClexError as error:
        print(f"clex: {error}", file=sys.stderr)
        sys.exit(2)
    except SystemExit as stop:
        # typer answers Ctrl-C itself, with this code.
        if stop.code == 130:
            print("clex: interrupted; the same command goes on", file=sys.stderr)
        raise
