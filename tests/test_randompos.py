"""RandomPos as a baseline: plain frequencies, random positions in training, ordinary ones later.

(Ruoss et al. 2023, arXiv 2305.16843, in the form that the CLEX paper compares with.) It needs no
code of its own: method ``none`` with the sampler ``random``, all weights trained.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

import clex
import tiny
from clex import training
from clex.evaluation.perplexity import PerplexityPlan, evaluate_extended, evaluate_methods
from clex.hf.rotary import ScaledRope
from clex.training import TrainConfig

MAX_SCALE = 4
CONFIG = clex.ClexConfig(method="none", positions="random", max_scale=MAX_SCALE)
# Every window over the whole range, none with plain positions: both differ from our defaults.
TRAINING = TrainConfig(
    depth="full", steps=3, rate=1e-3, min_scale=MAX_SCALE, max_scale=MAX_SCALE, native_share=0.0
)


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[Tensor]]:
    """A model after three steps, and the positions of its training windows."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    seen: list[Tensor] = []
    hold = ScaledRope.hold

    def watched(
        self: ScaledRope, scale: Any, positions: Tensor | None = None, **settings: Any
    ) -> Any:
        if positions is not None:
            seen.append(positions.clone())
        return hold(self, scale, positions, **settings)

    monkeypatch.setattr(ScaledRope, "hold", watched)
    model = clex.extend(tiny.make_model(), CONFIG)
    tokens = tiny.make_tokens([300, 280])
    console = Console(file=io.StringIO())
    return training.train(model, tokens, TRAINING, tmp_path / "out", console=console), seen


def test_positions_are_random_over_the_whole_range(trained: tuple[Any, list[Tensor]]) -> None:
    _, seen = trained
    assert len(seen) == 3
    for positions in seen:
        assert positions.shape == (1, tiny.NATIVE)
        assert (positions == positions.round()).all() and (positions.diff() >= 1).all()
        # A quarter farther than the range, the default `span_margin`.
        assert positions.min() == 0 and positions.max() == 1.25 * MAX_SCALE * tiny.NATIVE - 1
        assert positions.diff().max() > 2, "not evenly spread"
    assert not torch.equal(seen[0], seen[1])


def test_a_trained_model_is_plain(trained: tuple[Any, list[Tensor]], tmp_path: Path) -> None:
    """All that is left of the method is in the weights: ordinary positions, plain frequencies."""
    model, _ = trained
    ids = tiny.make_ids(1, 200)
    before = tiny.logits(tiny.make_model(), ids)
    extended = tiny.logits(model, ids)
    assert not torch.allclose(extended, before, atol=1e-3), "it has learned something"
    loaded = clex.load(tmp_path / "out")
    assert torch.equal(tiny.logits(loaded, ids), extended)
    plan = PerplexityPlan((64, 256), target=15)
    tokens = tiny.make_tokens([256])
    rows = evaluate_extended(model, tokens, plan)
    plain = clex.restore(model)
    assert torch.equal(tiny.logits(plain, ids), extended)
    base = evaluate_methods(plain, tokens, plan, {"base": None})
    assert [row.nll for row in rows] == [row.nll for row in base]


def test_positions_enter_the_loss() -> None:
    """The negative: with positions of its own a window has another loss."""
    model, ids = clex.extend(tiny.make_model(), CONFIG), tiny.make_ids(1, tiny.NATIVE)
    ordinary = tiny.logits(model, ids)
    drawn = training.sample_positions(
        "random", tiny.NATIVE, torch.tensor([4.0]), torch.tensor([0]), tiny.NATIVE
    )
    with clex.at_scale(model, 4.0, drawn):
        assert not torch.allclose(tiny.logits(model, ids), ordinary, atol=1e-2)
