"""The method that docs/adding_a_method.md shows is a method."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import clex
import tiny
from clex import ClexConfig, get_scaling
from clex.catalogue import method_rows
from clex.scaling import base, scaling_methods
from references import Shape, assert_close, assert_same_bits, make_spec

DOCS = Path(__file__).parent.parent / "docs"
SHAPE = Shape(head_dim=64, theta=1e4, native_length=2048)
SCALES = torch.tensor([1.0, 1.3, 2.0, 4.0, 7.7, 16.0])


def code_blocks(name: str) -> list[str]:
    text = (DOCS / name).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture
def graded() -> Iterator[Any]:
    """The example of adding_a_method.md, registered for the time of a test."""
    (code,) = code_blocks("adding_a_method.md")
    scaling_methods()
    before = set(base._REGISTRY)
    # As the file it says it is, so that its relative import works.
    names = {"__name__": "clex.scaling.graded", "__package__": "clex.scaling"}
    try:
        exec(compile(code, "adding_a_method.md", "exec"), names)
        yield names["Graded"]
    finally:
        for name in set(base._REGISTRY) - before:
            del base._REGISTRY[name]


def test_the_example_is_short() -> None:
    (code,) = code_blocks("adding_a_method.md")
    lines = [line for line in code.splitlines() if line.strip()]
    assert len(lines) <= 15


def test_the_example_is_a_method(graded: Any) -> None:
    assert get_scaling("graded") is graded
    spec = make_spec(SHAPE)
    scaling = graded(spec, ClexConfig(method="graded"))
    result = scaling.inv_freq(SCALES)
    assert result.shape == (6, 32) and result.dtype == torch.float32
    assert result.isfinite().all() and (result > 0).all()
    assert_same_bits(result[0], spec.inv_freq)
    assert_close(result[3, -1], spec.inv_freq[-1].double().numpy() / 4, 1e-6)
    assert torch.equal(result[:, 0], spec.inv_freq[:1].expand(6)), "the fastest dimension stays"
    assert scaling.source


def test_the_example_has_the_rate_that_it_says(graded: Any) -> None:
    scaling = graded(make_spec(SHAPE), ClexConfig(method="graded"))
    t, h = SCALES[1:].double(), 1e-5
    numeric = (scaling.ratio(t * (1 - h)).log() - scaling.ratio(t * (1 + h)).log()) / (2 * h)
    assert torch.allclose(scaling.rate(t), numeric, atol=1e-8)
    # So it can be the base of learned dynamics.
    learned = get_scaling("clex")(make_spec(SHAPE), ClexConfig(base="graded"))
    assert_same_bits(learned.inv_freq(SCALES), scaling.inv_freq(SCALES))


def test_the_example_is_found_everywhere(graded: Any) -> None:
    row = next(row for row in method_rows() if row.name == "graded")
    assert row.what.startswith("f_i / t**s_i") and row.kind == "closed form" and row.exportable
    model = clex.extend(tiny.make_model(), ClexConfig(method="graded", max_scale=4))
    assert not torch.equal(clex.frequencies(model, 4), clex.frequencies(model, 1))


def test_the_example_is_gone_afterwards() -> None:
    assert "graded" not in scaling_methods()
