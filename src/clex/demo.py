"""`clex demo`: a whole extension, from a plain model to a picture, in minutes on two CPU cores."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.panel import Panel
from torch import nn

from .config import ClexConfig
from .data import load_tokens
from .evaluation.perplexity import Row
from .evaluation.report import tables, write_report
from .hf.checkpoint import load
from .hf.extend import config_of
from .hf.models import assets_folder, load_base, load_tokenizer
from .run import EvalConfig, run_extend
from .training import TrainConfig

MODEL = "tiny-llama"
SCALE = 8.0
STEPS = 40
# Windows of each of the four unseen books; fewer make the table jump.
WINDOWS = 4


def run_demo(out: str | Path, *, overwrite: bool = False, console: Console | None = None) -> None:
    """Extend tiny-llama 8 times: its dynamics first, then a short training of all weights.

    Args:
        out: folder for the two results, the table, the picture and a sample.
        overwrite: delete what an earlier demo left there.
        console: where progress and tables go.

    Raises:
        ClexError: see `clex.run.run_extend`.
    """
    console, out, books = console or Console(stderr=True), Path(out), assets_folder() / "books"
    clex = ClexConfig(max_scale=SCALE)
    evaluation = EvalConfig(documents=4, windows=WINDOWS)
    stages = {
        "clex, dynamics": (TrainConfig(depth="dynamics", steps=STEPS), None, evaluation),
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
