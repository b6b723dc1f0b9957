"""`clex eval harness`: tasks of lm-evaluation-harness, each request at the scale of its length."""

from __future__ import annotations

import csv
import importlib.util
import logging
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from ..errors import ConfigError, DataError, OutputError, unknown
from ..files import new_file, read_json, write_json
from ..hf.checkpoint import is_checkpoint
from ..hf.models import load_tokenizer, resolve
from ..measured import load_measured
from ..run_folder import claimed, holds_run, versions
from . import longbench
from .harness_scores import Score, metric_rows, score_table
from .harness_texts import load_text_task, task_name
from .perplexity import as_method

# What a longer window may cost at lengths that the model could read before.
RETENTION = ("hellaswag", "arc_easy", "arc_challenge", "piqa", "lambada_openai")
_PACKAGES = ("lm_eval", "jieba", "fuzzywuzzy", "rouge", "wonderwords")
_SEED = 1234


@dataclass(frozen=True, kw_only=True)
class HarnessConfig:
    """What is asked of a model, and how.

    Args:
        tasks: names of lm-eval tasks, groups or tags; ``longbench``, ``longbench_<category>`` and
            ``longbench_<task>`` by the authors' rules; ``retention`` for `RETENTION`.
        longbench: folder with LongBench items; the hub if not given.
        texts: JSONL files, see `clex.evaluation.harness_texts`.
        rivals: training-free methods measured beside; ``base`` is the model as it is.
        method: training-free method for a plain model; none if not given.
        max_scale: longest scale of a plain model with a method; a result brings its own.
        max_length: most tokens of a request; the native window times the longest scale if not
            given, and the native window for the model as it is.
        limit: first items of each task; all if not given.
        chat: whether prompts are put into the tokenizer's chat template, as the authors of
            LongBench do with chat models; never on its few-shot and code tasks.
        ruler_lengths: lengths that RULER makes its items for, tokens.
        batch_tokens: most tokens of a batch, padding included. Scores do not depend on it.
        precision: of the weights: ``auto`` (bf16 on GPUs, else fp32), ``bf16`` or ``fp32``.
    """

    tasks: tuple[str, ...]
    longbench: str | None = None
    texts: tuple[str, ...] = ()
    rivals: tuple[str, ...] = ()
    method: str | None = None
    max_scale: float = 8.0
    max_length: int | None = None
    limit: int | None = None
    chat: bool = False
    ruler_lengths: tuple[int, ...] = ()
    batch_tokens: int = 65_536
    precision: str = "auto"

    def __post_init__(self) -> None:
        if not self.tasks and not self.texts:
            raise ConfigError("nothing to measure: name tasks or JSONL files")
        for name in ("max_length", "limit", "batch_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, not {value}")
        if self.precision not in ("auto", "bf16", "fp32"):
            raise ConfigError(unknown("precision", self.precision, ("auto", "bf16", "fp32")))

    def dtype(self, device: torch.device) -> torch.dtype:
        """Of the weights on `device`."""
        narrow = self.precision == "bf16" or (self.precision == "auto" and device.type == "cuda")
        return torch.bfloat16 if narrow else torch.float32


@dataclass(frozen=True)
class _Subject:
    """A model under measurement: how to have it for a while, and the most tokens that it reads."""

    open: Callable[[], Any]
    max_length: int


def require_lm_eval() -> None:
    """Check that the optional packages are there.

    Raises:
        ConfigError: one is missing.
    """
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"clex eval harness needs {', '.join(missing)}: pip install 'clex-llm[eval]'"
        )


