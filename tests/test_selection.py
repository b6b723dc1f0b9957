"""The step of a fit that is kept, against a naive loss and scripted ones."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

import clex
import tiny
from clex.config import ClexConfig
from clex.data import WindowPlan, Windows
from clex.errors import CheckpointError, TrainingError
from clex.hf.checkpoint import extension_state
from clex.hf.extend import at_scale
from clex.selection import SELECTION_FILE, Selection, long_windows
from clex.training import TrainConfig, make_trainer, train

TOKENS = tiny.make_tokens([300, 280, 270, 260])
PLAN = WindowPlan(tokens=None, native_length=tiny.NATIVE, min_scale=1, max_scale=4, margin=1 / 32)


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def make() -> Any:
    torch.manual_seed(0)
    return clex.extend(tiny.make_model("llama"), ClexConfig(max_scale=4, steps=4))


def fit(folder: Path, **settings: Any) -> tuple[dict[str, Tensor], str]:
    """The learned numbers after six steps, and what was told."""
    told = Console(file=io.StringIO(), width=200)
    config = TrainConfig(**{"steps": 6, "save_every": 2, "dynamics_rate": 1e-2, **settings})
    model = train(make(), TOKENS, config, folder, console=told)
    return extension_state(model), told.file.getvalue()  # type: ignore[attr-defined]


def script(monkeypatch: pytest.MonkeyPatch, losses: list[float]) -> list[dict[str, Tensor]]:
    """Give the looks these losses; returns the numbers that each look saw."""
    seen: list[dict[str, Tensor]] = []

    def loss(self: Selection) -> float:
        state = extension_state(self.trainer.extended)
        seen.append({name: tensor.clone() for name, tensor in state.items()})
        return losses[len(seen) - 1]

    monkeypatch.setattr(Selection, "_loss", loss)
    return seen


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("best", [0, 3, 6])
def test_keeps_the_best_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, best: int) -> None:
    losses = [5.0] * 7
    losses[best] = 4.0
    seen = script(monkeypatch, losses)
    kept, told = fit(tmp_path)
    assert [k for k in range(7) if equal(kept, seen[k])] == [best]
    assert ("no step reads them better" in told) == (best == 0)
    assert ("keeping step" in told) == (best != 0)
    record = json.loads((tmp_path / SELECTION_FILE).read_text())
    assert record["kept"] == best
    assert record["losses"] == {str(k): loss for k, loss in enumerate(losses)}
    # What is saved is what is kept.
    fresh = clex.load(tmp_path, tiny.make_model("llama"))
    assert equal(extension_state(fresh), kept)
    # Only the numbers of one step lie beside the checkpoints.
    assert len(list((tmp_path / "checkpoints").glob("selected-*"))) == 1


def test_without_windows_the_last_step_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = script(monkeypatch, [4.0] + [5.0] * 6)
    start, _ = fit(tmp_path / "with")
    assert equal(start, seen[0])
    last, told = fit(tmp_path / "without", select_windows=0)
    assert equal(last, seen[6])
    assert not (tmp_path / "without" / SELECTION_FILE).exists()
    assert "long windows" not in told


def test_loss_is_that_of_the_tokens_beyond_the_window(tmp_path: Path) -> None:
    model = make()
    trainer = make_trainer(model, TOKENS, TrainConfig(select_windows=3), tmp_path)
    assert trainer.selection is not None
    # Away from the start, where all scales with one start would be alike.
    with torch.no_grad():
        for parameter in trainer.extended.parameters():
            if parameter.requires_grad:
                parameter += 0.3
    wanted = []
    for batch in long_windows(TOKENS, PLAN, 3, seed=0):
        ids = batch["input_ids"]
        with torch.no_grad(), at_scale(trainer.extended, batch["scale"]):
            logits = trainer.extended(ids).logits[0, :-1].double()
        losses = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
        # Half of the weight is on all that lies beyond the native window, half on its end.
        new, end = losses[tiny.NATIVE - 1 :], losses[-tiny.NATIVE // 2 :]
        wanted.append((new.mean() / 2 + end.mean() / 2).item())
    assert trainer.selection._loss() == pytest.approx(sum(wanted) / 3, abs=1e-5)


def test_windows_reach_the_largest_scale_and_lie_apart() -> None:
    batches = long_windows(TOKENS, PLAN, 3, seed=0)
    assert [batch["scale"].item() for batch in batches] == [2, 3, 4]
    assert [batch["input_ids"].shape[1] for batch in batches] == [132, 198, 264]
    training = Windows(TOKENS, PLAN, 200, seed=0)
    seeds = {training[k]["seed"] for k in range(200)}
    assert seeds.isdisjoint(batch["seed"].item() for batch in batches)


def test_released_scales_stay_whole() -> None:
    plan = WindowPlan(
        tokens=None, native_length=tiny.NATIVE, min_scale=1, max_scale=4, integer_scales=True
    )
    batches = long_windows(TOKENS, plan, 5, seed=0)
    assert [batch["scale"].item() for batch in batches] == [1, 2, 2, 3, 4]


def test_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = [5.0, 4.0, 6.0, 7.0, 6.5, 6.5, 4.5]
    script(monkeypatch, losses)
    whole, _ = fit(tmp_path / "whole")
    calls = script(monkeypatch, [*losses[:4], RuntimeError("killed")])  # type: ignore[list-item]
    real = Selection._loss

    def killed(self: Selection) -> float:
        loss = real(self)
        if isinstance(loss, Exception):
            raise loss
        return loss

    monkeypatch.setattr(Selection, "_loss", killed)
    with pytest.raises(RuntimeError, match="killed"):
        fit(tmp_path / "cut")
    assert len(calls) == 5
    # The look of step 4 comes before its checkpoint, so the run goes on from that of step 2.
    script(monkeypatch, losses[-4:])
    again, _ = fit(tmp_path / "cut")
    assert equal(again, whole)
    records = [json.loads((tmp_path / d / SELECTION_FILE).read_text()) for d in ("whole", "cut")]
    assert records[0] == records[1]
    assert records[0]["kept"] == 1


def test_a_loss_that_is_no_number_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(monkeypatch, [5.0, 4.0, 4.5, float("nan")])
    with pytest.raises(TrainingError, match=r"not a number at step 3; .*checkpoint-2"):
        fit(tmp_path)


def test_damaged_numbers_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(monkeypatch, [4.0] + [5.0] * 6)
    fit(tmp_path)
    file = tmp_path / "checkpoints" / "selected-0.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="selected-0"):
        fit(tmp_path)
