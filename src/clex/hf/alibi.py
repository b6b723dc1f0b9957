"""ALiBi as an attention function of transformers, for one model instance, in bounded memory.

transformers looks an attention function up by the name in the config that each attention module
holds. Ours is registered under a name of its own, and the instance gets a config of its own that
carries this name: configs may be shared between models, and another model must not change.
"""

from __future__ import annotations

import copy
import functools
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import dropout as drop
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function, sdpa_mask

from ..errors import UnsupportedModelError

NAME = "clex_alibi"

# Attention weights of a block of queries: at most 64 Mi float32 numbers, 256 MiB, of which a few
# copies live at once (scores, bias, softmax). Blocks are made as small as that asks for.
SCORES_AT_ONCE = 2**26
QUERIES_AT_ONCE = 256
# Queries and keys of a block of FlexAttention.
BLOCK = 128


def alibi_slopes(heads: int) -> list[float]:
    """The slope m_h of each head, all positive (Press et al. 2022; their code for any number).

    For a power of two 2^(-8h/H), h = 1..H. Otherwise the slopes of the next lower power n, then
    every second slope of 2n until there are enough.
    """
    power = 2 ** int(math.log2(heads))
    slopes = [2 ** (-8 * h / power) for h in range(1, power + 1)]
    between = [2 ** (-8 * h / (2 * power)) for h in range(1, 2 * power, 2)]
    return slopes + between[: heads - power]


def add_alibi(model: nn.Module) -> str:
    """Let the attention of one model instance use ALiBi.

    Returns:
        The name of the attention that it had, for `remove_alibi`.

    Raises:
        UnsupportedModelError: the model does not take its attention from transformers' interface.
    """
    host: Any = model
    if not getattr(host, "_supports_attention_backend", False):
        raise UnsupportedModelError(
            f"{type(model).__name__} does not take its attention from transformers'"
            " AttentionInterface, which 'alibi' needs"
        )
    # The decoder of a composite model holds the config of its text part, and so do all its layers.
    shared = host.get_decoder().config
    before = str(shared._attn_implementation)
    AttentionInterface.register(NAME, alibi_attention)
    AttentionMaskInterface.register(NAME, alibi_mask)
    own = copy.deepcopy(shared)
    own._attn_implementation = NAME
    for module in model.modules():
        if module.__dict__.get("config") is shared:
            module.config = own
    return before


def remove_alibi(model: nn.Module, before: str) -> None:
    """Undo `add_alibi`; the instance keeps its own config, with all that was changed in it."""
    for module in model.modules():
        config: Any = module.__dict__.get("config")
        if getattr(config, "_attn_implementation", None) == NAME:
            config._attn_implementation = before


def alibi_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | BlockMask | None:
    """The mask that `alibi_attention` gets, as small as it can be.

    Returns:
        A `BlockMask`: a whole text without padding, on a GPU.
        ``None``: causal, the queries being the last of the keys. (B, kv_length) bool: the same, and
        false keys are padding. Everything else (packed documents, sliding windows, caches of fixed
        size): (B, 1, q_length, kv_length) bool, complete.
    """
    plain = mask_function is causal_mask_function and isinstance(q_offset, int) and kv_offset == 0
    fits = attention_mask is None or attention_mask.shape[-1] == kv_length
    if plain and fits and q_offset + q_length == kv_length:
        device = torch.device(kwargs.get("device", "cpu"))
        if device.type == "cuda" and attention_mask is None and q_length == kv_length > 1:
            return causal_blocks(q_length, device)
        return attention_mask
    kwargs["allow_is_causal_skip"] = False  # without a mask it would not be known what causal means
    mask: Tensor | None = sdpa_mask(
        batch_size,
        q_length,
        kv_length,
        q_offset,
        kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        **kwargs,
    )
    return mask


