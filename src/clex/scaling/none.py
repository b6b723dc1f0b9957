"""Plain RoPE: the frequencies that the model was trained with, at every length."""

import torch
from torch import Tensor

from .base import Scaling, register_scaling


@register_scaling("none")
class Plain(Scaling):
    """Plain RoPE: no scaling."""

    source = "Su et al. 2021, arXiv 2104.09864"

    def ratio(self, t: Tensor) -> Tensor:
        return torch.ones(len(t), self.inv_freq_native.numel(), device=t.device)

    def rate(self, t: Tensor) -> Tensor:
        return torch.zeros(len(t), self.inv_freq_native.numel(), device=t.device)
