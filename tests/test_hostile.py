"""Files from somebody else: none of their code runs, nothing leaves its folder, all is bounded."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import clex
import tiny
from clex import cli
from clex.comparison.recipe import parse_recipe
from clex.config import ClexConfig
from clex.data import load_tokens
from clex.digests import digests_of
from clex.errors import CheckpointError, ClexError, ConfigError, DataError
from clex.hf import models
from clex.hf.checkpoint import CONFIG_FILE, is_checkpoint, load
from clex.hf.extend import extension_of
from clex.hf.models import load_base, load_host_config
from clex.training import TrainConfig

CODE = """
import pathlib
pathlib.Path({mark!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own_llama"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture(autouse=True)
def trust_ends_with_the_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "_remote_code", False)


@pytest.fixture
def with_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A model that brings code, and the file that the code makes when it runs."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    folder, mark = tiny.write_model(tmp_path / "model"), tmp_path / "it_ran"
    (folder / "own.py").write_text(CODE.format(mark=str(mark)))
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "own_llama",
        "architectures": ["OwnModel"],
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder, mark


class Evil:
    """A pickle of it makes a file when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


# Code of a model.


def test_code_of_a_model_does_not_run(with_code: tuple[Path, Path], tmp_path: Path) -> None:
    folder, mark = with_code
    clex.save(clex.extend(tiny.make_model(vocab_size=256)), tmp_path / "out", weights="none")
    about = json.loads((tmp_path / "out" / CONFIG_FILE).read_text())
    (tmp_path / "out" / CONFIG_FILE).write_text(json.dumps({**about, "base_model": str(folder)}))
    for read in (
        lambda: load_base(folder),
        lambda: load_host_config(folder),
        lambda: clex.load(tmp_path / "out"),
    ):
        with pytest.raises(ConfigError, match="pass --trust-remote-code") as caught:
            read()
        assert "\n" not in str(caught.value)
    assert not mark.exists()


def test_code_of_a_model_that_is_trusted(with_code: tuple[Path, Path]) -> None:
    folder, mark = with_code
    model = load_base(folder, trust_remote_code=True)
    assert type(model).__name__ == "OwnModel"
    assert mark.exists()
    with pytest.raises(ConfigError):
        load_base(folder)  # asked for one model, not for all


@pytest.mark.parametrize("trusted", [False, True])
def test_the_option_of_the_command_line(
    with_code: tuple[Path, Path],
    trusted: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, mark = with_code
    arguments = ["clex", "generate", str(folder), "--prompt", "a", "--max-new-tokens", "1"]
    monkeypatch.setattr(sys, "argv", arguments + ["--trust-remote-code"] * trusted)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert (caught.value.code or 0) == (0 if trusted else 2)
    assert ("--trust-remote-code" in capsys.readouterr().err) == (not trusted)
    assert mark.exists() == trusted


def test_every_command_that_loads_a_model_has_the_option() -> None:
    import typer

    from clex.cli.app import app

    without = {"methods", "families", "demo", "import-official", "eval", "doctor"}
    group: Any = typer.main.get_command(app)
    commands = {**group.commands, **group.commands["eval"].commands}
    for name, command in commands.items():
        has = any("--trust-remote-code" in option.opts for option in command.params)
        assert has == (name not in without), name


# Pickles.


def test_pickles_are_not_read(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    folder = tiny.write_model(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(mark)))
    with pytest.raises(ConfigError, match="cannot load model"):
        load_base(folder)
    adapted = peft.get_peft_model(
        clex.extend(tiny.make_model()), peft.LoraConfig(r=2, target_modules=["q_proj"])
    )
    clex.save(adapted, tmp_path / "out", weights="adapter")
    (tmp_path / "out" / "adapter_model.safetensors").unlink()
    (tmp_path / "out" / "adapter_model.bin").write_bytes(pickle.dumps(Evil(mark)))
    with pytest.raises(CheckpointError, match=r"no adapter_model.safetensors in"):
        load(tmp_path / "out", tiny.make_model())
    assert not mark.exists()


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth", "scheduler.pt"])
def test_a_checkpoint_of_training_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Whoever writes into the folder can make the digests fit as well."""
    from test_faults import train

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    train(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "checkpoint-4")
    last = tmp_path / "run" / "checkpoints" / "checkpoint-2"
    torch.save(Evil(tmp_path / "mark"), last / name)
    record = json.loads((last / "complete.json").read_text())
    record["sha256"] |= digests_of(last, [name])
    (last / "complete.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match="cannot go on from") as caught:
        train(tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "mark").exists()


# Adapters.


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    model = clex.extend(tiny.make_model())
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    clex.save(adapted, tmp_path / "out", weights="adapter")
    about = json.loads((tmp_path / "out" / CONFIG_FILE).read_text())
    # Somebody who changes the files changes the record of them too.
    (tmp_path / "out" / CONFIG_FILE).write_text(json.dumps({**about, "sha256": {}}))
    return tmp_path / "out"


ADAPTERS: dict[str, tuple[dict[str, Any], str]] = {
    "rank": ({"r": 10**9}, "r = 1000000000 is out of range"),
    "rank of a layer": ({"rank_pattern": {"q_proj": 10**9}}, "rank_pattern = 1000000000"),
    "number": ({"layers_to_transform": [10**12]}, "layers_to_transform = 1000000000000"),
    "module to import": ({"megatron_config": {"a": 1}}, "megatron_config is not supported"),
    "file to read": ({"init_lora_weights": "corda"}, "init_lora_weights = 'corda'"),
    "other kind": ({"peft_type": "NO_SUCH"}, "cannot load the adapter"),
    "no kind": ({"peft_type": None}, "has no peft_type"),
    "long text": ({"target_modules": "x" * 10_000}, "target_modules has 10000 characters"),
    "no such layer": ({"target_modules": ["nowhere"]}, "cannot load the adapter"),
    "more layers": ({"target_modules": ["q_proj", "k_proj"]}, "it lacks base_model"),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_that_are_refused(adapter: Path, kind: str) -> None:
    changes, words = ADAPTERS[kind]
    clex.load(adapter, tiny.make_model())
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    model = tiny.make_model()
    with pytest.raises(CheckpointError, match=words) as caught:
        clex.load(adapter, model)
    assert "\n" not in str(caught.value)
    assert extension_of(model) is None


def test_an_adapter_without_some_weights(adapter: Path) -> None:
    state = load_file(adapter / "adapter_model.safetensors")
    state.pop(sorted(state)[0])
    save_file(state, adapter / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="it lacks base_model"):
        clex.load(adapter, tiny.make_model())


# Configs.


@pytest.mark.parametrize(
    "values",
    [
        {"max_scale": 1e9},
        {"width": 1e6},
        {"steps": 10**9},
        {"native_length": 10**15},
        {"post": ["clip"] * 1000},
        {"post": "clip"},
        {"layer_types": ["x"] * 1000},
        {"method": ["clex"]},
        {"grid": {}},
        {"temperature": 3},
        {"options": {"a" * 5: [[]]}},
    ],
)
def test_configs_that_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ClexError):
        clex.extend(tiny.make_model(), ClexConfig.from_dict(values))


@pytest.mark.parametrize("name", ["../x", "a/b", "/tmp/x", "..", ".hidden", "x" * 300, "a\0b", ""])
def test_methods_of_a_recipe_stay_in_its_folder(name: str) -> None:
    content = {
        "model": "tiny-llama",
        "data": "books",
        "max_scale": 2.0,
        "methods": {name: {"method": "yarn", "train": False}},
    }
    with pytest.raises(ConfigError, match="a method's name is made of"):
        parse_recipe(content, "", Path())
    content["methods"] = {"fine-1.0": {"method": "yarn", "train": False}}
    assert parse_recipe(content, "", Path()).methods[1].name == "fine-1.0"


def test_recipes_without_bounds_are_refused() -> None:
    content: dict[str, Any] = {
        "model": "tiny-llama",
        "data": "books",
        "max_scale": 2.0,
        "methods": {"yarn": {"method": "yarn"}},
    }
    for change, words in (
        ({"seeds": list(range(2000))}, "2000 seeds are too many"),
        ({"evaluation": {"bands": 10**9}}, "bands must be from 1 to 65536"),
        (
            {"budget": {"depth": "full", "steps": 10**7, "batch_size": 65536}},
            "windows are out of range",
        ),
        ({"max_scale": 1e9}, "max_scale"),
    ):
        with pytest.raises(ConfigError, match=words):
            parse_recipe({**content, **change}, "", Path())


def test_settings_of_a_wrong_type() -> None:
    for values in ({"steps": "many"}, {"rate": [1.0]}, {"batch_size": True}):
        with pytest.raises(ConfigError, match="must be a number"):
            TrainConfig(**values)  # type: ignore[arg-type]


def test_json_without_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / CONFIG_FILE).write_text("[" * 200_000)
    with pytest.raises(CheckpointError, match="cannot read"):
        clex.load(tmp_path, tiny.make_model())
    monkeypatch.setattr("clex.files._MOST_JSON", 100)
    (tmp_path / CONFIG_FILE).write_text(json.dumps({"clex": "x" * 100}))
    with pytest.raises(CheckpointError, match="which no file of clex has"):
        clex.load(tmp_path, tiny.make_model())


def test_names_that_are_no_paths(tmp_path: Path) -> None:
    for name in ("x" * 5000, "a\0b"):
        assert not is_checkpoint(name)
        with pytest.raises(ConfigError):
            load_base(name)
        with pytest.raises(DataError, match="no such file or folder"):
            load_tokens(name, None)
        content = {
            "model": name,
            "data": name,
            "max_scale": 2.0,
            "methods": {"yarn": {"method": "yarn", "train": False}},
        }
        assert parse_recipe(content, "", tmp_path).model == name
