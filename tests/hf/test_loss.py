"""Token losses in bounded memory against plain cross entropy over full logits."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor
from torch.nn.functional import cross_entropy

import tiny
from clex.errors import UnsupportedModelError
from clex.hf import loss as loss_module
from clex.hf.loss import TokenLoss

# The same float32 sums over 128 words in another order; losses are about 5.
TOLERANCE = 1e-5

# Heads that do more than multiply by a matrix, with the effect made large enough to see.
SPECIAL: dict[str, Any] = {
    "gemma2": transformers.Gemma2Config(
        **{**tiny.GROUPED, "head_dim": 16, "final_logit_softcapping": 0.5, "pad_token_id": 0}
    ),
    "cohere": transformers.CohereConfig(**{**tiny.GROUPED, "logit_scale": 0.25}),
    "granite": transformers.GraniteConfig(**{**tiny.GROUPED, "logits_scaling": 8.0}),
}


def naive(model: Any, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    flat = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return flat.view(len(ids), -1)


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("at_once", [2**26, 3 * tiny.VOCAB, 1], ids=["whole", "odd", "single"])
@pytest.mark.parametrize("last", [None, 39, 7, 1])
def test_losses_and_hits(
    family: str, last: int | None, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_module, "LOGITS_AT_ONCE", at_once)
    model, ids = tiny.make_model(family), tiny.make_ids(2, 40)
    with torch.no_grad():
        guesses = tiny.logits(model, ids).argmax(-1)
        ids[:, 1::2] = guesses[:, :-1:2]  # or nearly no token would be the first choice
        wanted = naive(model, ids)
        losses, hits = TokenLoss(model)(model, ids, last)
    count = last or 39
    assert losses.shape == hits.shape == (2, count)
    assert (losses - wanted[:, -count:]).abs().max() < TOLERANCE
    right = tiny.logits(model, ids).argmax(-1)[:, :-1] == ids[:, 1:]
    assert torch.equal(hits, right[:, -count:])
    assert 0 < right.sum() < right.numel()
    assert TokenLoss(model)(model, ids, last)[1].shape == (2, 0)  # training does not ask


@pytest.mark.parametrize("at_once", [2**26, 3 * tiny.VOCAB])
def test_gradients(family: str, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "LOGITS_AT_ONCE", at_once)
    model, ids = tiny.make_model(family), tiny.make_ids(2, 40)
    wanted = gradients(model, naive(model, ids).mean())
    ours = gradients(model, TokenLoss(model)(model, ids)[0].mean())
    assert ours.keys() == wanted.keys()
    for name in wanted:
        # Sums over 78 tokens in another order, in float32.
        torch.testing.assert_close(ours[name], wanted[name], rtol=1e-4, atol=1e-6)
    half = gradients(model, TokenLoss(model)(model, ids, 20)[0].mean())
    assert any((half[name] - wanted[name]).abs().max() > 1e-3 for name in wanted)


@pytest.mark.parametrize("name", SPECIAL)
def test_heads_that_scale_or_cap(name: str) -> None:
    model, ids = tiny.build(SPECIAL[name]), tiny.make_ids(2, 40)
    token_loss = TokenLoss(model)
    with torch.no_grad():
        assert (token_loss(model, ids)[0] - naive(model, ids)).abs().max() < TOLERANCE
        token_loss.factor, token_loss.softcap = 1.0, None
        assert (token_loss(model, ids)[0] - naive(model, ids)).abs().max() > 0.01


def test_unknown_head_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny.make_model(), tiny.make_ids(2, 40)
    forward = model.forward

    def louder(*args: Any, **inputs: Any) -> Any:
        output = forward(*args, **inputs)
        output.logits = output.logits * 1.01
        return output

    TokenLoss(model)(model, ids)
    monkeypatch.setattr(model, "forward", louder)
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM does more to its logits"):
        TokenLoss(model)(model, ids)


def test_model_without_head_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="LlamaModel has no output head"):
        TokenLoss(tiny.make_model().model)


def test_adapters_are_seen() -> None:
    """The trainer calls the wrapper, and the losses are the wrapped model's."""
    model, ids = tiny.make_model(), tiny.make_ids(2, 40)
    token_loss = TokenLoss(model)
    with torch.no_grad():
        before = naive(model, ids)
        lora = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        wrapped = peft.get_peft_model(model, lora).eval()
        losses, _ = token_loss(wrapped, ids)
        assert (losses - naive(wrapped, ids)).abs().max() < TOLERANCE
    assert (losses - before).abs().max() > 0.01
