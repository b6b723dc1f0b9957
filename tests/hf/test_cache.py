"""Moving cached keys to another scale, against a cache that was filled at that scale.

Keys of the first layer depend on t through their rotation alone, so there a moved cache must equal
a new one. That the others differ is what makes it an approximation, and is tested as well.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, StaticCache

import clex
import tiny
from clex.errors import ConfigError, UnsupportedModelError
from clex.hf.cache import key_layouts, move_cache

LENGTH = 90
WINDOW = 16
# Keys of random models are of size 1 and angles of 90 rad have an error of 4e-6 in float32.
EXACT = 1e-4

MLA: dict[str, Any] = {
    **tiny.SIZES,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 2,
    "num_key_value_heads": 4,
}
SLIDING: dict[str, Any] = {**tiny.GROUPED, "head_dim": 16, "sliding_window": WINDOW}

# Config, its settings, and where the first layer has its rotated numbers: place, first entry,
# number, neighbours as pairs.
MODELS: dict[str, tuple[Any, dict[str, Any], tuple[str, int, int, bool]]] = {
    "llama": (transformers.LlamaConfig, tiny.GROUPED, ("keys", 0, 16, False)),
    "qwen3": (transformers.Qwen3Config, {**tiny.GROUPED, "head_dim": 16}, ("keys", 0, 16, False)),
    "phi": (
        transformers.PhiConfig,
        {**tiny.SIZES, "partial_rotary_factor": 0.5},
        ("keys", 0, 8, False),
    ),
    "gpt_neox": (*tiny.FAMILIES["gpt_neox"], ("keys", 0, 8, False)),
    "cohere": (transformers.CohereConfig, tiny.GROUPED, ("keys", 0, 16, True)),
    "glm": (
        transformers.GlmConfig,
        {**tiny.GROUPED, "head_dim": 16, "partial_rotary_factor": 0.5},
        ("keys", 0, 8, True),
    ),
    "gemma3": (
        transformers.Gemma3TextConfig,
        {**SLIDING, "layer_types": ["full_attention", "sliding_attention"]},
        ("keys", 0, 16, False),
    ),
    "gpt_oss": (
        transformers.GptOssConfig,
        {**SLIDING, "num_local_experts": 4, "num_experts_per_tok": 2},
        ("keys", 0, 16, False),
    ),
    "deepseek_v2": (transformers.DeepseekV2Config, MLA, ("values", 0, 16, True)),
    "deepseek_v3": (transformers.DeepseekV3Config, MLA, ("values", 0, 16, False)),
}


def make(name: str, **changes: Any) -> Any:
    """A tiny model, extended, with an attention factor that follows t."""
    config_type, settings, _ = MODELS[name]
    settings = dict(settings)
    partial = settings.pop("partial_rotary_factor", None)
    settings["rope_parameters"] = settings.get("rope_parameters") or {
        "rope_type": "default",
        "rope_theta": 10_000.0,
        **({"partial_rotary_factor": partial} if partial else {}),
    }
    if name == "gemma3":
        settings["rope_parameters"] = {
            kind: {"rope_type": "default", "rope_theta": theta}
            for kind, theta in (("full_attention", 1e5), ("sliding_attention", 1e4))
        }
    model = tiny.build(config_type(**{**settings, **changes}))
    extension = clex.ClexConfig(
        method="dynamic_ntk", max_scale=4, temperature="yarn", native_length=tiny.NATIVE
    )
    return clex.extend(model, extension)


@torch.no_grad()
def fill(model: Any, ids: Tensor, t: Any, cache: Any = None, **inputs: Any) -> Any:
    """A cache that read `ids` at scale `t`."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    with clex.at_scale(model, t):
        model(input_ids=ids, past_key_values=cache, use_cache=True, **inputs)
    return cache


def error(a: Any, b: Any, layer: int = 0) -> float:
    """Largest difference between two caches in one layer, keys and values."""
    first, second = a.layers[layer], b.layers[layer]
    return max(
        (x - y).abs().max().item()
        for x, y in ((first.keys, second.keys), (first.values, second.values))
    )


