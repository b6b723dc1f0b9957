"""From text files to training windows.

Documents stay apart. A window is cut from one document wherever one is long enough; documents that
are shorter are packed, and then each restarts `position_ids` at 0, from which transformers builds a
mask that keeps them from attending to one another; the first token of each is not scored. Item i
of a `Windows` is a pure function of the seed and i, so that a run resumes exactly and any number of
processes draws the same data.
"""

from __future__ import annotations

import json
import math
import os
import warnings
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet as parquet
import torch
from torch import Tensor

from .decoding import clean, read_lines, read_text, require_size
from .errors import ConfigError, DataError
from .files import output_errors
from .positions import uniform
from .shards import is_shards, load_shards

SUFFIXES = (".txt", ".md", ".jsonl", ".jsonl.gz", ".parquet")
# Documents, and characters, that are tokenised together.
_BATCH, _BATCH_CHARACTERS = 16, 2**22


def find_files(path: str | Path) -> list[Path]:
    """The text files that `path` stands for: itself, or all inside a folder, sorted.

    Raises:
        DataError: nothing there, or no file of a kind that clex reads.
    """
    path = Path(path)
    if os.path.isdir(path):
        files = sorted(f for f in path.rglob("*") if f.is_file() and f.name.endswith(SUFFIXES))
        if not files:
            raise DataError(f"no {', '.join(SUFFIXES)} file in folder {path}")
        return files
    if not os.path.exists(path):
        raise DataError(f"no such file or folder: {path}")
    if not path.name.endswith(SUFFIXES):
        raise DataError(f"{path} is not one of {', '.join(SUFFIXES)}")
    return [path]


def read_documents(files: Sequence[Path], field: str = "text") -> Iterator[str]:
    """The documents of `files`, one after another; empty ones are left out.

    A .txt or .md file is one document; a line of .jsonl and a row of .parquet are one each, their
    text being in `field`. Text is UTF-8, or what a byte order mark says. Bytes that are none become
    replacement characters, with a warning for each file.

    Raises:
        DataError: a file is damaged, is not text, holds a document that is too large, or a record
            has no such field.
    """
    for file in files:
        replaced = 0
        try:
            for where, text in _read(file, field):
                require_size(text, where)
                text = clean(text, where)
                replaced += text.count("\ufffd")
                if text.strip():
                    yield text
        except DataError:
            raise
        except (
            OSError,
            EOFError,
            ValueError,
            KeyError,
            RecursionError,
            zlib.error,
            pyarrow.ArrowException,
        ) as error:
            raise DataError(f"cannot read {file}: {_line(error)}") from error
        if replaced:
            warnings.warn(
                f"{file}: {replaced:,} characters are not UTF-8 and were replaced; is it in another"
                " encoding?",
                stacklevel=2,
            )


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _read(file: Path, field: str) -> Iterator[tuple[str, str]]:
    """Where each text stands, for messages, and the text."""
    if file.name.endswith((".txt", ".md")):
        yield str(file), read_text(file)
    elif file.name.endswith(".parquet"):
        table = parquet.ParquetFile(file)
        if field not in table.schema_arrow.names:
            raise DataError(
                f"{file} has no column {field!r} (columns: {', '.join(table.schema_arrow.names)})"
            )
        for batch in table.iter_batches(batch_size=64, columns=[field]):
            values = batch.column(0).to_pylist()
            yield from ((str(file), str(value)) for value in values if value is not None)
    else:
        for number, line in read_lines(file):
            if not line.strip():
                continue
            record = json.loads(line)
            if not isinstance(record, dict) or not isinstance(record.get(field), str):
                raise DataError(f"{file}, line {number}: no text in field {field!r}")
            yield f"{file}, line {number}", record[field]


def load_tokens(source: str | Path, tokenizer: Any, field: str = "text") -> datasets.Dataset:
    """Tokenise documents once, into a memory-mapped table that later runs find again.

    Args:
        source: a file, a folder, the id of a dataset of the hub (its ``train`` split), or a folder
            that ``clex tokenize`` made.
        tokenizer: of the model; no special tokens are added.
        field: column or key that holds the text.

    Returns:
        Rows ``{"input_ids": list of int, "length": int}``, one for each document.

    Raises:
        DataError: nothing readable, or no text.
        OutputError: the table cannot be written, such as on a full disk.
    """
    text = str(source)
    if is_shards(text):
        return load_shards(text, tokenizer)
    if not os.path.exists(text) and text.count("/") == 1 and not text.startswith((".", "/", "~")):
        try:
            hub = datasets.load_dataset(text, split="train")
        except Exception as error:
            reason = str(error).strip().splitlines()[0]
            raise DataError(f"no such file or folder, and no dataset {text!r}: {reason}") from error
        if field not in hub.column_names:
            raise DataError(
                f"dataset {text!r} has no column {field!r} (columns: {', '.join(hub.column_names)})"
            )
        tokens = hub.map(
            lambda rows: _tokenize(rows[field], tokenizer),
            batched=True,
            batch_size=_BATCH,
            remove_columns=hub.column_names,
            desc="tokenising",
        )
    else:
        files = find_files(source)
        stamps = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
        try:
            with output_errors(Path(datasets.config.HF_DATASETS_CACHE)):
                tokens = _table(stamps, field, tokenizer)
        except datasets.exceptions.DatasetGenerationError as error:
            if isinstance(error.__cause__, DataError):
                raise error.__cause__ from None
            if len(list(read_documents(files, field))) == 0:
                raise DataError(f"no text in {source}") from None
            raise
    if len(tokens) == 0 or max(tokens["length"], default=0) == 0:
        raise DataError(f"no text in {source}")
    return tokens


