"""Checkpoints of the authors' code, faked in their layout, against the released algorithm."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import clex
import references
import tiny
from clex import cli
from clex.errors import CheckpointError, OutputError
from clex.hf import official
from clex.hf.extend import config_of, require_extension
from clex.hf.official import INDEX_FILE, import_official
from references import Shape, assert_close

MAX_FACTOR = 16
UP, DOWN = (f"model.clex_layer.proj_func.ode_{name}_proj" for name in ("up", "down"))
SMALL: dict[str, Any] = {**tiny.GROUPED, "hidden_size": 128, "vocab_size": 256}


@dataclass(frozen=True)
class Family:
    """A family that the authors released, and the share of a head that it rotates."""

    config: type[transformers.PreTrainedConfig]
    settings: dict[str, Any]
    partial: float = 1.0


FAMILIES = {
    "llama": Family(transformers.LlamaConfig, SMALL),
    "mixtral": Family(transformers.MixtralConfig, {**SMALL, "num_local_experts": 2}),
    "phi": Family(transformers.PhiConfig, SMALL, partial=0.4),
}


@dataclass(frozen=True)
class Fake:
    """A folder as the authors' code writes it, with what is in it."""

    folder: Path
    shape: Shape
    up: Tensor
    down: Tensor
    plain: Any

    def expected(self, scales: list[int], act: str = "tanh") -> references.Vector:
        up, down = (w.double().numpy() for w in (self.up, self.down))
        return released(self.shape, up, down, scales, act)


def released(
    shape: Shape, up: references.Vector, down: references.Vector, scales: list[int], act: str
) -> references.Vector:
    """The reference, which has tanh; for SiLU the same with tanh exchanged while it runs."""
    if act == "tanh":
        return references.released_clex(shape, up, down, scales)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np, "tanh", lambda x: x / (1 + np.exp(-x)))
        return references.released_clex(shape, up, down, scales)


