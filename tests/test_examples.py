"""The examples, run on a small random model: each does what its first lines promise."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import clex
import tiny
from clex.hf.checkpoint import is_checkpoint
from clex.hf.models import load_base
from clex.scaling import base, scaling_methods

EXAMPLES = Path(__file__).parent.parent / "examples"
SHORT = ("extend", "train", "evaluate", "export", "add_a_method")


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model with window 64 and a token for each byte."""
    return str(tiny.write_model(tmp_path_factory.mktemp("model") / "model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.write_documents(tmp_path_factory.mktemp("data") / "d.jsonl", [600, 500, 700]))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path) -> Iterator[None]:
    with tiny.token_cache(tmp_path / "tokens"):
        yield


@pytest.fixture
def registry() -> Iterator[None]:
    """Methods that an example registers are gone after the test."""
    scaling_methods()
    before = dict(base._REGISTRY)
    try:
        yield
    finally:
        base._REGISTRY.clear()
        base._REGISTRY.update(before)


def by_cell(rows: list[Any], protocol: str) -> dict[tuple[str, int], float]:
    return {(row.method, row.length): row.ppl for row in rows if row.protocol == protocol}


def test_extend(model: str, data: str, tmp_path: Path) -> None:
    out = tmp_path / "extended"
    losses = load("extend").main(["--model", model, "--text", data, "--out", str(out)])
    assert losses["extended, window"] == losses["plain, window"]
    assert losses["extended, 4x"] != losses["plain, 4x"]
    assert losses["loaded, 4x"] == losses["extended, 4x"]


def test_train(model: str, data: str, tmp_path: Path) -> None:
    out = tmp_path / "fitted"
    arguments = ["--model", model, "--data", data, "--steps", "3", "--out", str(out)]
    losses = load("train").main(arguments)
    assert len(losses) == 3
    fresh = clex.extend(load_base(model), clex.ClexConfig(max_scale=4, base="yarn"))
    assert not clex.frequencies(clex.load(out), 4).equal(clex.frequencies(fresh, 4))


def test_evaluate(model: str, data: str, tmp_path: Path) -> None:
    out = tmp_path / "measured"
    rows = load("evaluate").main(["--model", model, "--data", data, "--out", str(out)])
    ppl = by_cell(rows, "target")
    assert ppl["yarn", 64] == ppl["base", 64] and ppl["yarn", 256] != ppl["base", 256]
    assert len(json.loads((out / "results.json").read_text())) == len(rows)
    assert (out / "perplexity.png").stat().st_size > 10_000


def test_export(model: str, tmp_path: Path) -> None:
    out = tmp_path / "exported"
    assert load("export").main(["--model", model, "--out", str(out)]) < 1e-4
    assert (out / "clex_export.json").is_file() and not is_checkpoint(out)


@pytest.mark.usefixtures("registry")
def test_add_a_method(model: str, data: str) -> None:
    ppl = by_cell(load("add_a_method").main(["--model", model, "--data", data]), "target")
    names = {method for method, _ in ppl}
    assert {"bent", "yarn", "the model as it is"} <= names
    assert len({ppl[name, 64] for name in names}) == 1, "all are the plain model in its window"
    assert len({ppl[name, 256] for name in names}) == len(names)


@pytest.mark.parametrize("name", SHORT)
def test_examples_are_short_and_say_how_to_run_them(name: str) -> None:
    text = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 100
    top = text.split('"""')[1]
    commands = re.findall(rf"^    python examples/{name}\.py(.*)$", top, flags=re.MULTILINE)
    assert commands
    for option in re.findall(r"--[\w-]+", " ".join(commands)):
        assert f'"{option}"' in text, f"{option} is not an option of {name}.py"


def test_no_example_is_left_out() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*SHORT, "length_router"}
