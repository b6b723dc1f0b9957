"""Errors that a user can cause and mend. The command line prints them as one line and exits with 2.

ClexError
 ├── ConfigError             a setting is unknown, out of range, or contradicts another
 ├── DataError               text that cannot be read, is empty, or is too short for a window
 ├── UnsupportedModelError   a model without a rotary module that we can extend
 ├── CheckpointError         files that are missing, damaged, or do not belong to this model
 ├── OutputError             an output folder that is in use, not empty, full or not writable
 └── TrainingError           a run that cannot go on, such as a loss that is not a number
"""

from collections.abc import Iterable
from difflib import get_close_matches


class ClexError(Exception):
    """Base of every error that clex raises on purpose."""


class ConfigError(ClexError, ValueError):
    """A setting is unknown, out of range, or contradicts another."""


class DataError(ClexError, ValueError):
    """Text that cannot be read, is empty, or is too short for a window."""


class UnsupportedModelError(ClexError, TypeError):
    """The model has no rotary module that clex can extend."""


class CheckpointError(ClexError):
    """Files that are missing, damaged, or do not belong to this model."""


class OutputError(ClexError, OSError):
    """An output folder that is in use, not empty, full or not writable."""


class TrainingError(ClexError, RuntimeError):
    """A run that cannot go on, such as a loss that is not a number."""


def unknown(kind: str, value: object, valid: Iterable[str]) -> str:
    """One line that names an unknown `value`, the nearest valid names, and all of them."""
    names = sorted(valid)
    near = get_close_matches(str(value), names, n=2, cutoff=0.5)
    hint = f"; did you mean {' or '.join(repr(name) for name in near)}?" if near else ""
    return f"unknown {kind} {value!r}{hint} (valid: {', '.join(names)})"
