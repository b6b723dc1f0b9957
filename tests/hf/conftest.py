"""One tiny model of each checked family, plain and extended."""

from __future__ import annotations

from typing import Any

import pytest

import clex
import tiny


@pytest.fixture(params=sorted(tiny.FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def extended(family: str) -> Any:
    """Extended to 4 times the native window, with dynamics away from their start."""
    model = clex.extend(tiny.make_model(family), clex.ClexConfig(max_scale=4, steps=4))
    tiny.stir(model)
    return model
