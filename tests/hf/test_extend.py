"""The seam: what an extended model does at each scale, in each family, and what is refused."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import clex
import tiny
from clex.errors import ConfigError, UnsupportedModelError
from clex.hf.extend import extension_of, require_extension, scale_for
from clex.positions import sample_positions

# Cached decoding does the same sums in another order; float32 logits here are of size 1.
DECODING = 1e-4
# One row alone and in a batch: the matrix product of the host may block its sums differently.
BATCHING = 1e-5


def shift(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


# What t does to the logits.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_of_plain_model_at_one(family: str, dtype: torch.dtype) -> None:
    model = tiny.make_model(family, dtype=dtype)
    ids = tiny.make_ids(2, tiny.NATIVE)
    before = tiny.logits(model, ids)
    clex.extend(model, clex.ClexConfig(max_scale=4))
    tiny.stir(model)  # whatever the dynamics learned
    with clex.at_scale(model, 1):
        assert torch.equal(tiny.logits(model, ids), before)
    assert torch.equal(tiny.logits(model, ids), before)  # a text that fits, scale from its length
    with clex.at_scale(model, 4):
        assert shift(tiny.logits(model, ids), before) > 0.1


def test_scale_follows_length(extended: Any) -> None:
    length = 3 * tiny.NATIVE - 5
    ids = tiny.make_ids(2, length)
    automatic = tiny.logits(extended, ids)
    t = scale_for(extended, length)
    assert 2.9 < t <= 3.4  # a step of the grid is a factor 1.19
    with clex.at_scale(extended, t):
        assert torch.equal(tiny.logits(extended, ids), automatic)
    with clex.at_scale(extended, t + 0.3):
        assert shift(tiny.logits(extended, ids), automatic) > 0.01


@pytest.mark.parametrize("takes_rows", [True, False])
def test_rows_keep_their_own_scale(extended: Any, takes_rows: bool) -> None:
    rope = require_extension(extended)
    if takes_rows and not rope._takes_rows:
        pytest.skip("the host of this release takes one vector for all rows")
    rope._takes_rows = takes_rows
    ids, scales = tiny.make_ids(3, 40), [1.0, 2.7, 4.0]
    with clex.at_scale(extended, scales):
        together = tiny.logits(extended, ids)
    for row, t in enumerate(scales):
        with clex.at_scale(extended, t):
            alone = tiny.logits(extended, ids[row : row + 1])
        assert shift(together[row], alone[0]) < BATCHING
    with clex.at_scale(extended, scales[::-1]):
        assert shift(tiny.logits(extended, ids)[0], together[0]) > 0.1


def test_padded_rows_take_scales_of_their_own_lengths(extended: Any) -> None:
    ids = tiny.make_ids(2, 200)
    mask = torch.ones_like(ids)
    mask[1, :150] = 0  # 50 tokens behind padding
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    together = tiny.logits(extended, ids, attention_mask=mask, position_ids=position_ids)
    alone = tiny.logits(extended, ids[1:, 150:])  # t = 1
    assert shift(together[1, 150:], alone[0]) < DECODING
    with clex.at_scale(extended, scale_for(extended, 200)):  # one scale for the batch
        wrong = tiny.logits(extended, ids, attention_mask=mask, position_ids=position_ids)
    assert shift(wrong[1, 150:], alone[0]) > 0.1


def test_gradients_reach_all_that_is_learned(extended: Any) -> None:
    scalings = require_extension(extended).scalings
    ids = tiny.make_ids(2, 40)

    def norms(t: float) -> dict[str, float]:
        extended.zero_grad()
        with clex.at_scale(extended, t):
            extended(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return {name: p.grad.norm().item() for name, p in scalings.named_parameters()}

    assert all(value > 0 for value in norms(2.7).values())
    assert not any(norms(1.0).values())  # zero and not missing: parallel training sums them


def test_gradients_same_with_checkpointing(extended: Any) -> None:
    ids = tiny.make_ids(2, 40)

    def gradients() -> dict[str, Tensor]:
        extended.zero_grad()
        with clex.at_scale(extended, [2.7, 1.3]):
            loss = extended(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        return {name: p.grad.clone() for name, p in extended.named_parameters()}

    extended.train()
    kept = gradients()
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    handle = extended.get_decoder().layers[0].mlp.register_forward_pre_hook(count)
    extended.gradient_checkpointing_enable({"use_reentrant": False})
    recomputed = gradients()
    handle.remove()
    assert calls == 2  # forward, and once more in the backward pass
    assert all(torch.equal(kept[name], recomputed[name]) for name in kept)


def test_changed_weights_are_seen(extended: Any) -> None:
    ids = tiny.make_ids(1, 40)

    def at_four() -> Tensor:
        with clex.at_scale(extended, 4.0):
            first = tiny.logits(extended, ids)
            assert torch.equal(tiny.logits(extended, ids), first)  # solved once, remembered
        return first

    before = at_four()
    assert torch.equal(at_four(), before)
    with torch.no_grad():
        # Through .data, which does not raise the version: as fused optimisers do.
        for parameter in require_extension(extended).scalings.parameters():
            parameter.data += 1
    assert shift(at_four(), before) > 0.01


# Sampled positions.


def test_positions_are_those_of_the_host(extended: Any) -> None:
    ids, t = tiny.make_ids(2, 40), torch.tensor([2.0, 4.0])
    table = sample_positions("chunks", 40, t, torch.tensor([1, 2]), tiny.NATIVE)
    assert table.max() > tiny.NATIVE  # there are jumps
    with clex.at_scale(extended, t, table):
        ours = tiny.logits(extended, ids)
    with clex.at_scale(extended, t):
        theirs = tiny.logits(
            extended, ids, position_ids=table.long(), attention_mask=torch.ones_like(ids)
        )
        # Without a mask the host takes each jump for the start of another document.
        apart = tiny.logits(extended, ids, position_ids=table.long())
    assert torch.equal(ours, theirs)
    assert shift(ours, apart) > 0.1


def test_positions_with_one_scale_for_all_rows(extended: Any) -> None:
    ids, t = tiny.make_ids(2, 40), torch.tensor([3.0, 3.0])
    table = sample_positions("random", 40, t, torch.tensor([1, 2]), tiny.NATIVE)
    with clex.at_scale(extended, t, table):
        by_row = tiny.logits(extended, ids)
    with clex.at_scale(extended, 3.0, table):
        assert shift(tiny.logits(extended, ids), by_row) < BATCHING


def test_positions_under_left_padding(extended: Any) -> None:
    """A padded row stands where the same row stands alone: the table follows position_ids."""
    ids, t = tiny.make_ids(1, 40), torch.tensor([4.0])
    table = sample_positions("chunks", 40, t, torch.tensor([7]), tiny.NATIVE)
    padded = torch.cat([torch.zeros(1, 9, dtype=torch.int64), ids], dim=1)
    mask = torch.cat([torch.zeros(1, 9, dtype=torch.int64), torch.ones_like(ids)], dim=1)
    counted = (mask.cumsum(1) - 1).clamp(min=0)
    with clex.at_scale(extended, t, table):
        alone = tiny.logits(extended, ids)
        inside = tiny.logits(extended, padded, attention_mask=mask, position_ids=counted)
    with clex.at_scale(extended, t):
        plain = tiny.logits(extended, padded, attention_mask=mask, position_ids=counted)
    assert shift(inside[:, 9:], alone) < BATCHING
    assert shift(plain[:, 9:], alone) > 0.01  # without the table the row stands elsewhere


def test_positions_end_with_the_block(extended: Any) -> None:
    ids = tiny.make_ids(1, 40)
    before = tiny.logits(extended, ids)
    with (
        pytest.raises(KeyError),
        clex.at_scale(extended, 4, torch.arange(40.0)[None] * 2),
    ):
        raise KeyError
    assert torch.equal(tiny.logits(extended, ids), before)
    with clex.at_scale(extended, 2):
        with clex.at_scale(extended, 4):
            pass
        inner = tiny.logits(extended, ids)
    with clex.at_scale(extended, 2):
        assert torch.equal(tiny.logits(extended, ids), inner)


# Caches.


def test_cached_decoding_is_one_forward(extended: Any) -> None:
    ids = tiny.make_ids(2, 80)

    def decode(t_late: float) -> Tensor:
        with torch.no_grad():
            with clex.at_scale(extended, 2.0):
                out = extended(input_ids=ids[:, :70], use_cache=True)
            parts = [out.logits]
            for i in range(70, 80):
                with clex.at_scale(extended, t_late):
                    out = extended(
                        input_ids=ids[:, i : i + 1],
                        past_key_values=out.past_key_values,
                        use_cache=True,
                    )
                parts.append(out.logits)
        return torch.cat(parts, dim=1)

    with clex.at_scale(extended, 2.0):
        whole = tiny.logits(extended, ids)
    assert shift(decode(2.0), whole) < DECODING
    # Keys are cached after rotation: a scale that changes underneath would leave stale ones.
    with pytest.raises(ConfigError, match="t = 2 and now t = 4"):
        decode(4.0)


def test_generate(extended: Any) -> None:
    ids = tiny.make_ids(1, 50)
    settings = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    with clex.at_scale(extended, 2.0):
        with_cache = extended.generate(ids, **settings)
        without = extended.generate(ids, use_cache=False, **settings)
    assert with_cache.shape == (1, 70)
    assert torch.equal(with_cache, without)
    with clex.at_scale(extended, 4.0):
        assert not torch.equal(extended.generate(ids, **settings), with_cache)


# Instances, dtypes, frequencies.


def test_restore(family: str) -> None:
    model, ids = tiny.make_model(family), tiny.make_ids(1, 100)
    stock = type(model.get_decoder().rotary_emb)
    before = tiny.logits(model, ids)
    clex.extend(model, clex.ClexConfig(max_scale=4))
    assert shift(tiny.logits(model, ids), before) > 0.01
    clex.restore(model)
    assert type(model.get_decoder().rotary_emb) is stock
    assert extension_of(model) is None
    assert torch.equal(tiny.logits(model, ids), before)
    clex.restore(model)  # again: nothing to do


def test_other_models_are_untouched(family: str) -> None:
    ids = tiny.make_ids(1, 100)
    one, two = tiny.make_model(family), tiny.make_model(family)
    before = tiny.logits(two, ids)
    clex.extend(one, clex.ClexConfig(max_scale=4))
    assert torch.equal(tiny.logits(two, ids), before)
    assert torch.equal(tiny.logits(tiny.make_model(family), ids), before)
    assert extension_of(two) is None


def test_cast_does_not_touch_frequencies(extended: Any) -> None:
    before = clex.frequencies(extended, 2.7)
    extended.to(torch.bfloat16)
    after = clex.frequencies(extended, 2.7)
    assert torch.equal(after, before)
    scalings = require_extension(extended).scalings
    assert all(p.dtype == torch.float32 for p in scalings.parameters())
    ids = tiny.make_ids(1, 40)
    with clex.at_scale(extended, 2.7):
        assert tiny.logits(extended, ids).dtype == torch.bfloat16
    # What a cast would do: bfloat16 keeps 8 bits, so frequencies move by up to 1 in 512.
    assert shift(before.bfloat16().float() / before, torch.ones_like(before)) > 1e-4


def test_extending_a_cast_model_finds_exact_frequencies(family: str) -> None:
    exact = clex.extend(tiny.make_model(family), clex.ClexConfig(max_scale=4))
    cast = tiny.make_model(family).to(torch.bfloat16)
    rounded = cast.get_decoder().rotary_emb.inv_freq.float()
    clex.extend(cast, clex.ClexConfig(max_scale=4))
    assert torch.equal(clex.frequencies(cast, 3.0), clex.frequencies(exact, 3.0))
    assert not torch.equal(clex.frequencies(cast, 1.0), rounded)


def test_frequencies(family: str, extended: Any) -> None:
    native = tiny.make_model(family).get_decoder().rotary_emb.inv_freq
    one, four = clex.frequencies(extended, 1), clex.frequencies(extended, 4)
    assert four.dtype == torch.float32
    assert four.shape == native.shape == ((4,) if family == "gpt_neox" else (8,))
    assert torch.equal(one, native)
    assert (four <= one).all()  # longer text, slower turning
    assert (four < one).any()
    four.zero_()  # a copy, not the model's own
    assert clex.frequencies(extended, 4).all()


# What is refused.


def test_model_without_rotary_is_refused() -> None:
    config = transformers.GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2)
    with pytest.raises(UnsupportedModelError) as caught:
        clex.extend(tiny.build(config))
    assert "GPT2LMHeadModel" in str(caught.value)
    assert "clex families" in str(caught.value)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
        {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0] * 8,
            "long_factor": [2.0] * 8,
            "original_max_position_embeddings": 32,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_rope_that_changes_by_itself_is_refused(rope: dict[str, Any]) -> None:
    model = tiny.make_model(rope_parameters=rope)
    stock = model.model.rotary_emb
    with pytest.raises(UnsupportedModelError, match=rope["rope_type"]):
        clex.extend(model)
    assert model.model.rotary_emb is stock


def test_fixed_rope_scaling_is_extended() -> None:
    rope = {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 2.0,
        "original_max_position_embeddings": 32,
    }
    model, ids = tiny.make_model(rope_parameters=rope), tiny.make_ids(1, 32)
    before = tiny.logits(model, ids)
    clex.extend(model, clex.ClexConfig(max_scale=4))
    assert torch.equal(tiny.logits(model, ids), before)


def test_extending_twice_is_refused() -> None:
    model = clex.extend(tiny.make_model())
    with pytest.raises(ConfigError, match="extended already"):
        clex.extend(model)
    clex.extend(clex.restore(model))  # but this is fine


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_scale": 1.0}, "max_scale must be above 1"),
        ({"method": "yarm"}, "did you mean 'yarn'"),
        ({"layer_types": ("full_attention",)}, "has no layer types"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], words: str) -> None:
    model = tiny.make_model()
    with pytest.raises(ConfigError, match=words):
        clex.extend(model, clex.ClexConfig(**settings))
    assert extension_of(model) is None


@pytest.mark.parametrize("t", [0.5, 0.0, -1, float("nan")], ids=str)
def test_scale_below_one_is_refused(t: Any) -> None:
    model = clex.extend(tiny.make_model())
    with pytest.raises(ConfigError, match="at least 1"), clex.at_scale(model, t):
        pass


def test_list_of_scales_is_checked() -> None:
    model = clex.extend(tiny.make_model())
    with clex.at_scale(model, [2.0, 1.0]):
        pass
    with pytest.raises(ConfigError, match="at least 1"), clex.at_scale(model, [2.0, 0.5]):
        pass


def test_zero_dim_scale() -> None:
    model, ids = clex.extend(tiny.make_model()), tiny.make_ids(1, 20)
    with clex.at_scale(model, 2.0):
        wanted = tiny.logits(model, ids)
    with clex.at_scale(model, torch.tensor(2.0)):
        assert torch.equal(tiny.logits(model, ids), wanted)


def test_scale_of_plain_model_is_refused() -> None:
    model = tiny.make_model()
    with pytest.raises(ConfigError, match="LlamaForCausalLM is not extended"):
        clex.frequencies(model, 2)
    with pytest.raises(ConfigError, match="not extended"), clex.at_scale(model, 2):
        pass


def test_scale_above_max_warns() -> None:
    model, ids = clex.extend(tiny.make_model(), clex.ClexConfig(max_scale=4)), tiny.make_ids(1, 40)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with clex.at_scale(model, 4):
            most = tiny.logits(model, ids)
    with pytest.warns(UserWarning, match="scale 5 is above max_scale 4"), clex.at_scale(model, 5):
        assert torch.equal(tiny.logits(model, ids), most)
