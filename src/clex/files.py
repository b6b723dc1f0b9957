"""Writing so that a kill or a full disk never leaves a file that looks whole and is not.

What is not whole yet has a name that begins with `TEMPORARY`. A kill leaves such files behind; they
are taken away by the next process that holds their folder.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .errors import CheckpointError, OutputError

TEMPORARY = ".clex-tmp."
# No file of settings or results comes near; a larger one is not read into memory.
_MOST_JSON = 2**28


@contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's word on a bad output place into one clear line.

    Raises:
        OutputError: the disk is full, or `path` cannot be written.
    """
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(f"no space left to write {path}") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise OutputError(f"cannot write {path}: {error.strerror}") from error
        raise
    except SafetensorError as error:  # it writes by itself and has the system's error in words only
        raise OutputError(f"cannot write {path}: {error}") from error
    except RuntimeError as error:
        # torch.save loses the reason, which is a full disk nearly always.
        if "inline_container" not in str(error) and "PytorchStreamWriter" not in str(error):
            raise
        raise OutputError(f"cannot write {path}: is the disk full?") from error


@contextmanager
def only_writer(path: Path, lock: Path, *, wait: bool = False) -> Iterator[None]:
    """Be the only process that writes to `path`, by a lock file that is gone afterwards.

    Args:
        path: what is written, for the message.
        lock: the lock file; its folder exists.
        wait: for the other process, instead of raising.

    Raises:
        OutputError: another process writes to `path`, or `lock` cannot be made.
    """
    while True:
        with output_errors(path):
            file = lock.open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            file.close()
            raise OutputError(f"another process is writing to {path}") from None
        except OSError:
            break  # a file system without locks
        # One that was just finished took its lock file away: what we hold may be that.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), lock.stat()):
                break
        file.close()
    with file:
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def remove_temporary(folder: Path) -> None:
    """Take away what killed processes left half written, for the only writer of `folder`."""
    for entry in [*folder.rglob(f"{TEMPORARY}*")]:
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends without an error."""
    with output_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(
            dir=path.parent, prefix=f"{TEMPORARY}{path.name}.", suffix=path.suffix
        )
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            _flush(temporary)
            temporary.chmod(0o644)  # mkstemp makes files that only their owner reads
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its place when the block ends without error.

    Raises:
        OutputError: another process is writing to `path`, or it cannot be written.
    """
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    old = path.with_name(f"{TEMPORARY}{path.name}.old")
    with output_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with only_writer(path, path.with_name(f"{TEMPORARY}{path.name}.lock")):
            for left in (temporary, old):  # by a kill
                shutil.rmtree(left, ignore_errors=True)
            temporary.mkdir()
            try:
                yield temporary
                for file in temporary.rglob("*"):
                    if file.is_file():
                        _flush(file)
                if path.exists():
                    path.replace(old)  # at once, since half a folder may look whole
                temporary.replace(path)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
                shutil.rmtree(old, ignore_errors=True)


@contextmanager
def new_files(folder: Path, last: str) -> Iterator[Path]:
    """A temporary folder whose content moves into `folder` when the block ends without an error.

    Args:
        folder: made if it does not exist; what has the same names in it is replaced.
        last: the file that is moved after all others, and makes them count.
    """
    with output_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder, prefix=TEMPORARY))
        try:
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    _flush(file)
            for entry in sorted(temporary.iterdir(), key=lambda entry: entry.name == last):
                target = folder / entry.name
                if target.is_dir():
                    shutil.rmtree(target)
                entry.replace(target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as readable JSON, whole or not at all."""
    with new_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        CheckpointError: it is missing, unreadable or not JSON.
    """
    try:
        if path.stat().st_size > _MOST_JSON:
            raise CheckpointError(
                f"{path} has {path.stat().st_size:,} bytes, which no file of clex has"
            )
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"no {path.name} in {path.parent}") from None
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from None


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
