"""The job behind `clex eval passkey` and `clex eval needle`: ask, keep every trial, report."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .data import find_files, read_documents
from .evaluation.haystacks import DEPTHS, Haystacks, RetrievalPlan
from .evaluation.heatmap import draw_heatmap, scores_of, summary_table, write_cells
from .evaluation.perplexity import as_method
from .evaluation.retrieval import Trial, cells_of, effective_length, run_retrieval, summarise
from .evaluation.trials import TrialLog
from .files import write_json
from .hf.models import assets_folder, load_tokenizer
from .measured import load_measured
from .run import choose_device
from .run_folder import claimed, holds_run

TRIALS_FILE = "trials.jsonl"
# Multiplications and additions that one CPU core does in about a minute and a half.
_CPU_BUDGET = 1.7e12


@dataclass(frozen=True, kw_only=True)
class RetrievalConfig:
    """How retrieval is measured; see `RetrievalPlan` for what the values mean.

    Args:
        task: ``passkey`` or ``needle``.
        lengths: tokens; L, 2L, 4L ... up to the longest scale if not given.
        depths: places of the asked statement, 0 to 1.
        needles: different statements in every cell; 5 if not given, fewer on a CPU.
        hidden: statements hidden at once.
        distractors: wrong answers beside the right one.
        seed: of text, statements and answers.
        generate: also score greedy generation.
        rivals: training-free methods measured beside; ``base`` is the model as it is.
    """

    task: str = "needle"
    lengths: tuple[int, ...] | None = None
    depths: tuple[float, ...] = DEPTHS
    needles: int | None = None
    hidden: int = 1
    distractors: int = 9
    seed: int = 0
    generate: bool = True
    rivals: tuple[str, ...] = ("base", "yarn")

    def plan(
        self, native_length: int, max_scale: float, weights: int, device: torch.device
    ) -> RetrievalPlan:
        """What was asked for; a CPU drops long lengths and needles that nobody asked for."""
        lengths = list(self.lengths or ())
        while not self.lengths and native_length * 2 ** len(lengths) <= native_length * max_scale:
            lengths.append(native_length * 2 ** len(lengths))
        needles = self.needles or 5
        texts = (len(self.rivals) + 1) * (len(self.depths) + 1)
        while device.type == "cpu" and texts * needles * sum(lengths) * weights > _CPU_BUDGET:
            if self.needles is None and needles > 2:
                needles -= 1
            elif self.lengths is None and len(lengths) > 1:
                lengths.pop()
            else:
                break
        return RetrievalPlan(
            task=self.task,
            lengths=tuple(sorted(set(lengths))),
            depths=self.depths,
            needles=needles,
            hidden=self.hidden,
            distractors=self.distractors,
            seed=self.seed,
            generate=self.generate,
        )


def run_needles(
    model_name: str,
    out: str | Path,
    config: RetrievalConfig,
    *,
    data: str | Path | None = None,
    max_scale: float = 8.0,
    field: str = "text",
    overwrite: bool = False,
    device: str = "auto",
    console: Console | None = None,
) -> list[Trial]:
    """Retrieval by length and depth of a plain model, or of a result of `run_extend`, with rivals.

    Every trial is written as soon as it is there; the same call goes on after a kill. `out` gets
    ``results.json``, ``cells.csv`` and a heat map for each score.

    Args:
        model_name: a plain model, or a folder that `clex.load` reads.
        out: folder for the results.
        config: what is asked.
        data: text to hide needles in, see `clex.data.find_files`; the bundled books if not given.
        max_scale: longest scale of a plain model; an extended one brings its own.
        field: column or key of the text.
        overwrite: delete what an earlier run left in `out`.
        device: ``auto``, ``cpu``, ``cuda`` ...
        console: where progress and tables go.

    Returns:
        All trials.

    Raises:
        ClexError: one line that says what is wrong.
    """
    console, place, out = console or Console(stderr=True), choose_device(device), Path(out)
    measured = load_measured(model_name, config.rivals, max_scale=max_scale, device=place)
    plain, extended, settled = measured.plain, measured.extended, measured.config
    native, free = measured.native_length, measured.rivals
    weights = sum(parameter.numel() for parameter in plain.parameters())
    plan = config.plan(native, settled.max_scale, weights, place)
    path = assets_folder() / "books" / "test.jsonl.gz" if data is None else data
    texts = [] if plan.task == "passkey" else list(read_documents(find_files(path), field))
    haystacks = Haystacks(load_tokenizer(measured.source), plan, texts)
    text = hashlib.sha256()
    for number in range(plan.needles):  # text that is too short shows here, not after an hour
        text.update(repr(haystacks.needle(number)).encode())

    settings = {
        "model": model_name,
        "data": None if plan.task == "passkey" else str(path),
        "field": field,
        "methods": {name: rival and rival.to_dict() for name, rival in free.items()},
        "extension": None if extended is None else settled.to_dict(),
        "plan": plan.to_dict(),
        # Another text or tokenizer under the same name must not be mixed with what was asked.
        "text": text.hexdigest(),
    }
    holds_run(out, settings, overwrite, f"clex eval {plan.task}")
    console.print(
        f"{plan.task}: lengths {', '.join(f'{n:,}' for n in plan.lengths)};"
        f" {len(plan.depths)} depths; {plan.needles} needles in each cell"
    )
    trials: list[Trial] = []
    tokens = sum(plan.lengths) * len(plan.depths) * plan.needles
    with (
        claimed(out, settings, overwrite),
        Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
        ) as bar,
    ):
        log = TrialLog(out / TRIALS_FILE)
        # In tokens: a prompt of 64k takes as long as hundreds of short ones.
        total = tokens * (len(free) + (extended is not None))
        task = bar.add_task("tokens", total=total, completed=sum(t.length for t in log.done))

        def keep(trial: Trial) -> None:
            log.keep(trial)
            bar.advance(task, trial.length)

        for name, rival in free.items():
            with as_method(plain, rival):
                trials += run_retrieval(plain, haystacks, plan, name, log.done, keep)
        if extended is not None:
            trials += run_retrieval(extended, haystacks, plan, measured.own_name, log.done, keep)
        _report(trials, plan, native, out)
    rows = summarise(trials, plan)
    console.print(summary_table(rows, native))
    console.print(f"chance: {plan.chance:.2f} for choice and gain, 0 for exact")
    console.print(f"in [bold]{out}[/bold]: results.json, cells.csv, heatmap-*.png")
    return trials


def _report(trials: Sequence[Trial], plan: RetrievalPlan, native: int, out: Path) -> None:
    cells, rows = cells_of(trials), summarise(trials, plan)
    reach = [
        {
            "method": method,
            "score": score,
            "length": effective_length(
                [row for row in rows if (row.method, row.score) == (method, score)], native
            ),
        }
        for method, score in dict.fromkeys((row.method, row.score) for row in rows)
    ]
    write_json(
        out / "results.json",
        {
            "plan": plan.to_dict(),
            "native_length": native,
            "chance": plan.chance,
            "effective_lengths": reach,
            "summary": [row.to_dict() for row in rows],
            "cells": [cell.to_dict() for cell in cells],
            "trials": [trial.to_dict() for trial in trials],
        },
    )
    write_cells(cells, out / "cells.csv")
    for score in scores_of(cells):
        draw_heatmap(cells, score, out / f"heatmap-{score}.png", native, plan.chance)
