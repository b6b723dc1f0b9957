"""Needles and pass keys: prompts to the token, scores right for those who see and the blind."""

import csv
import dataclasses
import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import clex
import clex.needles
from clex.cli import app
from clex.config import ClexConfig
from clex.errors import ClexError, ConfigError, DataError, OutputError
from clex.evaluation.haystacks import DEPTHS, Haystacks, Prompt, RetrievalPlan, sentences
from clex.evaluation.heatmap import draw_heatmap
from clex.evaluation.retrieval import (
    Summary,
    Trial,
    ask,
    cells_of,
    effective_length,
    run_retrieval,
    summarise,
    tail,
    wilson,
)
from clex.needles import RetrievalConfig, run_needles
from tiny import make_model, make_tokenizer, write_model

WORDS = ("the", "sea", "was", "calm", "and", "old", "ship", "lay", "bay", "until", "wind")


def book(count: int = 400, seed: int = 0) -> str:
    """Sentences of 3 to 9 words."""
    random = Random(seed)
    return " ".join(
        " ".join(random.choices(WORDS, k=random.randint(3, 9))).capitalize() + "."
        for _ in range(count)
    )


class Stub(nn.Module):
    """A model of bytes that answers by rule: next to everything on one token.

    It has a cache of its own, of the tokens so far, with the two methods that a cache must have.
    """

    def __init__(self, vocab: int = 256) -> None:
        super().__init__()
        self.vocab = vocab
        self.weight = nn.Parameter(torch.zeros(1))

    def next(self, tokens: list[int]) -> Tensor:
        raise NotImplementedError

    def forward(
        self, input_ids: Tensor, past_key_values: Any = None, logits_to_keep: int = 0, **_: Any
    ) -> Any:
        cache = past_key_values or Tokens()
        rows = []
        for token in input_ids[0].tolist():
            cache.append(token)
            rows.append(list(cache))
        wanted = rows[-logits_to_keep:] if logits_to_keep else rows
        logits = torch.stack([self.next(row) for row in wanted])[None]
        return SimpleNamespace(logits=logits, past_key_values=cache)

    def generate(self, input_ids: Tensor, generation_config: Any, **_: Any) -> Tensor:
        past = _["past_key_values"]
        past += input_ids[0, len(past) :].tolist()
        tokens = input_ids[0].tolist()
        for _step in range(generation_config.max_new_tokens):
            tokens.append(int(self.next(tokens).argmax()))
            past.append(tokens[-1])
        return torch.tensor([tokens])


class Tokens(list[int]):
    def get_seq_length(self) -> int:
        return len(self)

    def crop(self, count: int) -> None:
        del self[len(self) + count :]


class Oracle(Stub):
    """Goes on as the text did after the longest earlier copy of its last tokens."""

    def next(self, tokens: list[int]) -> Tensor:
        logits = torch.zeros(self.vocab)
        best, follower = 0, 0
        for i in range(len(tokens) - 1):
            same = 0
            while same <= i and same < 40 and tokens[i - same] == tokens[-1 - same]:
                same += 1
            if same >= best:
                best, follower = same, tokens[i + 1]
        logits[follower] = 20.0
        return logits


class Blind(Stub):
    """Its opinion depends on the last token and the length alone, not on what was hidden."""

    def next(self, tokens: list[int]) -> Tensor:
        random = Random(f"{len(tokens)} {tokens[-1]} {tokens[0]}")
        return torch.tensor([random.gauss(0, 1) for _ in range(self.vocab)])


def setting(task: str = "needle", **changes: Any) -> tuple[Haystacks, RetrievalPlan]:
    values: dict[str, Any] = {"lengths": (320, 640), "needles": 2, "depths": (0.0, 0.5, 1.0)}
    plan = RetrievalPlan(task=task, **{**values, **changes})
    return Haystacks(make_tokenizer(), plan, [book()]), plan


def every(haystacks: Haystacks, plan: RetrievalPlan) -> Iterator[Prompt]:
    for length in plan.lengths:
        for number in range(plan.needles):
            for depth in plan.depths:
                yield haystacks.prompt(length, depth, number)


def decoded(prompt: Prompt) -> str:
    return str(make_tokenizer().decode(prompt.input_ids))


