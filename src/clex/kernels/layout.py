"""How the operators lay out what they return."""

from __future__ import annotations

import torch
from torch import Tensor


def token_major(x: Tensor, dtype: torch.dtype) -> Tensor:
    """An empty (B, heads, T, D) that lies as (B, T, heads, D) in memory, as hosts make them."""
    rows, heads, length, size = x.shape
    return x.new_empty(rows, length, heads, size, dtype=dtype).transpose(1, 2)
