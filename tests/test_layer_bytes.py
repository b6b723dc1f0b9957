"""What a layer keeps for its backward pass, against the tensors that autograd is seen to save."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor

from clex.config import ClexConfig
from clex.hf.extend import at_scale, extend, require_extension
from clex.layer_bytes import ADAPTED, AUTOCAST, FROZEN, SHARDED, Traffic

TOKENS = 101  # a prime, so that sizes of weights are no multiple of it


def saved(kind: str, layers: int, hidden: int, inner: int) -> float:
    """Bytes that a forward pass saves for each token."""
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=64,
    )
    dtype = torch.float32 if kind == "autocast" else torch.bfloat16
    model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    model = extend(model, ClexConfig(max_scale=16))
    if kind in ("frozen", "adapted"):
        model.requires_grad_(False)
        model.enable_input_require_grads()
    if kind == "adapted":
        lora = peft.LoraConfig(
            r=2, target_modules="all-linear", exclude_modules=r".*\.scalings\..*"
        )
        peft.get_peft_model(model, lora)
    require_extension(model).scalings.requires_grad_(True)
    model.train()
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    positions = torch.arange(TOKENS)[None] * 2
    with (
        at_scale(model, 3.0, positions),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16),
    ):
        kept = model.model(input_ids=torch.zeros(1, TOKENS, dtype=torch.long), use_cache=False)
    assert kept.last_hidden_state.requires_grad
    sizes = [storage.nbytes() for storage in storages.values()]
    return sum(size for size in sizes if size % TOKENS == 0) / TOKENS


@pytest.mark.parametrize(
    ("kind", "traffic"),
    [("autocast", AUTOCAST), ("bfloat16", SHARDED), ("frozen", FROZEN), ("adapted", ADAPTED)],
)
def test_kept_is_what_autograd_saves(kind: str, traffic: Traffic) -> None:
    def layer(hidden: int, inner: int) -> float:
        return saved(kind, 2, hidden, inner) - saved(kind, 1, hidden, inner)

    plain = layer(96, 160)
    assert (layer(192, 160) - plain) / 96 == pytest.approx(traffic.kept.hidden)
    assert (layer(96, 192) - plain) / 32 == pytest.approx(traffic.kept.inner)
    if kind == "autocast":
        # Without kernels the rotation keeps other tensors, as many bytes in this case. On top:
        # float32 sums of the softmax, one for each head, and the norms' two.
        rest = plain - traffic.kept.of(96, 8 * 16, 160)
        assert rest == pytest.approx(4 * 6 + 4 * 2)
