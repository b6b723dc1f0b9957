"""Every protocol of perplexity against all logits at once, in float64; and coming back."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

import clex
import tiny
from clex.config import ClexConfig
from clex.data import find_files, read_documents
from clex.errors import CheckpointError, ClexError, ConfigError, DataError, OutputError
from clex.evaluation import longppl, perplexity
from clex.evaluation.perplexity import (
    PerplexityPlan,
    cut_windows,
    evaluate_extended,
    evaluate_methods,
    measure,
    select_documents,
)
from clex.evaluation.report import retention_table, tables
from clex.evaluation.scores import Row, Score, ScoreLog, differences, rows_of
from clex.evaluation.token_bytes import token_bytes
from clex.hf import loss as loss_module
from clex.hf.extend import scale_for
from clex.hf.models import assets_folder, load_tokenizer
from clex.run import EvalConfig, run_perplexity

ALL = ("window", "target", "position", "sliding")
PLAN = PerplexityPlan(
    lengths=(16, 32, 64, 200),
    target=15,
    windows=2,
    protocols=ALL,
    bands=5,
    sliding=(48, 64),
    stride=20,
)
DOCUMENTS = (400, 230, 120, 310)
# Nats: what is asked of every protocol. float32 sums in another order differ by some 1e-6.
TOLERANCE = 1e-4
METHODS = {
    "base": None,
    "yarn": ClexConfig(method="yarn", max_scale=4),
    "clex": ClexConfig(max_scale=4, steps=4),
}


def place(row: Row) -> tuple[str, int, int]:
    return row.protocol, row.length, row.band_start


def quiet() -> Console:
    return Console(file=io.StringIO())


def naive(model: nn.Module, ids: Tensor, scale: float | None) -> tuple[np.ndarray, np.ndarray]:
    """Loss and hit of each token but the first, from all logits at once."""
    inputs = ids[None]
    if scale is None:
        logits = tiny.logits(model, inputs)[0]
    else:
        with clex.at_scale(model, scale):
            logits = tiny.logits(model, inputs)[0]
    table = logits.double().numpy()[:-1]
    wanted = ids.numpy()[1:]
    peak = table.max(axis=1)
    norm = peak + np.log(np.exp(table - peak[:, None]).sum(axis=1))
    return norm - table[np.arange(len(wanted)), wanted], table.argmax(axis=1) == wanted


def by_hand(model: nn.Module, documents: list[Tensor]) -> dict[tuple[Any, ...], list[np.ndarray]]:
    """(protocol, length, band) to losses and hits, as the definitions read."""
    extended = any(type(m).__name__ == "ScaledRope" for m in model.modules())
    found: dict[tuple[Any, ...], list[tuple[np.ndarray, np.ndarray]]] = {}

    def scale(length: int) -> float | None:
        return scale_for(model, length) if extended else None

    def add(key: tuple[Any, ...], nll: np.ndarray, hit: np.ndarray) -> None:
        found.setdefault(key, []).append((nll, hit))

    for ids in documents:
        for k in range(min(PLAN.windows, len(ids) // 200)):
            text = ids[200 * k : 200 * k + 200]
            for length in PLAN.lengths:
                nll, hit = naive(model, text[:length], scale(length))
                add(("window", length, 0), nll, hit)
                if length == 200:
                    for band in range(5):
                        at = [p - 1 for p in range(40 * band, 40 * band + 40) if p > 0]
                        add(("position", 200, 40 * band), nll[at], hit[at])
                nll, hit = naive(model, text[200 - length :], scale(length))
                add(("target", length, 0), nll[-15:], hit[-15:])
        for window in PLAN.sliding:
            # The loop of the transformers guide on perplexity of fixed-length models.
            previous = 0
            for begin in range(0, len(ids), PLAN.stride):
                end = min(begin + window, len(ids))
                nll, hit = naive(model, ids[begin:end], scale(window))
                count = end - previous
                add(("sliding", window, 0), nll[-count:], hit[-count:])
                previous = end
                if end == len(ids):
                    break
    return {
        key: [np.concatenate(part) for part in zip(*v, strict=True)] for key, v in found.items()
    }


@pytest.mark.parametrize("method", METHODS)
def test_every_protocol_agrees_with_all_logits(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_module, "LOGITS_AT_ONCE", 7 * tiny.VOCAB)
    tokens = tiny.make_tokens(DOCUMENTS)
    model = tiny.make_model()
    config = METHODS[method]
    if config is not None:
        clex.extend(model, config)
        if method == "clex":
            tiny.stir(model)
    # Every third token is the model's first choice: or no token would be a hit.
    documents = [torch.tensor(tokens[i]["input_ids"]) for i in (0, 1, 3)]
    for ids in documents:
        ids[1::3] = tiny.logits(model, ids[None])[0].argmax(-1)[:-1:3][: len(ids[1::3])]
    rows = measure(model, list(zip((0, 1, 3), documents, strict=True)), PLAN, method)
    wanted = by_hand(model, documents)
    assert {(r.protocol, r.length, r.band_start) for r in rows} == wanted.keys()
    errors = []
    for row in rows:
        nll, hit = wanted[row.protocol, row.length, row.band_start]
        assert row.tokens == len(nll) and row.documents == 3
        assert row.accuracy == pytest.approx(hit.mean(), abs=1e-12)
        errors.append(abs(row.nll - nll.mean()))
    assert max(errors) < TOLERANCE
    sums = [row.tokens for row in rows if row.protocol == "position"]
    assert sum(sums) == next(r.tokens for r in rows if (r.protocol, r.length) == ("window", 200))
    assert any(0 < row.accuracy < 1 for row in rows)


@pytest.mark.parametrize(("length", "stride"), [(200, 48), (145, 48), (193, 48), (100, 1), (30, 7)])
def test_sliding_windows_side_by_side_and_all_but_so(length: int, stride: int) -> None:
    """Windows of 48 tokens that do not overlap, a last one of one token, steps of one token."""
    plan = PerplexityPlan((200,), 15, protocols=("sliding",), sliding=(48,), stride=stride)
    model, ids = tiny.make_model(), tiny.make_ids(1, length)[0]
    scored: dict[int, float] = {}
    for begin in range(0, length, stride):
        nll, _ = naive(model, ids[begin : begin + 48], None)
        for offset, loss in enumerate(nll, start=1):
            scored.setdefault(begin + offset, loss)
        if begin + 48 >= length:
            break
    (row,) = measure(model, [(0, ids)], plan, "base")
    assert row.tokens == len(scored)
    # Every token but the first, and the first of each window where none comes before it.
    assert row.tokens == length - 1 - (stride == 48) * ((length - 1) // 48)
    assert row.nll == pytest.approx(np.mean(list(scored.values())), abs=TOLERANCE)


def test_scale_matters_to_every_protocol() -> None:
    """The negative: beyond the native window an extension changes each protocol."""
    tokens, model = tiny.make_tokens(DOCUMENTS), tiny.make_model()
    rows = evaluate_methods(model, tokens, PLAN, {n: METHODS[n] for n in ("base", "yarn")}, quiet())
    half = len(rows) // 2
    for base, yarn in zip(rows[:half], rows[half:], strict=True):
        assert place(base) == place(yarn) and base.tokens == yarn.tokens
        assert (base.nll == yarn.nll) == (base.length <= tiny.NATIVE)
        assert base.scale == 1 and (yarn.scale > 1) == (yarn.length > tiny.NATIVE)


def test_documents_are_those_of_the_longest_length() -> None:
    tokens = tiny.make_tokens(DOCUMENTS)
    assert select_documents(tokens, PLAN) == [0, 1, 3]
    slides = PerplexityPlan(lengths=(200,), target=1, protocols=("sliding",), sliding=(300,))
    assert select_documents(tokens, slides) == [0, 1, 2, 3]
    rows = evaluate_methods(tiny.make_model(), tokens, slides, {"base": None}, quiet())
    assert rows[0].tokens == sum(DOCUMENTS) - 4  # shorter than the window, and scored whole
    few = PerplexityPlan(
        lengths=(200,), target=1, protocols=("sliding",), sliding=(300,), sliding_tokens=50
    )
    rows = evaluate_methods(tiny.make_model(), tokens, few, {"base": None}, quiet())
    assert rows[0].tokens == 4 * 49
    with pytest.raises(DataError, match="longest usable length is 400"):
        select_documents(tokens, PerplexityPlan(lengths=(500,), target=1))


@pytest.mark.parametrize("protocols", [("window",), ("target",), ("position",), ALL])
def test_work_is_what_is_read(protocols: tuple[str, ...]) -> None:
    """The bar ends at its end; and one protocol alone gives the numbers that it gives in all."""
    plan = PerplexityPlan(
        PLAN.lengths, 15, 2, protocols=protocols, bands=5, sliding=PLAN.sliding, stride=20
    )
    tokens, read = tiny.make_tokens(DOCUMENTS), []
    model = tiny.make_model()
    texts = [(i, torch.tensor(tokens[i]["input_ids"])) for i in (0, 1, 3)]
    rows = measure(model, texts, plan, "base", read.append)
    assert sum(read) == sum(plan.work(len(ids)) for _, ids in texts)
    everything = {place(row): row for row in measure(model, texts, PLAN, "base")}
    for row in rows:
        assert row.nll == pytest.approx(everything[place(row)].nll, abs=1e-6)


def test_windows_and_documents_give_the_same() -> None:
    plan = PerplexityPlan(PLAN.lengths, 15, 2)
    tokens, model = tiny.make_tokens(DOCUMENTS), tiny.make_model()
    whole = evaluate_methods(model, tokens, plan, {"base": None}, quiet())
    windows = cut_windows(tokens, plan)
    assert [number for number, _ in windows] == [0, 0, 1, 3]
    # The pieces of a document need not stand together.
    assert measure(model, [windows[i] for i in (0, 2, 1, 3)], plan, "base") == whole


def test_usual_plan_holds_short_lengths() -> None:
    plan = PerplexityPlan.for_model(64, 8)
    assert plan.lengths == (16, 32, 64, 128, 256, 512)
    assert plan.target == 15 and plan.truncation == 32
    assert PerplexityPlan.for_model(8192, 4).truncation == 4096  # the paper's
    assert PerplexityPlan.for_model(64, 8, protocols=("sliding",), stride=8).sliding == (64, 512)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"protocols": ("windows",)}, "did you mean 'window'"),
        ({"protocols": ()}, "no protocol to measure"),
        ({"protocols": ("sliding",), "stride": 65}, "64 tokens cannot move by 65"),
        ({"protocols": ("sliding",), "stride": 0}, "cannot move by 0"),
        ({"protocols": ("longppl",), "truncation": 512}, "leaves LongPPL no tokens"),
    ],
)
def test_plans_that_make_no_sense(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        PerplexityPlan.for_model(64, 8, **settings)


def test_a_loss_that_is_no_number() -> None:
    model, ids = tiny.make_model(), tiny.make_ids(1, 200, vocab=100)[0]
    ids[20] = 127
    with torch.no_grad():
        model.model.embed_tokens.weight[127] = math.nan
    with pytest.raises(ClexError, match="base: the loss at 32 tokens is not a number"):
        measure(model, [(0, ids)], PLAN, "base")


# Bytes.

TEXT = "Ünïcödé  日本語 😀\n\tthe quick brown fox — “quoted” 🇩🇪 e\u0301nd " * 3


def with_byte_fallback() -> PreTrainedTokenizerFast:
    """A vocabulary as of SentencePiece: ▁ for a space, bytes for what it does not know."""
    pieces = [
        "<unk>",
        *(f"<0x{i:02X}>" for i in range(256)),
        "▁",
        *"abcdefghiknoqruwxt",
        "▁t",
        "th",
    ]
    merges = [("▁", "t"), ("t", "h")]
    tokenizer = Tokenizer(
        models.BPE(
            {p: i for i, p in enumerate(pieces)}, merges, unk_token="<unk>", byte_fallback=True
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize(
    "make",
    [tiny.make_tokenizer, lambda: load_tokenizer("tiny-llama"), with_byte_fallback],
    ids=["bytes", "byte-level", "byte fallback"],
)
def test_bytes_of_tokens(make: Any) -> None:
    tokenizer = make()
    table = token_bytes(tokenizer)
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert table[ids].sum() == len(TEXT.encode())
    # Wherever a text is cut between characters, the sum of the parts is the whole.
    seen = 0
    for count in range(1, len(ids)):
        part = tokenizer.decode(ids[:count], clean_up_tokenization_spaces=False)
        if TEXT.startswith(part):
            seen += 1
            assert table[ids[:count]].sum() == len(part.encode())
    assert seen > 20


def test_bits_per_byte_by_hand() -> None:
    """Loss over the letters that the tokenizer itself says the scored tokens stand for."""
    tokenizer = load_tokenizer("tiny-llama")
    text = "It was a bright day, and the old ship lay in the bay until the wind came up. " * 8
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = torch.tensor(encoded["input_ids"])[:100]
    model = tiny.make_model(vocab_size=4096)
    plan = PerplexityPlan((32, 100), 15)
    rows = measure(model, [(0, ids)], plan, "base", token_bytes=token_bytes(tokenizer))
    for row in rows:
        first = 0 if row.protocol == "window" else 100 - row.length
        nll, _ = naive(model, ids[first : first + row.length], None)
        nll = nll if row.protocol == "window" else nll[-15:]
        start = encoded["offset_mapping"][first + row.length - len(nll)][0]
        stop = encoded["offset_mapping"][first + row.length - 1][1]
        assert row.bits_per_byte == pytest.approx(
            nll.sum() / math.log(2) / (stop - start), rel=1e-5
        )
    assert all(row.bits_per_byte is None for row in measure(model, [(0, ids)], plan, "base"))


# Coming back.


def score(method: str, document: int, nll: float, length: int = 16) -> Score:
    return Score(method, "window", length, 0, 0, document, 1.0, 1, nll, 15, 3, 20)


def test_log_loses_only_what_was_being_written(tmp_path: Path) -> None:
    file = tmp_path / "documents.jsonl"
    log = ScoreLog(file)
    for document in range(3):
        log.add("base", document, [score("base", document, 1.5), score("base", document, 2.5, 32)])
    whole = file.read_bytes()
    assert ScoreLog(file).scores == log.scores
    assert file.read_bytes() == whole
    lines = whole.splitlines(keepends=True)
    # Cut inside the last line, between the two lines of a document, and at nothing.
    for kept in (whole[:-20], b"".join(lines[:5]), b"".join(lines[:4])):
        file.write_bytes(kept)
        again = ScoreLog(file)
        assert [again.has("base", n) for n in range(3)] == [True, True, False]
        assert file.read_bytes() == b"".join(lines[:4])
        again.add("base", 2, [score("base", 2, 1.5), score("base", 2, 2.5, 32)])
        assert file.read_bytes() == whole
    file.write_bytes(whole[:30] + whole[40:])
    with pytest.raises(CheckpointError, match="line 1 is damaged"):
        ScoreLog(file)


@pytest.fixture
def job(tmp_path: Path) -> Any:
    """`clex eval ppl` of a tiny model on four documents; the folder is the argument."""
    with tiny.token_cache(tmp_path / "cache"):
        model = tiny.write_model(tmp_path / "model")
        data = tiny.write_documents(tmp_path / "data.jsonl", [300, 280, 90, 270, 260])
        evaluation = EvalConfig(
            protocols=("window", "target", "position", "sliding", "longppl"), stride=60
        )

        def run(out: str, **changes: Any) -> list[Row]:
            settings: dict[str, Any] = {"max_scale": 4, "evaluation": evaluation, "device": "cpu"}
            settings["console"] = quiet()
            return run_perplexity(
                str(model),
                out=tmp_path / out,
                **{**settings, "data": data, **changes},
            )

        yield run


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_documents_that_are_too_short_are_told(job: Any) -> None:
    told = Console(file=io.StringIO(), width=200)
    job("out", console=told, evaluation=EvalConfig(documents=3, protocols=("window",)))
    said = told.file.getvalue()  # type: ignore[attr-defined]
    assert "reading 3 of 5 documents; shorter than 256 tokens: 1" in said


def test_killed_and_started_again(
    job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job("whole")
    wanted = content(tmp_path / "whole")
    assert {"results.json", "results.csv", "differences.csv", "documents.jsonl"} <= wanted.keys()
    real, read = perplexity.score_document, []

    def counted(*args: Any) -> Any:
        read.append(args[3:5])
        return real(*args)

    def killed(*args: Any) -> Any:
        if len(read) == 6:  # two documents into the second method
            raise KeyboardInterrupt
        return counted(*args)

    with monkeypatch.context() as patch:
        patch.setattr(perplexity, "score_document", killed)
        with pytest.raises(KeyboardInterrupt):
            job("out")
    assert not (tmp_path / "out" / "results.json").exists()
    monkeypatch.setattr(perplexity, "score_document", counted)
    job("out")
    assert len(read) == len(set(read)) == 8, "nothing is measured twice"
    assert content(tmp_path / "out") == wanted
    job("out")
    assert len(read) == 8, "a finished one is only told"
    assert content(tmp_path / "out") == wanted


def test_other_settings_are_refused(job: Any, tmp_path: Path) -> None:
    short = EvalConfig(protocols=("window",), lengths=(32,), documents=2, rivals=("base",))
    job("out", evaluation=short)
    before = content(tmp_path / "out")
    for changes, words in (
        ({"max_scale": 3}, "clex.max_scale"),
        ({"evaluation": EvalConfig(protocols=("target",))}, "evaluation.protocols"),
    ):
        with pytest.raises(OutputError, match=f"other settings .*{words}.*--overwrite"):
            job("out", **{"evaluation": short, **changes})
    assert content(tmp_path / "out") == before
    # Another text under the same name.
    tiny.write_documents(tmp_path / "data.jsonl", [301, 280, 90, 270, 260])
    with pytest.raises(OutputError, match=r"other settings \(text\)"):
        job("out", evaluation=short)
    job("out", evaluation=short, overwrite=True)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years")
    with pytest.raises(OutputError, match="was not written by clex eval ppl"):
        job("thesis", evaluation=short, overwrite=True)


def test_evaluator_of_another_vocabulary(
    job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The judged model reads bytes; tiny-llama reads the same text in its own tokens."""
    monkeypatch.setattr(longppl, "GAIN", 0.2)
    monkeypatch.setattr(longppl, "MOST_LOSS", 4.0)
    evaluation = EvalConfig(lengths=(400, 800), protocols=("longppl",), truncation=40)
    book = tmp_path / "book.txt"
    text = next(read_documents(find_files(assets_folder() / "books" / "test.jsonl.gz")))
    book.write_text(text[5000:6700])
    tiny_llama = dataclasses.replace(evaluation, evaluator="tiny-llama")
    rows = job("out", evaluation=tiny_llama, data=book, max_scale=12.5)
    assert {(row.protocol, row.length) for row in rows} == {("longppl", 400), ("longppl", 800)}
    assert all(0 < row.tokens < 800 for row in rows)


