"""LongBench tasks by the authors' rules. Expected scores are worked out by hand."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from clex.errors import DataError
from clex.evaluation import longbench
from clex.hf.models import load_tokenizer

pytest.importorskip("lm_eval")

# From the authors' config/dataset2maxlen.json.
NEW_TOKENS = {
    **dict.fromkeys(("narrativeqa", "qasper", "dureader", "samsum"), 128),
    **dict.fromkeys(("multifieldqa_en", "multifieldqa_zh", "trec", "lsht"), 64),
    **dict.fromkeys(("lcc", "repobench-p"), 64),
    **dict.fromkeys(("hotpotqa", "2wikimqa", "musique", "triviaqa"), 32),
    **dict.fromkeys(("passage_count", "passage_retrieval_en", "passage_retrieval_zh"), 32),
    **dict.fromkeys(("gov_report", "qmsum", "multi_news", "vcsum"), 512),
}
# Answer, references, classes, score.
Case = tuple[str, list[str], list[str], float]
# Without articles: "cat sat on mat" and "cat on mat": 3 of 4 and 3 of 3 words.
QA: Case = ("The cat sat on a mat.", ["dog", "cat on the mat"], [], 6 / 7)
# The words are apple and banana, and apple.
QA_ZH: Case = ("苹果，香蕉", ["西瓜", "苹果。"], [], 2 / 3)  # noqa: RUF001
# Longest common subsequence a c e: 3 of 5 and 3 of 4 words.
ROUGE: Case = ("a b c d e", ["x y", "a c e f"], [], 2 / 3)
# Apple, banana of apple, melon, banana: 2 of 2 and 2 of 3 words.
ROUGE_ZH: Case = ("苹果香蕉", ["苹果西瓜香蕉"], [], 4 / 5)
CLASSES = ["Food", "Date", "Food and drink"]
CASES: list[tuple[str, Case]] = [
    *((task, QA) for task in ("narrativeqa", "qasper", "multifieldqa_en")),
    *((task, QA) for task in ("hotpotqa", "2wikimqa", "musique", "triviaqa")),
    ("narrativeqa", ("", ["cat"], [], 0.0)),
    ("multifieldqa_zh", QA_ZH),
    *((task, ROUGE) for task in ("gov_report", "qmsum", "multi_news", "samsum")),
    ("gov_report", ("", ["a"], [], 0.0)),
    *((task, ROUGE_ZH) for task in ("dureader", "vcsum")),
    # Two classes are named, one is right.
    ("trec", ("Food or Date", ["Food"], CLASSES, 1 / 2)),
    # A class that is part of the right one does not count against it.
    ("trec", ("Food and drink", ["Food and drink"], CLASSES, 1.0)),
    ("trec", ("Date", ["Food"], CLASSES, 0.0)),
    ("lsht", ("体育 农业", ["农业"], ["体育", "农业", "军事"], 1 / 2)),
    ("passage_count", ("There are 7 of 12", ["7"], [], 1 / 2)),
    ("passage_count", ("none", ["7"], [], 0.0)),
    ("passage_retrieval_en", ("Paragraph 3 or 13", ["Paragraph 3"], [], 1 / 2)),
    ("passage_retrieval_zh", ("段落3", ["段落3"], [], 1.0)),
    ("passage_retrieval_zh", ("段落13", ["段落3"], [], 0.0)),
    # Four of five letters agree.
    ("lcc", ("x = 1", ["x = 2"], [], 0.8)),
    ("repobench-p", ("```\n# text\nx = 1\ny = 2", ["no", "x = 2"], [], 0.8)),
    # Only the first line counts, after line breaks.
    ("trec", ("\n\nDate\nFood", ["Date"], CLASSES, 1.0)),
    ("triviaqa", ("\ncat on mat\ncat sat", ["cat on the mat"], [], 1.0)),
    ("samsum", ("a c e f\nb b b b", ["a c e f"], [], 1.0)),
    ("lsht", ("农业\n体育", ["农业"], ["体育", "农业"], 1.0)),
    # ... but not in tasks of other kinds.
    ("hotpotqa", ("cat\ndog", ["cat"], [], 2 / 3)),
    # The authors take a blank line for the first line of code, where lm-eval goes on.
    ("lcc", ("# text\n\nx = 2", ["x = 2"], [], 0.0)),
]


def record(**changes: Any) -> dict[str, Any]:
    plain = {"context": "CONTEXT", "input": "INPUT", "answers": ["yes"], "all_classes": None}
    return {**plain, "_id": "a1", **changes}


def write_items(folder: Path, name: str, records: list[dict[str, Any]]) -> Path:
    text = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in records)
    file = folder / name
    if name.endswith(".gz"):
        file.write_bytes(gzip.compress(text.encode()))
    else:
        file.write_text(text, encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer("tiny-llama")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("items")
    for name in longbench.TASKS:
        write_items(folder, f"{name}.jsonl", [record()])
    return longbench.load_tasks(list(longbench.TASKS), tokenizer, folder)


@pytest.mark.parametrize(("name", "case"), CASES)
def test_scores_agree_with_hand_made_ones(tasks: dict[str, Any], name: str, case: Case) -> None:
    answer, references, classes, expected = case
    doc = {"answers": references, "all_classes": classes}
    score = tasks[f"longbench_{name}"].process_results(doc, [answer])["score"]
    assert score == pytest.approx(expected, abs=1e-6)


def test_every_task_has_a_hand_made_score() -> None:
    assert {name for name, _ in CASES} == set(longbench.TASKS)


def test_generation_settings_are_the_authors(tasks: dict[str, Any], tokenizer: Any) -> None:
    assert len(tasks) == 21
    for name, new in NEW_TOKENS.items():
        settings = tasks[f"longbench_{name}"].config.generation_kwargs
        assert settings["max_gen_toks"] == new, name
        assert settings["do_sample"] is False and settings["until"] == [], name
        assert ("eos_token_id" in settings) == (name == "samsum")
    samsum = tasks["longbench_samsum"].config.generation_kwargs
    assert samsum["min_new_tokens"] == 1
    assert samsum["eos_token_id"][0] == tokenizer.eos_token_id
    assert tokenizer.decode(samsum["eos_token_id"][1]) == "\n"


def test_prompts_are_the_authors(tasks: dict[str, Any]) -> None:
    def prompt(name: str) -> str:
        task = tasks[f"longbench_{name}"]
        return str(task.doc_to_text(next(iter(task.eval_docs))))

    assert prompt("multifieldqa_en") == (
        "Read the following text and answer briefly.\n\nCONTEXT\n\nNow, answer the following"
        " question based on the above text, only give me the answer and do not output any other"
        " words.\n\nQuestion: INPUT\nAnswer:"
    )
    lsht = "请判断给定新闻的类别，下面是一些例子。\n\nCONTEXT\nINPUT"  # noqa: RUF001
    assert prompt("lsht") == lsht
    assert prompt("lcc") == "Please complete the code given below. \nCONTEXTNext line of code:\n"
    # White space that lm-eval's own prompts lack, from the authors' config/dataset2prompt.json.
    assert prompt("repobench-p").endswith("\nCONTEXTINPUTNext line of code:\n")
    assert prompt("triviaqa").endswith("examples.\n\nCONTEXT\n\nINPUT")
    assert prompt("samsum").endswith("examples.\n\nCONTEXT\n\nINPUT")
    assert prompt("trec").endswith("questions.\n\nCONTEXT\nINPUT")
    assert prompt("passage_count").endswith("and so on.\n\nThe final answer is: ")
    assert prompt("passage_retrieval_en").endswith("etc.\n\nThe answer is: ")
    assert prompt("narrativeqa").count(" as concisely as you can, ") == 2
    for name in longbench.TASKS:
        assert "CONTEXT" in prompt(name)


def test_no_chat_template_on_few_shot_and_code() -> None:
    without = {name for name in longbench.TASKS if not longbench.takes_chat_template(name)}
    assert without == {"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"}


def test_files_are_found_by_name_or_by_their_records(tmp_path: Path) -> None:
    write_items(tmp_path, "qasper.jsonl", [record()])
    write_items(tmp_path, "some.jsonl.gz", [record(dataset="trec")])
    write_items(tmp_path, "qasper_e.jsonl", [record(dataset="qasper")])
    write_items(tmp_path, "other.jsonl", [record(dataset="gsm100")])
    (tmp_path / "notes.txt").write_text("x")
    found = longbench.find_items(tmp_path)
    assert {name: file.name for name, file in found.items()} == {
        "qasper": "qasper.jsonl",
        "trec": "some.jsonl.gz",
    }
    write_items(tmp_path, "again.jsonl", [record(dataset="trec")])
    with pytest.raises(DataError, match="two files for trec"):
        longbench.find_items(tmp_path)


def test_a_task_that_is_not_there_is_named(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(DataError, match="no LongBench task"):
        longbench.find_items(tmp_path)
    write_items(tmp_path, "trec.jsonl", [record()])
    with pytest.raises(DataError, match=r"'qasper'.*valid: trec"):
        longbench.load_tasks(["qasper"], tokenizer, tmp_path)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"context": "x", "input": "y"}', "no list in 'answers'"),
        ('{"context": "x", "answers": ["y"]}', "no text in 'input'"),
        ("[1]", "line 1: not an object"),
        ("{", "cannot read"),
        ("", "is empty"),
    ],
)
def test_damaged_items_are_told(tmp_path: Path, line: str, told: str) -> None:
    file = tmp_path / "trec.jsonl"
    file.write_text(line)
    with pytest.raises(DataError, match=told):
        longbench.read_items(file)


def test_categories_are_averaged_as_the_authors_do() -> None:
    # Their table for GPT-3.5-Turbo-16k, English: six categories, average 44.0.
    printed = {
        "single": 39.8,
        "multi": 38.7,
        "summarization": 26.5,
        "fewshot": 67.1,
        "synthetic": 37.8,
        "code": 54.1,
    }
    scores = {task: printed[c] for task, (c, spoken) in longbench.TASKS.items() if spoken != "zh"}
    cells = longbench.category_scores("gpt", scores)
    assert {cell.language for cell in cells} == {"en"}
    average = cells[0]
    assert (average.category, average.tasks, average.of) == ("Average", 16, 16)
    assert average.score == pytest.approx(44.0, abs=0.05)
    # A task weighs as much as its category has tasks; a missing one is told.
    cells = longbench.category_scores("m", {"trec": 30.0, "samsum": 50.0, "lcc": 10.0})
    by_title = {cell.category: cell for cell in cells}
    fewshot = by_title["Few-shot Learning"]
    assert (fewshot.score, fewshot.tasks, fewshot.of) == (40.0, 2, 3)
    assert by_title["Average"].score == 25.0
    # Code belongs to both languages.
    cells = longbench.category_scores("m", {"lsht": 30.0, "lcc": 10.0})
    assert [(c.category, c.score) for c in cells if c.language == "zh"] == [
        ("Average", 20.0),
        ("Few-shot Learning", 30.0),
        ("Code Completion", 10.0),
    ]
    assert not longbench.category_scores("m", {})
