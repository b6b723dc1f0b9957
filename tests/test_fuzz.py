"""Any file gives a result or a `ClexError`; longer by hand: `python -m benchmarks.fuzz`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from benchmarks import fuzz


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[fuzz.Inputs]:
    yield fuzz.Inputs(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("name", fuzz.READERS)
def test_any_file_is_read_or_refused(inputs: fuzz.Inputs, name: str) -> None:
    outcome = fuzz.fuzz(name, inputs, seconds=2, seed=1)
    assert not outcome.crashes
    # Some are read, some are refused: the changes reach what is checked.
    assert 0 < outcome.accepted < outcome.executions


def test_the_fuzzer_sees_a_crash(inputs: fuzz.Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    def fragile(inputs: fuzz.Inputs, rng: Any) -> None:
        {}["no such key"]

    monkeypatch.setitem(fuzz.READERS, "fragile", fragile)
    outcome = fuzz.fuzz("fragile", inputs, seconds=0.05, seed=0)
    assert len(outcome.crashes) == outcome.executions > 0


def test_the_fuzzer_sees_a_hang(inputs: fuzz.Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    def endless(inputs: fuzz.Inputs, rng: Any) -> None:
        while True:
            pass

    monkeypatch.setitem(fuzz.READERS, "endless", endless)
    monkeypatch.setattr(fuzz, "_SECONDS", 0.05)
    outcome = fuzz.fuzz("endless", inputs, seconds=0.01, seed=0)
    assert len(outcome.crashes) == 1


def test_what_announces_more_than_it_holds(tmp_path: Path, inputs: fuzz.Inputs) -> None:
    """Counts of 2**60: the reader of the format would fill the memory."""
    at = inputs.gguf.index(b"tokenizer.ggml.token_type") + len("tokenizer.ggml.token_type") + 8
    data = inputs.gguf[:at] + (2**60).to_bytes(8, "little") + inputs.gguf[at + 8 :]
    (tmp_path / "a.gguf").write_bytes(data)
    from clex.errors import CheckpointError
    from clex.export.gguf_header import check_header

    with pytest.raises(CheckpointError, match="more than 4,194,304 entries"):
        check_header(tmp_path / "a.gguf")
    (tmp_path / "a.gguf").write_bytes(inputs.gguf)
    check_header(tmp_path / "a.gguf")
