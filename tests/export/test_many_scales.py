"""Exports with several scales, as they are written; tests/with_vllm serves them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import exports
import pytest
import torch
from typer.testing import CliRunner

import clex
from clex.cli import app
from clex.errors import ConfigError, UnsupportedModelError
from clex.export import read_record
from clex.serving.length_classes import LengthClasses

SCALES = (1.0, 2.0, 4.0)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return exports.write_model(tmp_path / "llama")


def write(source: Path, out: Path, **settings: Any) -> Any:
    given = {"target": "vllm", "scale": None, "scales": SCALES, **settings}
    return exports.write_export(source, out, **given)


def test_what_is_written(llama: Path, tmp_path: Path) -> None:
    record = write(llama, tmp_path / "out")
    assert record == read_record(tmp_path / "out")
    assert (record.form, record.scales, record.length) == ("many_scales", list(SCALES), 256)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["ClexLlamaForCausalLM"]
    classes = LengthClasses.from_dict(config["clex_scales"])
    model = clex.extend(exports.plain(llama), exports.YARN)
    for t, inv_freq in zip(SCALES, classes.inv_freq, strict=True):
        assert torch.equal(torch.tensor(inv_freq), clex.frequencies(model, t))
    assert classes.attention_factors[0] == 1 < classes.attention_factors[1]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "--logits-processors clex.serving.vllm_requests:RequestScales" in card
    assert "| scale t | 1, 2, 4 |" in card and "at t = 4 for every text" in card
    before, after = exports.plain(llama).state_dict(), exports.plain(tmp_path / "out").state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_whoever_does_not_know_the_classes_reads_the_longest(llama: Path, tmp_path: Path) -> None:
    write(llama, tmp_path / "out")
    ids = exports.make_ids(50)
    found = exports.log_probs(exports.plain(tmp_path / "out"), ids)
    assert exports.difference(found, exports.live(llama, ids, 4.0)) < 5e-4
    assert exports.difference(found, exports.live(llama, ids, 1.0)) > 0.1


@pytest.mark.parametrize("scales", [(4.0,), (2.0, 1.0), (1.0, 1.0, 2.0), (0.5, 2.0), (1.0, 9.0)])
def test_scales_that_are_none(scales: tuple[float, ...], llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="two or more, rising, from 1 to 8"):
        write(llama, tmp_path / "out", scales=scales)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("more", [{"scale": 4}, {"length": 100}, {"form": "keep_weights"}])
def test_a_form_of_its_own(more: dict[str, Any], llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a form of their own"):
        write(llama, tmp_path / "out", **more)


@pytest.mark.parametrize(("family", "target"), [("gpt_neox", "vllm"), ("llama", "hf")])
def test_only_for_vllm_and_its_own_classes(family: str, target: str, tmp_path: Path) -> None:
    source = exports.write_model(tmp_path / "model", family)
    with pytest.raises(UnsupportedModelError, match="several scales in one server are for vLLM"):
        write(source, tmp_path / "out", target=target)


def test_the_command(llama: Path, tmp_path: Path) -> None:
    command = ["export", str(llama), "--method", "yarn", "--target", "vllm"]
    command += ["--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, [*command, "--scales", "1,2,4"], env={"COLUMNS": "200"})
    assert done.exit_code == 0 and "at scale 1, 2, 4" in done.output
    wrong = CliRunner().invoke(app, [*command, "--scales", "1,two"])
    assert isinstance(wrong.exception, ConfigError)
