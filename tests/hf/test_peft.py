"""Adapters of PEFT on an extended model: train, save, load, merge, generate."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import clex
import tiny
from clex.errors import ClexError
from clex.hf.extend import extension_of, require_extension, scale_for

IDS = tiny.make_ids(2, 100).clamp(min=1)  # the native window is 64
SAME = 1e-4


def make_base(family: str = "llama") -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = clex.extend(tiny.make_model(family), clex.ClexConfig(max_scale=4, steps=4))
    tiny.stir(model)
    return model


def train(model: Any, saved: list[str] | None, family: str = "llama") -> Any:
    """Three steps of LoRA on `model`, and on the modules named in `saved`."""
    targets = ["query_key_value"] if family == "gpt_neox" else ["q_proj", "v_proj"]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        lora = peft.LoraConfig(r=4, target_modules=targets, modules_to_save=saved)
        model = peft.get_peft_model(model, lora).train()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return model.eval()


def shift(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
@pytest.mark.parametrize("saved", [None, ["rotary_emb"]], ids=["weights", "dynamics too"])
def test_train_save_load_merge(saved: list[str] | None, family: str, tmp_path: Path) -> None:
    base = make_base(family)
    untrained = tiny.logits(base, IDS)
    before = clex.frequencies(base, 2.0)
    model = train(copy.deepcopy(base), saved, family)
    trained = tiny.logits(model, IDS)
    assert shift(trained, untrained) > 0.1
    assert torch.equal(clex.frequencies(model, 2.0), before) is (saved is None)
    model.save_pretrained(tmp_path)
    names = load_file(tmp_path / "adapter_model.safetensors")
    assert any(".scalings." in name for name in names) is (saved is not None)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert torch.equal(tiny.logits(loaded, IDS), trained)
    merged = loaded.merge_and_unload()
    assert shift(tiny.logits(merged, IDS), trained) < SAME
    assert torch.equal(clex.frequencies(merged, 2.0), clex.frequencies(model, 2.0))
    clex.restore(merged)
    assert extension_of(merged) is None
    assert not merged.get_decoder()._forward_pre_hooks


@pytest.mark.parametrize("saved", [None, ["rotary_emb"]], ids=["weights", "dynamics too"])
def test_generate_through_the_wrapper(saved: list[str] | None) -> None:
    model = train(make_base(), saved)
    ids = IDS[:1, :60]
    output = model.generate(
        input_ids=ids,
        max_new_tokens=24,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    with clex.at_scale(model, scale_for(model, 84)):
        again = tiny.logits(model, output.sequences)[:, 59:-1]
    assert shift(torch.stack(output.logits, dim=1), again) < SAME
    with clex.at_scale(model, 4.0):
        assert shift(tiny.logits(model, output.sequences)[:, 59:-1], again) > 0.01


def test_padded_rows_through_the_wrapper() -> None:
    """The hooks reach the copy of the rotary that PEFT trains."""
    model = train(make_base(), ["rotary_emb"])
    ids, mask = IDS.clone(), torch.ones_like(IDS)
    ids[1, :70], mask[1, :70] = 0, 0
    alone = tiny.logits(model, ids[1:, 70:])
    assert shift(tiny.logits(model, ids, attention_mask=mask)[1, 70:], alone[0]) < SAME
    with clex.at_scale(model, scale_for(model, 100)):
        assert shift(tiny.logits(model, ids, attention_mask=mask)[1, 70:], alone[0]) > 0.01


def test_disabled_adapter_is_the_base() -> None:
    base = make_base()
    untrained, before = tiny.logits(base, IDS), clex.frequencies(base, 2.0)
    model = train(base, ["rotary_emb"])
    assert not torch.equal(clex.frequencies(model, 2.0), before)
    with model.disable_adapter():
        assert torch.equal(tiny.logits(model, IDS), untrained)
        assert torch.equal(clex.frequencies(model, 2.0), before)


@pytest.mark.parametrize("saved", [None, ["rotary_emb"]], ids=["weights", "dynamics too"])
def test_clex_save_keeps_adapter_and_dynamics(saved: list[str] | None, tmp_path: Path) -> None:
    model = train(make_base(), saved)
    trained = tiny.logits(model, IDS)
    clex.save(model, tmp_path, weights="adapter", base_model="tiny")
    loaded = clex.load(tmp_path, tiny.make_model())  # a plain base, extended by `load`
    assert torch.equal(tiny.logits(loaded, IDS), trained)


def test_adapter_with_dynamics_needs_an_extended_base(tmp_path: Path) -> None:
    """PEFT drops what a plain base has no place for; clex does not take the result for extended."""
    train(make_base(), ["rotary_emb"]).save_pretrained(tmp_path)
    model = peft.PeftModel.from_pretrained(tiny.make_model(), tmp_path)
    with pytest.raises(ClexError, match="is not extended"):
        require_extension(model)
    with pytest.raises(ClexError):
        clex.extend(model)
    with pytest.raises(ClexError, match=r"clex_config\.json"):
        clex.load(tmp_path, tiny.make_model())
