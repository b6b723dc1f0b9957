"""Hooks of mkdocs: pages that come from other places of the repository, and links between all.

Files in docs/ are read on their own as well, so their links are those of the repository. On the
site a link to a file that has a page goes there, and one to a source file becomes its name.
"""

from __future__ import annotations

import os
import re
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

import typer
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

from error_messages import messages  # noqa: E402

# Files of the repository outside of docs/ that are pages as they are.
COPIED = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
}
# Folders that have a page, which is made here.
FOLDERS = {"benchmarks/results": "results/index.md", "examples": "examples.md"}
RESULTS = ROOT / "benchmarks" / "results"
EXAMPLES = ("extend", "train", "evaluate", "export", "add_a_method", "length_router")
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#:\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are not in docs/."""
    for source, page in _copied().items():
        path = ROOT / source
        content = path.read_text("utf-8") if path.suffix == ".md" else path.read_bytes()
        files.append(File.generated(config, page, content=content))
    for page, make in MADE.items():
        files.append(File.generated(config, page, content=make()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turn the repository's links into those of the site."""
    uri = page.file.src_uri
    if uri in MADE:
        return markdown
    copied = _copied()
    here = {site: source for source, site in copied.items()}.get(uri, f"docs/{uri}")

    def rewritten(match: re.Match[str]) -> str:
        image, label, target, anchor = match.groups()
        source = os.path.normpath(os.path.join(os.path.dirname(here), target))
        site = (FOLDERS | copied).get(source)
        if site is None and source.startswith("docs/"):
            site = source.removeprefix("docs/")
        if site is not None:
            away = os.path.relpath(site, os.path.dirname(uri) or ".")
            return f"{image}[{label}]({away}{anchor or ''})"
        # A file of the repository without a page; one that is not there stays a dead link.
        return label if (ROOT / source).exists() else match.group(0)

    return _LINK.sub(rewritten, markdown)


def _copied() -> dict[str, str]:
    """Files that become pages or pictures as they are, and where they are on the site."""
    results = [path for kind in ("*.md", "*.png") for path in RESULTS.glob(kind)]
    return COPIED | {f"benchmarks/results/{p.name}": f"results/{p.name}" for p in sorted(results)}


def _results() -> str:
    lines = [
        "# Results",
        "",
        "Each page holds the commands, the machine, the date and the seed.",
        "",
    ]
    for path in sorted(RESULTS.glob("*.md"), reverse=True):
        title = path.read_text("utf-8").splitlines()[0].lstrip("# ")
        lines.append(f"- [{title}]({path.name})")
    lines += ["", "Raw numbers are in `benchmarks/results` of the repository:", ""]
    raw = sorted(p.name for p in RESULTS.iterdir() if p.suffix in (".json", ".csv"))
    lines += [f"- `{name}`" for name in raw]
    return "\n".join(lines)


def _examples() -> str:
    parts = ["# Examples", "", "Each runs as it stands, on a bundled model, without a download."]
    for name in EXAMPLES:
        code = (ROOT / "examples" / f"{name}.py").read_text("utf-8")
        parts += ["", f"## {name}.py", "", "```python", code.rstrip(), "```"]
    return "\n".join(parts)


def _messages() -> str:
    """The catalogue of error messages, by part of the package."""
    parts = [
        "# Every error message",
        "",
        "Read from the sources when this site is built. The command line prints a message as one",
        "line and exits with code 2; in Python it is an exception of the class in brackets, all of",
        "them `clex.ClexError`. `…` stands for a value. What to do where the message does not say",
        "it: [Troubleshooting](troubleshooting.md).",
    ]
    for part, found in groupby(messages(), key=lambda m: m.module.split(".")[0]):
        parts += ["", f"## {part}", ""]
        # Words of a message that look like markup, such as [methods.NAME], are not.
        shown = {f"`{m.text.replace('{...}', '…')}` ({m.kind})": None for m in found}
        parts += [f"- {line}" for line in shown if not line.startswith("`…`")]
    return "\n".join(parts)


def _command_line() -> str:
    """Every command with its options, from the application itself."""
    from clex.cli import app

    lines = [
        "# Command line",
        "",
        "`clex --install-completion` teaches your shell to complete commands and options.",
    ]
    root = typer.main.get_command(app)
    for path, command in _commands(root, "clex"):
        lines += ["", f"## {path}", "", (command.help or "").strip(), ""]
        rows = [parameter for parameter in command.params if not _hidden(parameter)]
        if rows:
            lines += ["| | | if not given |", "| --- | --- | --- |"]
        lines += [_row(parameter) for parameter in rows]
    return "\n".join(lines)


def _commands(command: Any, path: str) -> list[tuple[str, Any]]:
    found = [] if path == "clex" else [(path, command)]
    for name, child in sorted(getattr(command, "commands", {}).items()):
        found += _commands(child, f"{path} {name}")
    return found


def _hidden(parameter: Any) -> bool:
    return getattr(parameter, "hidden", False) or parameter.name == "help"


def _row(parameter: Any) -> str:
    options = [option for option in parameter.opts if option.startswith("-")]
    name = ", ".join(options) or (parameter.metavar or parameter.name).upper()
    default = "" if parameter.default in (None, False, (), []) else f"`{_plain(parameter.default)}`"
    if parameter.required:
        default = "needed"
    text = (getattr(parameter, "help", None) or "").replace("|", "\\|")
    return f"| `{name}` | {text} | {default} |"


def _plain(value: Any) -> str:
    return str(getattr(value, "value", value))


MADE = {
    "results/index.md": _results,
    "examples.md": _examples,
    "messages.md": _messages,
    "cli.md": _command_line,
}
