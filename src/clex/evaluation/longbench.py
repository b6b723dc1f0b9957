"""LongBench v1 (Bai et al., ACL 2024, arXiv 2308.14508) on lm-evaluation-harness.

Prompts, answer lengths and metrics are those that lm-eval packages. Where its tasks differ from the
authors' `dataset2prompt.json`, `pred.py` and `eval.py`, the authors are followed: white space in
seven prompts, the first line of few-shot answers, the end of a samsum answer, and the line of code
that is compared. Items come from files of the authors' form or, without any, from the hub.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
from rich.table import Table

from ..errors import DataError, unknown
from .jsonl import SUFFIXES, read_records

PREFIX = "longbench_"
CATEGORIES = {
    "single": "Single-Doc QA",
    "multi": "Multi-Doc QA",
    "summarization": "Summarization",
    "fewshot": "Few-shot Learning",
    "code": "Code Completion",
    "synthetic": "Synthetic Tasks",
}
# Category and language of the 21 tasks. The authors count code in both of their tables.
TASKS = {
    "narrativeqa": ("single", "en"),
    "qasper": ("single", "en"),
    "multifieldqa_en": ("single", "en"),
    "multifieldqa_zh": ("single", "zh"),
    "hotpotqa": ("multi", "en"),
    "2wikimqa": ("multi", "en"),
    "musique": ("multi", "en"),
    "dureader": ("multi", "zh"),
    "gov_report": ("summarization", "en"),
    "qmsum": ("summarization", "en"),
    "multi_news": ("summarization", "en"),
    "vcsum": ("summarization", "zh"),
    "trec": ("fewshot", "en"),
    "triviaqa": ("fewshot", "en"),
    "samsum": ("fewshot", "en"),
    "lsht": ("fewshot", "zh"),
    "passage_count": ("synthetic", "en"),
    "passage_retrieval_en": ("synthetic", "en"),
    "passage_retrieval_zh": ("synthetic", "zh"),
    "lcc": ("code", "code"),
    "repobench-p": ("code", "code"),
}

# White space of the authors' prompts that lm-eval lost: what it has, and what they have.
_QUESTION = ("{{context}}\n{{question}}", "{{context}}\n\n{{question}}")
_PROMPTS = {
    "narrativeqa": ("asconcisely", "as concisely"),
    "triviaqa": _QUESTION,
    "samsum": _QUESTION,
    "passage_count": ("answer is:", "answer is: "),
    "passage_retrieval_en": ("answer is:", "answer is: "),
    "lcc": ("line of code:", "line of code:\n"),
    "repobench-p": ("line of code:", "line of code:\n"),
}

Judge = Callable[[Mapping[str, Any], Sequence[str]], dict[str, float]]


def takes_chat_template(task: str) -> bool:
    """Whether the authors put a chat model's template around this task's prompts."""
    return TASKS[task][0] not in ("fewshot", "code")


def find_items(folder: str | Path) -> dict[str, Path]:
    """The file of each LongBench task in `folder`.

    A file is known by its name (``narrativeqa.jsonl``), or else by the key ``dataset`` of its first
    record. Other files, LongBench-E (``*_e``) among them, are left alone.

    Returns:
        Task name to ``.jsonl`` or ``.jsonl.gz`` file.

    Raises:
        DataError: no such folder, nothing of LongBench in it, or two files for one task.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"no folder {folder}")
    found: dict[str, Path] = {}
    for file in sorted(folder.iterdir()):
        stem = file.name.split(".jsonl")[0]
        if not file.name.endswith(SUFFIXES) or stem.endswith("_e"):
            continue
        task = stem if stem in TASKS else _dataset_of(file)
        if task not in TASKS:
            continue
        if task in found:
            raise DataError(f"{folder} has two files for {task}: {found[task].name}, {file.name}")
        found[task] = file
    if not found:
        raise DataError(f"no LongBench task in {folder} (files such as narrativeqa.jsonl)")
    return {task: found[task] for task in TASKS if task in found}


def read_items(file: Path) -> datasets.Dataset:
    """The items of one task.

    Returns:
        Rows with the names that lm-eval uses: ``context``, ``question``, ``answers``,
        ``all_classes`` (list, may be empty), ``language`` and ``id``.

    Raises:
        DataError: the file is damaged or empty, or a record lacks a key.
    """
    rows = []
    for number, record in read_records(file):
        answers, classes = record.get("answers"), record.get("all_classes") or []
        if not isinstance(answers, list) or not answers or not isinstance(classes, list):
            raise DataError(f"{file}, line {number}: no list in 'answers' (or 'all_classes')")
        for key in ("context", "input"):
            if not isinstance(record.get(key), str):
                raise DataError(f"{file}, line {number}: no text in {key!r}")
        rows.append(
            {
                "context": record["context"],
                "question": record["input"],
                "answers": [str(answer) for answer in answers],
                "all_classes": [str(name) for name in classes],
                "id": str(record.get("_id", number)),
            }
        )
    if not rows:
        raise DataError(f"{file} is empty")
    return datasets.Dataset.from_list(rows)


def _dataset_of(file: Path) -> str:
    return next((str(record.get("dataset")) for _, record in read_records(file)), "")


