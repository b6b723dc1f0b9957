"""A corpus that was tokenised once: memory-mapped Arrow files and a list of them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from .errors import DataError
from .files import new_file, read_json, write_json
from .run_folder import claimed, holds_run

SHARDS_FILE = "shards.json"
_SCHEMA = pyarrow.schema(
    [("input_ids", pyarrow.list_(pyarrow.int32())), ("length", pyarrow.int64())]
)
_BATCH, _BATCH_CHARACTERS = 64, 2**22


def is_shards(folder: str | Path) -> bool:
    """Whether `folder` holds a corpus that `write_shards` made, finished or not."""
    return os.path.isfile(Path(folder) / SHARDS_FILE)


def tokenizer_digest(tokenizer: Any) -> str:
    """SHA-256 of all that decides which tokens a text becomes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = (
        json.dumps(tokenizer.get_vocab(), sort_keys=True) if backend is None else backend.to_str()
    )
    return hashlib.sha256(rules.encode()).hexdigest()


def write_shards(
    documents: Iterable[str],
    tokenizer: Any,
    out: str | Path,
    settings: dict[str, Any],
    *,
    shard_tokens: int = 2**26,
    overwrite: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Tokenise `documents` into files of about `shard_tokens` tokens each.

    An interrupted call goes on after its last whole file when it is made again; documents before
    that are read again but not tokenised.

    Args:
        documents: texts, in the same order each time.
        tokenizer: of the model; no special tokens are added.
        out: folder; made if it does not exist.
        settings: what the documents depend on, to recognise the call.
        shard_tokens: a file ends with the document that reaches this.
        overwrite: delete what another call left in `out`.
        console: where progress is shown.

    Returns:
        What `shards.json` holds: ``shards``, ``documents``, ``tokens``, ``complete``.

    Raises:
        OutputError: `out` is in use, holds something else, or cannot be written.
        DataError: there is no text.
    """
    out = Path(out)
    settings = {**settings, "tokenizer": tokenizer_digest(tokenizer), "shard_tokens": shard_tokens}
    begun = holds_run(out, settings, overwrite, "clex tokenize")
    about: dict[str, Any] = {
        "tokenizer": settings["tokenizer"],
        "shards": [],
        "documents": 0,
        "tokens": 0,
        "complete": False,
    }
    if begun and is_shards(out):
        about = read_json(out / SHARDS_FILE)
    if about["complete"]:
        return about
    progress = Progress(
        SpinnerColumn(),
        TextColumn("{task.completed:,} documents, {task.fields[tokens]:,} tokens"),
        TimeElapsedColumn(),
        console=console or Console(stderr=True),
    )
    with claimed(out, settings, overwrite), progress:
        rest = islice(documents, about["documents"], None)
        task = progress.add_task(
            "", total=None, completed=about["documents"], tokens=about["tokens"]
        )
        rows = _rows(rest, tokenizer)
        while True:
            name = f"tokens-{len(about['shards']):05d}.arrow"
            shard = _write_shard(out / name, rows, shard_tokens, lambda: progress.advance(task))
            if shard["documents"] == 0:
                (out / name).unlink()
                break
            about["shards"].append({"file": name, **shard})
            for key in ("documents", "tokens"):
                about[key] += shard[key]
            write_json(out / SHARDS_FILE, about)
            progress.update(task, tokens=about["tokens"])
        if about["tokens"] == 0:
            raise DataError("no text to tokenise")
        about["complete"] = True
        write_json(out / SHARDS_FILE, about)
    return about


def _rows(documents: Iterator[str], tokenizer: Any) -> Iterator[list[int]]:
    batch: list[str] = []

    def tokens() -> list[list[int]]:
        ids: list[list[int]] = tokenizer(batch, add_special_tokens=False, verbose=False)[
            "input_ids"
        ]
        batch.clear()
        return ids

    for text in documents:
        batch.append(text)
        # Tokenising takes many times the memory of the text.
        if len(batch) == _BATCH or sum(map(len, batch)) > _BATCH_CHARACTERS:
            yield from tokens()
    if batch:
        yield from tokens()


def _write_shard(
    file: Path, rows: Iterator[list[int]], size: int, tell: Callable[[], None]
) -> dict[str, int]:
    """Write documents until `size` tokens are reached; how many there were of each."""
    count = {"documents": 0, "tokens": 0}
    with (
        new_file(file) as temporary,
        pyarrow.OSFile(str(temporary), "wb") as sink,
        pyarrow.ipc.new_stream(sink, _SCHEMA) as writer,
    ):
        waiting: list[list[int]] = []

        def write() -> None:
            lengths = [len(ids) for ids in waiting]
            writer.write_batch(pyarrow.record_batch([waiting, lengths], schema=_SCHEMA))
            waiting.clear()

        for ids in rows:
            waiting.append(ids)
            count["documents"] += 1
            count["tokens"] += len(ids)
            if len(waiting) == _BATCH:
                write()
            tell()
            if count["tokens"] >= size:
                break
        if waiting:
            write()
    return count


def load_shards(folder: str | Path, tokenizer: Any) -> datasets.Dataset:
    """The documents of a finished corpus, memory-mapped, as `clex.data.load_tokens` returns them.

    Raises:
        DataError: the corpus is not finished, a file is missing or damaged, or the tokens are those
            of another tokenizer.
    """
    folder = Path(folder)
    about = read_json(folder / SHARDS_FILE)
    if not about.get("complete"):
        raise DataError(f"{folder} is not finished; the same clex tokenize command goes on")
    if about["tokenizer"] != tokenizer_digest(tokenizer):
        raise DataError(f"{folder} holds the tokens of another tokenizer than this model's")
    parts = []
    for shard in about["shards"]:
        try:
            part = datasets.Dataset.from_file(str(folder / shard["file"]))
        except (OSError, pyarrow.ArrowInvalid) as error:
            raise DataError(f"cannot read {folder / shard['file']}: {error}") from None
        if len(part) != shard["documents"]:
            raise DataError(
                f"{folder / shard['file']} has {len(part)} documents, not {shard['documents']}"
            )
        parts.append(part)
    return datasets.concatenate_datasets(parts)