def _table(stamps: list[tuple[str, int, int]], field: str, tokenizer: Any) -> datasets.Dataset:
    try:
        return datasets.Dataset.from_generator(
            _token_rows, gen_kwargs={"stamps": stamps, "field": field, "tokenizer": tokenizer}
        )
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, OSError):
            raise error.__cause__ from None
        raise


def parse_sources(texts: Sequence[str]) -> dict[str, float]:
    """Sources of a mixture and their shares, which sum to 1, from ``PATH`` or ``PATH=WEIGHT``.

    Raises:
        ConfigError: a weight is no positive number, is missing beside others, or a source is named
            twice.
    """
    weights: dict[str, float] = {}
    given = []
    for text in texts:
        name, equals, number = text.rpartition("=")
        if not equals or Path(text).exists():
            name, number = text, ""
        try:
            weight = float(number or 1)
        except ValueError:
            weight = math.nan
        if not 0 < weight < math.inf:
            raise ConfigError(f"the weight of {name} must be a positive number, not {number!r}")
        if name in weights:
            raise ConfigError(f"{name} is named twice")
        weights[name] = weight
        given.append(bool(number))
    if len(weights) > 1 and not all(given):
        bare = next(name for name, has in zip(weights, given, strict=True) if not has)
        raise ConfigError(f"{bare} has no weight; several sources are given as PATH=WEIGHT")
    total = math.fsum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


def load_mixture(
    sources: Sequence[str | Path], tokenizer: Any, field: str = "text"
) -> datasets.Dataset:
    """The documents of several sources, with the number of its source beside each.

    Args:
        sources: see `load_tokens`.
        tokenizer: of the model.
        field: column or key that holds the text.

    Returns:
        Rows of `load_tokens` with ``"source"``, int; without it where there is one source.

    Raises:
        DataError: a source cannot be read or has no text.
    """
    parts = [load_tokens(source, tokenizer, field) for source in sources]
    if len(parts) == 1:
        return parts[0]
    kind = datasets.Features(
        {"input_ids": datasets.List(datasets.Value("int32")), "length": datasets.Value("int64")}
    )
    return datasets.concatenate_datasets(
        [
            # What was tokenised once is of this kind already, and too large to be copied.
            (part if part.features == kind else part.cast(kind)).add_column(
                "source", [number] * len(part)
            )
            for number, part in enumerate(parts)
        ]
    )


def _token_rows(
    stamps: list[tuple[str, int, int]], field: str, tokenizer: Any
) -> Iterator[dict[str, Any]]:
    """Rows of the token table. Sizes and times are in `stamps` to read a changed file anew."""
    batch: list[str] = []
    for text in read_documents([Path(name) for name, _, _ in stamps], field):
        batch.append(text)
        if len(batch) == _BATCH or sum(map(len, batch)) > _BATCH_CHARACTERS:
            yield from _rows(_tokenize(batch, tokenizer))
            batch = []
    if batch:
        yield from _rows(_tokenize(batch, tokenizer))


def _tokenize(texts: list[str], tokenizer: Any) -> dict[str, list[Any]]:
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    # Arrays, since the table would look at each number of a list to find its type.
    arrays = [np.asarray(ids, dtype=np.int32) for ids in encoded]
    return {"input_ids": arrays, "length": [len(ids) for ids in encoded]}


def _rows(columns: dict[str, list[Any]]) -> Iterator[dict[str, Any]]:
    for values in zip(*columns.values(), strict=True):
        yield dict(zip(columns, values, strict=True))