def run_harness(
    model_name: str,
    out: str | Path,
    config: HarnessConfig,
    *,
    device: torch.device,
    overwrite: bool = False,
    console: Console | None = None,
) -> list[Score]:
    """Run tasks on a plain model or on a result of ``clex extend``, with rivals.

    Each finished task is kept in `out`: the same command goes on after a kill, and a command with
    more tasks or rivals adds to it.

    Args:
        model_name: a plain model, or a folder that `clex.load` reads.
        out: folder for ``results.json``, ``results.csv`` and, under ``tasks``, every item's score
            and answer.
        config: what is asked.
        device: where the model runs.
        overwrite: delete what an earlier run left in `out`.
        console: where progress and tables go.

    Returns:
        One row for each method, task and metric, in the order in which they were asked for. A task
        whose answers do not fit into a method's window is left out for it, and told.

    Raises:
        ClexError: one line that says what is wrong.
    """
    require_lm_eval()
    logging.getLogger("lm_eval").setLevel(logging.CRITICAL)
    console, out = console or Console(stderr=True), Path(out)
    settings = _settings(model_name, config)
    holds_run(out, settings, overwrite, "clex eval harness")
    subjects, tokenizer, source = _subjects(model_name, config, device)
    tasks = _load_tasks(config, tokenizer, source)
    sources = {task_name(file): file for file in config.texts}
    rows: list[Score] = []
    left_out: list[dict[str, str]] = []
    with claimed(out, settings, overwrite):
        for method, subject in subjects.items():
            files = {name: _task_file(out, method, name) for name in tasks}
            missing = [n for n, file in files.items() if not _is_done(file, sources.get(n))]
            if missing:
                with subject.open() as model:
                    for name in missing:
                        reader = partial(_reader, model, tokenizer, subject, config)
                        try:
                            answer = _run_task(reader, name, tasks[name], method, config, console)
                        except ConfigError as error:  # its answers do not fit into the window
                            left_out.append({"method": method, "task": name, "why": str(error)})
                            continue
                        write_json(files[name], {"source": sources.get(name), **answer})
            for file in files.values():
                if file.is_file():
                    rows += [Score(**row) for row in read_json(file)["scores"]]
        if not rows:
            raise ConfigError(left_out[0]["why"])
        cells = [cell for method in subjects for cell in _categories(method, rows)]
        about = {
            "settings": settings,
            "versions": {**versions(), **{name: _version(name) for name in _PACKAGES}},
        }
        _write(out, {**about, "left_out": left_out}, rows, cells)
    console.print(score_table(rows))
    for one in left_out:
        console.print(f"[yellow]left out[/yellow]: {one['task']} for {one['method']}: {one['why']}")
    for language in dict.fromkeys(cell.language for cell in cells):
        console.print(longbench.category_table(cells, language))
    console.print(f"in [bold]{out}[/bold]: results.json, results.csv, tasks/")
    return rows


def _settings(model_name: str, config: HarnessConfig) -> dict[str, Any]:
    """All that a finished task depends on; which tasks, texts and rivals there are may grow."""
    settings = {"model": model_name, **asdict(config), "seed": _SEED}
    for name in ("tasks", "texts", "rivals", "batch_tokens"):
        del settings[name]
    settings["ruler_lengths"] = list(config.ruler_lengths)
    return settings


def _is_done(file: Path, source: str | None) -> bool:
    """Whether `file` holds the scores of a task on the items of `source`.

    Raises:
        OutputError: it holds those of another JSONL file of the same name.
    """
    if not file.is_file():
        return False
    before = read_json(file)["source"]
    if before != source:
        raise OutputError(f"{file} holds the scores of {before}, not of {source}")
    return True


def _subjects(
    model_name: str, config: HarnessConfig, device: torch.device
) -> tuple[dict[str, _Subject], Any, str]:
    """The models by name of their rows, their tokenizer, and the folder or hub id of the base."""
    names = [*config.rivals]
    if is_checkpoint(model_name):
        if config.method is not None:
            raise ConfigError(f"{model_name} has its own method; --method is for plain models")
    elif (config.method or "base") not in names:
        names.append(config.method or "base")
    measured = load_measured(
        model_name, names, max_scale=config.max_scale, device=device, dtype=config.dtype(device)
    )
    longest = config.max_length or int(measured.native_length * measured.config.max_scale)
    subjects: dict[str, _Subject] = {}
    for name, form in measured.rivals.items():
        window = longest if form is not None else config.max_length or measured.native_length
        subjects[name] = _Subject(partial(as_method, measured.plain, form), window)
    if measured.extended is not None:
        own = partial(nullcontext, measured.extended)
        subjects[measured.own_name] = _Subject(own, longest)
    return subjects, load_tokenizer(measured.source), resolve(measured.source)


