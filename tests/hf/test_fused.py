"""Attention that rotates in one operator: the seam, on models whose rotary gives it the angles."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaAttention

import clex
import tiny
from clex.hf.extend import require_extension

IDS = tiny.make_ids(2, 40)


@pytest.fixture
def angles(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: fused attention is given positions and frequencies."""
    monkeypatch.setattr("clex.hf.rotary._worth_it", lambda *_: True)


def extended(**changes: Any) -> Any:
    model = clex.extend(tiny.make_model(**changes), clex.ClexConfig(max_scale=4, steps=2))
    tiny.stir(model)
    return model


def logits(model: Any, t: Any = 3.0, **inputs: Any) -> Tensor:
    with clex.at_scale(model, t):
        found: Tensor = model(IDS, use_cache=False, **inputs).logits
    return found


def operators(model: Any, **inputs: Any) -> int:
    """How often the rotation ran as the operator's function."""
    calls = []
    with torch.autograd.profiler.profile() as profile:
        logits(model, **inputs)
    calls = [event for event in profile.function_events if event.name == "_Rotate"]
    return len(calls)


def test_the_operator_runs_once_a_layer(angles: None) -> None:
    assert operators(extended()) == 2


def test_cpu_keeps_the_hosts_code() -> None:
    assert operators(extended()) == 0


def test_factor_of_the_hosts_own_rotary_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "attention_factor": 1.3}
    model = extended(rope_parameters={**yarn, "original_max_position_embeddings": 16})
    host = logits(model)
    monkeypatch.setattr("clex.hf.rotary._worth_it", lambda *_: True)
    assert torch.equal(logits(model), host)


def test_gradients_are_those_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    model = extended().train()
    found = []
    for fused in (False, True):
        monkeypatch.setattr("clex.hf.rotary._worth_it", lambda *_, fused=fused: fused)
        model.zero_grad()
        logits(model, torch.tensor([3.0, 1.5])).log_softmax(-1)[..., 3].sum().backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, grad in found[0].items():
        assert (grad - found[1][name]).norm() <= 2e-5 * grad.norm(), name
    assert any("scalings" in name for name in found[0])


def test_sampled_positions_reach_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    model = extended()
    positions = torch.arange(40).float() * 2.5
    with clex.at_scale(model, 3.0, positions.expand(2, -1)):
        host = model(IDS, use_cache=False).logits
        monkeypatch.setattr("clex.hf.rotary._worth_it", lambda *_: True)
        assert torch.equal(model(IDS, use_cache=False).logits, host)
    assert not torch.equal(logits(model), host)


def test_other_models_and_classes_stay_as_they_are(angles: None) -> None:
    forward, other = LlamaAttention.forward, tiny.make_model()
    model = extended()
    attention = model.model.layers[0].self_attn
    assert isinstance(attention, LlamaAttention) and type(attention) is not LlamaAttention
    assert LlamaAttention.forward is forward
    assert type(other.model.layers[0].self_attn) is LlamaAttention
    clex.restore(model)
    assert type(attention) is LlamaAttention


@pytest.mark.parametrize("way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_fused_as_well(angles: None, way: Any) -> None:
    model = extended()
    copied = way(model)
    assert operators(copied) == 2
    assert torch.equal(logits(copied), logits(model))
    inner = copied.model.layers[0].self_attn
    assert inner.q_proj is not model.model.layers[0].self_attn.q_proj


@pytest.mark.parametrize("learning", [False, True])
def test_compiles_without_a_break_and_once_for_all_layers(angles: None, learning: bool) -> None:
    """With gradients the compiler sees plain operations, which it fuses better than an operator."""
    model = extended()
    with torch.no_grad():
        expected = logits(model)
    graphs = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    for layer in model.model.layers:
        layer.compile(fullgraph=True, backend=backend)
    with torch.set_grad_enabled(learning):
        assert torch.equal(logits(model), expected)
    assert len(graphs) == 1
    targets = [str(node.target) for node in graphs[0].graph.nodes]
    assert sum("clex.rotate" in target for target in targets) == 1


def test_attention_that_takes_the_tables_apart_is_left_alone() -> None:
    from clex.hf.specimens import small_model

    for name in ("deepseek_v3", "cohere", "llama4_text"):
        model = clex.extend(small_model(name), clex.ClexConfig(max_scale=4, steps=2))
        assert require_extension(model).interleaved is None, name


def test_attention_with_a_forward_of_its_own_is_left_alone(angles: None) -> None:
    """As accelerate's hooks put it on an instance where a model is spread over devices."""
    model = tiny.make_model()
    attention = model.model.layers[1].self_attn
    attention.forward = attention.forward
    clex.extend(model, clex.ClexConfig(max_scale=4, steps=2))
    assert require_extension(model).interleaved is None
    logits(model)


def test_what_cannot_run_here_is_left_to_the_host(
    angles: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("no C compiler")

    monkeypatch.setattr("clex.hf.rotary.fuse", broken)
    with pytest.warns(UserWarning, match=r"no C compiler.*CLEX_NO_KERNELS"):
        model = extended()
    assert require_extension(model).interleaved is None
    logits(model)