@pytest.mark.parametrize(
    ("task", "hidden"), [("needle", 1), ("needle", 4), ("passkey", 1)], ids=str
)
def test_prompts_to_the_token(task: str, hidden: int) -> None:
    haystacks, plan = setting(task, depths=DEPTHS, hidden=hidden, lengths=(400, 1000))
    longest = max(len(s) + 1 for s in sentences(book()))
    for prompt in every(haystacks, plan):
        text = decoded(prompt)
        # One token a byte: the text itself tells lengths and places.
        assert len(text) + len(prompt.candidates[0]) == prompt.length
        assert {len(c) for c in prompt.candidates} == {len(prompt.answer) + 1}
        assert len(set(prompt.candidates)) == plan.distractors + 1
        assert text[prompt.position :].startswith(f" {prompt.statement}")
        assert text.count(prompt.statement) == 1
        assert text.count(prompt.answer) == prompt.statement.count(prompt.answer)
        before = text[: prompt.position]
        assert before.endswith(".")  # no sentence is split
        needle = haystacks.needle(prompt.needle)
        assert all(text.count(statement) == 1 for statement in needle.statements)
        hay, head = text.removesuffix(needle.question), text.index("remember it.") + 12
        others = sum(len(s) + 1 for s in needle.statements[1:] if s in before)
        shown = sum(len(s) + 1 for s in needle.statements)
        share = (len(before) - head - others) / (len(hay) - head - shown)
        assert share == pytest.approx(prompt.actual_depth)
        assert abs(share - prompt.depth) * (len(hay) - head - shown) <= longest / 2
        assert not prompt.depth or prompt.depth < 1 or share == 1


def test_without_the_needle_the_length_stays() -> None:
    haystacks, _ = setting()
    shown, absent = haystacks.prompt(320, 0.5, 0), haystacks.prompt(320, 0.5, 0, hide=False)
    assert len(shown.input_ids) == len(absent.input_ids)
    assert shown.candidates == absent.candidates
    assert absent.position is None
    assert not any(answer in decoded(absent) for answer in haystacks.needle(0).answers)
    assert decoded(shown)[-20:] == decoded(absent)[-20:]


def test_same_seed_same_prompts() -> None:
    first, second = (list(every(*setting())) for _ in range(2))
    assert first == second
    other = list(every(*setting(seed=1)))
    assert not {p.answer for p in first} & {p.answer for p in other}
    # Each needle of a cell has its own statement and text.
    assert len({p.answer for p in first}) == 2
    assert len({decoded(p)[100:140] for p in first if p.length == 640}) > 1


def test_answers_of_other_statements_compete() -> None:
    haystacks, _ = setting(hidden=3)
    prompt, needle = haystacks.prompt(640, 0.5, 0), haystacks.needle(0)
    candidates = [make_tokenizer().decode(c).strip() for c in prompt.candidates]
    assert all(any(s.endswith(f"{c}.") for c in candidates) for s in needle.statements)


def test_what_cannot_be_asked_is_refused() -> None:
    with pytest.raises(ConfigError, match="the shortest length is"):
        setting(lengths=(60,))
    with pytest.raises(DataError, match="fewer than the longest length"):
        haystacks, _ = setting(lengths=(320, 100_000))
        haystacks.needle(0)
    for wrong in (
        {"task": "haystack"},
        {"needles": 0},
        {"hidden": 99},
        {"depths": (0.5, 1.5)},
        {"lengths": (640, 320)},
        {"task": "passkey", "hidden": 2},
    ):
        with pytest.raises(ConfigError):
            setting(**wrong)


def test_long_pieces_are_cut_between_words() -> None:
    text = 'He said "No." Then ' + " ".join(["word"] * 100) + ". End!"
    pieces = sentences(text)
    assert " ".join(pieces) == text
    assert pieces[0] == 'He said "No."'
    assert max(len(piece.split()) for piece in pieces) == 40


@pytest.mark.parametrize("task", ["needle", "passkey"])
def test_oracle_finds_all(task: str) -> None:
    haystacks, plan = setting(task, lengths=(320,))
    trials = run_retrieval(Oracle(), haystacks, plan, "oracle")
    assert len(trials) == 6
    assert all(t.exact and t.choice and t.gain for t in trials), trials
    for row in summarise(trials, plan):
        assert row.mean == 1 and row.above_chance


