"""Importing clex and asking for help load none of the heavy packages."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from clex.cli import app

ROOT = Path(__file__).parent.parent
LIGHT = {"rich", "typer", "packaging"}


def loaded_by(code: str) -> set[str]:
    """Top-level packages that a new interpreter has loaded after `code`."""
    code += "\nimport json, sys; print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


def heavy() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = {text.split(">")[0].split("=")[0] for text in project["dependencies"]}
    assert {"torch", "transformers", "datasets", "numpy", "matplotlib"} <= names
    return names - LIGHT


def test_importing_clex_loads_nothing_heavy() -> None:
    loaded = loaded_by("import clex")
    assert "clex" in loaded and not loaded & heavy()


def test_help_loads_nothing_heavy() -> None:
    """The help pages of all commands, one after the other in one interpreter."""
    loaded = loaded_by(
        "import typer\n"
        "from clex.cli import app\n"
        "root = typer.main.get_command(app)\n"
        "pages = [[]]\n"
        "for name, command in root.commands.items():\n"
        "    pages += [[name]] + [[name, child] for child in getattr(command, 'commands', {})]\n"
        "assert ['extend'] in pages and ['eval', 'ppl'] in pages\n"
        "for page in pages:\n"
        "    app([*page, '--help'], standalone_mode=False)"
    )
    assert "typer" in loaded and not loaded & heavy()


def test_the_check_sees_what_is_loaded() -> None:
    assert "numpy" in loaded_by("import clex, numpy")


@pytest.mark.parametrize(
    ("typed", "word", "offered"),
    [("clex ex", 1, {"extend", "export"}), ("clex eval ", 2, {"ppl", "needle"})],
)
def test_the_shell_completes(typed: str, word: int, offered: set[str]) -> None:
    environment = {
        "_CLEX_COMPLETE": "complete_bash",
        "COMP_WORDS": typed,
        "COMP_CWORD": str(word),
    }
    result = CliRunner().invoke(app, [], prog_name="clex", env=environment)
    assert offered <= set(result.stdout.split())
    assert "chat" not in result.stdout.split()
