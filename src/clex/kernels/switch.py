"""Whether the kernels run: on CUDA, unless they are switched off."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# Environment variable that switches the kernels off for a whole process, at any value but 0.
OFF = "CLEX_NO_KERNELS"

# On AMD's GPUs, which torch calls cuda as well, the roundings of the kernels were never tried.
_installed = importlib.util.find_spec("triton") is not None and torch.version.hip is None
_wanted = os.environ.get(OFF, "0") == "0"


def has_triton() -> bool:
    """Whether kernels can be built here at all."""
    return _installed


def active(tensor: Tensor) -> bool:
    """Whether work on `tensor` goes to the kernels, which know no float64."""
    return has_kernels(tensor) and tensor.dtype != torch.float64


def has_kernels(tensor: Tensor) -> bool:
    """Whether the device of `tensor` has kernels that are switched on."""
    return _wanted and _installed and tensor.is_cuda


@contextmanager
def use(kernels: bool) -> Iterator[None]:
    """Switch the kernels on or off inside the block; plain PyTorch takes their place."""
    global _wanted
    before, _wanted = _wanted, kernels
    try:
        yield
    finally:
        _wanted = before