def _load_tasks(config: HarnessConfig, tokenizer: Any, source: str) -> dict[str, Any]:
    """Every task by name, its items read; nothing is run before all of them are there."""
    authors, others = _split(config)
    tasks: dict[str, Any] = {}
    for file in config.texts:
        name = task_name(file)
        if name in tasks:
            raise ConfigError(f"two JSONL files are called {name}")
        tasks[name] = load_text_task(file)
    if authors:
        tasks |= _loaded(
            "LongBench", lambda: longbench.load_tasks(authors, tokenizer, config.longbench)
        )
    if others:
        from lm_eval.tasks import TaskManager

        known: dict[str, Any] = {"tokenizer": source}
        if config.ruler_lengths:
            known["max_seq_lengths"] = list(config.ruler_lengths)
        manager = TaskManager(metadata=known)
        for name in others:
            if name not in manager.task_index:
                raise ConfigError(
                    f"unknown task {name!r}; `lm_eval ls tasks` lists what lm-eval has"
                )
            tasks |= _loaded(name, partial(_load_named, manager, name))
    return tasks


def _split(config: HarnessConfig) -> tuple[list[str], list[str]]:
    """LongBench tasks by their own names, and all the other names."""
    authors: list[str] = []
    others: list[str] = []
    local = None if config.longbench is None else longbench.find_items(config.longbench)
    for name in config.tasks:
        inner = name.removeprefix(longbench.PREFIX)
        if name == "longbench" or (name != inner and inner in longbench.CATEGORIES):
            members = [
                task
                for task, (category, _) in longbench.TASKS.items()
                if name == "longbench" or category == inner
            ]
            authors += [task for task in members if local is None or task in local]
        elif name != inner and inner in longbench.TASKS:
            authors.append(inner)
        elif name == "retention":
            others += RETENTION
        else:
            others.append(name)
    return list(dict.fromkeys(authors)), list(dict.fromkeys(others))


def _load_named(manager: Any, name: str) -> dict[str, Any]:
    tasks: dict[str, Any] = manager.load([name])["tasks"]
    return tasks


