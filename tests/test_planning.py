"""`clex plan`: what it counts is what a model has, and its advice follows from the numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from benchmarks.scaling import planned
from typer.testing import CliRunner

import tiny
from clex.cli import app
from clex.errors import ConfigError
from clex.hf.skeleton import skeleton_of
from clex.plan_report import advice, plan_for
from clex.planning import GB, H100, Estimate, Layout, Sizes, best, estimate, layouts
from clex.shapes import SHAPES, shape


@pytest.mark.parametrize("name", SHAPES)
def test_weights_are_those_of_the_model(name: str) -> None:
    model: Any = skeleton_of(shape(name))
    model.tie_weights()
    count = sum(p.numel() for p in model.parameters())
    assert Sizes.of(shape(name)).weights == count


def test_published_sizes() -> None:
    billions = {name: Sizes.of(shape(name)).weights / 1e9 for name in SHAPES}
    assert billions == pytest.approx(
        {"smollm2-135m": 0.1345, "llama-1b": 1.2358, "llama-8b": 8.0303, "llama-70b": 70.554},
        rel=1e-3,
    )


def of(
    layout: Layout, length: int = 65536, depth: str = "full", name: str = "llama-8b"
) -> Estimate:
    return estimate(Sizes.of(shape(name)), length, depth, layout)


def test_arithmetic_by_hand() -> None:
    """A step of one window of 8,192 tokens on the 1B shape, with every weight trained."""
    e = of(Layout(checkpointing=False), 8192, name="llama-1b")
    layers = 16 * (2048 * (2 * 2048 + 2 * 512 + 3 * 8192) + 2 * 2048)
    head = 2048 * 128256
    assert e.linear_flops == pytest.approx(8192 * (6 * layers + 8 * head))
    assert e.attention_flops == pytest.approx(3.5 * 2 * 8192**2 * 2048 * 16)
    assert e.optimizer == 8 * Sizes.of(shape("llama-1b")).weights
    again = of(Layout(checkpointing=True), 8192, name="llama-1b")
    assert again.linear_flops - e.linear_flops == pytest.approx(8192 * 2 * layers)
    assert again.activations < e.activations / 4


@pytest.mark.parametrize("depth", ["dynamics", "lora"])
def test_frozen_weights_need_no_optimizer(depth: str) -> None:
    layout, full = Layout(), of(Layout())
    frozen = of(layout, depth=depth)
    assert frozen.weights < full.weights / 2
    assert frozen.optimizer < full.optimizer / 50
    assert frozen.linear_flops < 0.8 * full.linear_flops
    assert frozen.attention_flops == full.attention_flops


def test_cutting_divides() -> None:
    whole = of(Layout(gpus=8, sharded=True), 2**20)
    pieces = of(Layout(gpus=8, pieces=8, sharded=True), 2**20)
    assert pieces.activations == pytest.approx(whole.activations / 8)
    assert pieces.tokens == whole.tokens / 8
    assert pieces.attention_flops == pytest.approx(whole.attention_flops / 8)
    assert pieces.optimizer == whole.optimizer == pytest.approx(of(Layout()).optimizer / 8)
    assert pieces.communication > whole.communication
    assert of(Layout(gpus=8)).optimizer == of(Layout()).optimizer


def test_layouts_can_be_run() -> None:
    for layout in layouts(8, 1000):
        assert 1000 % (2 * layout.pieces) == 0 or layout.pieces == 1
        assert layout.gpus % layout.pieces == 0
    assert {layout.pieces for layout in layouts(8, 4096)} == {1, 2, 4, 8}
    assert all(not layout.sharded and layout.pieces == 1 for layout in layouts(1, 4096))


def test_advice() -> None:
    text = advice(plan_for("llama-8b", 65536, 8, "full"), tokens=1e9)
    assert text.startswith("take: FSDP2")
    assert "hours" in text
    assert "sharding" not in advice(plan_for("llama-8b", 32768, 1, "lora"))
    none = advice(plan_for("llama-70b", 8192, 1, "full"))
    assert none.startswith("nothing fits")
    assert "weights and optimiser are most of it" in none
    long = advice(plan_for("llama-8b", 2**21, 8, "full"))
    assert "activations are most of it" in long


def test_best_is_the_fastest_that_fits() -> None:
    found = plan_for("llama-8b", 65536, 8, "full")
    chosen = best(found)
    assert chosen is not None and chosen.fits and chosen.memory < 79 * GB
    assert all(e.tokens_per_second <= chosen.tokens_per_second / 0.97 for e in found if e.fits)
    assert best([e for e in found if not e.fits]) is None


# What was measured.

RESULTS = Path(__file__).parents[1] / "benchmarks/results/2026-11-25-2xh100-scaling.json"
MEASURED = {
    row["case"]: row
    for row in json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]
    if row["shape"] in SHAPES
}


def test_every_engine_was_measured() -> None:
    assert len(MEASURED) == 12
    assert {row["engine"] for row in MEASURED.values()} == {"one", "ddp", "fsdp2", "cp"}
    assert {row["depth"] for row in MEASURED.values()} == {"full", "lora"}


@pytest.mark.parametrize("case", MEASURED)
def test_predictions_hold(case: str) -> None:
    """The speeds were fitted to the cases of one GPU; those of two are predictions."""
    row = MEASURED[case]
    plan = planned(row)
    assert plan.tokens == row["tokens_per_step"]
    assert plan.seconds == pytest.approx(row["step_seconds"], rel=0.10)
    assert plan.allocated == pytest.approx(row["peak_bytes"], rel=0.05)


def test_speeds_are_below_those_of_the_card() -> None:
    assert 0.3 < H100.matmul / 989e12 < 0.75
    assert 0.3 < H100.attention / 989e12 < 0.75
    assert 0.5 < H100.elementwise / 3.35e12 < 0.95


# The command.


def run(*args: str) -> Any:
    return CliRunner().invoke(app, ["plan", *args])


def test_command(tmp_path: Path) -> None:
    model = tiny.write_model(tmp_path / "model")
    for name in ("llama-1b", str(model), str(model / "config.json")):
        result = run(name, "--length", "4096", "--json")
        assert result.exit_code == 0, result.output
        rows = json.loads(result.output)
        assert len(rows) == 2
        assert rows[0]["memory"] > rows[0]["allocated"] > rows[0]["weights"] > 0
    assert "take:" in run("llama-1b", "--length", "4096", "--gpus", "2").output


@pytest.mark.parametrize("length", ["64", "1048576"])
def test_tables_fit_eighty_columns(monkeypatch: pytest.MonkeyPatch, length: str) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    output = run("llama-70b", "--length", length, "--gpus", "16").output
    advice = ("take", "time of", "nothing")
    lines = [line for line in output.splitlines() if not line.startswith(advice)]
    assert max(map(len, lines)) <= 80
    assert "\u2026" not in output  # nothing is cut short
    words = set(output.split())
    names = "weights gradients optimizer activations logits allocated fits PFLOPs s/step tokens/s"
    assert {*names.split(), "FSDP2,", "pieces,", "recomputing"} <= words
    assert sum(line.lstrip().startswith(("DDP", "FSDP2")) for line in lines) == 2 * len(
        plan_for("llama-70b", int(length), 16, "full")
    )


def test_feed_forward_without_a_gate() -> None:
    model: Any = tiny.make_model("gpt_neox")
    sizes = Sizes.of(model.config)
    assert sizes.products == 2
    count = sum(p.numel() for p in model.parameters())
    assert sizes.weights == pytest.approx(count, rel=0.05)  # biases are not counted


def test_experts_are_refused() -> None:
    sizes = {**tiny.GROUPED, "num_local_experts": 4}
    with pytest.raises(ConfigError, match="cannot plan for 'mixtral'"):
        Sizes.of(transformers.MixtralConfig(**sizes))


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("llama-2b", "--length", "4096"), "llama-2b"),
        (("llama-1b", "--length", "0"), "length must be at least 1"),
        (("llama-1b", "--length", "64", "--gpus", "0"), "gpus must be at least 1"),
        (("llama-1b", "--length", "64", "--lora-rank", "0"), "LoRA rank must be at least 1"),
        (("llama-1b", "--length", "64", "--tokens", "nan"), "tokens must be a positive number"),
    ],
)
def test_bad_input(args: tuple[str, ...], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        raise run(*args).exception or AssertionError("no error")
