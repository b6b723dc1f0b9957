"""`clex demo`: what an extension does, in minutes on two CPU cores.

For tiny-llama the whole of it, from a plain model to a picture; for SmolLM2 the dynamics that come
with the package are read beside the plain model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from torch import nn

from .config import ClexConfig
from .data import load_tokens
from .errors import ConfigError, unknown
from .evaluation.perplexity import Row
from .evaluation.report import tables, write_report
from .hf.checkpoint import base_name, load, load_config
from .hf.extend import config_of
from .hf.models import assets_folder, load_base, load_tokenizer
from .run import EvalConfig, run_extend, run_perplexity
from .training import TrainConfig

MODEL = "tiny-llama"
MODELS = (MODEL, "smollm2")
SCALE = 8.0
# Of four windows each, and of 2,048 tokens.
DYNAMICS_STEPS, STEPS = 10, 40
# Windows of each of the four unseen books; fewer make the table jump.
WINDOWS = 4


# Read once by each method: twice the window of SmolLM2.
READY_LENGTH = 16_384


def run_demo(
    out: str | Path,
    *,
    model: str = MODEL,
    overwrite: bool = False,
    console: Console | None = None,
) -> None:
    """Show an extension at work.

    Args:
        out: folder for the results, the table, the picture and a sample.
        model: ``"tiny-llama"``, which is extended 8 times, its dynamics first and then, by a short
            training, all weights; or ``"smollm2"``, which reads a book with ready-made dynamics.
        overwrite: delete what an earlier demo left there.
        console: where progress and tables go.

    Raises:
        ClexError: see `clex.run.run_extend`; or `model` is another, or is not installed.
    """
    if model not in MODELS:
        raise ConfigError(unknown("demo model", model, MODELS))
    console, out = console or Console(stderr=True), Path(out)
    if model == MODEL:
        _extend_tiny(out, overwrite, console)
    else:
        read_ready_made(f"{model}-layers", out, READY_LENGTH, overwrite, console)


def read_ready_made(
    name: str, out: Path, length: int, overwrite: bool, console: Console
) -> list[Row]:
    """Perplexity along the first `length` tokens of an unseen book: base, YaRN, and a result.

    Args:
        name: of the result, see `clex.hf.checkpoint.result_folder`.
        out: folder for the rows and the picture.
        length: tokens, above the native window.
        overwrite: delete what an earlier demo left there.
        console: where progress and the table go.
    """
    config = load_config(name)
    load_base(base_name(name))  # says what to install before anything is promised
    console.print(
        f"three readings of {length:,} tokens of a book; a few minutes each on two CPU cores"
    )
    rows = run_perplexity(
        name,
        assets_folder() / "books" / "test.jsonl.gz",
        out,
        max_scale=config.max_scale,
        evaluation=EvalConfig(lengths=(length,), documents=1, protocols=("window", "position")),
        overwrite=overwrite,
        device="cpu",
        console=console,
    )
    console.rule("result")
    console.print(_by_position(rows, config.native_length))
    console.print(f"picture: [bold]{out / 'perplexity.png'}[/bold]")
    return rows


def _by_position(rows: Sequence[Row], native_length: int | None) -> Table:
    """Perplexity in bands of position, a column for each method."""
    table = Table(title=f"perplexity by position, window {native_length:,}")
    table.add_column("tokens", justify="right")
    bands: dict[tuple[int, int], list[str]] = {}
    for row in rows:
        if row.protocol == "position":
            if row.band_start == 0:
                table.add_column(row.method, justify="right")
            bands.setdefault((row.band_start, row.band_stop), []).append(f"{row.ppl:,.1f}")
    for (start, stop), cells in bands.items():
        table.add_row(f"{start:,} to {stop:,}", *cells)
    return table


def _extend_tiny(out: Path, overwrite: bool, console: Console) -> None:
    books = assets_folder() / "books"
    clex = ClexConfig(max_scale=SCALE)
    evaluation = EvalConfig(documents=4, windows=WINDOWS)
    stages = {
        "clex, dynamics": (TrainConfig(depth="dynamics", steps=DYNAMICS_STEPS), None, evaluation),
        "clex, full": (
            TrainConfig(depth="full", steps=STEPS, batch_size=8, rate=1e-4),
            out / "dynamics",
            replace(evaluation, rivals=()),
        ),
    }
    rows: list[Row] = []
    for name, (training, start, measured) in stages.items():
        console.rule(name)
        stage = run_extend(
            MODEL,
            books / "train.jsonl.gz",
            out / training.depth,
            clex=clex,
            training=training,
            evaluation=measured,
            eval_data=books / "test.jsonl.gz",
            choose_start=True,
            start=start,
            overwrite=overwrite,
            device="cpu",
            console=console,
        )
        rows += [replace(row, method=name if row.method == "clex" else row.method) for row in stage]
    native = config_of(load(out / "dynamics")).native_length
    assert native is not None
    write_report(rows, out, native)
    console.rule("result")
    for part in tables(rows, native):
        console.print(part)
    _show_sample(out, books / "test.jsonl.gz", console)
    console.print(f"picture: [bold]{out / 'perplexity.png'}[/bold]")


def _show_sample(out: Path, book: Path, console: Console) -> None:
    """What the plain and the extended model write after 1,900 tokens of an unseen book."""
    tokenizer = load_tokenizer(MODEL)
    prompt = torch.tensor([load_tokens(book, tokenizer)[0]["input_ids"][6000:7900]])
    plain = _continue(load_base(MODEL), prompt)
    model = load(out / "full")
    extended = _continue(model, prompt)
    console.print(Panel("..." + tokenizer.decode(prompt[0, -60:]), title="1,900 tokens of a book"))
    console.print(Panel(tokenizer.decode(plain), title="the plain model goes on"))
    console.print(Panel(tokenizer.decode(extended), title="the extended model goes on"))


def _continue(model: nn.Module, prompt: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(0)
    with torch.no_grad():
        output: torch.Tensor = model.generate(  # type: ignore[operator]
            prompt, max_new_tokens=60, do_sample=True, temperature=0.8, top_p=0.95
        )
    return output[0, prompt.shape[1] :]
