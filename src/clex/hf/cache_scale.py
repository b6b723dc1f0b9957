"""The scale that the keys of a cache were rotated at, kept on the cache itself.

Keys are cached after rotation, so a cache belongs to one t. The mark is an attribute of the cache
object: it follows a copied cache (the usual way to share a prompt) and goes when the cache goes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from ..errors import ConfigError
from .rotary import ScaledRope, spread

_MARK = "clex_scale"


def scale_of_cache(cache: Any) -> Tensor | None:
    """The scales (B,) or (1,) that the keys in `cache` were rotated at; `None` if not known.

    They are on the device of the frequencies after a forward pass and on the CPU after a move.
    """
    scale: Tensor | None = getattr(cache, _MARK, None)
    return scale


def mark_cache(cache: Any, scale: Tensor) -> None:
    """Note that the keys in `cache` are those of `scale`, (B,) or (1,): after filling or moving."""
    if isinstance(cache, Cache):
        setattr(cache, _MARK, scale)


def holds_keys(cache: Any) -> bool:
    """Whether `cache` is one of transformers' that has seen a token."""
    return isinstance(cache, Cache) and int(cache.get_seq_length()) > 0


def require_scale(rope: ScaledRope, cache: Any, scale: Tensor) -> None:
    """Check that keys of `scale` may join those in `cache`, whatever is known of these.

    Raises:
        ConfigError: the cache was filled at another scale, with other frequencies.
    """
    known = scale_of_cache(cache)
    if known is not None and holds_keys(cache) and not _same_keys(rope, known, scale):
        raise ConfigError(_conflict(known, scale))


def serving_scale(rope: ScaledRope, cache: Any, wanted: Tensor) -> Tensor:
    """The scale for a text that goes on from `cache`, where the user holds none.

    It is that of the cache as long as this covers the text: a smaller t would be wrong for the
    keys that are there, and a larger one is not needed.

    Args:
        wanted: scale (B,) or (1,) that the whole text asks for.

    Raises:
        ConfigError: the text has outgrown the cache, or the scale of the cache is not known.
    """
    if not holds_keys(cache):
        return wanted
    known = scale_of_cache(cache)
    if known is None:
        raise ConfigError(
            "it is not known at which t the keys in this cache were rotated; hold the t that they"
            " were made at: with clex.at_scale(model, t)"
        )
    known = known.to(wanted.device)
    ours, theirs = _aligned(known, wanted)
    if bool((theirs <= ours).all()) or _same_keys(rope, known, wanted):
        return known
    raise ConfigError(_conflict(known, wanted))


def _conflict(known: Tensor, wanted: Tensor) -> str:
    return (
        f"the keys in the cache were rotated at t = {_shown(known)} and now"
        f" t = {_shown(wanted)} is wanted: start anew inside clex.at_scale(model, t) with a t for"
        " the whole text, or let a clex.hf.session.Session refill or move the cache"
    )


def _shown(scale: Tensor) -> str:
    return ", ".join(f"{t:.4g}" for t in dict.fromkeys(scale.tolist()))


def _aligned(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    rows = max(len(a), len(b))
    return spread(a, rows), spread(b, rows)


def _same_keys(rope: ScaledRope, a: Tensor, b: Tensor) -> bool:
    """Whether both scales rotate alike: they are equal, or the method does not follow t there."""
    b = b.to(a.device)
    if torch.equal(*_aligned(a, b)):
        return True
    with torch.no_grad():
        return all(
            torch.equal(*_aligned(one, other))
            for first, second in zip(rope.solve(a).values(), rope.solve(b).values(), strict=True)
            for one, other in zip(first, second, strict=True)
        )
