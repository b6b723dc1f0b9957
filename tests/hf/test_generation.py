"""Generation: one scale for each sequence, whatever the way of decoding and the neighbours."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import clex
import tiny
from clex.errors import ConfigError
from clex.hf.cache_scale import mark_cache, scale_of_cache
from clex.hf.extend import require_extension, scale_for
from clex.hf.forward_pass import remove_hooks
from clex.hf.generation import total_lengths

# Cached decoding and batches do the same sums in another order; float32 logits here are of size 1.
SAME = 1e-4
PROMPTS = (100, 50, 10)  # the native window is 64
NEW = 24
GEMMA3 = transformers.Gemma3TextConfig(
    **{**tiny.GROUPED, "head_dim": 16, "query_pre_attn_scalar": 16, "pad_token_id": 0},
    sliding_window=16,
    layer_types=["sliding_attention", "full_attention"],
)


def make_extended(family: str = "llama", seed: int = 0, **settings: Any) -> Any:
    """Extended to 8 times the native window, with dynamics away from their start."""
    if family == "gemma3":
        model = tiny.build(GEMMA3, seed)
    elif family == "sliding":
        model = tiny.make_model("mistral", seed, sliding_window=24)
    else:
        model = tiny.make_model(family, seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        clex.extend(model, clex.ClexConfig(**{"max_scale": 8, **settings}))
    if settings.get("method", "clex") == "clex":
        tiny.stir(model)
    return model


@pytest.fixture(params=["llama", "gpt_neox", "qwen3", "gemma3", "sliding"])
def model(request: pytest.FixtureRequest) -> Any:
    return make_extended(request.param, steps=4)


@pytest.fixture
def llama() -> Any:
    return make_extended(steps=4)


def make_ids(rows: int, length: int, seed: int = 0) -> Tensor:
    return tiny.make_ids(rows, length, seed).clamp(min=1)  # 0 is for padding


def padded(side: str = "left") -> tuple[Tensor, Tensor, list[Tensor]]:
    """A batch of prompts with its mask, and each prompt alone."""
    alone = [make_ids(1, n, seed=n) for n in PROMPTS]
    ids = torch.zeros(len(alone), max(PROMPTS), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(alone):
        place = slice(-row.shape[1], None) if side == "left" else slice(row.shape[1])
        ids[i, place], mask[i, place] = row[0], 1
    return ids, mask, alone


def generate(model: Any, ids: Tensor, *, by: Any = None, **settings: Any) -> tuple[Tensor, Tensor]:
    """New tokens (B, NEW) and the logits (B, NEW, V) that they were chosen from."""
    output = (by or model.generate)(
        ids,
        **{
            "max_new_tokens": NEW,
            "do_sample": False,
            "pad_token_id": 0,
            "return_dict_in_generate": True,
            "output_logits": True,
            **settings,
        },
    )
    return output.sequences[:, ids.shape[1] :], torch.stack(output.logits, dim=1)


def recomputed(model: Any, ids: Tensor, new: Tensor, t: float) -> Tensor:
    """The same logits from one forward pass without a cache, at scale t."""
    with clex.at_scale(model, t):
        return tiny.logits(model, torch.cat([ids, new], dim=1))[:, ids.shape[1] - 1 : -1]


def shift(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


# Decoding is recomputation.


@pytest.mark.parametrize("prompt", [60, 100])  # the first grows out of the native window
def test_decoding_is_recomputation(model: Any, prompt: int) -> None:
    ids = make_ids(1, prompt)
    t = scale_for(model, prompt + NEW)
    assert t > 1.4
    new, logits = generate(model, ids)
    assert shift(logits, recomputed(model, ids, new, t)) < SAME
    assert shift(logits, recomputed(model, ids, new, t * 1.19)) > 0.01
    assert require_extension(model).scale is None  # held for the call only


def test_without_holding_results_are_wrong(model: Any) -> None:
    ids = make_ids(1, 60)
    new, logits = generate(model, ids)
    remove_hooks(model.get_decoder())  # they would raise
    followed, other = generate(model, ids, by=lambda *a, **k: type(model).generate(model, *a, **k))
    assert not torch.equal(followed, new)
    assert shift(other, logits) > 0.1
    final = recomputed(model, ids, followed, scale_for(model, 60 + NEW))
    assert shift(other, final) > 0.1


def test_plain_generate_past_the_grid_is_refused(llama: Any) -> None:
    """Where the wrapper is bypassed, the keys still cannot go stale."""
    with pytest.raises(ConfigError, match=r"rotated at t = 1 and now t = 1\.189"):
        type(llama).generate(llama, make_ids(1, 60), max_new_tokens=NEW)


def test_sampling(model: Any) -> None:
    ids = make_ids(1, 60)
    torch.manual_seed(0)
    new, logits = generate(model, ids, do_sample=True, temperature=0.8, top_k=0)
    assert shift(logits, recomputed(model, ids, new, scale_for(model, 60 + NEW))) < SAME
    assert not torch.equal(new, generate(model, ids)[0])


@pytest.mark.parametrize(
    "settings",
    [
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 16},
        {"cache_implementation": "static", "prefill_chunk_size": 16},
        {"prompt_lookup_num_tokens": 3, "eos_token_id": tiny.VOCAB},  # 5.5 asks for an end token
    ],
    ids=str,
)
@pytest.mark.parametrize("model", ["llama", "gemma3", "sliding"], indirect=True)
def test_other_ways_to_the_same_tokens(model: Any, settings: dict[str, Any]) -> None:
    ids = make_ids(1, 60)
    new, _ = generate(model, ids)
    assert torch.equal(generate(model, ids, **settings)[0], new)


@pytest.mark.parametrize("assistant_scale", ["extended", "plain", "itself"])
def test_assisted_generation(llama: Any, assistant_scale: str) -> None:
    ids = make_ids(1, 60)
    new, _ = generate(llama, ids)
    assistant = llama if assistant_scale == "itself" else make_extended(seed=1, steps=4)
    if assistant_scale == "plain":
        clex.restore(assistant)
    assisted, _ = generate(llama, ids, assistant_model=assistant)
    assert torch.equal(assisted, new)


def test_assistant_is_held_for_the_whole_text(llama: Any, monkeypatch: Any) -> None:
    assistant, seen = make_extended(seed=1, steps=4), set()
    rope = require_extension(assistant)
    forward = rope.forward

    def watch(*args: Any, **kwargs: Any) -> Any:
        assert rope.scale is not None
        seen.add(rope.scale.item())
        return forward(*args, **kwargs)

    monkeypatch.setattr(rope, "forward", watch)
    generate(llama, make_ids(1, 60), assistant_model=assistant)
    assert list(seen) == [pytest.approx(scale_for(assistant, 60 + NEW))]
    assert rope.scale is None
    with clex.at_scale(llama, 4.0):  # also where the caller holds one for the model
        generate(llama, make_ids(1, 60), assistant_model=assistant)


# Rows.


def test_row_does_not_depend_on_its_neighbours(model: Any) -> None:
    ids, mask, alone = padded()
    new, logits = generate(model, ids, attention_mask=mask)
    for i, row in enumerate(alone):
        own, its_logits = generate(model, row)
        assert torch.equal(new[i], own[0])
        assert shift(logits[i], its_logits[0]) < SAME
        t = scale_for(model, row.shape[1] + NEW)
        assert shift(logits[i], recomputed(model, row, new[i : i + 1], t)[0]) < SAME
    with clex.at_scale(model, scale_for(model, max(PROMPTS) + NEW)):  # one scale for all
        assert shift(generate(model, ids, attention_mask=mask)[1][2, 0], logits[2, 0]) > 0.01


def test_padding_is_found_by_the_pad_token(llama: Any) -> None:
    ids, mask, _ = padded()
    with_mask, _ = generate(llama, ids, attention_mask=mask)
    assert torch.equal(generate(llama, ids)[0], with_mask)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"num_beams": 3, "cache_implementation": "static"},
    ],
    ids=str,
)
@pytest.mark.parametrize("model", ["gpt_neox", "gemma3"], indirect=True)
def test_beams_have_the_scale_of_their_prompt(model: Any, settings: dict[str, Any]) -> None:
    ids, mask, alone = padded()
    settings |= {"output_logits": False, "return_dict_in_generate": False, "do_sample": False}
    settings |= {"max_new_tokens": 12, "pad_token_id": 0}
    together = model.generate(ids, attention_mask=mask, **settings)[:, ids.shape[1] :]
    n = settings.get("num_return_sequences", 1)
    for i, row in enumerate(alone):
        own = model.generate(row, **settings)[:, row.shape[1] :]
        assert torch.equal(together[i * n : (i + 1) * n], own)


def test_returned_sequences_have_the_scale_of_their_prompt(model: Any) -> None:
    ids, mask, alone = padded()
    torch.manual_seed(0)
    new, logits = generate(
        model, ids, attention_mask=mask, num_return_sequences=2, do_sample=True, top_k=0
    )
    for i in range(len(new)):
        row = alone[i // 2]
        t = scale_for(model, row.shape[1] + NEW)
        assert shift(logits[i], recomputed(model, row, new[i : i + 1], t)[0]) < SAME


def test_batch_that_scales_do_not_fit_is_refused(llama: Any) -> None:
    with (
        clex.at_scale(llama, [1.0, 2.0]),
        pytest.raises(ConfigError, match="2 scales are held for a batch of 3 rows"),
    ):
        tiny.logits(llama, make_ids(3, 10))


@pytest.mark.parametrize("side", ["left", "right"])
def test_forward_of_padded_rows(model: Any, side: str) -> None:
    ids, mask, alone = padded(side)
    with torch.no_grad():
        logits = tiny.logits(model, ids, attention_mask=mask)
    for i, row in enumerate(alone):
        assert shift(logits[i][mask[i] == 1], tiny.logits(model, row)[0]) < SAME
    with clex.at_scale(model, scale_for(model, max(PROMPTS))):  # what counting padding would do
        wrong = tiny.logits(model, ids, attention_mask=mask)
    assert shift(wrong[2][mask[2] == 1], logits[2][mask[2] == 1]) > 0.01


def test_gradients_of_padded_rows(llama: Any) -> None:
    ids, mask, _ = padded("right")
    llama(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
    parameters = require_extension(llama).scalings.parameters()
    assert all(p.grad.norm() > 0 for p in parameters)


# How long the text will be.


@pytest.mark.parametrize(
    ("own", "config", "arguments"),
    [
        ({}, None, {}),
        ({}, None, {"max_new_tokens": 70}),
        ({}, None, {"max_length": 90}),
        ({}, None, {"max_length": 90, "max_new_tokens": 70}),
        ({}, {"max_new_tokens": 33}, {}),
        ({}, {"max_length": 77}, {}),
        ({"max_new_tokens": 5}, None, {}),
        ({"max_new_tokens": 5}, {"max_new_tokens": 33}, {}),
        ({"max_length": 80}, None, {"max_new_tokens": 70}),
        ({"max_length": 80}, {"max_length": 60}, {}),
        ({"max_new_tokens": 5}, None, {"max_length": 90}),
    ],
    ids=str,
)
def test_length_is_that_of_transformers(
    llama: Any,
    own: dict[str, Any],
    config: dict[str, Any] | None,
    arguments: dict[str, Any],
    monkeypatch: Any,
) -> None:
    found = []
    prepare = type(llama)._prepare_cache_for_generation

    def watch(self: Any, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        found.append(generation_config.max_length)
        return prepare(self, generation_config, *args, **kwargs)

    monkeypatch.setattr(type(llama), "_prepare_cache_for_generation", watch)
    for name, value in own.items():
        setattr(llama.generation_config, name, value)
    given = None if config is None else transformers.GenerationConfig(**config)
    ids = make_ids(2, 50)
    ours = total_lengths(llama, ids, given, arguments)
    llama.generate(ids, given, **arguments)
    assert found == [ours[0].item()]
    assert len(ours) == 2


def test_length_of_embeddings(llama: Any) -> None:
    ids = make_ids(1, 60)
    new, _ = generate(llama, ids)
    embeddings = llama.get_input_embeddings()(ids)
    assert torch.equal(
        llama.generate(inputs_embeds=embeddings, max_new_tokens=NEW, do_sample=False), new
    )


def test_text_longer_than_the_window_warns(llama: Any) -> None:
    with pytest.warns(UserWarning, match="540 tokens are more than the 512 that max_scale 8"):
        llama.generate(make_ids(1, 500), max_new_tokens=40)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        llama.generate(make_ids(1, 500), max_new_tokens=12)


# Who decides on t.


def test_scale_that_the_caller_holds_is_kept(llama: Any) -> None:
    ids = make_ids(1, 60)
    with clex.at_scale(llama, 4.0):
        new, logits = generate(llama, ids)
    assert shift(logits, recomputed(llama, ids, new, 4.0)) < SAME
    assert shift(logits, generate(llama, ids)[1]) > 0.01


def test_fixed_scale() -> None:
    moving, fixed = make_extended(steps=4), make_extended(steps=4, fixed_scale=4.0)
    ids, mask, _ = padded()
    with clex.at_scale(moving, 4.0):
        logits = tiny.logits(moving, ids, attention_mask=mask)
        new = generate(moving, ids, attention_mask=mask)[0]
    assert torch.equal(tiny.logits(fixed, ids, attention_mask=mask), logits)
    assert torch.equal(generate(fixed, ids, attention_mask=mask)[0], new)
    assert not torch.equal(generate(moving, ids, attention_mask=mask)[0], new)
    assert scale_for(fixed, 10) == scale_for(fixed, 500) == 4.0
    with torch.no_grad():  # learned numbers that change later are seen
        for parameter in require_extension(fixed).scalings.parameters():
            parameter.data += 1
    assert shift(tiny.logits(fixed, ids, attention_mask=mask), logits) > 0.01


@pytest.mark.parametrize("value", [0.5, 9.0, "4"])
def test_fixed_scale_out_of_range_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match="fixed_scale"):
        clex.ClexConfig(max_scale=8, fixed_scale=value)


# Caches that outlive a call.


def test_cache_keeps_its_scale(model: Any) -> None:
    """Without a scale that is held, a loop of forward calls goes on at the scale of its cache."""
    ids = make_ids(2, 60)
    with torch.no_grad(), clex.at_scale(model, 2.0):
        cache = model(input_ids=ids[:, :40], use_cache=True).past_key_values
        whole = model(input_ids=ids).logits
    assert scale_of_cache(cache).tolist() == [2.0]
    with torch.no_grad():
        shared = copy.deepcopy(cache)
        parts = [
            model(input_ids=ids[:, i : i + 1], past_key_values=cache).logits for i in range(40, 60)
        ]
        rest = model(input_ids=ids[:, 40:], past_key_values=shared).logits
    assert shift(torch.cat(parts, dim=1), whole[:, 40:]) < SAME
    assert shift(rest, whole[:, 40:]) < SAME


def test_text_that_outgrows_its_cache_is_refused(model: Any) -> None:
    ids = make_ids(1, 80)
    with torch.no_grad():
        cache = model(input_ids=ids[:, :60], use_cache=True).past_key_values
        for i in range(60, 64):
            model(input_ids=ids[:, i : i + 1], past_key_values=cache)
        with pytest.raises(ConfigError, match=r"t = 1 and now t = 1.189 is wanted.*at_scale"):
            model(input_ids=ids[:, 64:65], past_key_values=cache)
        assert cache.get_seq_length() == 64
        # The mark is what tells: with another one the keys are taken for those of t = 2.
        mark_cache(cache, torch.tensor([2.0]))
        wrong = model(input_ids=ids[:, 64:65], past_key_values=cache).logits
        with clex.at_scale(model, 2.0):
            right = model(input_ids=ids[:, :65]).logits[:, -1:]
    assert shift(wrong, right) > 0.01


def test_cache_of_padded_rows(model: Any) -> None:
    ids, mask, alone = padded()
    ids, mask = ids[:, :-2], mask[:, :-2]
    with torch.no_grad():
        output = model(input_ids=ids, attention_mask=mask, use_cache=True)
        wanted = [scale_for(model, n - 2) for n in PROMPTS]
        assert scale_of_cache(output.past_key_values).tolist() == pytest.approx(wanted)
        for i in range(2):
            step = torch.cat([row[:, i - 2, None] for row in alone])
            mask = torch.cat([mask, torch.ones_like(step)], dim=1)
            output = model(
                input_ids=step,
                attention_mask=mask,
                past_key_values=output.past_key_values,
                position_ids=mask.sum(1, keepdim=True) - 1,
            )
            assert output.logits.isfinite().all()


def test_changed_scale_over_a_cache_is_refused(model: Any) -> None:
    ids = make_ids(1, 40)
    with torch.no_grad(), clex.at_scale(model, 2.0):
        cache = model(input_ids=ids, use_cache=True).past_key_values
    for t in (1.0, 4.0):
        with (
            clex.at_scale(model, t),
            pytest.raises(ConfigError, match=rf"t = 2 and now t = {t:g} is wanted"),
        ):
            model(input_ids=ids[:, :1], past_key_values=cache)
    cache.reset()  # an empty cache belongs to no scale
    cache = transformers.DynamicCache(config=model.config)
    mark_cache(cache, torch.tensor([2.0]))
    with torch.no_grad(), clex.at_scale(model, 4.0):
        model(input_ids=ids, past_key_values=cache)
    assert scale_of_cache(cache).tolist() == [4.0]


def test_cache_of_unknown_scale(llama: Any) -> None:
    ids = make_ids(1, 40)
    plain = tiny.make_model()
    with torch.no_grad():
        cache = plain(input_ids=ids, use_cache=True).past_key_values
        with pytest.raises(ConfigError, match="not known at which t"):
            llama(input_ids=ids[:, :1], past_key_values=cache)
        with pytest.raises(ConfigError, match="not known at which t"):
            llama.generate(ids, past_key_values=cache)
        with clex.at_scale(llama, 1.0):  # the user says it
            llama(input_ids=ids[:, :1], past_key_values=cache)
    assert scale_of_cache(cache).tolist() == [1.0]


def test_generating_again_from_a_cache(model: Any) -> None:
    ids = make_ids(1, 60)
    settings: dict[str, Any] = {"do_sample": False, "return_dict_in_generate": True}
    settings["suppress_tokens"] = [0]  # in the second prompt it would be taken for padding
    first = model.generate(ids, max_new_tokens=24, **settings)
    t = scale_for(model, 84)
    assert scale_of_cache(first.past_key_values).tolist() == pytest.approx([t])
    # There is room up to the next scale of the grid, and not beyond.
    second = model.generate(
        first.sequences, past_key_values=first.past_key_values, max_new_tokens=5, **settings
    )
    with clex.at_scale(model, t):
        assert torch.equal(
            model.generate(ids, max_new_tokens=29, **settings).sequences, second.sequences
        )
    with pytest.raises(ConfigError, match=r"t = 1\.414 and now t = 2 is wanted"):
        model.generate(
            second.sequences, past_key_values=second.past_key_values, max_new_tokens=20, **settings
        )


@pytest.mark.parametrize("method", ["none", "alibi"])
def test_method_that_does_not_follow_t_has_no_stale_keys(method: str) -> None:
    model = make_extended(method=method)
    ids = make_ids(1, 60)
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
        for _ in range(3):
            model(input_ids=make_ids(1, 40), past_key_values=cache)
    assert cache.get_seq_length() == 180


# Continuous batching.


def test_continuous_batching_needs_one_scale() -> None:
    moving, fixed = make_extended(), make_extended(fixed_scale=2.0)
    prompts = [[1, 2, 3], [4, 5, 6, 7]]
    with pytest.raises(ConfigError, match="packs requests of all lengths into one row"):
        moving.generate_batch(prompts)
    with pytest.raises(ConfigError, match="packs requests"):
        moving.generate(make_ids(2, 5), cache_implementation="paged")
    config = transformers.GenerationConfig(max_new_tokens=2, eos_token_id=-1, pad_token_id=0)
    assert fixed.init_continuous_batching(config) is not None
    with clex.at_scale(moving, 2.0):
        assert moving.init_continuous_batching(config) is not None


# Instances.


@pytest.mark.parametrize("way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(model: Any, way: Any) -> None:
    ids = make_ids(1, 60)
    new, _ = generate(model, ids)
    twin = way(model)
    assert torch.equal(generate(twin, ids)[0], new)
    with torch.no_grad():  # on its own
        for parameter in require_extension(model).scalings.parameters():
            parameter += 1
    assert torch.equal(generate(twin, ids)[0], new)
    clex.restore(twin)
    assert "generate" not in vars(twin)
    assert not twin.get_decoder()._forward_pre_hooks
    assert not twin.get_decoder()._forward_hooks
    twin.generate(ids, max_new_tokens=5)
    assert vars(model)["generate"].model is model


def test_restore_brings_a_custom_generate_back() -> None:
    model = tiny.make_model()

    def custom(ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        return type(model).generate(model, ids, *args, **kwargs), "custom"

    model.generate = custom
    clex.extend(model)
    new, label = model.generate(make_ids(1, 60), max_new_tokens=NEW)
    assert (new.shape, label) == ((1, 60 + NEW), "custom")
    clex.restore(model)
    assert model.generate is custom


def test_two_models_are_independent() -> None:
    one, two = make_extended(steps=4), make_extended("qwen3", steps=4)
    ids = make_ids(1, 60)
    new, _ = generate(two, ids)
    with clex.at_scale(one, 8.0):
        assert torch.equal(generate(two, ids)[0], new)
    clex.restore(one)
    assert torch.equal(generate(two, ids)[0], new)


# Compiled.


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_compiled_decoding(family: str) -> None:
    """A static cache and a compiled forward: the same tokens, and one graph for all scales."""
    model = make_extended(family, steps=4)
    ids = make_ids(1, 60)
    wanted = {n: generate(model, ids, max_new_tokens=n)[0] for n in (10, 40)}
    graphs = []

    def backend(graph: Any, example: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    plain = model.forward
    compiled = torch.compile(model.forward, backend=backend, fullgraph=True)

    def forward(*args: Any, **kwargs: Any) -> Any:
        decoding = kwargs["input_ids"].shape[1] == 1
        return (compiled if decoding else plain)(*args, **kwargs)

    model.forward = forward
    settings: dict[str, Any] = {"cache_implementation": "static"}
    if hasattr(model.generation_config, "max_cache_len"):  # else a cache is as long as the text
        settings["max_cache_len"] = 128
    for n, new in wanted.items():
        assert torch.equal(generate(model, ids, max_new_tokens=n, **settings)[0], new)
        if n == 10:
            first = len(graphs)
    assert first > 0
    assert first == len(graphs) or "max_cache_len" not in settings


@pytest.mark.slow
def test_compiled_forward() -> None:
    model = make_extended(method="yarn")
    ids, mask, _ = padded()
    wanted = tiny.logits(model, ids, attention_mask=mask)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    assert shift(tiny.logits(compiled, ids, attention_mask=mask), wanted) < SAME
    with clex.at_scale(model, 4.0):
        held = tiny.logits(model, ids, attention_mask=mask)
        assert shift(tiny.logits(compiled, ids, attention_mask=mask), held) < SAME
    assert shift(held, wanted) > 0.1
