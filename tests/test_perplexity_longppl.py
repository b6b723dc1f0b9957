"""LongPPL against a second reading of its definition, and key tokens that are there."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor

import clex
import tiny
from clex.config import ClexConfig
from clex.errors import CheckpointError, ConfigError
from clex.evaluation.longppl import Evaluator, find_key_tokens, key_tokens_of, local_losses
from clex.evaluation.perplexity import PerplexityPlan, Reader, evaluate_methods

TRUNCATION = 32
LENGTH = 160
PLAN = PerplexityPlan((64, LENGTH), 15, 2, protocols=("window", "longppl"), truncation=TRUNCATION)
# Sums of float32 logits in another order.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def evaluator() -> Any:
    """A model that is sure of itself."""
    model = tiny.make_model(max_position_embeddings=LENGTH)
    with torch.no_grad():
        model.lm_head.weight.mul_(6)
    return model


@pytest.fixture(scope="module")
def tokens(evaluator: Any) -> datasets.Dataset:
    """Texts that the evaluator continues with its first choice from everything before."""
    rows = []
    for seed, length in enumerate((LENGTH, 2 * LENGTH + 20, 100)):
        ids = tiny.make_ids(1, 8, seed)
        while ids.shape[1] < length:
            best = tiny.logits(evaluator, ids[:, -LENGTH:])[:, -1].argmax(-1)
            # Some tokens that nothing can foresee.
            other = tiny.make_ids(1, 1, 1000 * seed + ids.shape[1])[0]
            ids = torch.cat([ids, (other if ids.shape[1] % 4 == 0 else best)[None]], dim=1)
        rows.append(ids[0].tolist())
    return datasets.Dataset.from_dict({"input_ids": rows, "length": [len(r) for r in rows]})


def losses(model: Any, ids: Tensor) -> np.ndarray:
    """Loss of token p at p, from all logits at once in float64; nan at 0."""
    table = tiny.logits(model, ids[None])[0].double().log_softmax(-1).numpy()
    return np.array([np.nan, *(-table[p - 1, ids[p]] for p in range(1, len(ids)))])


def naive(model: Any, ids: Tensor) -> tuple[np.ndarray, list[int]]:
    """Short losses of the tokens from K on, one token at a time, and the key tokens."""
    long = losses(model, ids)
    short, keys = [], []
    for p in range(TRUNCATION, len(ids)):
        start = (p - TRUNCATION) // (TRUNCATION // 4) * (TRUNCATION // 4)
        assert TRUNCATION <= p - start < 1.25 * TRUNCATION
        short.append(losses(model, ids[start : p + 1])[-1])
        if short[-1] - long[p] > 2 and long[p] < 2:
            keys.append(p)
    return np.array(short), keys


def test_key_tokens(evaluator: Any, tokens: datasets.Dataset) -> None:
    ids = torch.tensor(tokens[0]["input_ids"])
    wanted, keys = naive(evaluator, ids)
    read = Reader(evaluator)
    ours = local_losses(read, ids, TRUNCATION)
    assert np.abs(ours.numpy() - wanted).max() < TOLERANCE
    assert find_key_tokens(read, ids, TRUNCATION).tolist() == keys
    assert 5 < len(keys) < LENGTH - TRUNCATION - 5


def test_key_tokens_of_a_short_window(evaluator: Any, tokens: datasets.Dataset) -> None:
    """Token by token: the long context is never longer than the window, and differs from all."""
    ids, window = torch.tensor(tokens[0]["input_ids"]), 80
    context, step = 64, 16
    short, keys = naive(evaluator, ids)[0], []
    for p in range(TRUNCATION, LENGTH):
        start = max(0, (p - context) // step * step)
        long = losses(evaluator, ids[start : p + 1])[-1]
        assert p - start < window and (start == 0 or p - start >= context)
        if short[p - TRUNCATION] - long > 2 and long < 2:
            keys.append(p)
    read = Reader(evaluator)
    found = find_key_tokens(read, ids, TRUNCATION, window).tolist()
    assert found == keys
    everything = find_key_tokens(read, ids, TRUNCATION)
    assert found != everything.tolist()
    assert find_key_tokens(read, ids, TRUNCATION, LENGTH).equal(everything)
    kept = key_tokens_of(Evaluator(evaluator, window=window), tokens, PLAN)
    assert kept[0, 0].tolist() == keys
    with pytest.raises(ConfigError, match=r"truncation 32 .* reads 40 tokens \(valid: 2 to 31\)"):
        find_key_tokens(read, ids, TRUNCATION, 40)


def test_longppl_of_another_model(evaluator: Any, tokens: datasets.Dataset) -> None:
    """The judged model is not the evaluator; lengths above K only; all windows."""
    judged = tiny.make_model(seed=3)
    console = Console(file=io.StringIO())
    found = key_tokens_of(Evaluator(evaluator), tokens, PLAN, console=console)
    assert list(found) == [(0, 0), (1, 0), (1, 1)]
    methods = {"base": None, "yarn": ClexConfig(method="yarn", max_scale=4)}
    rows = evaluate_methods(judged, tokens, PLAN, methods, console, key_tokens=found)
    texts = {
        (document, k): torch.tensor(tokens[document]["input_ids"])[LENGTH * k : LENGTH * (k + 1)]
        for document, k in found
    }
    by_hand = {place: naive(evaluator, ids)[1] for place, ids in texts.items()}
    for row in [row for row in rows if row.protocol == "longppl"]:
        wanted = []
        for place, ids in texts.items():
            keys = [p for p in by_hand[place] if p < row.length]
            if row.method == "yarn":
                clex.extend(judged, methods["yarn"])
                with clex.at_scale(judged, row.scale):
                    full = losses(judged, ids[: row.length])
                clex.restore(judged)
            else:
                full = losses(judged, ids[: row.length])
            wanted += [full[p] for p in keys]
        assert row.tokens == len(wanted) > 3
        assert row.nll == pytest.approx(np.mean(wanted), abs=TOLERANCE)
        assert row.ppl == pytest.approx(math.exp(np.mean(wanted)), rel=1e-3)
        window = next(
            r
            for r in rows
            if (r.protocol, r.length, r.method) == ("window", row.length, row.method)
        )
        assert abs(window.nll - row.nll) > 0.01, "key tokens are not all tokens"
    assert {(r.method, r.length) for r in rows if r.protocol == "longppl"} == {
        (method, length) for method in methods for length in PLAN.lengths
    }


def test_key_tokens_are_kept(
    evaluator: Any, tokens: datasets.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, console = tmp_path / "key_tokens.json", Console(file=io.StringIO())
    first = key_tokens_of(Evaluator(evaluator), tokens, PLAN, file, console)

    def unused(*_: Any) -> Any:
        raise AssertionError("found already")

    with monkeypatch.context() as patch:
        patch.setattr(Reader, "__call__", unused)
        again = key_tokens_of(Evaluator(evaluator), tokens, PLAN, file, console)
    assert again.keys() == first.keys()
    assert all(torch.equal(again[key], first[key]) for key in first)
    file.write_text("[{}]")
    with pytest.raises(CheckpointError, match=r"key_tokens\.json is damaged"):
        key_tokens_of(Evaluator(evaluator), tokens, PLAN, file, console)
