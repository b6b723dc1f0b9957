"""`clex eval harness`: the scale of each request, cutting, and the whole command."""

from __future__ import annotations

import csv
import importlib.metadata
import importlib.util
import io
import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn
from typer.testing import CliRunner

import clex
from clex.cli import app
from clex.errors import ClexError, ConfigError, DataError, OutputError
from clex.hf.extend import scale_for
from clex.hf.models import load_base, load_tokenizer
from test_longbench import record, write_items

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance

from clex.evaluation import harness, harness_model
from clex.evaluation.harness import HarnessConfig, run_harness
from clex.evaluation.harness_model import HarnessModel, cut_middle
from clex.evaluation.harness_scores import interval, metric_rows
from clex.evaluation.harness_texts import load_text_task

CPU = torch.device("cpu")
NATIVE = 256
WORDS = "The ship lay in the bay until the wind came up from the sea and the men went down. "


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer("tiny-llama")


@pytest.fixture(scope="module")
def yarn() -> Any:
    return clex.extend(load_base("tiny-llama"), clex.ClexConfig(method="yarn", max_scale=8))


def reader(model: nn.Module, tokenizer: Any, **changes: Any) -> HarnessModel:
    settings = {"max_length": 8 * NATIVE, "batch_tokens": 65_536, **changes}
    return HarnessModel(model, tokenizer, **settings)


def instances(kind: str, requests: Sequence[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, arguments, i) for i, arguments in enumerate(requests)]


def likelihood(model: nn.Module, context: list[int], end: list[int], scale: float | None) -> float:
    """Log-likelihood of `end` from the logits of one plain forward pass."""
    ids = torch.tensor([context + end])
    with torch.no_grad(), nullcontext() if scale is None else clex.at_scale(model, scale):
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    found = logits[0, -len(end) :].log_softmax(-1).gather(1, torch.tensor(end)[:, None])
    return float(found.sum())


def greedy(model: nn.Module, ids: list[int], new: int, scale: float) -> list[int]:
    """Greedy continuation without a cache."""
    text = list(ids)
    with torch.no_grad(), clex.at_scale(model, scale):
        for _ in range(new):
            logits = model(input_ids=torch.tensor([text]), use_cache=False).logits
            text.append(int(logits[0, -1].argmax()))
    return text[len(ids) :]


class Spy:
    """Stands for `at_scale` and keeps the scales that were held."""

    def __init__(self) -> None:
        self.held: list[list[float]] = []

    def __call__(self, model: nn.Module, scales: list[float]) -> Any:
        self.held.append(list(scales))
        return clex.at_scale(model, scales)


