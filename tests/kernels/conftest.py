"""Where kernels are tested: on a GPU, or in Triton's interpreter on a CPU."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    # Read when a kernel is defined, so before any of them is imported.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> str:
    """A device on which the operators of `clex.kernels` call their kernels."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    if ON_GPU:
        return "cuda"
    for module in ("rotary", "cache_move"):
        monkeypatch.setattr(f"clex.kernels.{module}.active", lambda tensor: True)
    return "cpu"