def test_blind_is_at_chance() -> None:
    haystacks, plan = setting(needles=70, depths=(0.5,), lengths=(200,), distractors=3)
    trials = run_retrieval(Blind(), haystacks, plan, "blind")
    hits = {name: sum(getattr(t, name) for t in trials) for name in ("exact", "choice", "gain")}
    assert hits["exact"] == 0
    # It answers the same with and without the needle: nothing is gained, a tie is no answer.
    assert all(t.log_probs == t.absent_log_probs for t in trials)
    assert hits["gain"] == 0
    low, high = wilson(hits["choice"], 70)
    assert low < plan.chance < high, hits
    assert hits["choice"] > 0


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "mistral"])
@pytest.mark.parametrize("scale", [None, 2.5])
def test_scores_equal_full_forwards(family: str, scale: float | None) -> None:
    """Also with a sliding window, whose cache cannot be cut back."""
    changes = {"sliding_window": 100} if family == "mistral" else {}
    model = make_model(family, vocab_size=256, **changes)
    haystacks, _ = setting(distractors=4)
    prompt = haystacks.prompt(320, 0.5, 0)
    if scale:
        clex.extend(model, ClexConfig(method="yarn", max_scale=8))
        with clex.at_scale(model, scale):
            reply, naive = ask(model, prompt, haystacks.tokenizer), full(model, prompt)
    else:
        reply, naive = ask(model, prompt, haystacks.tokenizer), full(model, prompt)
    assert reply.log_probs == pytest.approx(naive[0], abs=1e-4)
    assert reply.generated == haystacks.tokenizer.decode(naive[1], skip_special_tokens=True)


def full(model: Any, prompt: Prompt) -> tuple[list[float], list[int]]:
    """Whole forward passes over prompt and answer, without any cache."""
    scores = []
    with torch.no_grad():
        for candidate in prompt.candidates:
            ids = torch.tensor([[*prompt.input_ids, *candidate]])
            logits = model(input_ids=ids, use_cache=False).logits[0].double().log_softmax(-1)
            start = len(prompt.input_ids)
            scores.append(sum(logits[start + i - 1, c].item() for i, c in enumerate(candidate)))
        tokens = list(prompt.input_ids)
        for _ in prompt.candidates[0]:
            logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits
            tokens.append(int(logits[0, -1].argmax()))
    return scores, tokens[len(prompt.input_ids) :]


def test_extension_reads_at_the_scale_of_the_length() -> None:
    model = clex.extend(make_model(vocab_size=256), ClexConfig(method="yarn", max_scale=16))
    haystacks, plan = setting(needles=1, depths=(0.5,), generate=False)
    trials = run_retrieval(model, haystacks, plan, "yarn")
    assert [t.scale for t in trials] == pytest.approx([2**2.5, 2**3.5])  # grid
    with clex.at_scale(model, trials[0].scale):
        inside = ask(model, haystacks.prompt(320, 0.5, 0))
    with clex.at_scale(model, trials[1].scale):
        other = ask(model, haystacks.prompt(320, 0.5, 0))
    assert trials[0].log_probs == inside.log_probs != other.log_probs
    assert trials[0].exact is None and trials[0].generated is None


def test_a_needle_counts_once_however_many_depths_it_was_asked_at() -> None:
    """One answer that the model likes anyway is half of all trials and proves nothing."""
    haystacks, plan = setting(needles=2, depths=tuple(k / 10 for k in range(11)), lengths=(320,))
    trials = [
        dataclasses.replace(trial, choice=trial.needle == 0)
        for trial in run_retrieval(Blind(), haystacks, plan, "blind")
    ]
    row = next(row for row in summarise(trials, plan) if row.score == "choice")
    assert (row.trials, row.mean) == (22, 0.5)
    assert tail(11, 22, plan.chance) < 1e-5  # what independent trials would say
    assert row.low < plan.chance and not row.above_chance


def test_statistics() -> None:
    assert tail(0, 5, 0.1) == pytest.approx(1)
    assert tail(3, 5, 0.1) == pytest.approx(0.00856)
    assert tail(1, 5, 0.0) == 0
    assert wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)

    def row(length: int, mean: float, above: bool = True) -> Summary:
        return Summary(
            method="m",
            score="gain",
            length=length,
            trials=10,
            mean=mean,
            low=0,
            high=1,
            above_chance=above,
            depths_above_chance=0,
        )

    falling = [row(128, 1.0), row(256, 0.8), row(512, 0.72), row(1024, 0.71), row(2048, 0.9)]
    assert effective_length(falling, 256) == 512
    assert effective_length(falling[2:], 256) is None
    assert effective_length([row(256, 0.1, above=False), row(512, 0.1)], 256) is None


