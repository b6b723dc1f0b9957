"""ALiBi: no rotation at all; where a token stands is told by a bias on the attention."""

import torch
from torch import Tensor

from .base import Scaling, register_scaling


@register_scaling("alibi")
class Alibi(Scaling):
    """ALiBi: no rotation, a penalty on the logits that grows with the distance.

    All frequencies are 0 at every t, so that cos = 1 and sin = 0.

    This is half of the method. The other half, -m_h (q_pos - k_pos) on the logits of head h, is no
    frequency vector; `clex.hf.alibi` puts it into the attention of the model. A RoPE model must be
    trained after the change: it is a baseline of length extrapolation, not of extension, and t = 1
    is not the model's own curve. t changes nothing, and sampled positions have no effect.
    """

    source = "Press et al. 2022, arXiv 2108.12409"
    exact_at_one = False
    rotates = False

    def ratio(self, t: Tensor) -> Tensor:
        return torch.zeros(len(t), self.inv_freq_native.numel(), device=t.device)
