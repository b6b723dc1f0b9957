"""The models and books that come with the package: real ones, so real claims can be checked."""

import json
import lzma
import math
from pathlib import Path

import pytest
import torch

import clex
from clex import demo
from clex.config import ClexConfig
from clex.data import load_tokens, read_documents
from clex.evaluation.perplexity import (
    PerplexityPlan,
    cut_windows,
    evaluate_methods,
    measure,
)
from clex.hf.loss import TokenLoss
from clex.hf.models import assets_folder, load_base, load_tokenizer
from clex.run import EvalConfig, run_extend
from clex.training import TrainConfig

BOOKS = assets_folder() / "books"
NAMES = ("tiny-llama", "tiny-neox")


@pytest.mark.parametrize("name", NAMES)
def test_beats_compression(name: str) -> None:
    """Bits per byte on unseen text, from 255 tokens of context at most, below those of xz -9."""
    model, tokenizer = load_base(name), load_tokenizer(name)
    text = next(read_documents([BOOKS / "test.jsonl.gz"]))[:60_000]
    ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]
    rows = ids[: len(ids) // 256 * 256].view(-1, 256)
    with torch.no_grad():
        losses, _ = TokenLoss(model)(model, rows)
    scored = tokenizer.batch_decode(rows[:, 1:])
    size = sum(len(part.encode()) for part in scored)
    bits = losses.double().sum().item() / math.log(2) / size
    # xz sees the whole text at once; 60,000 letters are short for it, the full set gives 2.24.
    packed = 8 * len(lzma.compress(text.encode(), preset=9)) / len(text.encode())
    assert bits < 1.9 < packed, (bits, packed)


@pytest.mark.parametrize("name", NAMES)
def test_recorded_numbers(name: str) -> None:
    """The card's claim: bits per byte below the best baseline, a 5-gram of the same tokens."""
    record = json.loads((assets_folder() / name / "training.json").read_text())
    assert record["validation"]["bits_per_byte"] < 1.745
    assert (assets_folder() / name / "model.safetensors").stat().st_size <= 16 * 2**20
    assert load_base(name).config.max_position_embeddings == 256


@pytest.mark.parametrize("name", NAMES)
def test_window_breaks_and_is_mended(name: str) -> None:
    """Four times the window: the plain model collapses, an untrained extension does not."""
    model = load_base(name)
    tokens = load_tokens(BOOKS / "test.jsonl.gz", load_tokenizer(name))
    plan = PerplexityPlan(lengths=(256, 1024), target=63, windows=1, documents=3)
    methods = {"base": None, "yarn": ClexConfig(method="yarn"), "clex": ClexConfig(base="yarn")}
    rows = evaluate_methods(model, tokens, plan, methods)
    ppl = {(r.method, r.length): r.ppl for r in rows if r.protocol == "target"}
    assert ppl["base", 1024] > 3 * ppl["base", 256]
    for method in ("yarn", "clex"):
        assert ppl[method, 256] == ppl["base", 256]  # t = 1 is the plain model
        assert ppl[method, 1024] < 1.3 * ppl[method, 256]


def test_neox_from_end_to_end(tmp_path: Path) -> None:
    """The whole job on partial rotary; fitted dynamics come back from disk unchanged."""
    rows = run_extend(
        "tiny-neox",
        BOOKS / "train.jsonl.gz",
        tmp_path / "out",
        clex=ClexConfig(max_scale=4),
        training=TrainConfig(depth="dynamics", steps=6),
        evaluation=EvalConfig(lengths=(256, 1024), documents=2),
        eval_data=BOOKS / "test.jsonl.gz",
        choose_start=True,
        device="cpu",
    )
    ppl = {(r.method, r.length, r.protocol): r.ppl for r in rows}
    assert ppl["clex", 256, "window"] == ppl["base", 256, "window"]
    assert ppl["clex", 1024, "target"] < 0.5 * ppl["base", 1024, "target"]
    model = clex.load(tmp_path / "out")
    moved = clex.frequencies(model, 4.0) / clex.frequencies(model, 1.0)
    assert isinstance(moved, torch.Tensor)
    assert moved.shape == (16,)
    assert (moved[1:] < 1).any()
    tokens = load_tokens(BOOKS / "test.jsonl.gz", load_tokenizer("tiny-neox"))
    plan = PerplexityPlan(lengths=(256, 1024), target=63, documents=2)
    again = measure(model, cut_windows(tokens, plan), plan, "clex")
    assert [row.ppl for row in again] == pytest.approx(
        [ppl[row.method, row.length, row.protocol] for row in again], rel=1e-6
    )


def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both stages, table, picture and sample, with less training; again it only tells."""
    monkeypatch.setattr(demo, "STEPS", 1)
    monkeypatch.setattr(demo, "WINDOWS", 1)
    demo.run_demo(tmp_path / "demo")
    rows = json.loads((tmp_path / "demo" / "results.json").read_text())
    names = ["base", "yarn", "clex, dynamics", "clex, full"]
    assert list(dict.fromkeys(row["method"] for row in rows)) == names
    assert {row["length"] for row in rows} == {64, 128, 256, 512, 1024, 2048}
    assert (tmp_path / "demo" / "perplexity.png").stat().st_size > 10_000
    before = (tmp_path / "demo" / "full" / "model.safetensors").stat().st_mtime_ns
    demo.run_demo(tmp_path / "demo")
    assert (tmp_path / "demo" / "full" / "model.safetensors").stat().st_mtime_ns == before