def test_cells_and_pictures_agree(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    trials = run_needles(
        str(model),
        tmp_path / "out",
        RetrievalConfig(lengths=(200, 400), depths=(0.0, 1.0), needles=2),
        data=write_book(tmp_path),
        device="cpu",
    )
    assert Counter(t.method for t in trials) == {"base": 8, "yarn": 8}
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [Trial.from_dict(t) for t in result["trials"]] == trials
    with (tmp_path / "out" / "cells.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(result["cells"]) == 8
    cells = cells_of(trials)
    for score in ("exact", "choice", "gain"):
        assert (tmp_path / "out" / f"heatmap-{score}.png").read_bytes()[:4] == b"\x89PNG"
        drawn = draw_heatmap(cells, score, tmp_path / "again.png", 64, 0.1)
        for row in rows:
            y, x = [0.0, 1.0].index(float(row["depth"])), [200, 400].index(int(row["length"]))
            assert drawn[row["method"]][y][x] == float(row[score])
            chosen = [
                getattr(t, score)
                for t in trials
                if (t.method, t.length, t.depth)
                == (row["method"], int(row["length"]), float(row["depth"]))
            ]
            assert float(row[score]) == sum(chosen) / 2
    first = next(t for t in trials)
    assert math.exp(max(first.log_probs)) <= 1


def write_book(folder: Path) -> Path:
    (folder / "book.txt").write_text(book())
    return folder / "book.txt"


def test_killed_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, text = str(write_model(tmp_path / "model")), write_book(tmp_path)
    config = RetrievalConfig(lengths=(200,), depths=(0.0, 0.5, 1.0), needles=2, generate=False)
    whole = run_needles(model, tmp_path / "whole", config, data=text, device="cpu")

    asked: list[Prompt] = []

    def counted(model: Any, prompt: Prompt, tokenizer: Any = None) -> Any:
        if len(asked) == 7:
            raise KeyboardInterrupt
        asked.append(prompt)
        return ask(model, prompt, tokenizer)

    monkeypatch.setattr("clex.evaluation.retrieval.ask", counted)
    with pytest.raises(KeyboardInterrupt):
        run_needles(model, tmp_path / "out", config, data=text, device="cpu")
    kept = (tmp_path / "out" / "trials.jsonl").read_text()
    assert kept.count("\n") == 5  # and two prompts without a needle
    with (tmp_path / "out" / "trials.jsonl").open("a") as file:
        file.write('{"method": "ba')  # the kill came while a line was written
    monkeypatch.setattr("clex.evaluation.retrieval.ask", ask)
    assert run_needles(model, tmp_path / "out", config, data=text, device="cpu") == whole
    assert (tmp_path / "out" / "trials.jsonl").read_text().startswith(kept)

    monkeypatch.setattr("clex.evaluation.retrieval.ask", None)  # nothing is asked again
    assert run_needles(model, tmp_path / "out", config, data=text, device="cpu") == whole
    with pytest.raises(OutputError, match="other settings"):
        other = RetrievalConfig(lengths=(200,), depths=(0.0,), needles=2, generate=False)
        run_needles(model, tmp_path / "out", other, data=text, device="cpu")
    with pytest.raises(OutputError, match="not empty"):
        run_needles(model, tmp_path / "model", config, data=text, device="cpu")


def test_numbers_that_are_none_are_reported() -> None:
    model = make_model(vocab_size=256)
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    haystacks, _ = setting()
    with pytest.raises(ClexError, match="not numbers"):
        ask(model, haystacks.prompt(320, 0.5, 0))


@pytest.mark.parametrize("task", ["needle", "passkey"])
def test_command(task: str, tmp_path: Path) -> None:
    arguments = ["--lengths", "256,512", "--depths", "2", "--needles", "1", "--device", "cpu"]
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["eval", task, "tiny-llama", "--out", str(out), *arguments])
    assert result.exit_code == 0, result.output
    trials = json.loads((out / "results.json").read_text())["trials"]
    assert len(trials) == 2 * 2 * 2
    # At t = 1 yarn is the plain model, past the window it is not.
    scores = {(t["method"], t["length"], t["depth"]): t["log_probs"] for t in trials}
    assert scores["base", 256, 1.0] == scores["yarn", 256, 1.0]
    assert scores["base", 512, 1.0] != scores["yarn", 512, 1.0]


def test_cpu_default_is_affordable() -> None:
    plan = RetrievalConfig().plan(8192, 8.0, 135_000_000, torch.device("cpu"))
    assert plan.lengths == (8192,) and plan.needles == 2
    asked = RetrievalConfig(lengths=(65536,), needles=5)
    assert asked.plan(8192, 8.0, 135_000_000, torch.device("cpu")).lengths == (65536,)
    gpu = RetrievalConfig().plan(8192, 8.0, 135_000_000, torch.device("cuda"))
    assert gpu.lengths == (8192, 16384, 32768, 65536) and gpu.needles == 5