def load_tasks(
    names: Sequence[str], tokenizer: Any, folder: str | Path | None = None
) -> dict[str, Any]:
    """Tasks of lm-eval that follow the authors' rules, ready to run.

    Args:
        names: of `TASKS`.
        tokenizer: of the model; it says which token ends a line.
        folder: items of the authors' form; the hub if not given.

    Returns:
        ``longbench_<name>`` to task.

    Raises:
        DataError: `folder` lacks a task, or its items cannot be read.
        ConfigError: lm-eval is not installed.
    """
    import lm_eval.tasks

    items = None if folder is None else find_items(folder)
    wanted: list[dict[str, Any]] = []
    for name in names:
        override: dict[str, Any] = {"task": PREFIX + name}
        if items is not None:
            if name not in items:
                raise DataError(unknown(f"LongBench task in {folder}", name, items))
            override["custom_dataset"] = _Items(items[name])
        wanted.append(override)
    packaged = Path(lm_eval.tasks.__file__).parent / "longbench"
    # Only this folder is indexed: reading the definitions of all tasks takes half a minute.
    manager = lm_eval.tasks.TaskManager(include_path=packaged, include_defaults=False)
    with warnings.catch_warnings():
        # fuzzywuzzy tells that it is slow without python-Levenshtein, which counts differently.
        warnings.simplefilter("ignore", UserWarning)
        tasks = manager.load([{"group": "longbench_chosen", "task": wanted}])["tasks"]
    logging.getLogger("jieba").setLevel(logging.WARNING)
    for name in names:
        _follow_authors(tasks[PREFIX + name], name, tokenizer)
    return dict(tasks)


@dataclass(frozen=True)
class _Items:
    """Reads a file when lm-eval asks for the dataset; lm-eval passes its metadata along."""

    file: Path

    def __call__(self, **_metadata: Any) -> dict[str, datasets.Dataset]:
        return {"test": read_items(self.file)}


def _follow_authors(task: Any, name: str, tokenizer: Any) -> None:
    generation: dict[str, Any] = {"until": []}
    if name == "samsum":
        newline = tokenizer.encode("\n", add_special_tokens=False)[-1]
        ends = [token for token in (tokenizer.eos_token_id, newline) if token is not None]
        generation.update(eos_token_id=ends, min_new_tokens=1)
    task.set_config("generation_kwargs", generation, update=True)
    theirs, authors = _PROMPTS.get(name, ("", ""))
    if authors not in task.config.doc_to_text:  # a release of lm-eval may have it right
        task.set_config("doc_to_text", task.config.doc_to_text.replace(theirs, authors))
    category = TASKS[name][0]
    if category == "fewshot":
        task.set_config("process_results", first_line_only(task.config.process_results))
    elif category == "code":
        task.set_config("process_results", code_similarity)


def first_line_only(judge: Judge) -> Judge:
    """`judge` on the first line of the answer that is not empty, as the authors score few-shot."""

    def judged(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
        return judge(doc, [results[0].lstrip("\n").split("\n")[0]])

    return judged


def code_similarity(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Edit similarity of the first line that is neither Markdown nor a comment, best reference.

    lm-eval also skips blank lines, which the authors do not.
    """
    from fuzzywuzzy import fuzz

    lines = results[0].lstrip("\n").split("\n")
    code = next((x for x in lines if not any(mark in x for mark in ("`", "#", "//"))), "")
    return {"score": max(fuzz.ratio(code, answer) / 100 for answer in doc["answers"])}


@dataclass(frozen=True)
class CategoryScore:
    """One cell of the authors' tables.

    Attributes:
        method: what was measured.
        language: ``en`` or ``zh``; code counts in both.
        category: title of the column, or ``Average``: the mean of the categories that have a score.
        score: 0 to 100, mean over the tasks that were run, each task counting alike.
        tasks: tasks that were run.
        of: tasks that the category has. Where fewer were run, the score is no LongBench score.
    """

    method: str
    language: str
    category: str
    score: float
    tasks: int
    of: int

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


def category_scores(method: str, scores: Mapping[str, float]) -> list[CategoryScore]:
    """The rows of the authors' two tables, from task name (without prefix) to score (0 to 100)."""
    languages = [n for n in ("en", "zh") if any(TASKS[task][1] == n for task in scores)]
    result = []
    for language in languages or (["en"] if scores else []):
        cells = []
        for category, title in CATEGORIES.items():
            members = [
                task
                for task, (own, spoken) in TASKS.items()
                if own == category and spoken in (language, "code")
            ]
            run = [scores[task] for task in members if task in scores]
            if run:
                mean = sum(run) / len(run)
                cells.append(CategoryScore(method, language, title, mean, len(run), len(members)))
        average = CategoryScore(
            method,
            language,
            "Average",
            sum(cell.score for cell in cells) / len(cells),
            sum(cell.tasks for cell in cells),
            sum(spoken in (language, "code") for _, spoken in TASKS.values()),
        )
        result += [average, *cells]
    return result


def category_table(cells: Sequence[CategoryScore], language: str) -> Table:
    """The authors' table, turned so that it fits a terminal: categories by methods."""
    chosen = [cell for cell in cells if cell.language == language]
    methods = list(dict.fromkeys(cell.method for cell in chosen))
    by_place = {(cell.category, cell.method): cell for cell in chosen}
    table = Table(title=f"LongBench, {'English' if language == 'en' else 'Chinese'} and code")
    table.add_column("category")
    for title in ("tasks", *methods):
        table.add_column(title, justify="right")
    for category in dict.fromkeys(cell.category for cell in chosen):
        found = [by_place.get((category, method)) for method in methods]
        tasks = "; ".join(dict.fromkeys(f"{c.tasks} of {c.of}" for c in found if c is not None))
        table.add_row(category, tasks, *("-" if c is None else f"{c.score:.1f}" for c in found))
    return table