def split_documents(
    tokens: datasets.Dataset, share: float = 0.1
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Training and held-out documents: every k-th document is held out, at least one.

    Of a mixture every k-th of each source; a source of one document is for training only.

    Raises:
        DataError: no source has two documents.
    """
    sources = np.asarray(tokens["source"] if "source" in tokens.column_names else [0] * len(tokens))
    held: list[int] = []
    for source in np.unique(sources):
        own = np.flatnonzero(sources == source)
        if len(own) > 1:
            every = min(len(own), max(2, round(1 / share)))
            held += own[every - 1 :: every].tolist()
    if not held:
        raise DataError("one document cannot be split; give held-out text with --eval-data")
    kept = sorted({*range(len(tokens))} - {*held})
    return tokens.select(kept), tokens.select(held)


def long_enough(lengths: Sequence[int], wanted: int, what: str) -> None:
    """Check that some document has `wanted` tokens.

    Raises:
        DataError: none has; says how long the longest is and what would work.
    """
    longest = max(lengths)
    if longest < wanted:
        half = sum(n >= wanted / 2 for n in lengths)
        raise DataError(
            f"{what} needs a document of {wanted:,} tokens, and 0 of {len(lengths)} documents have"
            f" that many; the longest usable length is {longest:,} tokens ({half} documents have"
            f" {wanted // 2:,} or more)"
        )


@dataclass(frozen=True)
class WindowPlan:
    """What item i of a `Windows` looks like.

    Attributes:
        tokens: length of a window; ``None``: the true length of its scale, t * native_length.
        native_length: the unit of t.
        min_scale, max_scale: scales are drawn uniformly between these: the largest, where most
            can go wrong, need the most windows.
        power: above 1 larger scales are drawn more often, with a density that grows as
            (t - min_scale)^(power - 1).
        margin: windows of true length above t = 1 are longer than their scale by this share.
            Without it the mean loss buys a better middle with a collapse in the last few percent of
            the range.
        native_share: share of items at t = 1, which teach (and keep) the short window.
        integer_scales: draw whole numbers in that range uniformly instead, as the released CLEX.
        rising: number of items, from the first, over which the largest scale rises to `max_scale`.
        multiple: windows of true length are shortened to a multiple of this.
        packed: whether short documents are packed to fill a window.
        shares: share of the windows that come from each source; as much as each has if not given.
        long_factor: how much more often than by their size documents that fill a window are drawn,
            in each source by itself (Fu et al. 2024, arXiv 2402.10171); at a fixed window length.
    """

    tokens: int | None
    native_length: int
    min_scale: float
    max_scale: float
    power: float = 1.0
    margin: float = 0.0
    native_share: float = 0.0
    integer_scales: bool = False
    rising: int = 0
    multiple: int = 1
    packed: bool = True
    shares: tuple[float, ...] = ()
    long_factor: float = 1.0

    def window(self, scale: float) -> int:
        """Tokens of a window at `scale`."""
        margin = self.margin if scale > 1 else 0.0  # the plain model ends at its window
        true = round(scale * self.native_length * (1 + margin))
        return self.tokens or max(2, self.multiple, true - true % self.multiple)

    def largest(self, index: int) -> float:
        """The largest scale that item `index` may have.

        While it rises it grows by the same factor from item to item, from 2 (or `min_scale` where
        that is more): the shorter windows come first, and each doubling gets as many items.
        """
        if index >= self.rising:
            return self.max_scale
        start = min(max(self.min_scale, 2.0), self.max_scale)
        return start * (self.max_scale / start) ** (index / self.rising)

    def scale(self, index: int, seed: int) -> float:
        """The scale of item `index`, along a low-discrepancy sequence."""
        first, coin = uniform(torch.tensor([seed]), 2, stream=11)[0].tolist()
        # The golden ratio spreads any few neighbours evenly over the range: fewer steps are needed
        # than with independent draws. The coin uses sqrt(2), independent of it.
        share = (first + index * 0.6180339887498949) % 1.0
        coin = (coin + index * math.sqrt(2)) % 1.0
        if coin < self.native_share:
            return 1.0
        share **= 1 / self.power
        if self.integer_scales:
            low = math.ceil(self.min_scale)
            high = max(low, int(self.largest(index)))
            return float(low + int(share * (high - low + 1)))
        return self.min_scale + (self.largest(index) - self.min_scale) * share


@dataclass(frozen=True)
class _Source:
    """What one source has for a window: numbers of documents, and packs of short ones."""

    documents: np.ndarray[Any, np.dtype[np.int64]]
    packs: list[list[int]]
    share: float


class Windows(torch.utils.data.Dataset[dict[str, Any]]):
    """`count` training windows drawn from documents.

    Item: ``input_ids`` int64 (n,), ``position_ids`` int64 (n,) (restarting in packed windows),
    ``packed`` bool, ``scale`` float, ``seed`` int (of the item's positions).

    Args:
        tokens: from `load_tokens` or `load_mixture`.
        plan: lengths, scales, shares.
        count: number of items.
        seed: the run's seed.

    Raises:
        DataError: a source has no document that is long enough, or all of its together are too
            short for one window.
        ConfigError: there are not as many shares as sources.
    """

    def __init__(
        self, tokens: datasets.Dataset, plan: WindowPlan, count: int, seed: int = 0
    ) -> None:
        self.tokens = tokens.with_format("numpy", columns=["input_ids"])
        self.lengths = np.asarray(tokens["length"], dtype=np.int64)
        self.plan, self.count, self.seed = plan, count, seed
        if "source" in tokens.column_names:
            numbers = np.asarray(tokens["source"], dtype=np.int64)
        else:
            numbers = np.zeros(len(tokens), dtype=np.int64)
        groups = [np.flatnonzero(numbers == k) for k in range(int(numbers.max()) + 1)]
        if plan.shares and len(plan.shares) != len(groups):
            raise ConfigError(f"{len(plan.shares)} shares for {len(groups)} sources of text")
        # Without shares all sources are one.
        groups = groups if plan.shares else [np.arange(len(tokens))]
        shares = plan.shares or (1.0,)
        self.sources = [self._source(g, s) for g, s in zip(groups, shares, strict=True)]

    def _source(self, documents: np.ndarray[Any, np.dtype[np.int64]], share: float) -> _Source:
        plan, lengths = self.plan, self.lengths[documents]
        packs: list[list[int]] = []
        if plan.tokens is None:
            most = plan.window(plan.max_scale)
            long_enough(lengths.tolist(), most, f"scale {plan.max_scale:g}")
        elif not plan.packed:
            long_enough(lengths.tolist(), plan.tokens, "a window of one document")
        else:
            short = documents[(lengths < plan.tokens) & (lengths > 1)]
            packs = self._pack(short.tolist(), plan.tokens)
            if lengths.max() < plan.tokens and not packs:
                raise DataError(
                    f"{len(lengths)} documents with {lengths.sum():,} tokens together"
                    f" do not fill one window of {plan.tokens:,} tokens"
                )
        return _Source(documents, packs, share)

    def _pack(self, documents: list[int], size: int) -> list[list[int]]:
        """Groups of short documents, in order, that fill a window each; the rest is dropped."""
        packs: list[list[int]] = []
        group: list[int] = []
        filled = 0
        for document in documents:
            group.append(document)
            filled += int(self.lengths[document])
            if filled >= size:
                packs.append(group)
                group, filled = [], 0
        return packs

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        plan = self.plan
        scale = plan.scale(index, self.seed)
        n = plan.window(scale)
        row_seed = self.seed * 1_000_003 + index
        draws = uniform(torch.tensor([row_seed]), 3, stream=12)[0].tolist()
        which, where, whose = draws
        source = self.sources[-1]
        for candidate in self.sources[:-1]:
            if whose < candidate.share:
                source = candidate
                break
            whose -= candidate.share
        starts = np.maximum(self.lengths[source.documents] - n + 1, 0)  # windows of each document
        total = plan.long_factor * int(starts.sum())
        packed_tokens = len(source.packs) * n
        choice = which * (total + packed_tokens)
        if choice >= total:
            pack = source.packs[min(int((choice - total) / n), len(source.packs) - 1)]
            parts = [self._document(document) for document in pack]
            parts[-1] = parts[-1][: n - sum(len(part) for part in parts[:-1])]
            ids = np.concatenate(parts)
            positions = np.concatenate([np.arange(len(part)) for part in parts])
        else:
            place = np.searchsorted(starts.cumsum(), choice / plan.long_factor, side="right")
            start = int(where * starts[place])
            ids = self._document(int(source.documents[place]))[start : start + n]
            positions = np.arange(n)
        return {
            "input_ids": torch.from_numpy(ids.astype(np.int64)),
            "position_ids": torch.from_numpy(positions),
            "packed": bool(choice >= total),
            "scale": scale,
            "seed": row_seed,
        }

    def _document(self, index: int) -> np.ndarray[Any, np.dtype[Any]]:
        ids: np.ndarray[Any, np.dtype[Any]] = self.tokens[index]["input_ids"]
        return ids


def collate(items: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Stack items of one length.

    Returns:
        ``input_ids`` (B, n), ``scale`` float32 (B,), ``seed`` int64 (B,), and, only where a window
        is packed, ``position_ids`` (B, n): without them the host takes its fastest causal path.
    """
    batch = {
        "input_ids": torch.stack([item["input_ids"] for item in items]),
        "scale": torch.tensor([item["scale"] for item in items], dtype=torch.float32),
        "seed": torch.tensor([item["seed"] for item in items], dtype=torch.int64),
    }
    if any(item["packed"] for item in items):
        batch["position_ids"] = torch.stack([item["position_ids"] for item in items])
    return batch
