"""Frequencies and temperatures of each layer's own, in every family that can have them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import clex
import tiny
from clex.errors import ConfigError, UnsupportedModelError
from clex.hf.cache import key_layouts, move_cache
from clex.hf.extend import require_extension
from clex.hf.specimens import small_model

IDS = tiny.make_ids(2, 150)
KINDS = ("temperature", "curve")


def extended(family: str = "llama", kind: str = "curve", **changes: Any) -> Any:
    config = clex.ClexConfig(max_scale=4, steps=4, per_layer=kind)
    model = clex.extend(tiny.make_model(family, **changes), config)
    tiny.stir(model, std=0.1)
    return model


def by_hand(plain: nn.Module, scaling: Any, t: float) -> Tensor:
    """Logits of a plain model whose layers are each given cos and sin of their own numbers."""
    scale = torch.tensor([t])
    with torch.no_grad():
        inv_freq = scaling.layer_inv_freq(scale)[0].double()
        factor = scaling.layer_attention_factor(scale)[0].double()
    positions = torch.arange(IDS.shape[1], dtype=torch.float64)

    def own(attention: Any, args: Any, kwargs: Any) -> Any:
        layer = attention.layer_idx
        angles = positions[:, None] * inv_freq[layer]
        angles = torch.cat([angles, angles], dim=-1)[None]
        pair = (angles.cos() * factor[layer]).float(), (angles.sin() * factor[layer]).float()
        return args, {**kwargs, "position_embeddings": pair}

    handles = [
        module.register_forward_pre_hook(own, with_kwargs=True)
        for name, module in plain.named_modules()
        if name.endswith(("self_attn", "attention"))
    ]
    found = tiny.logits(plain, IDS)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_each_layer_is_given_its_own(family: str, kind: str) -> None:
    model = extended(family, kind)
    scaling: Any = require_extension(model).scalings["all"]
    with clex.at_scale(model, 3.0):
        found = tiny.logits(model, IDS)
    wanted = by_hand(tiny.make_model(family), scaling, 3.0)
    assert (found - wanted).abs().max() < 2e-4 * wanted.abs().max()

    swapped = copy.deepcopy(scaling)
    with torch.no_grad():
        swapped.field.own.copy_(scaling.field.own.flip(0))
        swapped.temperature.own.copy_(scaling.temperature.own.flip(0))
    assert (by_hand(tiny.make_model(family), swapped, 3.0) - wanted).abs().max() > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_bits_of_the_plain_model_at_one(family: str, kind: str) -> None:
    short = IDS[:, : tiny.NATIVE]
    before = tiny.logits(tiny.make_model(family), short)
    model = extended(family, kind)
    assert torch.equal(tiny.logits(model, short), before)
    with clex.at_scale(model, 4):
        assert (tiny.logits(model, short) - before).abs().max() > 0.1
    clex.restore(model)
    assert torch.equal(tiny.logits(model, short), before)
    assert not [name for name, _ in model.named_buffers() if "clex" in name]


def test_decoding_equals_one_pass_and_rows_their_own(family: str) -> None:
    model = extended(family)
    with clex.at_scale(model, [2.5, 4.0]), torch.no_grad():
        whole = model(IDS, use_cache=False).logits
        cache = model(IDS[:, :-3], use_cache=True).past_key_values
        for k in (3, 2, 1):
            part = IDS[:, -k : -k + 1 or None]
            step = model(part, past_key_values=cache, use_cache=True).logits
            assert (step[:, 0] - whole[:, -k]).abs().max() < 1e-4
    with clex.at_scale(model, 4.0):
        assert (tiny.logits(model, IDS[1:]) - whole[1:]).abs().max() < 1e-4


def test_what_a_gpu_does_has_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = extended().train()
    found: list[Any] = []
    for fused in (False, True):
        monkeypatch.setattr("clex.hf.rotary._worth_it", lambda *_, fused=fused: fused)
        model.zero_grad()
        with clex.at_scale(model, 3.0):
            logits = model(IDS, use_cache=False).logits
        logits.log_softmax(-1)[..., 3].sum().backward()
        found.append((logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}))
    (host, grads), (ours, ours_grads) = found
    assert torch.equal(host, ours)
    for name, grad in grads.items():
        assert (grad - ours_grads[name]).norm() <= 2e-5 * grad.norm(), name
    own = [grads[name] for name in grads if name.endswith(".own")]
    assert len(own) == 2 and all((grad.abs().view(2, -1).sum(1) > 0).all() for grad in own)


def test_recomputed_activations_have_the_same_gradients() -> None:
    found = []
    for again in (False, True):
        torch.manual_seed(0)  # the field's inner weights
        model = extended().train()
        if again:
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        model(IDS, labels=IDS, use_cache=False).loss.backward()
        found.append([p.grad for p in require_extension(model).scalings.parameters()])
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() <= 1e-5 * a.norm()


def test_one_graph_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clex.hf.rotary._worth_it", lambda *_: True)
    model = extended(num_hidden_layers=4)
    with clex.at_scale(model, 3.0), torch.no_grad():
        expected = model(IDS, use_cache=False).logits
        graphs = []

        def backend(graph: Any, _: Any) -> Any:
            graphs.append(graph)
            return graph.forward

        torch.compiler.reset()
        for layer in model.model.layers:
            layer.compile(fullgraph=True, backend=backend)
        assert torch.equal(model(IDS, use_cache=False).logits, expected)
    assert len(graphs) == 1


def test_saved_loaded_and_copied(tmp_path: Path) -> None:
    model = extended()
    expected = tiny.logits(model, IDS)
    clex.save(model, tmp_path / "result", base_model="none")
    loaded = clex.load(tmp_path / "result", tiny.make_model())
    assert torch.equal(tiny.logits(loaded, IDS), expected)
    assert torch.equal(tiny.logits(copy.deepcopy(model), IDS), expected)


def test_moved_keys_of_the_first_layer_are_exact(family: str) -> None:
    model = extended(family)
    caches = []
    for t in (2.0, 3.5):
        with clex.at_scale(model, t), torch.no_grad():
            caches.append(model(IDS, use_cache=True).past_key_values)
    before = caches[0].layers[0].keys.clone()
    move_cache(model, caches[0], 2.0, 3.5, layouts=key_layouts(model))
    moved, wanted = caches[0].layers[0].keys, caches[1].layers[0].keys
    assert (moved - wanted).norm() < 1e-5 * wanted.norm() < (before - wanted).norm()


def test_what_is_shown_is_the_mean_curve() -> None:
    model = extended()
    scaling: Any = require_extension(model).scalings["all"]
    t = torch.tensor([3.0])
    mean = scaling.layer_inv_freq(t)[0].log().mean(0).exp()
    shown = clex.frequencies(model, 3.0)
    assert isinstance(shown, Tensor) and torch.allclose(shown, mean, rtol=1e-5)
    factors = scaling.layer_attention_factor(t)[0]
    assert torch.allclose(factors.log().mean().exp(), scaling.attention_factor(t)[0], rtol=1e-5)
    assert factors.std() > 0


def test_refused() -> None:
    with pytest.raises(ConfigError, match="per_layer 'curve'"):
        clex.ClexConfig(preset="paper", per_layer="curve")
    with pytest.raises(ConfigError, match="learned temperature"):
        clex.ClexConfig(temperature="log_n", per_layer="temperature")
    with pytest.raises(ConfigError, match="per_layer"):
        clex.ClexConfig(per_layer="layers")
    with pytest.raises(ConfigError, match="belongs to method 'clex'"):
        clex.ClexConfig(method="yarn", per_layer="curve")


def test_layer_types_and_other_decoders_are_refused_by_name() -> None:
    config = clex.ClexConfig(max_scale=4, per_layer="curve")
    model = small_model("gemma3_text")
    with pytest.raises(UnsupportedModelError, match="per_layer"):
        clex.extend(model, config)
    clex.extend(model, clex.ClexConfig(max_scale=4))  # it was left as it was
