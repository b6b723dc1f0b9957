"""The documents are true: links lead somewhere, snippets run, commands and messages exist."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import typer

import clex
import tiny
from clex.cli import app
from clex.hf.models import BUNDLED, load_base

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *RESULTS.glob("*.md")],
    key=lambda path: path.as_posix(),
)
# Its block is the file of a method, with a relative import; `test_docs_method.py` runs it.
SNIPPETS = [p for p in PAGES if "```python" in p.read_text("utf-8") and "adding_a_m" not in p.name]
LINK = re.compile(r"\]\(([^)\s]+)\)")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(text: str, language: str) -> list[str]:
    """Contents of the fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Anchors of the headings, as GitHub and mkdocs make them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ +(.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def dead_links(page: Path) -> list[str]:
    """Links to files and headings of the repository that are not there."""
    dead = []
    for link in LINK.findall(page.read_text("utf-8")):
        target, _, anchor = link.partition("#")
        if ":" in target:
            continue
        file = page.parent / target if target else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            dead.append(link)
    return dead


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    assert not dead_links(page)


def test_the_check_sees_dead_links(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A title\n[a](page.md#a-title) [b](#nowhere) [c](gone.md) [d](https://d)\n")
    assert dead_links(page) == ["#nowhere", "gone.md"]


@pytest.fixture
def as_a_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """A folder with what the snippets speak of, and the names that they take for given."""
    plain = tiny.write_model(tmp_path / "your" / "model")
    extended = clex.extend(load_base(plain), clex.ClexConfig(max_scale=8, steps=4))
    clex.save(extended, tmp_path / "longer", weights="none", base_model=str(plain))
    # A stand-in for SmolLM2 with its rotary and layers, all that ready-made dynamics look at.
    rotary = {"head_dim": 64, "rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}
    sizes = {"max_position_embeddings": 8192, "num_hidden_layers": 30}
    smollm2 = tiny.write_model(tmp_path / "smollm2", **sizes, **rotary)
    monkeypatch.setitem(BUNDLED, "smollm2", lambda name: smollm2)
    tiny.write_model(tmp_path / "longer-hf")
    (tmp_path / "books").mkdir()
    tiny.write_documents(tmp_path / "books" / "books.jsonl", [300, 400])
    monkeypatch.chdir(tmp_path)
    with tiny.token_cache(tmp_path / "tokens"):
        yield {"input_ids": tiny.make_ids(1, 100), "torch": torch}


@pytest.mark.parametrize("page", SNIPPETS, ids=name_of)
def test_snippets_run(page: Path, as_a_reader: dict[str, Any]) -> None:
    """The blocks of a page, one after the other, as a reader would type them."""
    for number, code in enumerate(blocks(page.read_text("utf-8"), "python")):
        exec(compile(code, f"{page.name}, block {number}", "exec"), as_a_reader)


def test_there_are_snippets() -> None:
    assert {"README.md", "extend.md", "evaluate.md"} <= {page.name for page in SNIPPETS}


def commands(text: str) -> list[list[str]]:
    """Words of each `clex ...` line in the blocks without a language; a backslash joins lines."""
    lines = "\n".join(blocks(text, "")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if re.match(r"\s*clex ", line)]


def mistakes(words: list[str]) -> list[str]:
    """Sub-commands and options of a command line that the application does not have."""
    command: Any = typer.main.get_command(app)
    rest = words[1:]
    while hasattr(command, "commands") and rest and not rest[0].startswith("-"):
        if rest[0] not in command.commands:
            return [f"no command {rest[0]}"]
        command, rest = command.commands[rest[0]], rest[1:]
    known = {option for parameter in command.params for option in parameter.opts}
    known |= {option for parameter in command.params for option in parameter.secondary_opts}
    known |= {"--help"}
    given = {word.split("=")[0] for word in rest if re.match(r"--?[a-z]", word)}
    return [f"no option {option}" for option in sorted(given - known)]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_exist(page: Path) -> None:
    if page == ROOT / "docs" / "log.md" or page.parent == RESULTS:
        pytest.skip("a record of its day")
    found = {
        shlex.join(words): wrong
        for words in commands(page.read_text("utf-8"))
        if (wrong := mistakes(words))
    }
    assert not found


def test_the_check_sees_wrong_commands() -> None:
    text = "```\nclex extend M --data D --out O \\\n  --trian full  # why\nclex evil\n```\n"
    assert [mistakes(words) for words in commands(text)] == [
        ["no option --trian"],
        ["no command evil"],
    ]


@pytest.fixture(scope="module")
def error_messages() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "error_messages", ROOT / "scripts" / "error_messages.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


# A message with one of these says the way out itself.
WAY_OUT = re.compile(
    r"\b(valid|must|unknown|out of range|give|pass|choose|use|needs?|wants?|call|pip install|hold"
    r"|leave|delete|convert|join|correct|say)\b|--[a-z]"
)


@cache
def entries() -> dict[str, re.Pattern[str]]:
    """Messages in the tables of the page. `…` stands for a value; at an end, for anything."""
    text = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
    found = {}
    for entry in re.findall(r"^\| `(.+?)` \|", text, flags=re.MULTILINE):
        inner = r"\{\.\.\.\}".join(re.escape(part) for part in entry.strip("…").split("…"))
        before, after = ".*" * entry.startswith("…"), ".*" * entry.endswith("…")
        found[entry] = re.compile(before + inner + after)
    return found


def unexplained(text: str) -> bool:
    """Whether a message says no way out, and is neither on the page nor only wraps another."""
    letters = re.sub(r"\{\.\.\.\}|[^a-z]", "", text)
    on_page = any(pattern.fullmatch(text) for pattern in entries().values())
    return len(letters) >= 8 and not WAY_OUT.search(text) and not on_page


def test_each_error_message_says_the_way_out(error_messages: ModuleType) -> None:
    """In its own words, or in docs/troubleshooting.md: add a row there for a new message."""
    found = error_messages.messages()
    assert len(found) > 300
    missing = [f"{m.module}:{m.line} {m.text}" for m in found if unexplained(m.text)]
    assert not missing, "\n".join(missing)


def test_each_entry_is_a_message(error_messages: ModuleType) -> None:
    texts = [message.text for message in error_messages.messages()]
    for entry, pattern in entries().items():
        assert len(re.sub("[^a-z]", "", entry)) >= 4, f"{entry} fits nearly everything"
        assert any(pattern.fullmatch(text) for text in texts), f"no message reads {entry}"


def test_the_check_sees_an_unexplained_message() -> None:
    assert unexplained("the moon is in the wrong house at step {...}")
    assert not unexplained("the moon must be full, not {...}")
    assert not unexplained("no space left to write {...}")


def test_messages_are_read_whole(error_messages: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "errors.py").write_text(
        "class ClexError(Exception): ...\nclass Bad(ClexError): ...\nclass Other(Exception): ...\n"
    )
    (tmp_path / "a.py").write_text(
        "_WAY = 'mend it'\n"
        "def said(x):\n    return f'{x} is said'\n"
        "def f(x):\n"
        "    raise Bad(f'{x!r} is' ' bad; ' + f'{_WAY}')\n"
        "    raise Bad(said(x))\n"
        "    raise Bad(unknown('kind', x, []))\n"
        "    raise Other('not ours')\n"
    )
    texts = [message.text for message in error_messages.messages(tmp_path)]
    assert texts == [
        "{...} is bad; mend it",
        "{...} is said",
        "unknown kind {...} (valid: {...})",
    ]
