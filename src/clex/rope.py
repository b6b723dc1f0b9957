"""What the maths knows of a rotary embedding: one frequency vector and its native length."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RopeSpec:
    """One rotary frequency vector of a model, at scale t = 1.

    Attributes:
        inv_freq: the model's own frequencies, float32, shape (F,), radians per token, fastest
            first. F is half the rotated size, which partial rotary makes smaller than the head.
            Entries may be 0 (dimensions that do not rotate); they stay 0 at every t.
        native_length: tokens that the model was trained to read, the unit of t.
        rope_theta: base of the geometric curve, as far as the model names one.
        attention_scaling: factor that the model itself puts on cos and sin (1 but for YaRN-like).
        layers: the layers of the model where each is to have a temperature or frequencies of its
            own, else 1.
    """

    inv_freq: Tensor
    native_length: int
    rope_theta: float
    attention_scaling: float = 1.0
    layers: int = 1

    @property
    def rotary_dim(self) -> int:
        """Rotated entries of a head, d = 2 F."""
        return 2 * self.inv_freq.numel()

    def log_inv_freq(self) -> Tensor:
        """log of `inv_freq`, shape (F,); 0 where the frequency is 0, see `rotates`."""
        return torch.where(self.rotates(), self.inv_freq, torch.ones(())).log()

    def rotates(self) -> Tensor:
        """Which dimensions rotate at all, bool, shape (F,)."""
        return self.inv_freq > 0

    def slope(self) -> Tensor:
        """Share of the log range, from 0 at the fastest to 1 at the slowest rotating dimension.

        Shape (F,). For a geometric curve this is 2i/(d-2), the exponent of NTK-aware scaling
        (transformers ``dynamic``); taken from the vector itself it also fits curves that do not
        start at 1, and it is 0 where nothing rotates.
        """
        z, rotates = self.log_inv_freq(), self.rotates()
        fastest, slowest = z[rotates].max(), z[rotates].min()
        span = (slowest - fastest).clamp(max=-torch.finfo(z.dtype).tiny)
        return torch.where(rotates, (z - fastest) / span, torch.zeros(()))

    def turns(self) -> Tensor:
        """Full turns inside the native window, native_length * inv_freq / 2 pi, shape (F,)."""
        return self.inv_freq * (self.native_length / (2 * math.pi))
