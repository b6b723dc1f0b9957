"""lm-eval tasks over a local JSONL file: perplexity of texts, or questions with given answers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from ..errors import DataError
from .jsonl import SUFFIXES, read_records

_METRICS = {"higher_is_better": True, "aggregation": "mean"}
_PERPLEXITY: dict[str, Any] = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "metric_list": [
        {"metric": "word_perplexity"},
        {"metric": "byte_perplexity"},
        {"metric": "bits_per_byte"},
    ],
}
_CHOICE: dict[str, Any] = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "choices",
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc", **_METRICS}, {"metric": "acc_norm", **_METRICS}],
}


def task_name(file: str | Path) -> str:
    """Name of the task that `load_text_task` makes of a file."""
    return Path(file).name.split(".jsonl")[0]


def load_text_task(file: str | Path) -> Any:
    """A task of lm-eval, named after the file.

    Args:
        file: ``.jsonl`` or ``.jsonl.gz``. Records with ``text`` give perplexity a word and a byte,
            read in windows of the model's length; records with ``question``, ``choices`` (texts)
            and ``answer`` (number of the right one, from 0) give accuracy.

    Raises:
        DataError: the file is damaged or empty, or a record is of neither form.
    """
    from lm_eval.api.task import ConfigurableTask

    file = Path(file)
    if not file.name.endswith(SUFFIXES):
        raise DataError(f"{file} is not one of {', '.join(SUFFIXES)}")
    rows, kinds = [], set()
    for number, record in read_records(file):
        row = _text(record) or _question(record)
        if row is None:
            raise DataError(
                f"{file}, line {number}: neither a 'text' nor 'question', 'choices', 'answer'"
            )
        rows.append(row)
        kinds.add("text" in row)
    if len(kinds) != 1:
        raise DataError(f"{file} " + ("mixes texts and questions" if kinds else "is empty"))
    return ConfigurableTask(
        config={
            "task": task_name(file),
            "test_split": "test",
            "custom_dataset": _Rows(datasets.Dataset.from_list(rows)),
            **(_PERPLEXITY if kinds == {True} else _CHOICE),
        }
    )


@dataclass(frozen=True)
class _Rows:
    rows: datasets.Dataset

    def __call__(self, **_metadata: Any) -> dict[str, datasets.Dataset]:
        return {"test": self.rows}


def _text(record: dict[str, Any]) -> dict[str, Any] | None:
    text = record.get("text")
    return {"text": text} if isinstance(text, str) and text.strip() else None


def _question(record: dict[str, Any]) -> dict[str, Any] | None:
    question, choices, answer = (record.get(key) for key in ("question", "choices", "answer"))
    if not isinstance(question, str) or not isinstance(choices, list) or type(answer) is not int:
        return None
    if not all(isinstance(choice, str) for choice in choices) or not 0 <= answer < len(choices):
        return None
    return {"question": question, "choices": choices, "answer": answer}
