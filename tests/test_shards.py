"""Corpora: tokenised once, mixed by weight, long documents drawn more often."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from typer.testing import CliRunner

import tiny
from clex import shards
from clex.cli import app
from clex.data import (
    WindowPlan,
    Windows,
    load_mixture,
    load_tokens,
    parse_sources,
    read_documents,
    split_documents,
)
from clex.errors import ConfigError, DataError, OutputError
from clex.shards import SHARDS_FILE, load_shards, write_shards

LENGTHS = [50, 300, 20, 170, 90, 210, 400]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with tiny.token_cache(tmp_path_factory.mktemp("cache")):
        yield


def write(folder: Path, **settings: Any) -> dict[str, Any]:
    documents = read_documents([tiny.write_documents(folder.parent / "d.jsonl", LENGTHS)])
    tokenizer = settings.pop("tokenizer", None) or tiny.make_tokenizer()
    settings = {"shard_tokens": 300, **settings}
    return write_shards(documents, tokenizer, folder, {"from": "d.jsonl"}, **settings)


def rows(tokens: datasets.Dataset) -> list[list[int]]:
    return [row["input_ids"] for row in tokens]


# Shards.


def test_shards_hold_what_load_tokens_reads(tmp_path: Path) -> None:
    about = write(tmp_path / "out")
    tokenizer = tiny.make_tokenizer()
    wanted = load_tokens(tmp_path / "d.jsonl", tokenizer)
    found = load_tokens(tmp_path / "out", tokenizer)
    assert rows(found) == rows(wanted)
    assert list(found["length"]) == list(wanted["length"]) == LENGTHS
    # A file ends with the document that reaches 300 tokens: 350, 490, 400.
    assert [shard["tokens"] for shard in about["shards"]] == [350, 490, 400]
    assert about["tokens"] == sum(LENGTHS)
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"run.json", SHARDS_FILE, *(shard["file"] for shard in about["shards"])}


def test_interrupted_tokenising_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "whole")
    real = shards._write_shard
    calls: list[str] = []

    def dies(file: Path, *args: Any) -> Any:
        if file.name == "tokens-00001.arrow" and not calls:
            calls.append(file.name)
            raise KeyboardInterrupt
        return real(file, *args)

    monkeypatch.setattr(shards, "_write_shard", dies)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "out")
    with pytest.raises(DataError, match="not finished"):
        load_shards(tmp_path / "out", tiny.make_tokenizer())
    first = (tmp_path / "out" / "tokens-00000.arrow").stat().st_mtime_ns
    write(tmp_path / "out")
    assert (tmp_path / "out" / "tokens-00000.arrow").stat().st_mtime_ns == first
    for file in (tmp_path / "whole").glob("*.arrow"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


def test_other_tokens_and_damage_are_refused(tmp_path: Path) -> None:
    about = write(tmp_path / "out")
    other = tiny.make_tokenizer()
    other.add_tokens(["ship"])
    with pytest.raises(DataError, match="another tokenizer"):
        load_shards(tmp_path / "out", other)
    with pytest.raises(OutputError, match="other settings"):
        write(tmp_path / "out", shard_tokens=100)
    file = tmp_path / "out" / about["shards"][1]["file"]
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(DataError, match=r"tokens-00001\.arrow"):
        load_shards(tmp_path / "out", tiny.make_tokenizer())


def test_no_text(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no text"):
        write_shards([], tiny.make_tokenizer(), tmp_path / "out", {})


def test_command(tmp_path: Path) -> None:
    model = tiny.write_model(tmp_path / "model")
    texts = tiny.write_documents(tmp_path / "d.jsonl", LENGTHS)
    command = ["tokenize", str(texts), "--tokenizer", str(model), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "7 documents, 1,240 tokens in 1 files" in result.output.replace("\n", " ")
    assert json.loads((tmp_path / "out" / SHARDS_FILE).read_text())["complete"]


# Mixtures.


@pytest.mark.parametrize(
    ("texts", "wanted"),
    [
        (["books"], {"books": 1.0}),
        (["books=3", "code=1"], {"books": 0.75, "code": 0.25}),
        (["a=b=0.5", "c=0.5"], {"a=b": 0.5, "c": 0.5}),
    ],
)
def test_sources(texts: list[str], wanted: dict[str, float]) -> None:
    assert parse_sources(texts) == pytest.approx(wanted)


@pytest.mark.parametrize("texts", [["a=1", "b"], ["a=0"], ["a=-1", "b=1"], ["a=1", "a=2"], ["a=x"]])
def test_sources_that_make_no_sense(texts: list[str]) -> None:
    with pytest.raises(ConfigError):
        parse_sources(texts)


def test_file_with_an_equals_sign(tmp_path: Path) -> None:
    file = tmp_path / "t=1.txt"
    file.write_text("text")
    assert parse_sources([str(file)]) == {str(file): 1.0}


def mixture(tmp_path: Path) -> datasets.Dataset:
    """Two sources of long and short documents, of one letter each."""
    for letter, lengths in (("a", [100, 60, 20, 20, 20]), ("b", [300, 300, 30, 30, 300])):
        with (tmp_path / f"{letter}.jsonl").open("w") as file:
            file.writelines(json.dumps({"text": letter * n}) + "\n" for n in lengths)
    sources = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    return load_mixture(sources, tiny.make_tokenizer())


def plan(**settings: Any) -> WindowPlan:
    return WindowPlan(tokens=50, native_length=64, min_scale=1, max_scale=4, **settings)


def drawn(tokens: datasets.Dataset, count: int = 600, **settings: Any) -> list[dict[str, Any]]:
    windows = Windows(tokens, plan(**settings), count)
    return [windows[i] for i in range(count)]


def letters(items: list[dict[str, Any]]) -> Counter[int]:
    assert all(len(item["input_ids"].unique()) == 1 for item in items)
    return Counter(int(item["input_ids"][0]) for item in items)


@pytest.mark.parametrize("share", [0.2, 0.9])
def test_windows_come_from_each_source_by_its_share(tmp_path: Path, share: float) -> None:
    tokens = mixture(tmp_path)
    a, b = (tokens[row]["input_ids"][0] for row in (0, -1))
    found = letters(drawn(tokens, shares=(share, 1 - share)))
    assert abs(found[a] / 600 - share) < 0.06  # three standard deviations
    assert found[a] + found[b] == 600


def test_sources_are_not_mixed_inside_a_window(tmp_path: Path) -> None:
    """Short documents of one source are packed with one another only."""
    packed = [
        i for i in drawn(mixture(tmp_path), shares=(0.5, 0.5), long_factor=0.01) if i["packed"]
    ]
    assert len(packed) > 300
    assert len(letters(packed)) == 2


def test_long_documents_are_drawn_more_often() -> None:
    tokens = tiny.make_tokens([10] * 100 + [120])
    # 71 windows in the long document; 20 packs of 50 tokens.
    for factor in (1.0, 5.0):
        share = sum(not item["packed"] for item in drawn(tokens, long_factor=factor)) / 600
        assert abs(share - factor * 71 / (factor * 71 + 1000)) < 0.05
    assert drawn(tokens, 20)[7]["input_ids"].equal(drawn(tokens, 8)[7]["input_ids"])


def test_a_number_of_shares_that_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="3 shares for 2 sources"):
        Windows(mixture(tmp_path), plan(shares=(0.2, 0.3, 0.5)), 1)


def test_held_out_documents_keep_their_source(tmp_path: Path) -> None:
    kept, held = split_documents(mixture(tmp_path), share=0.5)
    assert set(kept["source"]) == {0, 1}
    assert set(held["source"]) == {0, 1}
    assert torch.tensor(kept["source"]).diff().min() >= 0