def _loaded(name: str, load_them: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return load_them()
    except (DataError, ConfigError):
        raise
    # A task may fetch its items in any way, and fail in any.
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(f"cannot load task {name}: {lines[0]}") from error


def _reader(
    model: nn.Module,
    tokenizer: Any,
    subject: _Subject,
    config: HarnessConfig,
    progress: Callable[[int, int], None],
) -> Any:
    """The model for lm-eval. Its class is made on import of lm-eval, which is optional."""
    from .harness_model import HarnessModel

    return HarnessModel(
        model,
        tokenizer,
        max_length=subject.max_length,
        batch_tokens=config.batch_tokens,
        progress=progress,
    )


def _run_task(
    make_reader: Callable[[Callable[[int, int], None]], Any],
    name: str,
    task: Any,
    method: str,
    config: HarnessConfig,
    console: Console,
) -> dict[str, Any]:
    """Run one task; what is returned is its file: scores, settings and every item."""
    from lm_eval.evaluator import evaluate

    inner = name.removeprefix(longbench.PREFIX)
    authors = name != inner and inner in longbench.TASKS
    if task.get_config("num_fewshot") is None:
        task.set_config("num_fewshot", 0)
    task.set_fewshot_seed(_SEED)
    random.seed(_SEED)
    np.random.seed(_SEED)
    torch.manual_seed(_SEED)
    start = time.monotonic()
    chat = config.chat and (not authors or longbench.takes_chat_template(inner))
    with _bar(f"{method}, {name}", console) as progress:
        reader = make_reader(progress)
        reader.middle = authors
        found = evaluate(
            reader,
            {"tasks": {name: task}},
            limit=config.limit,
            bootstrap_iters=0,
            apply_chat_template=chat,
        )
    seconds = round(time.monotonic() - start, 2)
    samples = found["samples"][name]
    items = [_item(sample, reader.reads) for sample in samples]
    rows = metric_rows(task, found["results"][name], samples)
    if authors:
        rows = [_percent(row) for row in rows if row["metric"] == "score"]
    told = {
        "cut": sum(
            item["read"] < item["tokens"] for item in items if item["filter"] == items[0]["filter"]
        ),
        "longest": max(item["read"] for item in items),
        "scale": max(item["scale"] for item in items),
        "seconds": seconds,
    }
    return {
        "task": name,
        "method": method,
        "version": found["versions"].get(name),
        "max_length": reader.max_length,
        "chat_template": chat,
        "num_fewshot": found["n-shot"].get(name),
        "generation": task.get_config("generation_kwargs"),
        "scores": [{"method": method, "task": name, **row, **told} for row in rows],
        "items": items,
    }


def _percent(row: dict[str, Any]) -> dict[str, Any]:
    values = {key: row[key] for key in ("value", "low", "high")}
    return {**row, **{key: None if v is None else 100 * v for key, v in values.items()}}


def _item(sample: Mapping[str, Any], reads: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    """What is kept of an item: its scores, its answer, and how much of it the model read."""
    found = []
    for strings in sample["arguments"]:
        read = reads.get(tuple(part for part in strings if isinstance(part, str)))
        if read is not None:
            found.append(read)
    answers = [answer for answer in sample["filtered_resps"] if isinstance(answer, str)]
    doc = sample["doc"]
    return {
        "id": str(doc["id"]) if isinstance(doc, Mapping) and "id" in doc else sample["doc_id"],
        "filter": sample["filter"],
        "scores": {metric: _plain(sample[metric]) for metric in sample["metrics"]},
        "answer": answers[0] if answers else None,
        "tokens": max((read.tokens for read in found), default=0),
        "read": max((read.read for read in found), default=0),
        "scale": max((read.scale for read in found), default=1.0),
    }


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value if value is None or isinstance(value, str | int | float) else str(value)


def _categories(method: str, rows: Sequence[Score]) -> list[longbench.CategoryScore]:
    scores = {
        row.task.removeprefix(longbench.PREFIX): row.value
        for row in rows
        if row.method == method
        and row.task.startswith(longbench.PREFIX)
        and row.task.removeprefix(longbench.PREFIX) in longbench.TASKS
    }
    return longbench.category_scores(method, scores)


def _write(
    out: Path,
    about: Mapping[str, Any],
    rows: Sequence[Score],
    cells: Sequence[longbench.CategoryScore],
) -> None:
    records = [row.to_dict() for row in rows]
    write_json(
        out / "results.json",
        {**about, "scores": records, "longbench": [cell.to_dict() for cell in cells]},
    )
    with (
        new_file(out / "results.csv") as path,
        path.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, fieldnames=list(Score.__dataclass_fields__))
        writer.writeheader()
        writer.writerows(records)


def _task_file(out: Path, method: str, task: str) -> Path:
    safe = "".join(c if c.isalnum() or c in "-_." else "-" for c in f"{method}.{task}")
    return out / "tasks" / f"{safe}.json"


def _version(package: str) -> str | None:
    # A module copied onto a machine without a network has no version that could be asked for.
    try:
        return version(package.replace("_", "-"))
    except PackageNotFoundError:
        return None


@contextmanager
def _bar(text: str, console: Console) -> Iterator[Callable[[int, int], None]]:
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
    ) as progress:
        bar = progress.add_task(text, total=None)
        yield lambda done, total: progress.update(bar, completed=done, total=total)