def test_likelihoods_are_taken_at_the_scale_of_each_text(
    yarn: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    spy = Spy()
    monkeypatch.setattr(harness_model, "at_scale", spy)
    pairs = [(WORDS * n, " of the sea.") for n in (1, 25, 15, 50)]
    lm = reader(yarn, tokenizer)
    answers = lm.loglikelihood(instances("loglikelihood", pairs))
    scales = []
    for pair, (found, _) in zip(pairs, answers, strict=True):
        context, end = lm._encode_pair(*pair)
        # The last token is scored, not read.
        scale = scale_for(yarn, len(context) + len(end) - 1)
        assert found == pytest.approx(likelihood(yarn, context, end, scale), abs=2e-3)
        assert lm.reads[pair].scale == scale
        scales.append(scale)
    assert scales[0] == 1 and len(set(scales)) == 4
    # One batch, longest first, each row with its own.
    assert spy.held == [sorted(scales, reverse=True)]
    # The scale of the longest text would have given the others something else.
    context, end = lm._encode_pair(*pairs[0])
    assert abs(likelihood(yarn, context, end, max(scales)) - answers[0][0]) > 0.05


def test_a_plain_model_reads_at_no_scale(tokenizer: Any) -> None:
    plain = load_base("tiny-llama")
    lm = reader(plain, tokenizer, max_length=NATIVE)
    pair = (WORDS * 3, " of the sea.")
    ((found, _),) = lm.loglikelihood(instances("loglikelihood", [pair]))
    assert found == pytest.approx(likelihood(plain, *lm._encode_pair(*pair), None), abs=1e-3)


def test_greedy_flags_compare_all_tokens_of_the_continuation(yarn: Any, tokenizer: Any) -> None:
    lm = reader(yarn, tokenizer)
    context = lm.tok_encode(WORDS * 2)
    end = greedy(yarn, context, 4, 1.0)
    wrong = [*end[:-1], (end[-1] + 1) % 500]
    requests = [(("a", "b"), context, end), (("a", "c"), context, wrong)]
    assert [flag for _, flag in lm._loglikelihood_tokens(requests)] == [True, False]


def test_generations_are_made_at_the_scale_of_prompt_and_answer(
    yarn: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    spy = Spy()
    monkeypatch.setattr(harness_model, "at_scale", spy)
    new = 6
    settings = {"max_gen_toks": new, "until": [], "do_sample": False}
    prompts = [WORDS * n for n in (2, 30, 12)]
    lm = reader(yarn, tokenizer)
    texts = lm.generate_until(instances("generate_until", [(p, settings) for p in prompts]))
    scales = []
    for prompt, text in zip(prompts, texts, strict=True):
        ids = lm.tok_encode(prompt)
        scale = scale_for(yarn, len(ids) + new)
        alone = tokenizer.decode(greedy(yarn, ids, new, scale), skip_special_tokens=True)
        assert text == alone
        assert lm.reads[(prompt,)] == harness_model.Read(len(ids), len(ids), scale)
        scales.append(scale)
    assert len(set(scales)) == 3
    assert spy.held == [sorted(scales, reverse=True)]


def test_scores_do_not_depend_on_the_batch(yarn: Any, tokenizer: Any) -> None:
    pairs = [(WORDS * n, end) for n in (1, 20, 8) for end in (" of the sea.", " in")]
    settings = {"max_gen_toks": 8, "until": ["\n"], "do_sample": False}
    found = []
    for batch_tokens in (1, 65_536):
        lm = reader(yarn, tokenizer, batch_tokens=batch_tokens)
        texts = lm.generate_until(instances("generate_until", [(p, settings) for p, _ in pairs]))
        likelihoods = lm.loglikelihood(instances("loglikelihood", pairs))
        rolling = lm.loglikelihood_rolling(
            instances("loglikelihood_rolling", [(p,) for p, _ in pairs])
        )
        found.append((texts, likelihoods, rolling))
    (alone, one, apart), (together, many, joined) = found
    assert alone == together
    assert [x for x, _ in one] == pytest.approx([x for x, _ in many], abs=2e-3)
    assert apart == pytest.approx(joined, rel=1e-4)


@pytest.mark.parametrize("kind", ["loglikelihood", "generate_until"])
def test_batches_that_do_not_fit_are_halved(
    kind: str, yarn: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU that holds few tokens at once; the answers are those of single requests."""
    texts = [WORDS * 4, WORDS * 3, WORDS * 3, WORDS * 2, WORDS]
    if kind == "loglikelihood":
        requests = instances(kind, [(text, " The sea") for text in texts])
    else:
        requests = instances(kind, [(text, {"max_gen_toks": 4}) for text in texts])
    alone = [getattr(reader(yarn, tokenizer), kind)([request])[0] for request in requests]
    read: list[int] = []

    def room_for(most: int) -> HarnessModel:
        small = reader(yarn, tokenizer, progress=lambda *done: told.append(done))
        real = small._scales

        def scales(lengths: Sequence[int]) -> list[float]:
            read.append(len(lengths) * max(lengths))
            if read[-1] > most:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return real(lengths)

        monkeypatch.setattr(small, "_scales", scales)
        return small

    told: list[tuple[int, int]] = []
    room = 3 * len(tokenizer(WORDS * 4)["input_ids"])
    answers = getattr(room_for(room), kind)(requests)
    assert read[0] > room and max(read[1:]) <= read[0] / 2, "one attempt too many, then half"
    assert told[-1] == (5, 5)
    if kind == "loglikelihood":
        assert np.allclose([a for a, _ in answers], [a for a, _ in alone], atol=1e-4)
    else:
        assert answers == alone
    with pytest.raises(ConfigError, match=r"request of \d+ tokens does not fit .*--max-length"):
        getattr(room_for(0), kind)(requests)


def test_rolling_windows_of_the_native_length_are_read_at_scale_one(
    yarn: Any, tokenizer: Any
) -> None:
    text = WORDS * 40
    lm = reader(yarn, tokenizer, max_length=NATIVE)
    plain = reader(load_base("tiny-llama"), tokenizer, max_length=NATIVE)
    requests = instances("loglikelihood_rolling", [(text,)])
    assert lm.loglikelihood_rolling(requests) == pytest.approx(
        plain.loglikelihood_rolling(requests), rel=1e-6
    )


@pytest.mark.parametrize("length", [1, 9, 10, 11, 12, 1000])
@pytest.mark.parametrize("limit", [10, 11])
def test_the_middle_is_cut(length: int, limit: int) -> None:
    kept = cut_middle(list(range(length)), limit)
    if length <= limit:
        assert kept == list(range(length))
    else:
        assert kept == [0, 1, 2, 3, 4, *(length - k for k in (5, 4, 3, 2, 1))]


def test_long_prompts_lose_their_middle_or_their_start(yarn: Any, tokenizer: Any) -> None:
    prompt = "first words " + WORDS * 30 + "last words"
    settings = {"max_gen_toks": 20, "until": []}
    lm = reader(yarn, tokenizer, max_length=120)
    ids = lm.tok_encode(prompt)
    left = lm._prompt(0, prompt, settings)
    assert left.ids == ids[-100:] and left.tokens == len(ids)
    lm.middle = True
    middle = lm._prompt(0, prompt, settings).ids
    assert middle == ids[:50] + ids[-50:]
    text = tokenizer.decode(middle)
    assert text.startswith("first words") and text.endswith("last words")
    lm = reader(yarn, tokenizer, max_length=20)
    with pytest.raises(ConfigError, match="window of 20 tokens has no room"):
        lm._prompt(0, prompt, settings)


def test_intervals_are_those_of_the_mean_over_items() -> None:
    values = np.random.default_rng(1).normal(3, 2, 400)
    error = float(values.std() / 20)
    found = interval(list(values), np.mean)
    assert found == pytest.approx(
        [values.mean() - 1.96 * error, values.mean() + 1.96 * error], abs=0.3 * error
    )
    assert interval([2.0, 2.0, 2.0], np.mean) == (2.0, 2.0)
    assert interval([2.0], np.mean) is None


def test_intervals_of_perplexities() -> None:
    def per_word(pairs: Any) -> float:
        return float(np.exp(-sum(x for x, _ in pairs) / sum(n for _, n in pairs)))

    # 2 nats a word in one text, 3 in the other: 95 of 100 draws reach from one to the other.
    found = interval([(-20.0, 10), (-60.0, 20)], per_word)
    assert found == pytest.approx([np.exp(2.0), np.exp(3.0)])
    assert interval([-1.0, -2.0], lambda v: float(np.exp(-np.mean(v)))) == pytest.approx(
        [np.exp(1.0), np.exp(2.0)]
    )
    # No function of the mean, and no numbers.
    assert interval([1.0, 2.0, 4.0], np.median) is None
    assert interval([("a", "b"), ("c", "d")], lambda pairs: 0.0) is None


def test_lengths_that_ruler_did_not_ask_for_have_no_row() -> None:
    class Task:
        def aggregation(self) -> dict[str, Any]:
            return dict.fromkeys(("1024", "4096"), fmean)

    samples = [{"filter": "none", "1024": x, "4096": -1, "300": -1} for x in (1.0, 0.0)]
    samples.append({"filter": "none", "1024": -1, "4096": -1, "300": 1.0})
    results = {"alias": "niah", "1024,none": 0.5, "4096,none": -1, "1024_stderr,none": 0.1}
    # 300 is no length of the task: lm-eval has taken the mean of all items.
    rows = metric_rows(Task(), {**results, "300,none": -1 / 3}, samples)
    assert [(row["metric"], row["value"], row["items"]) for row in rows] == [
        ("1024", 0.5, 2),
        ("300", 1.0, 1),
    ]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "items"
    folder.mkdir()
    questions = [record(context=WORDS * n, input="Who?", answers=["the men"]) for n in (1, 40)]
    write_items(folder, "hotpotqa.jsonl", questions)
    types = record(context="Question: x\nType: Date", answers=["Date"], all_classes=["Date"])
    write_items(folder, "trec.jsonl.gz", [types])
    write_items(tmp_path, "texts.jsonl", [{"text": WORDS * 2}, {"text": WORDS * 5}])
    choice = {"question": WORDS, "choices": ["The men", "of of of"], "answer": 0}
    write_items(tmp_path, "choices.jsonl", [choice, {**choice, "answer": 1}])
    return tmp_path


def test_the_whole_command(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = data / "out"
    words = ["eval", "harness", "tiny-llama", "--tasks", "longbench", "--method", "yarn"]
    words += ["--longbench", str(data / "items"), "--rivals", "base", "--out", str(out)]
    words += ["--jsonl", str(data / "texts.jsonl"), "--jsonl", str(data / "choices.jsonl")]
    run = CliRunner().invoke(app, [*words, "--device", "cpu"], catch_exceptions=False)
    assert run.exit_code == 0
    results = json.loads((out / "results.json").read_text())
    rows = {(r["method"], r["task"], r["metric"]): r for r in results["scores"]}
    assert next(iter(rows)) == ("base", "texts", "word_perplexity")
    assert len(rows) == 14
    # The longer item does not fit the plain model, whose window is 256 tokens.
    base, yarn = (rows[m, "longbench_hotpotqa", "score"] for m in ("base", "yarn"))
    assert (base["cut"], base["longest"], base["scale"]) == (1, NATIVE - 32, 1.0)
    assert yarn["cut"] == 0 and yarn["longest"] > 2 * NATIVE and yarn["scale"] > 2
    # Short texts are read by both alike.
    short = [rows[m, "choices", "acc"] for m in ("base", "yarn")]
    assert [r["value"] for r in short] == [0.5, 0.5] and short[0]["items"] == 2
    cells = {(c["method"], c["category"]): c for c in results["longbench"]}
    assert cells["yarn", "Multi-Doc QA"]["tasks"] == 1
    average = (
        cells["yarn", "Multi-Doc QA"]["score"] + cells["yarn", "Few-shot Learning"]["score"]
    ) / 2
    assert cells["yarn", "Average"]["score"] == pytest.approx(average)
    task = json.loads((out / "tasks" / "yarn.longbench_hotpotqa.json").read_text())
    mean = 100 * np.mean([item["scores"]["score"] for item in task["items"]])
    assert task["scores"][0]["value"] == pytest.approx(mean)
    assert all(isinstance(item["answer"], str) for item in task["items"])
    assert results["versions"]["lm_eval"] and results["settings"]["model"] == "tiny-llama"
    with (out / "results.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == len(rows)

    # Only what is missing is run again.
    ran = []
    before = harness._run_task

    def spy(*arguments: Any) -> Any:
        ran.append((arguments[1], arguments[3]))
        return before(*arguments)

    monkeypatch.setattr(harness, "_run_task", spy)
    (out / "tasks" / "yarn.longbench_trec.json").unlink()
    (out / "results.json").unlink()
    CliRunner().invoke(app, [*words, "--device", "cpu"], catch_exceptions=False)
    assert ran == [("longbench_trec", "yarn")]
    again = json.loads((out / "results.json").read_text())
    assert [{**r, "seconds": 0} for r in again["scores"]] == [
        {**r, "seconds": 0} for r in results["scores"]
    ]
    with pytest.raises(OutputError, match=r"other settings \(limit\)"):
        CliRunner().invoke(app, [*words, "--limit", "1"], catch_exceptions=False)


def test_a_task_that_does_not_fit_is_left_out_and_told(data: Path) -> None:
    report = record(context=WORDS, input="", answers=["the men"])
    write_items(data / "items", "gov_report.jsonl", [report])  # asks for 512 new tokens
    names = ("longbench_gov_report", "longbench_trec")
    config = HarnessConfig(tasks=names, longbench=str(data / "items"))
    told = Console(file=io.StringIO(), width=300)
    (row,) = run_harness("tiny-llama", data / "two", config, device=CPU, console=told)
    assert row.task == "longbench_trec"
    results = json.loads((data / "two" / "results.json").read_text())
    (left,) = results["left_out"]
    assert (left["method"], left["task"]) == ("base", "longbench_gov_report")
    assert "window of 256 tokens has no room for a prompt and 512" in left["why"]
    assert "left out: longbench_gov_report for base" in told.file.getvalue()  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="no room for a prompt and 512"):
        alone = replace(config, tasks=names[:1])
        run_harness("tiny-llama", data / "one", alone, device=CPU)


def test_scores_of_another_file_are_not_taken_for_its_own(data: Path) -> None:
    (data / "other").mkdir()
    other = write_items(data / "other", "texts.jsonl", [{"text": WORDS}])
    run_harness(
        "tiny-llama",
        data / "out",
        HarnessConfig(tasks=(), texts=(str(data / "texts.jsonl"),)),
        device=CPU,
    )
    with pytest.raises(OutputError, match=r"holds the scores of .*, not of .*other"):
        run_harness(
            "tiny-llama", data / "out", HarnessConfig(tasks=(), texts=(str(other),)), device=CPU
        )


def test_the_perplexity_of_texts_is_that_of_the_model(data: Path) -> None:
    config = HarnessConfig(tasks=(), texts=(str(data / "texts.jsonl"),))
    rows = run_harness("tiny-llama", data / "ppl", config, device=CPU)
    model, tokenizer = load_base("tiny-llama"), load_tokenizer("tiny-llama")
    total, size = 0.0, 0
    for text in (WORDS * 2, WORDS * 5):
        ids = tokenizer.encode(text)
        assert len(ids) < NATIVE
        total += likelihood(model, [tokenizer.bos_token_id], ids, None)
        size += len(text.encode())
    found = next(row.value for row in rows if row.metric == "bits_per_byte")
    assert found == pytest.approx(-total / size / np.log(2), rel=1e-4)


def test_a_package_without_a_version_loses_no_scores(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = harness.version

    def version(package: str) -> str:
        if package == "jieba":
            raise importlib.metadata.PackageNotFoundError(package)
        return known(package)

    monkeypatch.setattr(harness, "version", version)
    config = HarnessConfig(tasks=(), texts=(str(data / "choices.jsonl"),))
    run_harness("tiny-llama", data / "out", config, device=CPU)
    results = json.loads((data / "out" / "results.json").read_text())
    assert results["versions"]["jieba"] is None and results["versions"]["lm_eval"]
    assert results["scores"]


def test_an_extended_result_brings_its_own_window(data: Path, yarn: Any) -> None:
    folder = clex.save(yarn, data / "yarn", weights="none", base_model="tiny-llama")
    config = HarnessConfig(tasks=("longbench_trec",), longbench=str(data / "items"))
    (row,) = run_harness(str(folder), data / "own", config, device=CPU)
    assert (row.method, row.task, row.items) == ("yarn", "longbench_trec", 1)
    task = json.loads((data / "own" / "tasks" / "yarn.longbench_trec.json").read_text())
    assert task["max_length"] == 8 * NATIVE
    both = HarnessConfig(tasks=("longbench_trec",), method="ntk")
    with pytest.raises(ConfigError, match="has its own method"):
        run_harness(str(folder), data / "both", both, device=CPU)


def test_without_lm_eval_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "lm_eval" else find(name, *a)
    )
    with pytest.raises(ConfigError, match=r"needs lm_eval: pip install 'clex-llm\[eval\]'"):
        run_harness("tiny-llama", tmp_path / "out", HarnessConfig(tasks=("piqa",)), device=CPU)


@pytest.mark.parametrize(
    ("record_", "told"),
    [
        ({"words": "x"}, "line 2: neither"),
        ({"question": "x", "choices": ["y"], "answer": 1}, "line 2: neither"),
        ({"question": "x", "choices": ["y"], "answer": 0}, "mixes texts and questions"),
    ],
)
def test_records_of_no_known_form_are_told(
    tmp_path: Path, record_: dict[str, Any], told: str
) -> None:
    file = write_items(tmp_path, "some.jsonl", [{"text": "x"}, record_])
    with pytest.raises(DataError, match=told):
        load_text_task(file)


def test_bad_requests_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to measure"):
        HarnessConfig(tasks=())
    with pytest.raises(ConfigError, match="unknown precision 'fp8'"):
        HarnessConfig(tasks=("piqa",), precision="fp8")
    (tmp_path / "x").write_text("")
    with pytest.raises(ClexError, match="not empty"):
        run_harness("tiny-llama", tmp_path, HarnessConfig(tasks=("piqa",)), device=CPU)
