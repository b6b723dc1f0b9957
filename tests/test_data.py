"""From files to training windows: what is read, what is refused, what a window holds."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch

import clex
import tiny
from clex import decoding
from clex.data import (
    WindowPlan,
    Windows,
    collate,
    find_files,
    load_tokens,
    read_documents,
    split_documents,
)
from clex.errors import DataError

NATIVE = tiny.NATIVE


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with tiny.token_cache(tmp_path_factory.mktemp("cache")):
        yield


def read(path: Path, field: str = "text") -> list[str]:
    return list(read_documents(find_files(path), field))


def write_gz(path: Path, *texts: str) -> Path:
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    return path


def write_parquet(path: Path, column: str, *texts: str | None) -> Path:
    pyarrow.parquet.write_table(pyarrow.table({column: list(texts)}), path)
    return path


# Reading.


def test_every_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    (tmp_path / "b.md").write_text("# three")
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "c.jsonl").write_text('{"text": "four"}\n\n{"text": "five"}\n')
    write_gz(tmp_path / "deep" / "er" / "d.jsonl.gz", "six", "séven")
    write_parquet(tmp_path / "e.parquet", "text", "eight", None, "nine")
    (tmp_path / "notes.pdf").write_bytes(b"not read")
    wanted = ["one\n\ntwo", "# three", "four", "five", "six", "séven", "eight", "nine"]
    assert read(tmp_path) == wanted
    assert read(tmp_path / "deep") == wanted[2:6]
    assert read(tmp_path / "e.parquet") == wanted[6:]


def test_other_field(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"body": "yes", "text": "no"}')
    assert read(file, "body") == ["yes"]
    assert read(write_parquet(tmp_path / "b.parquet", "body", "yes"), "body") == ["yes"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_bytes_that_are_no_utf8(tmp_path: Path, name: str) -> None:
    text = b"caf\xe9 au lait"
    (tmp_path / name).write_bytes(text if name == "a.txt" else b'{"text": "' + text + b'"}')
    with pytest.warns(UserWarning, match="1 characters are not UTF-8"):
        assert read(tmp_path) == ["caf\ufffd au lait"]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz"])
def test_byte_order_marks(tmp_path: Path, name: str, encoding: str) -> None:
    content = "caf\u00e9" if name == "a.txt" else '{"text": "caf\u00e9"}\n\n{"text": "\u65e5"}\n'
    data = content.encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    wanted = ["caf\u00e9"] if name == "a.txt" else ["caf\u00e9", "\u65e5"]
    assert read(tmp_path) == wanted


@pytest.mark.parametrize(
    "data", ["sixteen bits without a mark".encode("utf-16-le") * 3, bytes(range(256)), b"\0" * 99]
)
def test_what_is_no_text_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(DataError, match="is not text in UTF-8"):
        read(tmp_path)


def test_odd_characters_are_kept_or_replaced(tmp_path: Path) -> None:
    """A NUL is a character; half of one, which JSON can hold, is none that a tokenizer takes."""
    lines = ['{"text": "a\\u0000b"}', '{"text": "\\ud83d"}', '{"text": "\\ud83d\\ude00"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\r\n\r\n")
    with pytest.warns(UserWarning, match="1 characters"):
        texts = read(tmp_path)
    assert texts == ["a\0b", "\ufffd", "\U0001f600"]
    with pytest.warns(UserWarning, match="1 characters"):
        assert len(load_tokens(tmp_path, tiny.make_tokenizer())) == 3


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz"])
def test_a_document_that_is_too_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """One endless line is refused before more of it than a document's worth is in memory."""
    monkeypatch.setattr(decoding, "MOST_CHARACTERS", 1000)
    monkeypatch.setattr(decoding, "_MOST_LINE", 6000)
    opener = gzip.open if name.endswith(".gz") else open
    for size, words in ((1001, "1,000 characters in one document"), (5_000_000, ",000 characters")):
        with opener(tmp_path / name, "wt") as file:
            file.write("x" * size if name == "a.txt" else json.dumps({"text": "x" * size}))
        tracemalloc.start()
        with pytest.raises(DataError, match=words):
            read(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
        tracemalloc.stop()
    with opener(tmp_path / name, "wt") as file:
        file.write("x" * 1000 if name == "a.txt" else json.dumps({"text": "x" * 1000}))
    assert read(tmp_path) == ["x" * 1000]


def cut_gz(folder: Path) -> None:
    file = write_gz(folder / "a.jsonl.gz", *("some words of text " * 9 for _ in range(40)))
    file.write_bytes(file.read_bytes()[:-20])


def bend_gz(folder: Path) -> None:
    file = write_gz(folder / "a.jsonl.gz", *(f"{i} words of text " * 9 for i in range(400)))
    data = bytearray(file.read_bytes())
    data[40:60] = bytes(b ^ 0xFF for b in data[40:60])
    file.write_bytes(data)


def cut_parquet(folder: Path) -> None:
    file = write_parquet(folder / "a.parquet", "text", "some text")
    file.write_bytes(file.read_bytes()[:-20])


def text(name: str, content: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_text(content)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no files": (lambda folder: None, "no .txt, .md, .jsonl"),
    "empty file": (text("a.txt", ""), "no text in"),
    "only spaces": (text("a.jsonl", '{"text": " "}\n'), "no text in"),
    "no field": (text("a.jsonl", '{"text": "x"}\n{"body": "y"}'), "line 2: no text in field"),
    "field is no text": (text("a.jsonl", '{"text": 5}'), "line 1: no text in field 'text'"),
    "line is a list": (text("a.jsonl", "[1]"), "line 1: no text"),
    "line is no JSON": (text("a.jsonl", '{"text": '), "cannot read .*a.jsonl"),
    "line without an end": (text("a.jsonl", "[" * 100_000), "cannot read .*a.jsonl"),
    "no column": (
        lambda folder: write_parquet(folder / "a.parquet", "body", "x"),
        "no column 'text' .columns: body.",
    ),
    "gzip cut short": (cut_gz, "cannot read .*a.jsonl.gz"),
    "gzip with other bytes": (bend_gz, "cannot read .*a.jsonl.gz"),
    "no gzip": (text("a.jsonl.gz", '{"text": "x"}'), "cannot read .*a.jsonl.gz"),
    "parquet cut short": (cut_parquet, "cannot read .*a.parquet"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_refused(tmp_path: Path, kind: str) -> None:
    damage, words = DAMAGE[kind]
    damage(tmp_path)
    with pytest.raises(DataError, match=words) as caught:
        load_tokens(tmp_path, tiny.make_tokenizer())
    assert "\n" not in str(caught.value)


def test_paths_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        find_files(tmp_path / "nowhere")
    (tmp_path / "a.pdf").touch()
    with pytest.raises(DataError, match="is not one of"):
        find_files(tmp_path / "a.pdf")
    with pytest.raises(DataError, match=r"no such file or folder, and no dataset 'some/thing'"):
        load_tokens("some/thing", tiny.make_tokenizer())  # looks like a dataset; no network


def test_tokens(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "abc"}\n{"text": "defgh"}\n')
    tokenizer = tiny.make_tokenizer()
    tokens = load_tokens(file, tokenizer)
    assert tokens["length"][:] == [3, 5]
    assert [tokenizer.decode(ids) for ids in tokens["input_ids"]] == ["abc", "defgh"]
    file.write_text('{"text": "changed"}\n')  # the table of the old file must not come back
    assert load_tokens(file, tokenizer)["length"][:] == [7]


def test_order_of_documents_past_one_batch(tmp_path: Path) -> None:
    lengths = [(7 * i) % 19 + 5 for i in range(50)]
    tokens = load_tokens(tiny.write_documents(tmp_path / "a.jsonl", lengths), tiny.make_tokenizer())
    assert tokens["length"][:] == lengths


def test_split() -> None:
    tokens = tiny.make_tokens(range(5, 35))
    train, held = split_documents(tokens)
    assert held["length"][:] == [14, 24, 34]
    assert sorted([*train["length"], *held["length"]]) == list(range(5, 35))
    train, held = split_documents(tiny.make_tokens([5, 6]))
    assert (train["length"][:], held["length"][:]) == ([5], [6])
    with pytest.raises(DataError, match="--eval-data"):
        split_documents(tiny.make_tokens([500]))


def test_split_of_a_mixture() -> None:
    """Every source keeps documents, and the only one of a source is for training."""
    tokens = tiny.make_tokens(range(5, 28)).add_column("source", [0] * 2 + [1] + [2] * 20)
    train, held = split_documents(tokens)
    assert held["source"][:] == [0, 2, 2]
    assert sorted({*train["source"]}) == [0, 1, 2]
    alone = tiny.make_tokens([5, 6]).add_column("source", [0, 1])
    with pytest.raises(DataError, match="--eval-data"):
        split_documents(alone)


# Windows.


def make_windows(lengths: list[int], count: int = 200, seed: int = 0, **plan: Any) -> Windows:
    plan = {"tokens": None, "min_scale": 1.0, "max_scale": 4.0, **plan}
    return Windows(tiny.make_tokens(lengths), WindowPlan(native_length=NATIVE, **plan), count, seed)


LONG = [400, 300, 90]


def test_windows_depend_on_seed_and_index_only() -> None:
    one, two = make_windows(LONG, tokens=70), make_windows(LONG, tokens=70, count=7)
    [two[i] for i in (3, 1)]  # what was drawn before does not matter, nor how many there are
    for i in (6, 0, 3):
        assert all(
            torch.equal(torch.as_tensor(one[i][k]), torch.as_tensor(two[i][k])) for k in one[i]
        )
    other = make_windows(LONG, tokens=70, seed=1)
    assert any(not torch.equal(one[i]["input_ids"], other[i]["input_ids"]) for i in range(5))
    assert len({tuple(one[i]["input_ids"].tolist()) for i in range(50)}) > 40
    assert len({one[i]["seed"] for i in range(200)}) == 200


def test_true_lengths_come_from_one_document() -> None:
    documents = [ids for ids in tiny.make_tokens(LONG)["input_ids"]]
    windows = make_windows(LONG)
    sources = set()
    for i in range(60):
        item = windows[i]
        ids = item["input_ids"].tolist()
        assert len(ids) == round(item["scale"] * NATIVE)
        found = [
            d
            for d, document in enumerate(documents)
            if any(document[s : s + len(ids)] == ids for s in range(len(document)))
        ]
        assert len(found) == 1
        assert not item["packed"]
        assert item["position_ids"].tolist() == list(range(len(ids)))
        sources.add(found[0])
    assert sources == {0, 1, 2}


def test_every_start_is_as_likely() -> None:
    windows = make_windows([1070, 270], tokens=70)
    short = bytes(windows.tokens[1]["input_ids"].tolist())
    share = sum(bytes(windows[i]["input_ids"].tolist()) in short for i in range(400)) / 400
    # 201 starts of 1202: 0.167; four standard deviations are 0.075. By documents it would be 0.5.
    assert abs(share - 201 / 1202) < 0.075


def test_scales_fill_the_range() -> None:
    windows = make_windows(LONG, min_scale=1.5)
    logs = torch.tensor([windows.plan.scale(i, 3) for i in range(100)]).log()
    low, high = torch.tensor(1.5).log(), torch.tensor(4.0).log()
    assert logs.min() >= low - 1e-6
    assert logs.max() <= high + 1e-6
    # Low discrepancy: steps of the golden ratio leave no gap above 2.62 / n (three-gap theorem);
    # of 100 independent draws the largest gap would be about 5 / n.
    shares = ((logs - low) / (high - low)).sort().values
    assert shares.diff().max() < 2.7 / 100
    draws = torch.rand(100, generator=torch.Generator().manual_seed(0)).sort().values
    assert draws.diff().max() > 2.7 / 100
    assert windows.plan.scale(0, 3) != windows.plan.scale(0, 4)


def test_native_share() -> None:
    windows = make_windows(LONG, tokens=64, native_share=0.25, min_scale=2.0)
    scales = [windows[i]["scale"] for i in range(200)]
    # A low-discrepancy coin: 50 of 200, give or take a few.
    assert abs(scales.count(1.0) - 50) <= 3
    assert min(t for t in scales if t != 1) >= 2
    without = make_windows(LONG, tokens=64, min_scale=2.0).plan
    assert 1.0 not in [without.scale(i, 0) for i in range(200)]


def test_integer_scales() -> None:
    windows = make_windows(LONG, tokens=64, integer_scales=True, max_scale=4.9)
    scales = [windows[i]["scale"] for i in range(200)]
    assert set(scales) == {1.0, 2.0, 3.0, 4.0}
    assert all(45 <= scales.count(t) <= 55 for t in set(scales))  # low discrepancy again


def test_the_largest_scale_rises() -> None:
    plan = make_windows(LONG, tokens=64, max_scale=32.0, rising=100, count=200).plan
    scales = torch.tensor([plan.scale(i, 3) for i in range(200)], dtype=torch.float64)
    largest = torch.tensor([plan.largest(i) for i in range(200)], dtype=torch.float64)
    # 2 to 32 is four doublings of 25 items each.
    expected = [2.0, 4.0, 8.0, 16.0, 32.0, 32.0]
    assert largest[[0, 25, 50, 75, 100, 199]].tolist() == pytest.approx(expected)
    assert (largest.diff() >= 0).all() and (scales <= largest).all() and (scales >= 1).all()
    # The whole range below the largest is drawn from, not its end alone.
    shares = (scales - 1) / (largest - 1)
    assert shares[:100].min() < 0.03 and shares[:100].max() > 0.97
    # After it, and where it is off, scales are those of a plan without it.
    off = make_windows(LONG, tokens=64, max_scale=32.0).plan
    assert scales[100:].tolist() == [off.scale(i, 3) for i in range(100, 200)]
    assert scales[:100].max() < 32 and any(off.scale(i, 3) > largest[i] for i in range(100))
    assert [off.largest(i) for i in (0, 7)] == [32.0, 32.0]
    # Item by item, in any order.
    assert [plan.scale(i, 3) for i in range(199, -1, -1)] == scales.flip(0).tolist()


@pytest.mark.parametrize(
    ("low", "high", "first"), [(1.0, 1.5, 1.5), (3.0, 8.0, 3.0), (1.0, 8.0, 2.0), (8.0, 8.0, 8.0)]
)
def test_where_the_largest_scale_starts(low: float, high: float, first: float) -> None:
    plan = make_windows(LONG, tokens=64, min_scale=low, max_scale=high, rising=50).plan
    assert (plan.largest(0), plan.largest(50)) == (first, high)
    assert all(low <= plan.scale(i, 0) <= plan.largest(i) for i in range(60))


def test_the_largest_whole_scale_rises() -> None:
    settings = {"tokens": 64, "integer_scales": True, "max_scale": 4.9, "rising": 100}
    windows = make_windows(LONG, **settings)
    scales = [windows[i]["scale"] for i in range(200)]
    assert set(scales[:30]) == {1.0, 2.0} and set(scales[100:]) == {1.0, 2.0, 3.0, 4.0}
    assert all(t <= windows.plan.largest(i) for i, t in enumerate(scales))


# Packing.


def test_short_documents_are_packed() -> None:
    lengths = [30, 20, 25, 1, 40]  # one of a single token scores nothing and is left out
    documents = tiny.make_tokens(lengths)["input_ids"][:]
    windows = make_windows(lengths, tokens=64)
    item = windows[0]
    assert item["packed"]
    assert item["position_ids"].tolist() == [*range(30), *range(20), *range(14)]
    assert item["input_ids"].tolist() == documents[0] + documents[1] + documents[2][:14]
    batch = collate([item, windows[1]])
    assert batch["position_ids"].shape == batch["input_ids"].shape == (2, 64)
    assert batch["scale"].shape == batch["seed"].shape == (2,)


def test_long_documents_need_no_position_ids() -> None:
    windows = make_windows(LONG, tokens=64)
    assert "position_ids" not in collate([windows[0], windows[1]])


def test_packs_and_windows_are_mixed() -> None:
    windows = make_windows([100, 30, 40, 50, 30], tokens=64)
    packed = [windows[i]["packed"] for i in range(200)]
    # 37 starts in the long document and 128 tokens in packs.
    assert 0.65 < sum(packed) / 200 < 0.9


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
@pytest.mark.parametrize("t", [1.0, 3.0])
def test_documents_in_a_pack_do_not_see_each_other(family: str, t: float) -> None:
    model = clex.extend(tiny.make_model(family), clex.ClexConfig(max_scale=4))
    batch = collate([make_windows([30, 20, 25], tokens=64)[0]])
    second = batch["input_ids"][:, 30:50]
    with clex.at_scale(model, t):
        alone = tiny.logits(model, second)
        packed = tiny.logits(model, batch["input_ids"], position_ids=batch["position_ids"])
        leaking = tiny.logits(model, batch["input_ids"])
    # Sums over more keys, all but 20 of them with weight 0: float32 rounding.
    assert (packed[:, 30:50] - alone).abs().max() < 1e-4
    assert (leaking[:, 30:50] - alone).abs().max() > 0.1


# Too little text.


def test_too_short_for_the_scale() -> None:
    with pytest.raises(DataError) as caught:
        make_windows([255, 130, 20])
    message = str(caught.value)
    assert "scale 4 needs a document of 256 tokens" in message
    assert "0 of 3 documents" in message
    assert "longest usable length is 255 tokens" in message
    assert "(2 documents have 128 or more)" in message
    make_windows([256])


def test_too_little_for_a_window() -> None:
    with pytest.raises(DataError, match="2 documents with 60 tokens together do not fill one"):
        make_windows([30, 30], tokens=64)
    make_windows([30, 34], tokens=64)
