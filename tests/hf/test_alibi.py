"""ALiBi against the full bias written out, on every checked family; nothing left behind."""

from __future__ import annotations

import copy
import itertools
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

import clex
import tiny
from clex.errors import UnsupportedModelError
from clex.hf import alibi
from clex.hf.alibi import alibi_slopes

CONFIG = clex.ClexConfig(method="alibi", max_scale=4)
LENGTH = 100


def make(family: str = "llama", **changes: Any) -> Any:
    return clex.extend(tiny.make_model(family, **changes), CONFIG)


def slopes(heads: int) -> list[float]:
    """The recursive form of the authors' code, independent of ours."""
    if heads & (heads - 1) == 0:
        first = 2 ** (-(2 ** -((heads.bit_length() - 1) - 3)))
        return [first * first**i for i in range(heads)]
    power = 1 << (heads.bit_length() - 1)
    return slopes(power) + slopes(2 * power)[0::2][: heads - power]


def full_bias(model: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """A complete additive mask (B, H, T, T): causal, padding, and the bias, in float32."""
    heads, n = model.config.num_attention_heads, ids.shape[1]
    distance = torch.arange(n)[:, None] - torch.arange(n)
    bias = -torch.tensor(slopes(heads))[None, :, None, None] * distance.clamp(min=0)
    allowed = (distance >= 0)[None, None]
    if mask is not None:
        allowed = allowed & mask[:, None, None, :].bool()
    lowest = torch.finfo(torch.float32).min
    return bias.masked_fill(~allowed, lowest).expand(len(ids), -1, -1, -1)


def reference(family: str, ids: Tensor, mask: Tensor | None = None, **changes: Any) -> Any:
    """A model whose own eager code gets the bias as its mask, with a table that does not rotate."""

    def still(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        return torch.ones_like(output[0]), torch.zeros_like(output[1])

    model = tiny.make_model(family, **changes)
    model.set_attn_implementation("eager")
    model.get_decoder().rotary_emb.register_forward_hook(still, with_kwargs=True)
    return model(ids, attention_mask=full_bias(model, ids, mask), use_cache=False)


@pytest.fixture(params=[1, 7, 256])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(alibi, "QUERIES_AT_ONCE", request.param)
    return int(request.param)


def test_slopes() -> None:
    assert alibi_slopes(8) == [2.0**-h for h in range(1, 9)]
    for heads in (*range(1, 41), 71, 112):
        assert alibi_slopes(heads) == pytest.approx(slopes(heads), rel=1e-12)


def test_equals_the_full_bias(family: str) -> None:
    ids = tiny.make_ids(2, LENGTH)
    expected = reference(family, ids).logits
    torch.testing.assert_close(tiny.logits(make(family), ids), expected, rtol=1e-5, atol=1e-5)


def test_block_size_changes_nothing(block: int) -> None:
    ids = tiny.make_ids(2, LENGTH)
    expected = reference("llama", ids).logits
    torch.testing.assert_close(tiny.logits(make(), ids), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", [2, 127, 128, 129, 500])
def test_blocks_of_the_kernel(length: int) -> None:
    """Blocks and cells that FlexAttention sees against those that PyTorch finds cell by cell."""
    mask = alibi.causal_blocks(length, torch.device("cpu"))
    wanted = create_block_mask(
        lambda row, head, q, k: q >= k, None, None, length, length, device="cpu"
    )
    assert mask.shape == wanted.shape
    for part in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(mask, part), getattr(wanted, part)), part
        indices = part.replace("num_blocks", "indices")
        ours, theirs = getattr(mask, indices)[0, 0], getattr(wanted, indices)[0, 0]
        for i, count in enumerate(getattr(mask, part)[0, 0].tolist()):
            assert set(ours[i, :count].tolist()) == set(theirs[i, :count].tolist()), (indices, i)


@pytest.mark.skipif(shutil.which("g++") is None, reason="the kernel of a CPU needs a compiler")
def test_the_kernel_on_a_cpu() -> None:
    """What a GPU computes, by the kernel that PyTorch makes for CPUs: 6 heads, two key groups."""
    n, heads = 150, 6
    query, key, value = (torch.randn(1, h, n, 16) for h in (heads, 2, 2))
    found = alibi._in_one_kernel(
        query, key, value, alibi.causal_blocks(n, torch.device("cpu")), 0.25
    )
    key, value = (x.double().repeat_interleave(3, dim=1) for x in (key, value))
    places = torch.arange(n)
    distance = (places[:, None] - places).double()
    scores = query.double() @ key.mT * 0.25
    scores -= torch.tensor(slopes(heads)).double()[:, None, None] * distance
    weights = scores.masked_fill(distance < 0, -torch.inf).softmax(-1)
    expected = (weights @ value).transpose(1, 2).float()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_one_kernel_for_whole_texts(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention against the blocks, which the tests here check: logits and gradients."""
    ids = tiny.make_ids(1, 300).cuda()
    results, calls = {}, []
    kernel = alibi._in_one_kernel
    monkeypatch.setattr(alibi, "_in_one_kernel", lambda *a: (calls.append(1), kernel(*a))[1])
    for flex in (True, False):
        if not flex:
            monkeypatch.setattr(alibi, "causal_blocks", lambda *a: None)
        model = make(family).cuda()
        output = model(ids, labels=ids, use_cache=False)
        output.loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        results[flex] = output.logits.detach(), gradients
        assert len(calls) == model.config.num_hidden_layers
    torch.testing.assert_close(results[True][0], results[False][0], rtol=1e-3, atol=1e-3)
    for one, blocks in zip(results[True][1], results[False][1], strict=True):
        torch.testing.assert_close(one, blocks, rtol=2e-2, atol=1e-4)


def test_head_numbers_that_are_no_power_of_two() -> None:
    changes = {"num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 96}
    ids = tiny.make_ids(1, LENGTH)
    expected = reference("llama", ids, **changes).logits
    result = tiny.logits(make("llama", **changes), ids)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


def test_gradients(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alibi, "QUERIES_AT_ONCE", 13)
    ids = tiny.make_ids(1, 50)
    model, other = make(family).train(), tiny.make_model(family)
    model(ids, labels=ids, use_cache=False).loss.backward()
    # The same weights under the reference: gradients by the host's own attention.
    other.set_attn_implementation("eager")
    other.get_decoder().rotary_emb.register_forward_hook(
        lambda module, args, output: (torch.ones_like(output[0]), torch.zeros_like(output[1]))
    )
    mask = full_bias(other, ids)
    other(ids, labels=ids, attention_mask=mask, use_cache=False).loss.backward()
    wanted = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        if ".scalings." not in name and ".stock." not in name:
            torch.testing.assert_close(parameter.grad, wanted[name].grad, rtol=1e-4, atol=1e-6)


def test_left_padding(family: str) -> None:
    model, ids = make(family), tiny.make_ids(2, LENGTH)
    mask = torch.ones_like(ids)
    mask[0, :37] = 0
    padded = tiny.logits(model, ids, attention_mask=mask)
    alone = tiny.logits(model, ids[:1, 37:])
    torch.testing.assert_close(padded[:1, 37:], alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(padded[1:], tiny.logits(model, ids[1:]), rtol=1e-5, atol=1e-5)
    assert padded.isfinite().all(), "padding itself sees no key and must not become NaN"


@pytest.mark.parametrize("padded", [False, True])
def test_decoding_equals_the_full_forward(family: str, padded: bool) -> None:
    model, ids = make(family), tiny.make_ids(2, 40)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :9] = 0
    full = tiny.logits(model, ids, attention_mask=mask)
    with torch.no_grad():
        # A first piece, a second piece with several queries, then one by one.
        cuts = [0, 17, 29, *range(30, 41)]
        cache, parts = None, []
        for start, end in itertools.pairwise(cuts):
            output = model(
                ids[:, start:end],
                attention_mask=mask[:, :end],
                past_key_values=cache,
                use_cache=True,
            )
            cache, parts = output.past_key_values, [*parts, output.logits]
    seen = mask.bool()
    torch.testing.assert_close(torch.cat(parts, 1)[seen], full[seen], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_is_greedy_decoding(cache: str) -> None:
    model, ids = make(), tiny.make_ids(2, 20)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    with torch.no_grad():
        made = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=8,
            do_sample=False,
            pad_token_id=0,
            cache_implementation=cache,
            disable_compile=True,
        )
        grown = ids
        for _ in range(8):
            extra = torch.ones(2, grown.shape[1] - 20, dtype=mask.dtype)
            wide = torch.cat([mask, extra], 1)
            best = tiny.logits(model, grown, attention_mask=wide)[:, -1:].argmax(-1)
            grown = torch.cat([grown, best], 1)
    assert torch.equal(made, grown)


def test_packed_documents_do_not_see_each_other() -> None:
    model, ids = make(), tiny.make_ids(1, 60)
    places = torch.cat([torch.arange(25), torch.arange(35)])[None]
    packed = tiny.logits(model, ids, position_ids=places)
    torch.testing.assert_close(
        packed[:, 25:], tiny.logits(model, ids[:, 25:]), rtol=1e-5, atol=1e-5
    )


def test_sliding_windows_keep_their_mask() -> None:
    ids = tiny.make_ids(1, 60)
    wide = tiny.logits(make("mistral", sliding_window=1000), ids)
    narrow = tiny.logits(make("mistral", sliding_window=8), ids)
    assert torch.allclose(wide[:, :8], narrow[:, :8], atol=1e-5)
    assert not torch.allclose(wide[:, 30:], narrow[:, 30:], atol=1e-2)


def test_other_models_are_not_touched() -> None:
    """Also not one that shares the config object, or was there before."""
    plain = tiny.make_model()
    other = type(plain)(plain.config).eval()
    other.load_state_dict(plain.state_dict())
    assert other.config is plain.config
    ids = tiny.make_ids(1, LENGTH)
    before = tiny.logits(other, ids)
    extended = clex.extend(plain, CONFIG)
    assert torch.equal(tiny.logits(other, ids), before)
    assert not torch.allclose(tiny.logits(extended, ids), before, atol=1e-2), "on is off"
    assert other.config._attn_implementation != alibi.NAME


def test_restore(family: str) -> None:
    plain = tiny.make_model(family)
    ids, name = tiny.make_ids(1, LENGTH), plain.config._attn_implementation
    before = tiny.logits(plain, ids)
    extended = clex.extend(plain, CONFIG)
    copied = copy.deepcopy(extended)
    assert not torch.allclose(tiny.logits(extended, ids), before, atol=1e-2)
    clex.restore(extended)
    assert extended.config._attn_implementation == name
    assert torch.equal(tiny.logits(extended, ids), before)
    # A copy made while it was on stays on, and comes back by itself.
    assert not torch.allclose(tiny.logits(copied, ids), before, atol=1e-2)
    assert torch.equal(tiny.logits(clex.restore(copied), ids), before)


def test_save_and_load(tmp_path: Path) -> None:
    model, ids = make(), tiny.make_ids(1, LENGTH)
    before = tiny.logits(model, ids)
    clex.save(model, tmp_path)
    assert torch.equal(tiny.logits(clex.load(tmp_path), ids), before)
    assert alibi.NAME not in (tmp_path / "config.json").read_text()


def test_scale_and_positions_change_nothing() -> None:
    model, ids = make(), tiny.make_ids(1, LENGTH)
    with clex.at_scale(model, 4, torch.arange(LENGTH)[None].float() * 2):
        held = tiny.logits(model, ids)
    with clex.at_scale(model, 1):
        assert torch.equal(tiny.logits(model, ids), held)


def test_bfloat16_keeps_far_distances_apart() -> None:
    """In bfloat16, a bias of -1500 and one of -1500.5 would be the same."""
    n = 3002
    query, key = torch.zeros(1, 8, 1, 4), torch.zeros(1, 8, n, 4)
    value = torch.zeros(1, 8, n, 4)
    value[:, :, 1] = 1
    mask = (torch.arange(n) < 2)[None, None, None]
    parts = (x.bfloat16() for x in (query, key, value))
    result, _ = alibi.alibi_attention(torch.nn.Identity(), *parts, mask)
    # Keys 0 and 1 alone are seen; head 0 has slope 1/2.
    assert result[0, 0, 0, 0].item() == pytest.approx(1 / (1 + math.exp(-0.5)), abs=0.004)


def test_memory_is_bounded() -> None:
    """The largest tensor in a forward and backward pass is a block of weights, not T x T."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple | list) else [result]:
                if isinstance(tensor, Tensor):
                    self.numbers = max(self.numbers, tensor.numel())
            return result

    n, heads = 1024, 4
    model = make().train()
    with Largest() as largest:
        hidden = model.get_decoder()(tiny.make_ids(1, n), use_cache=False)[0]
        hidden.sum().backward()
    assert largest.numbers <= heads * alibi.QUERIES_AT_ONCE * n < heads * n * n


def test_models_without_the_interface_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.make_model()
    monkeypatch.setattr(type(model), "_supports_attention_backend", False)
    with pytest.raises(UnsupportedModelError, match="AttentionInterface"):
        clex.extend(model, CONFIG)
    assert not any("ScaledRope" in type(m).__name__ for m in model.modules())
