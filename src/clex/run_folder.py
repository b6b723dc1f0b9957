"""The output folder of a long command: held by one process, known by its settings, resumed."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

from .errors import CheckpointError, OutputError
from .files import TEMPORARY, only_writer, output_errors, read_json, remove_temporary, write_json
from .version import __version__

RUN_FILE = "run.json"
_LOCK = ".lock"


def versions() -> dict[str, str]:
    """What a result depends on."""
    return {
        "clex": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def holds_run(out: Path, settings: Mapping[str, Any], overwrite: bool, command: str) -> bool:
    """Whether `out` holds this very run, begun or finished; nothing is written.

    Args:
        out: the folder, which need not exist.
        settings: all that the result depends on; plain types, tuples and mappings.
        overwrite: a run with other settings is no error, and no run that is gone on with.
        command: name of the command for the message.

    Raises:
        OutputError: it is a file, holds something else, or a run with other settings.
    """
    if not out.exists():
        return False
    if not out.is_dir():
        raise OutputError(f"{out} is a file, not a folder")
    with output_errors(out):
        content = [p.name for p in out.iterdir()]
    content = [name for name in content if name != _LOCK and not name.startswith(TEMPORARY)]
    if not content:
        return False
    if RUN_FILE not in content:
        raise OutputError(f"{out} is not empty and was not written by {command}; choose another")
    if overwrite:
        return False
    try:
        before = read_json(out / RUN_FILE)["settings"]
    except (CheckpointError, KeyError, TypeError):
        raise OutputError(f"{out / RUN_FILE} is damaged; pass --overwrite to start anew") from None
    changed = _differences(before, _plain(settings))
    if changed:
        raise OutputError(
            f"{out} holds a run with other settings ({', '.join(changed)});"
            " pass --overwrite to start anew"
        )
    return True


@contextmanager
def claimed(out: Path, settings: Mapping[str, Any], overwrite: bool) -> Iterator[None]:
    """Hold the output folder for this process, and record what the run is.

    Raises:
        OutputError: another process holds it, or it cannot be written.
    """
    with output_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    with only_writer(out, out / _LOCK):
        remove_temporary(out)
        if overwrite:
            for entry in out.iterdir():
                if entry.is_dir():
                    shutil.rmtree(entry)
                elif entry.name != _LOCK:
                    entry.unlink()
        write_json(out / RUN_FILE, {"settings": _plain(settings), "versions": versions()})
        yield


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _differences(before: Any, now: Any, prefix: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted(before.keys() | now.keys())
        return [
            name
            for key in keys
            for name in _differences(before.get(key), now.get(key), f"{prefix}{key}.")
        ]
    return [] if before == now else [prefix.rstrip(".")]