def make_fake(
    folder: Path,
    family: str = "llama",
    theta: float = 10_000.0,
    *,
    factor: int = 1,
    per_layer: bool = False,
    dtype: torch.dtype = torch.float32,
    shard: str = "5GB",
    **scaling: Any,
) -> Fake:
    about = FAMILIES[family]
    rope = {"rope_type": "default", "rope_theta": theta}
    if about.partial < 1:
        rope["partial_rotary_factor"] = about.partial
    config = about.config(**{**about.settings, "rope_parameters": rope})
    plain = tiny.build(config, dtype=dtype)
    plain.save_pretrained(folder, max_shard_size=shard)
    tiny.make_tokenizer().save_pretrained(folder)
    shape = Shape(32, theta, about.partial, tiny.NATIVE)
    d = shape.rotary_dim
    generator = torch.Generator().manual_seed(3)
    up = (torch.rand(d // 2, factor * d, generator=generator) - 0.5) / 2
    down = 0.005 * torch.randn(factor * d, d // 2, generator=generator)
    up, down = up.to(dtype), down.to(dtype)
    layers = range(config.num_hidden_layers)
    stems = [f"layers.{i}.self_attn." for i in layers] if per_layer else [""]
    add = {}
    for stem in stems:
        prefix = f"model.{stem}clex_layer"
        add[f"{prefix}.proj_func.ode_up_proj"] = up.clone()
        add[f"{prefix}.proj_func.ode_down_proj"] = down.clone()
        add[f"{prefix}.inv_freq"] = torch.tensor(references.inv_freq(shape)).to(dtype)
    add_tensors(folder, add)
    # The form of config.json of early 2024.
    values = json.loads((folder / "config.json").read_text())
    values.pop("rope_parameters")
    values |= {
        "rope_theta": theta,
        "architectures": [f"CLEX{family.title()}ForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling_clex.CLEXForCausalLM"},
        "use_flashattn": True,
        "log_scale": True,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "rope_scaling": {
            "type": "clex",
            "max_factor": MAX_FACTOR,
            "param_factor": factor,
            "act": "tanh",
            "time_dt": 0.01,
            **scaling,
        },
    }
    if about.partial < 1:
        values["partial_rotary_factor"] = about.partial
    edit_config(folder, lambda _: values)
    return Fake(folder, shape, up, down, plain)


def add_tensors(folder: Path, add: dict[str, Tensor]) -> None:
    """To the only weight file, or to the last one and to the index."""
    index = folder / INDEX_FILE
    names = sorted(p.name for p in folder.glob("*.safetensors"))
    state = load_file(folder / names[-1])
    save_file(state | add, folder / names[-1], metadata={"format": "pt"})
    if index.is_file():
        values = json.loads(index.read_text())
        values["weight_map"] |= dict.fromkeys(add, names[-1])
        index.write_text(json.dumps(values))


def edit_weights(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    state = load_file(folder / "model.safetensors")
    edit(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads((folder / "config.json").read_text())
    result = edit(values)
    (folder / "config.json").write_text(json.dumps(result if isinstance(result, dict) else values))


def vectors(model: Any, scales: list[int]) -> Tensor:
    return torch.stack([clex.frequencies(model, t) for t in scales])


@pytest.mark.parametrize(
    ("family", "theta", "largest"),
    # The released algorithm takes 100 steps for each unit of t, so 16 is not done for all.
    [("llama", 1e4, 16), ("llama", 5e5, 4), ("mixtral", 1e6, 4), ("phi", 1e4, 16), ("phi", 5e5, 4)],
)
def test_same_frequencies_at_every_scale(
    family: str, theta: float, largest: int, tmp_path: Path
) -> None:
    fake = make_fake(tmp_path / "official", family, theta, max_factor=largest)
    model = clex.load(import_official(fake.folder, tmp_path / "out"))
    scales = list(range(1, largest + 1))
    assert_close(vectors(model, scales), fake.expected(scales), 1e-5)
    # The negative: the field is there.
    untrained = references.ntk(fake.shape, 2 * largest - 1)
    assert np.abs(np.log(vectors(model, [largest])[0].numpy() / untrained)).max() > 0.01
    config = config_of(model)
    assert (config.preset, config.grid, config.max_scale) == ("paper", "integer", largest)
    assert config.native_length == tiny.NATIVE and config.width == 1


@pytest.mark.parametrize("act", ["tanh", "silu"])
@pytest.mark.parametrize("factor", [1, 2])
def test_settings(act: str, factor: int, tmp_path: Path) -> None:
    fake = make_fake(tmp_path / "official", factor=factor, act=act, max_factor=4)
    model = clex.load(import_official(fake.folder, tmp_path / "out"))
    assert_close(vectors(model, [1, 2, 3, 4]), fake.expected([1, 2, 3, 4], act), 1e-5)
    field: Any = require_extension(model).scalings["all"].field
    assert field.up.weight.shape == (32 * factor, 16)


def test_the_first_release_named_no_activation(tmp_path: Path) -> None:
    fake = make_fake(tmp_path / "official")
    edit_config(fake.folder, lambda c: c["rope_scaling"].pop("act"))
    model = clex.load(import_official(fake.folder, tmp_path / "out"))
    assert_close(vectors(model, [4]), fake.expected([4], "silu"), 1e-5)


def test_the_plain_model_inside(tmp_path: Path) -> None:
    """At t = 1 its logits, bit for bit; its own files say nothing of the authors' code."""
    fake = make_fake(tmp_path / "official")
    out = import_official(fake.folder, tmp_path / "out")
    ids = tiny.make_ids(2, tiny.NATIVE, vocab=256)
    assert torch.equal(tiny.logits(clex.load(out), ids), tiny.logits(fake.plain, ids))
    stock = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(tiny.logits(stock, ids), tiny.logits(fake.plain, ids))
    written = json.loads((out / "config.json").read_text())
    assert written["rope_parameters"] == {"rope_type": "default", "rope_theta": 1e4}
    assert written["architectures"] == ["LlamaForCausalLM"]
    assert not {"rope_scaling", "auto_map", "log_scale", "use_flashattn"} & written.keys()
    assert not [key for key in load_file(out / "model.safetensors") if "clex" in key]
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert tokenizer("abc")["input_ids"] == tiny.make_tokenizer()("abc")["input_ids"]
    # The negative: beyond the window they differ.
    long = tiny.make_ids(1, 2 * tiny.NATIVE, vocab=256)
    assert not torch.allclose(tiny.logits(clex.load(out), long), tiny.logits(stock, long))


@pytest.mark.parametrize("family", ["mixtral", "phi"])
def test_other_families_keep_their_weights(family: str, tmp_path: Path) -> None:
    fake = make_fake(tmp_path / "official", family)
    model = clex.load(import_official(fake.folder, tmp_path / "out"))
    ids = tiny.make_ids(2, tiny.NATIVE, vocab=256)
    assert torch.equal(tiny.logits(model, ids), tiny.logits(fake.plain, ids))


def test_several_files(tmp_path: Path) -> None:
    fake = make_fake(tmp_path / "official", shard="200KB")
    files = sorted(p.name for p in fake.folder.glob("*.safetensors"))
    assert len(files) > 2
    out = import_official(fake.folder, tmp_path / "out")
    assert sorted(p.name for p in out.glob("model-*.safetensors")) == files
    ids = tiny.make_ids(1, tiny.NATIVE, vocab=256)
    assert torch.equal(tiny.logits(clex.load(out), ids), tiny.logits(fake.plain, ids))
    # A file of the index that is not there.
    (fake.folder / files[1]).unlink()
    refused(fake, tmp_path, f"lacks the weight file {files[1]}")


def test_the_field_in_every_layer(tmp_path: Path) -> None:
    fake = make_fake(tmp_path / "official", per_layer=True)
    model = clex.load(import_official(fake.folder, tmp_path / "out"))
    assert_close(vectors(model, [8]), fake.expected([8]), 1e-5)
    second = "model.layers.1.self_attn.clex_layer.proj_func.ode_up_proj"
    edit_weights(fake.folder, lambda s: s[second].add_(1e-3))
    refused(fake, tmp_path, "layers.1.*differs from.*layers.0")
    edit_weights(
        fake.folder, lambda s: [s.pop(key) for key in list(s) if ".1.self_attn.clex" in key]
    )
    refused(fake, tmp_path, "lacks model.layers.1.self_attn.clex_layer.proj_func.ode_up_proj")


def test_bfloat16(tmp_path: Path) -> None:
    """Weights stay in it; the field is used in float32, as in the released code."""
    fake = make_fake(tmp_path / "official", dtype=torch.bfloat16)
    out = import_official(fake.folder, tmp_path / "out")
    assert load_file(out / "model.safetensors")["lm_head.weight"].dtype == torch.bfloat16
    assert_close(vectors(clex.load(out), [16]), fake.expected([16]), 1e-5)


def test_long_ranges_get_more_steps(tmp_path: Path) -> None:
    """The 64 steps of the preset are too few up to t = 64."""
    fake = make_fake(tmp_path / "official", max_factor=64)
    model = clex.load(import_official(fake.folder, tmp_path / "out"))
    assert config_of(model).steps == 128
    scales = [1, 2, 8, 33, 64]
    up, down = (w.double().numpy() for w in (fake.up, fake.down))
    # Larger steps than the released 0.01, whose 6,300 take long; in float64 the same to 1e-9.
    expected = references.released_clex(fake.shape, up, down, scales, step=0.05)
    assert_close(vectors(model, scales), expected, 1e-5)


def test_strong_fields(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Far stronger than any that was published; and what is said where float32 is not enough."""
    fake = make_fake(tmp_path / "official", max_factor=8)

    def strengthen(state: dict[str, Tensor]) -> None:
        state[UP].mul_(8)
        state[DOWN].mul_(40)

    edit_weights(fake.folder, strengthen)
    fake.up.mul_(8)
    fake.down.mul_(40)
    model = clex.load(import_official(fake.folder, tmp_path / "out"))
    assert_close(vectors(model, [2, 8]), fake.expected([2, 8]), 1e-5)
    monkeypatch.setattr(official, "_SAME", 0.0)
    with pytest.warns(UserWarning, match=r"are exact to \de-0\d only"):
        import_official(fake.folder, tmp_path / "warned")
    monkeypatch.setattr(official, "_USELESS", 0.0)
    refused(fake, tmp_path, "cannot be solved in float32")


def test_native_length(tmp_path: Path) -> None:
    fake = make_fake(tmp_path / "official")
    given = import_official(fake.folder, tmp_path / "given", native_length=32)
    assert config_of(clex.load(given)).native_length == 32
    edit_config(fake.folder, lambda c: c.update(original_max_position_embeddings=16))
    read = import_official(fake.folder, tmp_path / "read")
    assert config_of(clex.load(read)).native_length == 16


# What is refused: with a reason, and nothing written.


def refused(fake: Fake, tmp_path: Path, reason: str) -> None:
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(CheckpointError, match=reason):
        import_official(fake.folder, tmp_path / "refused")
    assert sorted(p.name for p in tmp_path.iterdir()) == before


BAD_WEIGHTS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no up": (lambda s: s.pop(UP), f"lacks {UP}"),
    "no down": (lambda s: s.pop(DOWN), f"lacks {DOWN}"),
    "neither": (lambda s: (s.pop(UP), s.pop(DOWN)), "no .*ode_up_proj and no .*ode_down_proj"),
    "wide": (lambda s: s.update({UP: torch.zeros(16, 48)}), r"\(16, 48\), the config .*\(16, 32\)"),
    "transposed": (lambda s: s.update({DOWN: s[DOWN].T.contiguous()}), r"ode_down_proj has shape"),
    "nan": (lambda s: s[DOWN].fill_(float("nan")), "not finite"),
    "base": (
        lambda s: s["model.clex_layer.inv_freq"].pow_(1.5),
        "other frequencies.*rope_theta 10000.*correct rope_theta",
    ),
    "weight": (lambda s: s.pop("model.layers.1.mlp.up_proj.weight"), "lacks model.layers.1.mlp"),
    "shape": (lambda s: s.update({"lm_head.weight": torch.zeros(3, 3)}), "lm_head|mismatch"),
}
BAD_CONFIGS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "plain": (lambda c: c.pop("rope_scaling"), "no CLEX checkpoint: rope_scaling .* is None"),
    "other type": (lambda c: c["rope_scaling"].update(type="linear"), "not of type 'clex'"),
    "max_factor": (lambda c: c["rope_scaling"].pop("max_factor"), "has no max_factor"),
    "both": (
        lambda c: [c["rope_scaling"].pop(key) for key in ("max_factor", "param_factor")],
        "has no max_factor and no param_factor",
    ),
    "act": (lambda c: c["rope_scaling"].update(act="gelu"), "unknown activation 'gelu'"),
    "one": (lambda c: c["rope_scaling"].update(max_factor=1), "max_scale must be above 1"),
    "text": (lambda c: c["rope_scaling"].update(max_factor="16"), "max_scale must be a number"),
    "family": (lambda c: c.update(model_type="gpt2"), "model_type is 'gpt2'.*llama, mixtral, phi"),
    "list": (lambda c: c.update(rope_scaling=[1]), "no CLEX checkpoint"),
}


@pytest.mark.parametrize("case", BAD_WEIGHTS)
def test_bad_weights(case: str, tmp_path: Path) -> None:
    fake, (edit, reason) = make_fake(tmp_path / "official"), BAD_WEIGHTS[case]
    edit_weights(fake.folder, edit)
    refused(fake, tmp_path, reason)


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_bad_configs(case: str, tmp_path: Path) -> None:
    fake, (edit, reason) = make_fake(tmp_path / "official"), BAD_CONFIGS[case]
    edit_config(fake.folder, edit)
    refused(fake, tmp_path, reason)


def test_missing_files(tmp_path: Path) -> None:
    fake = make_fake(tmp_path / "official")
    weights = fake.folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    refused(fake, tmp_path, "cannot read .*model.safetensors")
    weights.rename(fake.folder / "pytorch_model.bin")
    refused(fake, tmp_path, "pytorch_model.bin, a pickle.*convert it to safetensors")
    (fake.folder / "pytorch_model.bin").unlink()
    refused(fake, tmp_path, "no model.safetensors")
    (fake.folder / "config.json").unlink()
    refused(fake, tmp_path, "no config.json in")


def test_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = make_fake(tmp_path / "official")

    def call(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["clex", "import-official", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return int(caught.value.code or 0), capsys.readouterr().err

    out = tmp_path / "out"
    assert call(fake.folder, "--out", out, "--native-length", 32)[0] == 0
    assert config_of(clex.load(out)).native_length == 32
    # What is there is not touched.
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    code, said = call(fake.folder, "--out", out)
    assert code == 2 and "is not empty" in said
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    code, said = call(tmp_path, "--out", tmp_path / "other")
    assert code == 2 and said.startswith("clex: no config.json")
    with pytest.raises(OutputError):
        import_official(fake.folder, fake.folder)
