"""Records of .jsonl files, with errors that name the line."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..decoding import read_lines
from ..errors import DataError

SUFFIXES = (".jsonl", ".jsonl.gz")


def read_records(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number, from 1, and object of each line that is not empty.

    Raises:
        DataError: the file cannot be read, or a line is not a JSON object.
    """
    try:
        for number, line in read_lines(file):
            if line.strip():
                record = json.loads(line)
                if not isinstance(record, dict):
                    raise DataError(f"{file}, line {number}: not an object")
                yield number, record
    except DataError:
        raise
    except (OSError, EOFError, ValueError, RecursionError, zlib.error) as error:
        raise DataError(f"cannot read {file}: {error}") from error
