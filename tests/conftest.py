"""Settings of every test, and the rotary embeddings that they run over."""

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test may download

import pytest
import torch

from clex.rope import RopeSpec
from references import Shape, make_spec

# Tests are small; with several pytest workers more threads only get in each other's way.
torch.set_num_threads(1)

SHAPES = (
    Shape(head_dim=32, theta=1e4),
    Shape(head_dim=64, theta=1e5),
    Shape(head_dim=128, theta=1e6, native_length=8192),
    Shape(head_dim=128, theta=1e4, native_length=4096),
    Shape(head_dim=64, theta=1e4, partial=0.5),
)


def pytest_collection_finish() -> None:
    """Collections of garbage, which end every training, need not look through all imports."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=SHAPES, ids=str)
def shape(request: pytest.FixtureRequest) -> Shape:
    """Head size, base, rotated share and native length of a model."""
    return request.param


@pytest.fixture
def spec(shape: Shape) -> RopeSpec:
    """The frequencies of `shape`, computed as transformers computes them."""
    return make_spec(shape)
