"""Length classes without any engine: who gets which, and the stacked table."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from clex.errors import ConfigError
from clex.serving.length_classes import LengthClasses, require_scale, shift_positions

CLASSES = LengthClasses(
    native_length=64,
    scales=(1.0, 1.5, 4.0),
    inv_freq=((1.0, 0.1), (0.9, 0.05), (0.8, 0.01)),
    attention_factors=(1.0, 1.05, 1.2),
)


def test_lengths_and_offsets() -> None:
    assert CLASSES.lengths == (64, 96, 256)
    assert CLASSES.offsets == (0, 64, 160)
    assert CLASSES.rotary_dim == 4


@pytest.mark.parametrize(
    ("prompt", "new", "wanted", "index"),
    [
        (1, 1, None, 0),
        (32, 32, None, 0),
        (32, 33, None, 1),
        (95, 1, None, 1),
        (96, 1, None, 2),
        (200, 900, None, 2),
        (None, 1, None, 2),
        (10, None, None, 2),
        (10, 10, 1, 0),
        (10, 10, 1.2, 1),
        (10, 10, 1.5, 1),
        (10, 10, 3, 2),
        (10, 10, 50, 2),
        (90, 1, 1, 1),
        (10, 10, "4", 0),
        (10, 10, 0.2, 0),
        (10, 10, float("nan"), 0),
    ],
)
def test_the_shortest_class_that_holds_a_request(
    prompt: int | None, new: int | None, wanted: Any, index: int
) -> None:
    assert CLASSES.choose(prompt, new, wanted) == index


@pytest.mark.parametrize("value", [0.9, "2", None, float("inf"), [2]])
def test_a_wish_that_is_no_scale(value: Any) -> None:
    with pytest.raises(ConfigError, match="clex_scale must be a number of at least 1"):
        require_scale(value)


def test_the_stacked_table() -> None:
    table = CLASSES.cos_sin()
    assert table.shape == (416, 4) and table.dtype == torch.float32
    for offset, length, inv_freq, factor in zip(
        CLASSES.offsets, CLASSES.lengths, CLASSES.inv_freq, CLASSES.attention_factors, strict=True
    ):
        angles = np.arange(length)[:, None] * np.array(inv_freq)
        wanted = factor * np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
        np.testing.assert_allclose(table[offset : offset + length], wanted, atol=2e-5)


def test_each_token_is_sent_into_the_class_of_its_request() -> None:
    # Three requests of 1, 3 and 2 tokens; rows beyond them and the padding hold leftovers.
    starts = torch.tensor([0, 1, 4, 6], dtype=torch.int32)
    offsets = torch.tensor([64, 0, 160, 160, 64])
    positions = torch.tensor([5, 0, 1, 2, 30, 31, 255, 255])
    out = torch.zeros(8, dtype=torch.int64)
    found = shift_positions(positions, starts, offsets, 416, out)
    assert found is out
    assert found.tolist()[:6] == [69, 0, 1, 2, 190, 191]
    assert found.max() < 416


def test_padding_after_a_full_batch_stays_inside_the_table() -> None:
    starts, offsets = torch.tensor([0, 1, 1, 1]), torch.tensor([0, 160, 160])
    positions = torch.tensor([3, 400, 400])
    found = shift_positions(positions, starts, offsets, 416, torch.zeros(3, dtype=torch.int64))
    assert found.tolist() == [3, 415, 415]


def test_through_json() -> None:
    assert LengthClasses.from_dict(json.loads(json.dumps(CLASSES.to_dict()))) == CLASSES


@pytest.mark.parametrize(
    "damage",
    [
        {"scales": None},
        {"inv_freq": [[1.0]]},
        {"attention_factors": "x"},
        {"scales": [], "inv_freq": [], "attention_factors": []},
    ],
)
def test_damaged_settings_are_refused(damage: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="is damaged"):
        LengthClasses.from_dict({**CLASSES.to_dict(), **damage})
    with pytest.raises(ConfigError, match="is damaged"):
        LengthClasses.from_dict({})
