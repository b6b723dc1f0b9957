"""The trials of a retrieval measurement on disk, from which it goes on after a kill."""

from __future__ import annotations

import json
from pathlib import Path

from ..errors import CheckpointError
from ..files import new_file, output_errors
from .retrieval import Trial


class TrialLog:
    """A JSON line for each trial, written as soon as it is there.

    Args:
        path: the file; made with the first trial.

    Attributes:
        done: trials of earlier runs. A last line that a kill left half written is taken away.

    Raises:
        CheckpointError: another line cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.done: list[Trial] = []
        if not path.exists():
            return
        # Bytes, since a kill may cut a character in two.
        lines = path.read_bytes().splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):
            lines.pop()
            with new_file(path) as temporary:
                temporary.write_bytes(b"".join(lines))
        try:
            self.done = [Trial.from_dict(json.loads(line)) for line in lines]
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{path} is damaged: {error}") from None

    def keep(self, trial: Trial) -> None:
        """Add a trial.

        Raises:
            OutputError: the file cannot be written.
        """
        with output_errors(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(trial.to_dict()) + "\n")