@pytest.mark.parametrize("name", MODELS)
def test_first_layer_equals_a_new_prefill(name: str) -> None:
    model, ids = make(name), tiny.make_ids(2, LENGTH)
    layout = key_layouts(model)[0]
    assert layout is not None
    where = (layout.where, layout.start, layout.rotary_dim, layout.interleaved)
    wanted = MODELS[name][2]
    moved, old, new = (fill(model, ids, t) for t in (1.0, 1.0, 2.7))
    if wanted[0] == "values" and moved.layers[0].keys.shape[-1] != MLA["kv_lora_rank"]:
        # Older releases of transformers cache the whole key of each head, not the compressed form.
        wanted = ("keys", MLA["qk_nope_head_dim"], *wanted[2:])
    assert where == wanted
    move_cache(model, moved, 1.0, 2.7, block=32)
    assert error(moved, new) < EXACT
    assert error(old, new) > 0.3  # stale keys
    assert error(moved, new, layer=1) < error(old, new, layer=1) or name == "gemma3"
    with pytest.raises(ConfigError, match=r"rotated at t = 2\.7"):
        fill(model, ids[:, :1], 1.0, moved)
    fill(model, ids[:, :1], 2.7, copy.deepcopy(moved))  # decoding goes on at the new scale
    move_cache(model, moved, 2.7, 1.0)
    assert error(moved, old) < EXACT


@pytest.mark.parametrize("name", ["llama", "glm", "deepseek_v2"])
def test_attention_factor_is_part_of_the_move(name: str) -> None:
    model, ids = make(name), tiny.make_ids(1, LENGTH)
    new, moved = fill(model, ids, 4.0), fill(model, ids, 1.0)
    for scaling in clex.hf.extend.require_extension(model).scalings.values():
        scaling.attention_factor = torch.ones_like  # a move that forgets it
    move_cache(model, moved, 1.0, 4.0)
    assert error(moved, new) > 0.1


def test_only_first_layer_is_exact() -> None:
    model, ids = make("llama"), tiny.make_ids(1, LENGTH)
    moved, new = fill(model, ids, 1.0), fill(model, ids, 4.0)
    move_cache(model, moved, 1.0, 4.0)
    assert error(moved, new) < EXACT < 0.05 < error(moved, new, layer=1)


def test_layers_that_are_not_extended_stay() -> None:
    model, ids = make("gemma3"), tiny.make_ids(1, LENGTH)
    assert [layout is not None for layout in key_layouts(model)] == [True, False]
    old, moved = fill(model, ids, 1.0), fill(model, ids, 1.0)
    move_cache(model, moved, 1.0, 4.0)
    assert error(moved, old, layer=1) == 0
    assert error(moved, old, layer=0) > 0.3


def test_norm_behind_the_rotation_takes_the_factor_out() -> None:
    config = transformers.HunYuanDenseV1Config(**tiny.GROUPED, head_dim=16)
    extension = clex.ClexConfig(method="dynamic_ntk", max_scale=4, temperature="yarn")
    model, ids = clex.extend(tiny.build(config), extension), tiny.make_ids(1, LENGTH)
    layout = key_layouts(model)[0]
    assert layout is not None and not layout.scaled
    moved, new = fill(model, ids, 1.0), fill(model, ids, 3.0)
    move_cache(model, moved, 1.0, 3.0)
    assert error(moved, new) < EXACT
    # Weights of the norm that differ within a pair break the rotation, and are refused.
    torch.nn.init.uniform_(model.model.layers[0].self_attn.key_layernorm.weight, 0.9, 1.1)
    with pytest.raises(UnsupportedModelError, match="HunYuanDenseV1ForCausalLM"):
        key_layouts(model)


def test_layers_without_rotation_stay() -> None:
    config = transformers.SmolLM3Config(**tiny.GROUPED, no_rope_layers=[1, 0])
    model = clex.extend(tiny.build(config), clex.ClexConfig(method="dynamic_ntk", max_scale=4))
    assert [layout is not None for layout in key_layouts(model)] == [True, False]


