"""Frequencies as the factors that serving engines read: plain base over wanted, float64."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import UnsupportedModelError


def plain_inv_freq(rope_theta: float, rotary_dim: int) -> Tensor:
    """theta**(-2i/d), the curve that every engine starts from; float64, shape (d/2,)."""
    exponent = torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim
    return torch.tensor(rope_theta, dtype=torch.float64) ** -exponent


def rope_factors(*, wanted: Tensor, rope_theta: float, rotary_dim: int) -> Tensor:
    """What engines divide the plain curve by (LongRoPE, arXiv 2402.13753; `rope_freqs` of GGUF).

    Above 1 where the wanted frequency is slower than the plain one, which is the rule for t > 1.
    The plain curve is that of `rope_theta` even where the model itself ships with another one
    (llama3, YaRN): engines know no other.

    Args:
        wanted: inv_freq, shape (rotary_dim / 2,), radians per token.
        rope_theta: base of the model's config.
        rotary_dim: rotated entries of a head.

    Returns:
        float64, shape (rotary_dim / 2,).

    Raises:
        UnsupportedModelError: the size is another, or a frequency is zero or not finite.
    """
    if wanted.shape != (rotary_dim // 2,):
        raise UnsupportedModelError(
            f"{tuple(wanted.shape)} frequencies for {rotary_dim} rotated entries of a head"
            f" (valid: {rotary_dim // 2})"
        )
    if not (wanted.isfinite() & (wanted > 0)).all():
        raise UnsupportedModelError(
            "a frequency is zero or not finite, and no engine has a factor for that"
        )
    return plain_inv_freq(rope_theta, rotary_dim) / wanted.double()
