"""Where the kernels run, and the switch that keeps them from it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import clex.kernels
from clex.kernels import active, use


def test_kernels_run_on_cuda_alone_and_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clex.kernels.switch, "_installed", True)
    on_gpu: Any = SimpleNamespace(is_cuda=True, dtype=torch.float32)
    assert active(on_gpu)
    assert not active(torch.zeros(1))
    assert not active(SimpleNamespace(is_cuda=True, dtype=torch.float64))  # type: ignore[arg-type]
    with use(kernels=False):
        assert not active(on_gpu)
        with use(kernels=True):
            assert active(on_gpu)
        assert not active(on_gpu)
    assert active(on_gpu)
    monkeypatch.setattr(clex.kernels.switch, "_installed", False)
    assert not active(on_gpu)
