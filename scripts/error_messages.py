"""Every message that clex raises on purpose, read from its sources.

    python scripts/error_messages.py

A placeholder stands as {...}; what a helper adds (`clex.errors.unknown`) is written out.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).parent.parent / "src" / "clex"


@dataclass(frozen=True)
class Message:
    """One place that raises: class of the error, module, line, and the text of its message."""

    kind: str
    module: str
    line: int
    text: str


def messages(source: Path = SOURCE) -> list[Message]:
    """All of them, by module and line. A message that is made elsewhere has the text ``{...}``."""
    return sorted(_find(source), key=lambda m: (m.module, m.line))


def _find(source: Path) -> Iterator[Message]:
    kinds = _kinds(source / "errors.py")
    for path in source.rglob("*.py"):
        module = ".".join(path.relative_to(source).with_suffix("").parts)
        tree = ast.parse(path.read_text(encoding="utf-8"))
        known = _texts(tree)
        for node in ast.walk(tree):
            match node:
                case ast.Call(func=ast.Name(id=kind), args=[first, *_]) if kind in kinds:
                    yield Message(kind, module, node.lineno, _text(first, known))


def _kinds(errors: Path) -> set[str]:
    """ClexError and what derives from it."""
    kinds = {"ClexError"}
    for node in ast.parse(errors.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and kinds & {ast.unparse(base) for base in node.bases}:
            kinds.add(node.name)
    return kinds


def _texts(tree: ast.Module) -> dict[str, ast.expr]:
    """Constants of a file, and functions of it that only return one expression."""
    found: dict[str, ast.expr] = {}
    for node in tree.body:
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                found[name] = value
            case ast.FunctionDef(name=name, body=[*_, ast.Return(value=value)]) if value:
                found[name] = value
    return found


def _text(node: ast.expr, known: dict[str, ast.expr]) -> str:
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(_text(part, known) for part in parts)
        case ast.FormattedValue(value=ast.Name(id=name)) if name in known:
            return _text(known[name], known)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _text(left, known) + _text(right, known)
        case ast.Call(func=ast.Name(id="unknown"), args=[kind, *_]):
            return f"unknown {_text(kind, known)} {{...}} (valid: {{...}})"
        case ast.Call(func=ast.Name(id=name)) if name in known:
            return _text(known[name], known)
        case ast.IfExp(body=first, orelse=second):
            return f"{_text(first, known)} / {_text(second, known)}"
    return "{...}"


if __name__ == "__main__":
    for message in messages():
        print(f"{message.module}:{message.line} {message.kind}: {message.text}")
