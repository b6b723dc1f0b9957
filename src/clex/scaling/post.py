"""Operations on the frequencies that any method gives: soft clip, resonance, zeroed bands.

None of them is the identity at t = 1, so `Scaling.inv_freq` applies them for t > 1 only, in the
order of `ClexConfig.post`. Each is as published and has no options, but for the share of `p_rope`,
which may follow its name: ``"p_rope:0.5"``. Dimensions are counted among those of the model's own
vector that rotate; a frequency of 0 stays 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..errors import ConfigError, unknown
from ..rope import RopeSpec


class Post(nn.Module):
    """One operation: ``inv_freq (B, F) -> (B, F)``, float32, radians per token, differentiable.

    Class attributes:
        source: paper or code that the formula comes from.
    """

    source: ClassVar[str] = ""

    def __init__(self, spec: RopeSpec) -> None:
        super().__init__()

    def forward(self, inv_freq: Tensor) -> Tensor:
        raise NotImplementedError


class Weighted(Post):
    """Multiplies the slowest dimensions that rotate by fixed numbers, fastest of them first."""

    weights: Tensor

    def _set(self, spec: RopeSpec, slowest: Tensor) -> None:
        weights = torch.ones(spec.inv_freq.numel(), dtype=torch.float64)
        rotating = spec.rotates().cpu().nonzero().flatten()
        weights[rotating[len(rotating) - len(slowest) :]] = slowest
        self.register_buffer("weights", weights.float(), persistent=False)

    def forward(self, inv_freq: Tensor) -> Tensor:
        return inv_freq * self.weights


class Clip(Weighted):
    """Soft clip of the slowest n: times (1 + cos(pi j/(n-1)))/2, j = 0 to n-1, the slowest 0.

    n = 20 for 64 frequencies as published; for F of them round(20 F / 64), which is our rule.
    """

    source = "soft clip ('CoPE'), arXiv 2602.05258"

    def __init__(self, spec: RopeSpec) -> None:
        super().__init__(spec)
        rotating = int(spec.rotates().sum())
        n = min(rotating, max(2, round(20 * rotating / 64)))
        angle = torch.linspace(0, math.pi, n, dtype=torch.float64)
        self._set(spec, (1 + angle.cos()) / 2)


class PRope(Weighted):
    """The slowest `share` is set to 0; 25 % is the paper's best.

    As many are kept as transformers' ``proportional`` keeps at `partial_rotary_factor` 1 - share.
    """

    source = "Barbero et al. 2024, arXiv 2410.06205; transformers 'proportional'"

    def __init__(self, spec: RopeSpec, share: float = 0.25) -> None:
        super().__init__(spec)
        if not 0 < share < 1:
            raise ConfigError(f"the share of 'p_rope' must be above 0 and below 1, not {share}")
        rotating = int(spec.rotates().sum())
        # The small number keeps 0.9 * 10 from being 8.999...
        kept = math.floor((1 - share) * rotating + 1e-9)
        self._set(spec, torch.zeros(rotating - kept, dtype=torch.float64))


class Resonance(Post):
    """Each wavelength rounded to whole tokens: f' = 2 pi / round(2 pi / f).

    The derivative of the rounding is 0 almost everywhere, which would cut the dynamics off from the
    loss; gradients pass as if it were not there (straight through, our choice).
    """

    source = "Wang et al. 2024, arXiv 2403.00071"

    def forward(self, inv_freq: Tensor) -> Tensor:
        # float64: in float32 a wavelength of some million tokens can round to the wrong neighbour.
        # No wavelength is 0, and that of a frequency of 0 is infinite, which gives 0 back.
        wavelength = (2 * math.pi / inv_freq.detach().double()).round().clamp(min=1)
        rounded = (2 * math.pi / wavelength).to(inv_freq.dtype)
        return rounded + (inv_freq - inv_freq.detach())


POSTS: dict[str, type[Post]] = {"clip": Clip, "resonance": Resonance, "p_rope": PRope}


def make_posts(names: Sequence[str], spec: RopeSpec) -> list[Post]:
    """The operations called `names`, for one rotary embedding, in this order.

    Raises:
        ConfigError: there is no such operation, or its number is bad or not wanted.
    """
    return [_make(text, spec) for text in names]


def _make(text: str, spec: RopeSpec) -> Post:
    name, colon, number = (part.strip() for part in text.partition(":"))
    if name not in POSTS:
        raise ConfigError(unknown("post-operation", name, POSTS))
    if not colon:
        return POSTS[name](spec)
    if name != "p_rope":
        raise ConfigError(f"post-operation {name!r} takes no number, got {text!r}")
    try:
        share = float(number)
    except ValueError:
        raise ConfigError(f"the share of 'p_rope' is no number: {text!r}") from None
    return PRope(spec, share)
