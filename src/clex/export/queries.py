"""The temperature of one scale, folded into the query weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, UnsupportedModelError
from .families import Family
from .fixed import FixedScale


def scale_queries(model: nn.Module, family: Family, fixed: FixedScale) -> int:
    """Multiply the queries of `model` by the temperature of one scale, in place.

    Only the entries that rotate are scaled: the live model has its factor on cos and sin, which
    reach no others. Weights are multiplied in float64 and rounded once to their own dtype. Keys and
    values in the same matrix stay as they are, bit for bit.

    Args:
        model: a plain model with its weights merged.
        family: where its queries are.
        fixed: the scale.

    Returns:
        How many attention blocks were changed.

    Raises:
        CheckpointError: an adapter is on the model; its share of the queries would stay behind.
        UnsupportedModelError: the model does not store its queries as its family does.
    """
    if any("lora_" in name for name, _ in model.named_parameters()):
        raise CheckpointError("the adapter must be merged before the queries are scaled")
    config: Any = model.config
    blocks = [m for name, m in model.named_modules() if name.split(".")[-1] == family.module]
    if len(blocks) != config.num_hidden_layers:
        raise UnsupportedModelError(
            f"{type(model).__name__} has {len(blocks)} modules {family.module!r} in"
            f" {config.num_hidden_layers} layers"
        )
    with torch.no_grad():
        for block in blocks:
            for parameter in block.parameters():
                rotated = _queries(parameter, family, config.num_attention_heads, fixed)[
                    :, : fixed.rotary_dim
                ]
                rotated.copy_((rotated.double() * fixed.temperature).to(parameter.dtype))
    return len(blocks)


def _queries(parameter: Tensor, family: Family, heads: int, fixed: FixedScale) -> Tensor:
    """The queries in a parameter: a view, shape (heads, head_dim, ...), 1 head for shared norms."""
    size, rest = fixed.head_dim, parameter.shape[1:]
    if family.form == "head_blocks":
        return parameter.view(heads, 3, size, *rest)[:, 0]
    queries = parameter[: heads * size] if family.form == "first_rows" else parameter
    return queries.view(-1, size, *rest)
