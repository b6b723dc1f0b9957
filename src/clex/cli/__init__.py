"""The command line. Each command imports its workflow when it is called, so that help is fast."""

from __future__ import annotations

import os
import sys
import warnings

from ..errors import ClexError

# Each of these adds its commands, in the order of the help page.
# isort: off
from . import extend, plan, tokenize, evaluate, generate, retrieval, harness, compare, export
from . import methods, families, doctor

# isort: on
from .app import app

__all__ = [
    "compare",
    "doctor",
    "evaluate",
    "export",
    "extend",
    "families",
    "generate",
    "harness",
    "main",
    "methods",
    "plan",
    "retrieval",
    "tokenize",
]


def main() -> None:
    """Run the command line; expected errors are one line on stderr and exit code 2."""
    # Our own bars and lines say what happens; these libraries' ones are read at their import.
    for name in ("TRANSFORMERS_VERBOSITY", "DATASETS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    try:
        app(standalone_mode=True)
    except ClexError as error:
        print(f"clex: {error}", file=sys.stderr)
        sys.exit(2)
    except SystemExit as stop:
        # typer answers Ctrl-C itself, with this code.
        if stop.code == 130:
            print("clex: interrupted; the same command goes on", file=sys.stderr)
        raise
