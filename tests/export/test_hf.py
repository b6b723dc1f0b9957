"""Exports for transformers and vLLM, loaded by transformers alone, against the live model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import exports
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

import clex
import tiny
from clex.errors import CheckpointError, ConfigError, OutputError, UnsupportedModelError
from clex.export import export
from clex.export.families import FAMILIES, family_of
from clex.export.fixed import fixed_scale
from clex.export.queries import scale_queries

TOLERANCE = 5e-4


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return exports.write_model(tmp_path / "llama")


def read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_portable_form_is_the_live_model(family: str, tmp_path: Path) -> None:
    source = exports.write_model(tmp_path / family, family)
    exports.write_export(source, tmp_path / "out")
    ids = exports.make_ids(255)
    found = exports.log_probs(exports.plain(tmp_path / "out"), ids)
    assert exports.difference(found, exports.live(source, ids, 4)) < TOLERANCE
    # Without the temperature, or without anything, it would be far away.
    no_temperature = exports.YARN.replace(temperature="none")
    assert exports.difference(found, exports.live(source, ids, 4, no_temperature)) > 0.01
    base = exports.log_probs(exports.plain(source), ids)
    assert exports.difference(found, base) > 100 * TOLERANCE


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gpt_neox", "glm"])
def test_untouched_weights_with_an_attention_factor_are_the_live_model(
    family: str, tmp_path: Path
) -> None:
    source = exports.write_model(tmp_path / family, family)
    exports.write_export(source, tmp_path / "out", form="keep_weights")
    before = load_file(source / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    ids = exports.make_ids(255)
    found = exports.log_probs(exports.plain(tmp_path / "out"), ids)
    assert exports.difference(found, exports.live(source, ids, 4)) < TOLERANCE


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "olmo2", "phi3", "gpt_neox"])
def test_only_the_queries_change(family: str, tmp_path: Path) -> None:
    source = exports.write_model(tmp_path / family, family)
    record = exports.write_export(source, tmp_path / "out")
    before = load_file(source / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    changed = {name for name, tensor in before.items() if not torch.equal(after[name], tensor)}
    module = FAMILIES[family].module
    assert changed == {name for name in before if f".{module}." in name}
    for name in changed:
        old, new = before[name], after[name]
        if family == "phi3":
            kept_old, kept_new, old, new = old[64:], new[64:], old[:64], new[:64]
        elif family == "gpt_neox":
            old, new = (x.view(4, 3, 16, *x.shape[1:]) for x in (old, new))
            # Keys, values, and the half of each query that does not rotate.
            assert torch.equal(old[:, 1:], new[:, 1:])
            kept_old, kept_new = old[:, 0, 8:], new[:, 0, 8:]
            old, new = old[:, 0, :8], new[:, 0, :8]
        else:
            kept_old = kept_new = torch.zeros(1)
        assert torch.equal(kept_old, kept_new)
        assert torch.allclose(new, old * record.temperature, rtol=1e-6, atol=0)


def test_single_scale_configs_leave_no_reader_a_choice(llama: Path, tmp_path: Path) -> None:
    for form, a in (("portable", 1.0), ("keep_weights", 1.1386294)):
        exports.write_export(llama, tmp_path / form, form=form)
        config = read_config(tmp_path / form)
        rope, old = config["rope_parameters"], config["rope_scaling"]
        assert rope["short_factor"] == rope["long_factor"]
        assert len(rope["long_factor"]) == 8
        for length in (
            config["max_position_embeddings"],
            config["original_max_position_embeddings"],
            rope["original_max_position_embeddings"],
        ):
            assert length == 256
        for key in ("attention_factor", "short_mscale", "long_mscale"):
            assert rope[key] == pytest.approx(a, rel=1e-6)
        assert old == {key: value for key, value in rope.items() if key != "rope_theta"}
        assert config["rope_theta"] == rope["rope_theta"] == 10_000.0
        assert rope["factor"] == 1.0


def test_readers_of_the_old_keys_alone_see_the_same_model(llama: Path, tmp_path: Path) -> None:
    exports.write_export(llama, tmp_path / "out")
    ids = exports.make_ids(200)
    wanted = exports.log_probs(exports.plain(tmp_path / "out"), ids)
    config = read_config(tmp_path / "out")
    del config["rope_parameters"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    found = exports.log_probs(exports.plain(tmp_path / "out"), ids)
    assert exports.difference(found, wanted) < 1e-6
    del config["rope_scaling"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    deaf = exports.log_probs(exports.plain(tmp_path / "out"), ids)
    assert exports.difference(deaf, wanted) > 0.1


def test_decoding_is_the_full_forward_across_the_native_window(llama: Path, tmp_path: Path) -> None:
    exports.write_export(llama, tmp_path / "out")
    model, ids = exports.plain(tmp_path / "out"), exports.make_ids(100)
    wanted = exports.log_probs(model, ids)
    with torch.no_grad():
        first = model(input_ids=ids[:, :50], use_cache=True)
        parts, cache = [first.logits], first.past_key_values
        for i in range(50, 100):
            step = model(input_ids=ids[:, i : i + 1], past_key_values=cache, use_cache=True)
            parts.append(step.logits)
    assert exports.difference(torch.cat(parts, 1).log_softmax(-1), wanted) < TOLERANCE


def test_rows_of_a_batch_do_not_change_each_other(llama: Path, tmp_path: Path) -> None:
    exports.write_export(llama, tmp_path / "out")
    model, ids = exports.plain(tmp_path / "out"), exports.make_ids(240)
    alone = exports.log_probs(model, ids[:, :40])
    both = torch.zeros(2, 240, dtype=torch.long)
    both[0], both[1, :40] = ids[0], ids[0, :40]
    mask = torch.zeros(2, 240, dtype=torch.long)
    mask[0], mask[1, :40] = 1, 1
    batched = exports.log_probs(model, both, attention_mask=mask)[1:, :40]
    assert exports.difference(batched, alone) < TOLERANCE


def test_two_scales_for_vllm(llama: Path, tmp_path: Path) -> None:
    record = exports.write_export(llama, tmp_path / "out", "vllm", form="two_scales")
    config = read_config(tmp_path / "out")
    rope = config["rope_parameters"]
    assert rope["short_factor"] == pytest.approx([1.0] * 8, rel=1e-6)
    assert rope["long_factor"] == record.factors
    assert (rope["short_mscale"], rope["factor"]) == (1.0, 4.0)
    assert rope["long_mscale"] == pytest.approx(record.temperature**0.5)
    assert rope["original_max_position_embeddings"] == 64
    assert config["max_position_embeddings"] == 256
    # With it at the top, vLLM takes 64 for the longest text, and the short factors.
    assert "original_max_position_embeddings" not in config
    overrides = json.loads((tmp_path / "out" / "hf_overrides.json").read_text())
    assert overrides["rope_parameters"] == rope


def test_two_scales_are_refused_where_they_change_over_in_mid_text(tmp_path: Path) -> None:
    llama = exports.write_model(tmp_path / "llama")
    olmo = exports.write_model(tmp_path / "olmo2", "olmo2")
    with pytest.raises(UnsupportedModelError, match="two scales are for vLLM"):
        exports.write_export(llama, tmp_path / "out", "hf", form="two_scales")
    with pytest.raises(UnsupportedModelError, match="through transformers"):
        exports.write_export(olmo, tmp_path / "out", "vllm", form="two_scales")


def test_families_that_vllm_would_run_wrong_are_refused(tmp_path: Path) -> None:
    source = exports.write_model(tmp_path / "cohere", "cohere")
    with pytest.raises(UnsupportedModelError, match="rotates pairs"):
        exports.write_export(source, tmp_path / "out", "vllm")


@pytest.mark.parametrize(
    "config",
    [
        transformers.DeepseekV3Config(),
        transformers.Gemma3TextConfig(),
        transformers.FalconConfig(),
    ],
    ids=lambda config: config.model_type,
)
def test_unchecked_families_are_refused(config: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="no export is checked"):
        family_of(config, "hf")


def test_a_query_norm_where_none_is_expected_is_refused(tmp_path: Path) -> None:
    source = exports.write_model(tmp_path / "stablelm", "stablelm", qk_layernorm=True)
    with pytest.raises(UnsupportedModelError, match="qk_layernorm"):
        exports.write_export(source, tmp_path / "out")


def test_an_export_is_not_exported_again(llama: Path, tmp_path: Path) -> None:
    exports.write_export(llama, tmp_path / "out")
    with pytest.raises(CheckpointError, match="scaled twice"):
        exports.write_export(tmp_path / "out", tmp_path / "again")


@pytest.mark.parametrize(
    "rope",
    [
        {
            "rope_type": "llama3",
            "rope_theta": 10_000.0,
            "factor": 2.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
        {
            "rope_type": "yarn",
            "rope_theta": 10_000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_a_base_that_ships_scaled(rope: dict[str, Any], tmp_path: Path) -> None:
    source = exports.write_model(tmp_path / "base", rope_parameters=rope)
    config = clex.ClexConfig(method="linear", max_scale=8, native_length=64, grid="none")
    record = exports.write_export(source, tmp_path / "out", clex=config)
    ids = exports.make_ids(255)
    found = exports.log_probs(exports.plain(tmp_path / "out"), ids)
    assert exports.difference(found, exports.live(source, ids, 4, config)) < TOLERANCE
    # The model's own factors count: against its scaled vector they would all be 4.
    assert max(record.factors) > 4.5
    if rope["rope_type"] == "yarn":
        assert record.temperature > 1.2


def test_fitted_dynamics(llama: Path, tmp_path: Path) -> None:
    model = clex.extend(exports.plain(llama), clex.ClexConfig(max_scale=8, steps=4))
    tiny.stir(model)
    clex.save(model, tmp_path / "dir", weights="none", base_model=str(llama))
    record = export(tmp_path / "dir", tmp_path / "out", target="hf", length=200)
    assert record.temperature != 1
    ids = exports.make_ids(199)
    with clex.at_scale(model, record.scale):
        wanted = exports.log_probs(model, ids)
    found = exports.log_probs(exports.plain(tmp_path / "out"), ids)
    assert exports.difference(found, wanted) < TOLERANCE
    # The scale is that which the live model takes for this length.
    assert exports.difference(found[:, -1], exports.log_probs(model, ids)[:, -1]) < TOLERANCE


def test_trained_weights_go_along(llama: Path, tmp_path: Path) -> None:
    model = clex.extend(exports.plain(llama), clex.ClexConfig(max_scale=8, steps=4))
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1.1)
    clex.save(model, tmp_path / "dir", tokenizer=exports.make_tokenizer())
    export(tmp_path / "dir", tmp_path / "out", target="hf", scale=4)
    ids = exports.make_ids(255)
    with clex.at_scale(model, 4):
        wanted = exports.log_probs(model, ids)
    found = exports.log_probs(exports.plain(tmp_path / "out"), ids)
    assert exports.difference(found, wanted) < TOLERANCE


def make_lora(source: Path) -> Any:
    model = clex.extend(exports.plain(source), clex.ClexConfig(max_scale=8, steps=4))
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    adapted: Any = peft.get_peft_model(model, settings)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    return adapted.eval()


def test_adapters_are_merged(llama: Path, tmp_path: Path) -> None:
    adapted = make_lora(llama)
    clex.save(adapted, tmp_path / "dir", weights="adapter", base_model=str(llama))
    export(tmp_path / "dir", tmp_path / "out", target="hf", scale=4)
    ids = exports.make_ids(255)
    with clex.at_scale(adapted, 4):
        wanted = exports.log_probs(adapted, ids)
    found = exports.log_probs(exports.plain(tmp_path / "out"), ids)
    assert exports.difference(found, wanted) < TOLERANCE
    with adapted.disable_adapter(), clex.at_scale(adapted, 4):
        assert exports.difference(found, exports.log_probs(adapted, ids)) > 0.1


def test_unmerged_adapters_are_refused(llama: Path) -> None:
    with pytest.raises(CheckpointError, match="merged"):
        scale_queries(
            make_lora(llama),
            FAMILIES["llama"],
            fixed_scale(clex.extend(exports.plain(llama), exports.YARN), scale=4),
        )


def test_dtype_is_kept_or_chosen(tmp_path: Path) -> None:
    exports.make_model().to(torch.bfloat16).save_pretrained(tmp_path / "half")
    record = exports.write_export(tmp_path / "half", tmp_path / "kept")
    assert record.weights == "bfloat16"
    assert read_config(tmp_path / "kept")["dtype"] == "bfloat16"
    record = exports.write_export(tmp_path / "half", tmp_path / "wide", dtype="float32")
    assert record.weights == "float32"
    ids = exports.make_ids(255)
    wide = exports.log_probs(exports.plain(tmp_path / "wide"), ids)
    assert exports.difference(wide, exports.live(tmp_path / "half", ids, 4)) < TOLERANCE


def test_the_tokenizer_is_as_long_as_the_window(tmp_path: Path) -> None:
    source = exports.write_model(tmp_path / "base")
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    tokenizer.model_max_length = 64
    tokenizer.save_pretrained(source)
    exports.write_export(source, tmp_path / "out")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").model_max_length == 256


def test_the_same_export_is_left_and_another_refused(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = exports.write_export(llama, out)
    stamp = (out / "model.safetensors").stat().st_mtime_ns
    assert exports.write_export(llama, out) == first
    assert (out / "model.safetensors").stat().st_mtime_ns == stamp
    with pytest.raises(OutputError, match="scale"):
        exports.write_export(llama, out, scale=2)
    with pytest.raises(OutputError, match="weights differ"):
        exports.write_export(llama, out, dtype="bfloat16")
    exports.write_export(llama, out, scale=2, overwrite=True)
    assert read_config(out)["max_position_embeddings"] == 128


def test_a_folder_of_something_else_is_never_replaced(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    with pytest.raises(OutputError, match="not written by clex export"):
        exports.write_export(llama, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "thesis.tex").read_text() == "x"


def test_a_failed_export_leaves_nothing(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("clex.export.workflow.write_card", full)
    with pytest.raises(OutputError, match="no space"):
        exports.write_export(llama, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["llama"]


def test_sources_need_exactly_one_method(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give --method"):
        exports.write_export(llama, tmp_path / "out", clex=None)
    model = clex.extend(exports.plain(llama), clex.ClexConfig(max_scale=8, steps=4))
    clex.save(model, tmp_path / "dir", weights="none", base_model=str(llama))
    with pytest.raises(ConfigError, match="leave out --method"):
        exports.write_export(tmp_path / "dir", tmp_path / "out")


def test_the_card_says_what_it_is(llama: Path, tmp_path: Path) -> None:
    model = clex.extend(exports.plain(llama), clex.ClexConfig(max_scale=8, steps=4))
    front = "---\nlicense: apache-2.0\nlanguage:\n- en\n---\n"
    (llama / "README.md").write_text(front)
    clex.save(model, tmp_path / "dir", weights="none", base_model=str(llama))
    training = {"depth": "dynamics", "steps": 40, "seed": 0}
    run = {"settings": {"data": "/home/me/books", "training": training}}
    (tmp_path / "dir" / "run.json").write_text(json.dumps(run))
    rows = [
        {"method": "clex", "length": 128, "protocol": p, "ppl": x}
        for p, x in (("window", 12.345), ("target", 11.0))
    ]
    (tmp_path / "dir" / "results.json").write_text(json.dumps(rows))
    export(tmp_path / "dir", tmp_path / "out", target="vllm", scale=4)
    card = (tmp_path / "out" / "README.md").read_text()
    for part in (
        "license: apache-2.0",
        "- en",
        "| longest text | 256 tokens |",
        "| scale t | 4 |",
        "| data | books |",
        "| steps | 40 |",
        "| clex | 12.35 / 11.00 |",
        "vllm serve . --max-model-len 256",
    ):
        assert part in card, part
    assert "/home/me" not in card and str(tmp_path) not in card
