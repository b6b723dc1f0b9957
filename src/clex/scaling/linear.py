"""Position interpolation: all frequencies divided by t."""

import torch
from torch import Tensor

from .base import Scaling, register_scaling


@register_scaling("linear")
class Linear(Scaling):
    """PI: positions are squeezed into the trained window, f / t."""

    source = "Chen et al. 2023, arXiv 2306.15595; transformers 'linear'"

    def ratio(self, t: Tensor) -> Tensor:
        return (1 / t)[:, None].expand(-1, self.inv_freq_native.numel())

    def rate(self, t: Tensor) -> Tensor:
        return torch.ones(len(t), self.inv_freq_native.numel(), device=t.device)