@pytest.mark.parametrize("name", ["gpt_oss", "gemma3"])
@pytest.mark.parametrize("length", [WINDOW // 2, LENGTH])
@pytest.mark.parametrize("static", [False, True])
def test_sliding_and_static_caches(name: str, length: int, static: bool) -> None:
    model, ids = make(name), tiny.make_ids(2, length)

    def cache() -> Any:
        if static:
            return StaticCache(config=model.config, max_cache_len=2 * LENGTH)
        return DynamicCache(config=model.config)

    moved, new = fill(model, ids, 1.5, cache()), fill(model, ids, 3.0, cache())
    if name == "gpt_oss" and length == LENGTH:
        assert moved.layers[0].keys.shape[2] in (WINDOW - 1, WINDOW)  # so that offsets are tested
    before = moved.layers[0].keys
    move_cache(model, moved, 1.5, 3.0, block=10)
    assert moved.layers[0].keys is before  # compiled graphs hold its address
    assert error(moved, new) < EXACT


def test_rows_with_padding_and_scales_of_their_own() -> None:
    model, ids = make("llama"), tiny.make_ids(2, LENGTH)
    mask = torch.ones_like(ids)
    mask[1, :30] = 0
    inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    old, new = [1.0, 2.0], [3.0, 4.0]
    moved, wanted = (fill(model, ids, t, **inputs) for t in (old, new))
    wrong = fill(model, ids, old, **inputs)
    move_cache(model, moved, old, new, attention_mask=mask)
    assert error(moved, wanted) < EXACT
    move_cache(model, wrong, old, new)  # slots taken for positions
    assert error(wrong, wanted) > 0.1
    with pytest.raises(ConfigError, match="attention_mask covers 40 of the 90 tokens"):
        move_cache(model, moved, new, old, attention_mask=mask[:, :40])


def test_bfloat16_is_rounded_once() -> None:
    model = make("llama").to(torch.bfloat16)
    ids = tiny.make_ids(1, LENGTH)
    moved, new = fill(model, ids, 1.0), fill(model, ids, 4.0)
    move_cache(model, moved, 1.0, 4.0)
    difference = (moved.layers[0].keys.float() - new.layers[0].keys.float()).norm()
    assert difference / new.layers[0].keys.float().norm() < 2**-7


def test_long_positions_keep_their_precision() -> None:
    model = make("llama")
    cache, far = DynamicCache(config=model.config), 100_000
    keys = torch.randn(1, 2, far, 16)
    cache.update(keys.clone(), keys.clone(), 0)
    layouts = key_layouts(model)
    move_cache(model, cache, 1.0, 4.0, layouts=layouts)
    delta = clex.frequencies(model, 4.0).double() - clex.frequencies(model, 1.0).double()
    angle = (far - 1) * delta
    pairs = torch.complex(keys[0, 0, -1, :8].double(), keys[0, 0, -1, 8:].double())
    a = (
        clex.hf.extend.require_extension(model)
        .scalings["all"]
        .attention_factor(torch.tensor([4.0]))
    )
    wanted = pairs * torch.polar(torch.ones_like(angle), angle) * a.double()
    assert (cache.layers[0].keys[0, 0, -1, :8] - wanted.real).abs().max() < 1e-6
    assert (cache.layers[0].keys[0, 0, -1, 8:] - wanted.imag).abs().max() < 1e-6


def test_same_scale_changes_no_bit_and_caches_of_inference_mode_move() -> None:
    model, ids = make("llama"), tiny.make_ids(1, 20)
    with torch.inference_mode():
        cache = fill(model, ids, 2.0)
    before = cache.layers[0].keys.clone()
    move_cache(model, cache, 2.0, 2.0)
    assert torch.equal(cache.layers[0].keys, before)
    move_cache(model, cache, 2.0, 3.0)
    assert not torch.equal(cache.layers[0].keys, before)


def test_what_cannot_be_moved_is_refused() -> None:
    model, ids = make("llama"), tiny.make_ids(1, 20)
    cache = fill(model, ids, 1.0)
    with pytest.raises(ConfigError, match=r"at least 1, not 0\.5"):
        move_cache(model, cache, 1.0, 0.5)
    with pytest.raises(ConfigError, match="rotated at t = 1 "):
        move_cache(model, cache, 2.0, 3.0)
    with pytest.raises(ConfigError, match="not extended"):
        key_layouts(tiny.make_model())
    cache.layers[1]._quantized_keys = None
    with pytest.raises(UnsupportedModelError, match="DynamicLayer cannot be moved"):
        move_cache(model, cache, 1.0, 2.0)


def test_unknown_layout_is_refused_by_name() -> None:
    model = make("llama")
    projection = model.model.layers[0].self_attn.k_proj
    # A key that depends on more than its rotation: no layout explains it.
    model.model.layers[0].self_attn.k_proj = Restless(projection)
    with pytest.raises(UnsupportedModelError, match=r"layer 0 of LlamaForCausalLM holds its keys"):
        key_layouts(model)


class Restless(torch.nn.Module):
    """Turns its output around at every second call."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner, self.calls = inner, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        result: Tensor = self.inner(x).roll(self.calls, -1)
        return result
