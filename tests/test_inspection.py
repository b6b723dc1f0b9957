"""`clex methods` and `clex inspect`: what they say is what the registry and the models are."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import clex
import tiny
from clex import cli
from clex.catalogue import method_rows, methods_table
from clex.errors import ConfigError, UnsupportedModelError
from clex.hf.extend import scaling_options
from clex.hf.skeleton import load_skeleton
from clex.inspection import _scales, inspect_model, write_inspection
from clex.scaling import scaling_methods

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Run the command line in this process: exit code, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["clex", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "120")
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main()
        said = capsys.readouterr()
        code = caught.value.code
        return (code if isinstance(code, int) else 0), said.out, said.err

    return run


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("plain") / "model")


@pytest.fixture
def extended(plain: Path, tmp_path: Path) -> Path:
    """A result with its weights elsewhere, away from its start."""
    model = clex.extend(clex.hf.models.load_base(plain), clex.ClexConfig(max_scale=4, steps=4))
    tiny.stir(model)
    return clex.save(model, tmp_path / "extended", weights="none", base_model=str(plain))


# Methods.


def test_every_method_has_its_row() -> None:
    rows = {row.name: row for row in method_rows()}
    assert list(rows) == list(scaling_methods())
    for row in rows.values():
        assert row.what and row.source, row.name
    assert [name for name, row in rows.items() if row.kind == "learned"] == ["clex"]
    assert rows["clex"].temperature == "learned" and rows["yarn"].temperature == "yarn"
    assert not rows["abf"].exact_at_one and rows["linear"].exact_at_one
    assert rows["longrope"].needs == ("long_factor",)
    for name in ("none", "linear", "ntk", "dynamic_ntk", "yarn", "abf", "llama3", "clex"):
        assert rows[name].exportable, name


def test_methods_as_json_and_as_table(call: Cli) -> None:
    code, said, _ = call("methods", "--json")
    assert code == 0
    assert json.loads(said) == [row.to_dict() for row in method_rows()]
    code, said, _ = call("methods")
    assert code == 0
    for name in scaling_methods():
        assert f" {name} " in said, name


def test_brackets_in_the_table_are_text() -> None:
    """A docstring such as "f[i]" must not be read as markup."""
    row = dataclasses.replace(method_rows()[0], what="scales [bold]f[i][/bold]")
    console = Console(width=200, record=True)
    console.print(methods_table([row]))
    assert "[bold]f[i][/bold]" in console.export_text()


# Models.


def test_a_plain_model(plain: Path, tmp_path: Path, call: Cli) -> None:
    code, said, _ = call("inspect", plain, "--scale", 4, "--out", tmp_path / "out")
    assert code == 0
    assert "model.rotary_emb" in said and "LlamaRotaryEmbedding" in said
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"inspect.json", "inspect.png"}
    assert (tmp_path / "out" / "inspect.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((tmp_path / "out" / "inspect.json").read_text())
    assert found["modules"] == [
        {
            "path": "model.rotary_emb",
            "module": "LlamaRotaryEmbedding",
            "layer_type": "all",
            "rotary_dim": 16,
            "native_length": 64,
            "theta": 10_000.0,
            "per_row": True,
        }
    ]
    assert found["scales"] == [1, 2, 4]
    assert [c["method"] for c in found["curves"]] == ["linear", "yarn", "critical_ntk"]
    for curves in found["curves"]:
        model = clex.extend(
            clex.hf.models.load_base(plain), clex.ClexConfig(method=curves["method"], max_scale=4)
        )
        for t, vector in zip(found["scales"], curves["inv_freq"]["all"], strict=True):
            assert torch.equal(torch.tensor(vector), clex.frequencies(model, t)), (curves, t)
        assert torch.equal(torch.tensor(found["native"]["all"]), clex.frequencies(model, 1))


def test_a_result_comes_first_with_its_own_numbers(extended: Path) -> None:
    found = inspect_model(extended, ["linear", "clex"])
    assert [c.method for c in found.curves] == ["clex (this model)", "linear", "clex"]
    assert found.scales == [1, 2, 4], "up to its max_scale"
    model = clex.load(extended)
    own = found.curves[0].inv_freq["all"]
    assert torch.equal(torch.tensor(own[2]), clex.frequencies(model, 4))
    # The negative: an untrained one has other numbers.
    assert own[2] != found.curves[2].inv_freq["all"][2]
    assert found.curves[0].attention_factor[2] > 1


def test_no_weights_are_read(extended: Path, plain: Path, tmp_path: Path) -> None:
    """Weights that cannot be read are not noticed, and a skeleton has almost no memory."""
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((plain / "config.json").read_bytes())
    (bare / "model.safetensors").write_bytes(b"not weights")
    assert inspect_model(bare, ["linear"]).modules[0].native_length == 64
    skeleton = load_skeleton(extended)
    real = {n for n, p in skeleton.named_parameters() if p.device.type != "meta"}
    assert real and all(n == "place" or ".scalings." in n for n in real)
    assert scaling_options(next(iter(_rope(skeleton).scalings.values()))) == {}


def _rope(model: Any) -> Any:
    return clex.hf.extend.require_extension(model)


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_families(family: str, tmp_path: Path) -> None:
    tiny.make_model(family).config.save_pretrained(tmp_path)
    found = inspect_model(tmp_path, ["linear"])
    # The reference: the model with its weights.
    model = clex.extend(tiny.make_model(family), clex.ClexConfig(method="linear", max_scale=8))
    assert found.modules[0].rotary_dim == 2 * clex.frequencies(model, 8).numel()
    assert found.curves[0].inv_freq["all"][-1] == clex.frequencies(model, 8).tolist()


def test_layer_types(tmp_path: Path) -> None:
    """Only full attention is replaced; vectors are by layer type."""
    import transformers

    config = transformers.Gemma3TextConfig(
        **{**tiny.GROUPED, "head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]}
    )
    config.save_pretrained(tmp_path)
    found = inspect_model(tmp_path, ["linear"], scale=2)
    assert [row.layer_type for row in found.modules] == ["full_attention"]
    assert list(found.curves[0].inv_freq) == ["full_attention"]
    write_inspection(found, tmp_path / "out")
    assert (tmp_path / "out" / "inspect.png").stat().st_size > 10_000


def test_native_length_is_a_setting(plain: Path) -> None:
    found = inspect_model(plain, ["yarn"], native_length=32, scale=2)
    assert found.modules[0].native_length == 32


def test_what_is_refused(plain: Path, extended: Path, tmp_path: Path, call: Cli) -> None:
    code, _, said = call("inspect", plain, "--methods", "yarm", "--out", tmp_path / "out")
    assert code == 2 and "did you mean 'yarn'" in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="above the max_scale 4"):
        inspect_model(extended, scale=8)
    for scale in (1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="scale"):
            inspect_model(plain, scale=scale)
    with pytest.raises(ConfigError, match="at least one method"):
        inspect_model(plain, [])
    with pytest.raises(ConfigError, match="long_factor"):
        inspect_model(plain, ["longrope"])
    with pytest.raises(ConfigError, match="unknown model"):
        inspect_model("tiny-lama")
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2" / "config.json").write_text('{"model_type": "gpt2", "n_layer": 1}')
    with pytest.raises(UnsupportedModelError, match="no rotary module"):
        inspect_model(tmp_path / "gpt2")


@pytest.mark.parametrize(
    ("largest", "expected"),
    [
        (1.5, [1, 1.5]),
        (2, [1, 2]),
        (8, [1, 2, 4, 8]),
        (10, [1, 2, 4, 8, 10]),
        (32, [1, 2, 4, 8, 16, 32]),
        (64, [1, 4, 16, 64]),
    ],
)
def test_scales(largest: float, expected: list[float]) -> None:
    assert _scales(float(largest)) == expected


def test_scales_are_few() -> None:
    for largest in (1.01, 3.0, 33.0, 100.0, 1000.0, 4096.0):
        scales = _scales(largest)
        assert 2 <= len(scales) <= 6 and scales == sorted(set(scales)) and scales[-1] == largest