def test_native_evaluator(job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the plain model, never beyond its window, whatever model is measured."""
    monkeypatch.setattr(longppl, "GAIN", 0.01)
    monkeypatch.setattr(longppl, "MOST_LOSS", 9.0)
    evaluation = EvalConfig(
        lengths=(96, 256), protocols=("longppl",), truncation=24, evaluator="native"
    )
    reads: list[int] = []
    find = longppl.find_key_tokens

    def spy(read: Any, ids: Any, truncation: int, window: int | None = None) -> Any:
        def noted(text: Any, last: int) -> Any:
            assert not read.extended
            reads.append(len(text))
            return read(text, last)

        return find(noted, ids, truncation, window)

    monkeypatch.setattr(longppl, "find_key_tokens", spy)
    rows = job("out", evaluation=evaluation)
    assert max(reads) <= 64 < 256
    assert {row.length for row in rows} == {96, 256}


def test_nothing_needs_a_long_context(job: Any) -> None:
    """Random text to a random model: no token is a key token."""
    evaluation = EvalConfig(lengths=(96, 256), protocols=("longppl",), truncation=24)
    with pytest.raises(DataError, match="no key tokens in 4 windows"):
        job("out", evaluation=evaluation)


# What is told.


def test_results_are_plain_and_stable(job: Any, tmp_path: Path) -> None:
    rows = job("out")
    records = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [Row(**record) for record in records] == rows
    assert list(records[0])[:10] == [
        *("method", "length", "protocol", "ppl", "documents", "windows", "tokens", "scale"),
        *("nll", "accuracy"),
    ]
    lines = (tmp_path / "out" / "results.csv").read_text().splitlines()
    assert lines[0] == ",".join(records[0]) and len(lines) == len(rows) + 1
    log = ScoreLog(tmp_path / "out" / "documents.jsonl")
    assert rows_of(log.scores) == rows
    for row in rows:
        assert row.ci_low is not None and row.ci_high is not None
        assert row.ci_low <= row.ppl <= row.ci_high


def test_differences_are_of_the_same_tokens() -> None:
    scores = [
        *(score("base", n, 30 + n) for n in range(5)),
        *(score("yarn", n, 27 + n) for n in range(4)),
    ]
    (pair,) = differences(scores)
    assert (pair.method, pair.against, pair.documents) == ("yarn", "base", 4)
    # 3 nats less in each document of 15 tokens, so that no resample differs.
    assert pair.change == pytest.approx(math.expm1(-3 / 15))
    assert pair.ci_low == pytest.approx(pair.change) and pair.ci_high == pytest.approx(pair.change)


def text_of(part: Any) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(part)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_short_texts_before_and_after() -> None:
    tokens, model = tiny.make_tokens([300, 256]), tiny.make_model()
    plan = PerplexityPlan.for_model(64, 4)
    rows = evaluate_methods(model, tokens, plan, {"base": None}, quiet())
    clex.extend(model, ClexConfig(max_scale=4))
    rows += evaluate_extended(model, tokens, plan, console=quiet())
    told = text_of(retention_table(rows, 64))
    assert told.count("+0.00%") == 3  # t = 1 is the plain model
    assert "128" not in told
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    worse = evaluate_extended(model, tokens, plan, "worse", quiet())
    told = text_of(retention_table([*rows, *worse], 64))
    old, new = (next(r for r in part if r.length == 16) for part in (rows, worse))
    assert f"{new.ppl / old.ppl - 1:+.2%}" in told
    assert any("short texts" in text_of(part) for part in tables([*rows, *worse], 64))
