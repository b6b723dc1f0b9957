"""Key tokens found with another tokenizer, against the offsets that tokenizers report."""

from __future__ import annotations

import io
from typing import Any

import datasets
import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import tiny
from clex.data import find_files, read_documents
from clex.errors import DataError
from clex.evaluation import longppl
from clex.evaluation.alignment import Aligner
from clex.evaluation.longppl import Evaluator, find_key_tokens, key_tokens_of
from clex.evaluation.perplexity import PerplexityPlan, Reader
from clex.hf.models import assets_folder, load_base, load_tokenizer

MIXED = "It was naïve \N{EM DASH} the “café” of 東京 closed.\n\nAnd so on, 1234 times."
PLAN = PerplexityPlan((400, 1200), 15, 2, protocols=("longppl",), truncation=40)


@pytest.fixture(scope="module")
def book() -> str:
    text = next(read_documents(find_files(assets_folder() / "books" / "test.jsonl.gz")))
    return text[5000:8200].encode("ascii", "ignore").decode()


def offsets(tokenizer: Any, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return encoded["input_ids"], encoded["offset_mapping"]


def test_every_byte_has_its_place() -> None:
    """One tokenizer has a token a byte; so its positions are those of the bytes."""
    one_each, pieces = tiny.make_tokenizer(), load_tokenizer("tiny-llama")
    text = Aligner(pieces, one_each)(pieces(MIXED, add_special_tokens=False)["input_ids"])
    assert text.other.tolist() == list(range(len(MIXED.encode()) + 1))
    back = Aligner(one_each, pieces)(one_each(MIXED, add_special_tokens=False)["input_ids"])
    assert torch.equal(back.other, text.own)
    start = len("It was naïve \N{EM DASH} the ".encode())
    stop = start + len("“café”".encode())
    covered = text.own_tokens(torch.arange(start, stop))
    own = pieces(MIXED, add_special_tokens=False)["input_ids"]
    assert "“café”" in pieces.decode([own[i] for i in covered])
    assert text.own_tokens(torch.zeros(0, dtype=torch.int64)).tolist() == []
    first, last = back.inside(start, stop)
    assert back.other[first] >= start and back.other[last] <= stop
    assert back.other[first - 1] < start and back.other[last + 1] > stop


def test_a_space_in_front_is_no_byte_of_the_text() -> None:
    plain = tiny.make_tokenizer()
    spaced = Tokenizer(models.BPE(plain.get_vocab(), merges=[]))
    spaced.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    spaced.decoder = decoders.ByteLevel()
    other = PreTrainedTokenizerFast(tokenizer_object=spaced)
    text = Aligner(plain, other)(plain("word", add_special_tokens=False)["input_ids"])
    assert text.other.tolist() == [0, 0, 1, 2, 3, 4]
    assert text.own_tokens(torch.tensor([0, 2])).tolist() == [1], "the space covers nothing"


def test_a_tokenizer_that_changes_the_text_is_refused() -> None:
    plain = tiny.make_tokenizer()
    lower = Tokenizer(models.BPE(plain.get_vocab(), merges=[]))
    lower.normalizer = normalizers.Replace("w", "www")
    lower.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    lower.decoder = decoders.ByteLevel()
    aligner = Aligner(plain, PreTrainedTokenizerFast(tokenizer_object=lower))
    with pytest.raises(DataError, match="makes 10 bytes of a text of 4"):
        aligner(plain("woww", add_special_tokens=False)["input_ids"])


@pytest.fixture
def many_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small model gains little from context: ask less of a key token."""
    monkeypatch.setattr(longppl, "GAIN", 0.2)
    monkeypatch.setattr(longppl, "MOST_LOSS", 4.0)


@pytest.mark.usefixtures("many_keys")
def test_key_tokens_of_another_tokenizer(book: str) -> None:
    """tiny-llama finds them in its pieces; the judged model reads bytes."""
    judged, own = tiny.make_tokenizer(), load_tokenizer("tiny-llama")
    model = load_base("tiny-llama")
    ids, _ = offsets(judged, book)
    tokens = datasets.Dataset.from_dict({"input_ids": [ids], "length": [len(ids)]})
    console = Console(file=io.StringIO())
    found = key_tokens_of(Evaluator(model, Aligner(judged, own)), tokens, PLAN, console=console)
    assert list(found) == [(0, 0), (0, 1)]
    pieces, places = offsets(own, book)
    for k in range(2):
        start, stop = 1200 * k, 1200 * (k + 1)
        inside = [i for i, (a, b) in enumerate(places) if start <= a and b <= stop]
        part = torch.tensor(pieces[inside[0] : inside[-1] + 1])
        keys = find_key_tokens(Reader(model), part, PLAN.truncation).tolist()
        wanted = {c - start for i in keys for c in range(*places[inside[0] + i])}
        assert found[0, k].tolist() == sorted(wanted)
        assert len(keys) > 3 and len(wanted) < 600


@pytest.mark.usefixtures("many_keys")
def test_its_own_tokenizer_changes_nothing(book: str) -> None:
    model, own = load_base("tiny-llama"), load_tokenizer("tiny-llama")
    ids = own(book, add_special_tokens=False)["input_ids"]
    tokens = datasets.Dataset.from_dict({"input_ids": [ids], "length": [len(ids)]})
    plan = PerplexityPlan((128, 300), 15, 2, protocols=("longppl",), truncation=40)
    console = Console(file=io.StringIO())
    direct = key_tokens_of(Evaluator(model), tokens, plan, console=console)
    aligned = key_tokens_of(Evaluator(model, Aligner(own, own)), tokens, plan, console=console)
    assert all(torch.equal(direct[key], aligned[key]) for key in direct)
    assert sum(map(len, direct.values())) > 3
