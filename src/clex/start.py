"""Which closed form is the best start for the dynamics of a model: tried, not guessed.

No closed form is the best for every model: with the weights untouched, at 8 times the window, YaRN
is ahead of NTK on one model and far behind it on another (docs/log.md). A few windows of
training text decide it before anything is fitted.
"""

from __future__ import annotations

import datasets
import torch
from rich.console import Console
from torch import nn

from .config import ClexConfig
from .data import WindowPlan, Windows, collate
from .evaluation.perplexity import as_method
from .hf.extend import at_scale, config_of
from .hf.loss import TokenLoss
from .scaling import Scaling, get_scaling

CANDIDATES = ("critical_ntk", "yarn")
_WINDOWS = 6


def can_be_base(method: str) -> bool:
    """Whether dynamics can go on from weights that were trained under `method`.

    It has to be a closed form that follows the length and has a rate; ``none`` follows nothing.
    """
    return method != "none" and get_scaling(method).rate is not Scaling.rate


@torch.no_grad()
def choose_base(
    model: nn.Module,
    tokens: datasets.Dataset,
    config: ClexConfig,
    *,
    seed: int = 0,
    console: Console | None = None,
) -> str:
    """The closed form under which an untrained extension reads long training windows best.

    Args:
        model: a plain model; it is plain again afterwards.
        tokens: training documents, from `clex.data.load_tokens`.
        config: of the extension; its `base` is what is chosen.
        seed: of the windows.
        console: where the losses are told.

    Returns:
        One of `CANDIDATES`: the one with the lowest mean loss over the last half native window of
        windows at the upper half of the range of scales.

    Raises:
        DataError: no document is long enough.
    """
    losses = {}
    for base in CANDIDATES:
        with as_method(model, config.replace(base=base)) as extended:
            native = config_of(extended).native_length
            assert native is not None
            plan = WindowPlan(
                tokens=None,
                native_length=native,
                min_scale=(1 + config.max_scale) / 2,
                max_scale=config.max_scale,
            )
            windows = Windows(tokens, plan, _WINDOWS, seed)
            token_loss, total = TokenLoss(extended), 0.0
            for index in range(_WINDOWS):
                batch = collate([windows[index]])
                ids = batch["input_ids"].to(next(model.parameters()).device)
                with at_scale(extended, batch["scale"]):
                    loss, _ = token_loss(extended, ids, last=min(native // 2, ids.shape[1] - 1))
                total += loss.mean().item()
            losses[base] = total / _WINDOWS
    best = min(losses, key=lambda base: losses[base])
    if console is not None:
        told = ", ".join(f"{base} {loss:.3f}" for base, loss in losses.items())
        console.print(f"base curve by loss on {_WINDOWS} long windows: {told}; taking {best}")
    return best