def alibi_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | BlockMask | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """softmax(q k^T scaling - m_h (q_pos - k_pos)) v, some queries at a time.

    Distances are counted in keys of the cache, which equals positions inside a document whatever
    the padding before it; only such distances are ever visible. Bias and softmax are float32
    whatever the model is: in bfloat16 distances above 256 would be rounded.

    On a GPU whole texts without padding go through PyTorch's FlexAttention, one kernel for all.

    Args:
        module: attention module of the host; unused.
        query: (B, H, Tq, D).
        key, value: (B, G, Tk, D), each for H / G heads; the queries are the last of the keys.
        attention_mask: from `alibi_mask`, or a complete one of the user, bool or additive.
        scaling: factor of the logits, D^(-1/2) if not given.
        dropout: share of attention weights that are dropped.

    Returns:
        (B, Tq, H, D), and no weights.
    """
    rows, heads, queries, size = query.shape
    groups, keys = key.shape[1], key.shape[2]
    scaling = size**-0.5 if scaling is None else scaling
    if isinstance(attention_mask, BlockMask):
        if dropout == 0:
            return _in_one_kernel(query, key, value, attention_mask, scaling), None
        attention_mask = None
    complete = attention_mask is not None and attention_mask.dim() == 4
    slopes = torch.tensor(alibi_slopes(heads), device=query.device).view(groups, -1, 1, 1)
    query = query.unflatten(1, (groups, -1))
    block = max(1, min(QUERIES_AT_ONCE, SCORES_AT_ONCE // (rows * heads * keys)))
    parts = []
    for start in range(0, queries, block):
        end = min(start + block, queries)
        seen = keys if complete else keys - queries + end
        first = keys - queries + start  # place of the block's first query among the keys
        mask = attention_mask
        if mask is not None:
            mask = mask[:, :, start:end, :seen] if complete else mask[:, :seen]
        arguments = query[..., start:end, :], key[:, :, :seen], value[:, :, :seen], mask, slopes
        if torch.is_grad_enabled() and queries > 1:
            # The weights of a block are made again in the backward pass, not kept.
            part = checkpoint(_attend, *arguments, first, scaling, dropout, use_reentrant=False)
        else:
            part = _attend(*arguments, first, scaling, dropout)
        parts.append(part)
    return torch.cat(parts, dim=3).flatten(1, 2).transpose(1, 2).contiguous(), None


def _in_one_kernel(
    query: Tensor, key: Tensor, value: Tensor, causal: BlockMask, scaling: float
) -> Tensor:
    """What `alibi_attention` returns for whole texts."""
    slopes = torch.tensor(alibi_slopes(query.shape[1]), device=query.device)
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))

    def biased(score: Tensor, row: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return score - slopes[head] * (q - k)

    attended: Tensor = _flex()(
        query,
        key,
        value,
        score_mod=biased,
        block_mask=causal,
        scale=scaling,
    )
    return attended.transpose(1, 2).contiguous()


@functools.cache
def _flex() -> Any:
    # Not compiled, it would hold all scores at once.
    return torch.compile(flex_attention)


@functools.lru_cache(maxsize=4)
def causal_blocks(length: int, device: torch.device) -> BlockMask:
    """Which blocks of queries see which blocks of keys in a text of `length` tokens.

    Written down, not found out by `create_block_mask`, which makes all ``length**2`` cells for it:
    the blocks before the diagonal are full, those on it are masked cell by cell.
    """

    def seen(row: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return q >= k

    count = -(-length // BLOCK)
    places = torch.arange(count, dtype=torch.int32, device=device)
    masked, full = torch.ones_like(places), places.clone()
    diagonal = places[:, None].repeat(1, count)
    if length % BLOCK:  # the last queries are fewer than a block, so none of their blocks is full
        masked[-1], full[-1], diagonal[-1] = count, 0, places
    return BlockMask.from_kv_blocks(
        masked[None, None],
        diagonal[None, None],
        full[None, None],
        places.repeat(count, 1)[None, None],
        BLOCK_SIZE=BLOCK,
        mask_mod=seen,
        seq_lengths=(length, length),
    )


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    slopes: Tensor,
    first: int,
    scaling: float,
    dropout: float,
) -> Tensor:
    """One block: query (B, G, H/G, q, D), key and value (B, G, k, D) to (B, G, H/G, q, D)."""
    shape = query.shape[2:4]
    # The heads of a group are more queries to the same keys, which are not repeated for them.
    scores = torch.matmul(query.flatten(2, 3), key.transpose(-1, -2)).unflatten(2, shape)
    scores = (scores * scaling).float()
    places = torch.arange(key.shape[2], device=query.device)
    distance = (first + torch.arange(query.shape[3], device=query.device))[:, None] - places
    scores = scores - slopes * distance
    lowest = torch.finfo(torch.float32).min  # not -inf: a query that is padding sees no key at all
    if mask is None or mask.dim() == 2:
        allowed = distance >= 0
        if mask is not None:
            allowed = allowed & mask[:, None, None, None, :].bool()
        scores = scores.masked_fill(~allowed, lowest)
    else:
        mask = mask[:, :, None] if mask.shape[1] == 1 else mask.unflatten(1, query.shape[1:3])
        scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask
    weights = drop(torch.softmax(scores, dim=-1).to(value.dtype), p=dropout)
    return torch.matmul(weights.flatten(2, 3), value).unflatten(2, shape)
