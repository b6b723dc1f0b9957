"""`verify` and the command: what agrees, and that what does not is seen."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import exports
import gguf
import pytest
from typer.testing import CliRunner

import clex
from clex.cli import app
from clex.digests import digests_of
from clex.errors import CheckpointError, ConfigError, UnsupportedModelError
from clex.export import export, read_record, verify
from clex.export.gguf_file import Field, GgufTensor, write_gguf

RUNNER = CliRunner()


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return exports.write_model(tmp_path / "llama")


@pytest.fixture
def fitted(llama: Path, tmp_path: Path) -> Path:
    """A result of `clex extend`, its dynamics away from their start."""
    import tiny

    model = clex.extend(exports.plain(llama), clex.ClexConfig(max_scale=8, steps=4))
    tiny.stir(model)
    return clex.save(model, tmp_path / "fitted", weights="none", base_model=str(llama))


def without_factors(file: Path) -> None:
    """What a converter leaves that drops the factors: the same file, plain RoPE."""
    reader = gguf.GGUFReader(file)
    fields = [
        Field(
            name,
            field.contents(),
            field.types[0],
            field.types[-1] if len(field.types) > 1 else None,
        )
        for name, field in reader.fields.items()
        if not name.startswith(("GGUF.", "general.architecture"))
    ]

    def tensor(t: Any) -> GgufTensor:
        return GgufTensor(t.name, t.data.shape, t.tensor_type.name, t.data.dtype, lambda: t.data)

    tensors = [tensor(t) for t in reader.tensors if t.name != "rope_freqs.weight"]
    write_gguf(file.with_name("deaf.gguf"), "llama", fields, tensors)
    file.with_name("deaf.gguf").replace(file)


def test_transformers(fitted: Path, tmp_path: Path) -> None:
    export(fitted, tmp_path / "out", target="hf", length=256)
    parity = verify(tmp_path / "out")
    assert parity.agrees and parity.engine == "transformers"
    assert [row.tokens for row in parity.rows] == [64, 255]
    for row in parity.rows:
        assert row.most < 5e-4 and row.best == 1
        assert row.base > 100 * row.mean
        assert row.from_base == pytest.approx(row.base, rel=0.01)


def test_ignored_keys_are_seen(fitted: Path, tmp_path: Path) -> None:
    export(fitted, tmp_path / "out", target="hf", length=256)
    file = tmp_path / "out" / "config.json"
    config = json.loads(file.read_text())
    for key in ("rope_parameters", "rope_scaling"):
        del config[key]
    file.write_text(json.dumps(config))
    parity = verify(tmp_path / "out")
    assert not parity.agrees
    assert parity.rows[-1].from_base < parity.rows[-1].mean


def test_an_ignored_attention_factor_is_seen(fitted: Path, tmp_path: Path) -> None:
    export(fitted, tmp_path / "out", target="hf", length=256, form="keep_weights")
    assert verify(tmp_path / "out").agrees
    file = tmp_path / "out" / "config.json"
    config = json.loads(file.read_text())
    for key in ("rope_parameters", "rope_scaling"):
        config[key]["attention_factor"] = 1.0
    file.write_text(json.dumps(config))
    assert not verify(tmp_path / "out").agrees


def test_llama_cpp(fitted: Path, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    export(fitted, tmp_path / "out", target="gguf", length=256)
    parity = verify(tmp_path / "out")
    assert parity.agrees and parity.engine == "xllamacpp"
    assert [row.tokens for row in parity.rows] == [64, 255]
    without_factors(tmp_path / "out" / "model.gguf")
    assert not verify(tmp_path / "out").agrees


def test_half_width_weights_are_held_by_their_mean(fitted: Path, tmp_path: Path) -> None:
    export(fitted, tmp_path / "out", target="hf", length=256, dtype="bfloat16")
    parity = verify(tmp_path / "out")
    assert parity.agrees and parity.tolerance.most is None
    assert parity.rows[-1].mean > 1e-4


def test_prompts_must_fit(fitted: Path, tmp_path: Path) -> None:
    export(fitted, tmp_path / "out", target="hf", length=256)
    with pytest.raises(ConfigError, match="valid: 17 to 255"):
        verify(tmp_path / "out", lengths=(256,))
    with pytest.raises(ConfigError, match="20 tokens, and 64"):
        verify(tmp_path / "out", lengths=(64,), ids=[1] * 20)


def test_engines_that_are_not_there(
    fitted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(fitted, tmp_path / "out", target="gguf", length=256)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install xllamacpp"):
        verify(tmp_path / "out")
    # The command says so before it writes.
    plain = (fitted, "--scale", 4, "--target", "gguf", "--out", tmp_path / "other")
    assert "pip install xllamacpp" in str(run(*plain, "--verify").exception)
    assert not (tmp_path / "other").exists()


def test_two_scales_are_not_tried_in_transformers(llama: Path, tmp_path: Path) -> None:
    exports.write_export(llama, tmp_path / "out", "vllm", form="two_scales")
    with pytest.raises(UnsupportedModelError, match="changes over"):
        verify(tmp_path / "out", engine="hf")


def test_records(fitted: Path, tmp_path: Path) -> None:
    record = export(fitted, tmp_path / "out", target="hf", length=256)
    assert read_record(tmp_path / "out") == record
    with pytest.raises(ConfigError, match="not an export"):
        read_record(fitted)
    (tmp_path / "out" / "clex_export.json").write_text("{}")
    with pytest.raises(CheckpointError, match="damaged"):
        read_record(tmp_path / "out")


def run(*arguments: Any) -> Any:
    return RUNNER.invoke(app, ["export", *map(str, arguments)], env={"COLUMNS": "200"})


def test_the_command(llama: Path, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    out = tmp_path / "out"
    plain = (llama, "--method", "yarn", "--scale", 4, "--target", "gguf", "--out", out)
    assert run(*plain).exit_code == 0
    record = read_record(out)
    assert (record.scale, record.length, record.clex["method"]) == (4, 256, "yarn")
    good = run(*plain, "--verify", "--verify-lengths", "40,255")
    assert good.exit_code == 0, good.output
    assert "xllamacpp" in good.output and "255" in good.output
    without_factors(out / "model.gguf")
    refused = run(*plain, "--verify")
    assert "is damaged" in str(refused.exception)
    # An exporter that forgot the factors would have recorded what it wrote.
    dataclasses.replace(record, sha256=digests_of(out, record.sha256)).write(out)
    bad = run(*plain, "--verify")
    assert bad.exit_code == 1
    assert "NO" in bad.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--keep-weights", "--two-scales", "--scale", 4), "two forms"),
        (("--verify-lengths", "64", "--scale", 4), "needs --verify"),
        (("--scale", 4, "--length", 256, "--method", "yarn"), "not both"),
        (("--scale", 4, "--native-length", 64), "give --method"),
        (("--scale", 4, "--method", "yarn", "--quantize", "Q8_0"), "belong to target gguf"),
    ],
)
def test_contradictions(
    arguments: tuple[Any, ...], message: str, llama: Path, tmp_path: Path
) -> None:
    result = run(llama, "--target", "hf", "--out", tmp_path / "out", *arguments)
    assert result.exit_code != 0
    assert message in str(result.exception)
    assert not (tmp_path / "out").exists()
