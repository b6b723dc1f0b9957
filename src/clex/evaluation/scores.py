"""What is kept of a measurement: sums for each document, and the rows that are made of them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..files import new_file, output_errors
from .statistics import difference_interval, mean_interval

DOCUMENTS_FILE = "documents.jsonl"
PROTOCOLS = ("window", "target", "position", "longppl", "sliding")


@dataclass(frozen=True)
class Cell:
    """A place in the tables of one method.

    Attributes:
        protocol: ``window``, ``target``, ``position``, ``sliding`` or ``longppl``.
        length: tokens that the model saw, or the window of protocol ``sliding``.
        band_start, band_stop: first token and one past the last of a band of protocol
            ``position``; 0 and 0 elsewhere.
    """

    protocol: str
    length: int
    band_start: int = 0
    band_stop: int = 0

    @property
    def place(self) -> tuple[int, int, int, int]:
        """Order in a table: ``window`` and ``target`` of a length side by side, first of all."""
        rank = PROTOCOLS.index(self.protocol)
        return (max(rank, 1), self.length, rank, self.band_start)


@dataclass(frozen=True)
class Score:
    """Sums over the scored tokens of one document in one cell: a line of ``documents.jsonl``.

    Attributes:
        method: what was measured.
        protocol, length, band_start, band_stop: see `Cell`.
        document: number of the document in the data.
        scale: length scale t that the model used.
        windows: texts of the document that were read.
        nll: sum of the losses in nats.
        tokens: tokens that were scored.
        hits: those that were the model's first choice.
        bytes: UTF-8 bytes of the scored tokens; 0 where they were not counted.
    """

    method: str
    protocol: str
    length: int
    band_start: int
    band_stop: int
    document: int
    scale: float
    windows: int
    nll: float
    tokens: int
    hits: int
    bytes: int

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Score:
        """From a line of the file.

        Raises:
            TypeError: an entry is missing, unknown, or of another type.
        """
        score = cls(**values)
        if not isinstance(score.method, str) or score.protocol not in PROTOCOLS:
            raise TypeError(f"{score.method!r}, {score.protocol!r} is no method and protocol")
        for name in ("nll", "scale", "hits", "bytes"):
            if not isinstance(getattr(score, name), int | float):
                raise TypeError(f"{name} is {getattr(score, name)!r}")
        for name in ("length", "band_start", "band_stop", "document", "windows", "tokens"):
            if type(getattr(score, name)) is not int:
                raise TypeError(f"{name} is {getattr(score, name)!r}")
        return score

    @property
    def cell(self) -> Cell:
        """Where it belongs."""
        return Cell(self.protocol, self.length, self.band_start, self.band_stop)


@dataclass(frozen=True)
class Row:
    """One cell of a perplexity table.

    Attributes:
        method: what was measured: ``base``, ``yarn``, ``clex``, ...
        length: tokens that the model saw, the context of protocol ``target`` included; the window
            of protocol ``sliding``.
        protocol: ``window``, ``target``, ``position``, ``sliding`` or ``longppl``.
        ppl: exp of the mean loss over all scored tokens.
        documents: documents that were read.
        windows: texts that were scored, one or more of each document.
        tokens: tokens that were scored; key tokens in protocol ``longppl``.
        scale: length scale t that the model used (1 for the base model).
        nll: mean loss in nats a token.
        accuracy: share of scored tokens that were the model's first choice.
        bits_per_byte: loss in bits over UTF-8 bytes of the scored tokens; ``None`` if not counted.
        band_start, band_stop: first token and one past the last of a band of protocol
            ``position``; 0 and 0 elsewhere.
        ci_low, ci_high: 95 % interval of `ppl`, bootstrap over documents; ``None`` for fewer than
            two documents.
    """

    method: str
    length: int
    protocol: str
    ppl: float
    documents: int
    windows: int
    tokens: int
    scale: float
    nll: float
    accuracy: float
    bits_per_byte: float | None = None
    band_start: int = 0
    band_stop: int = 0
    ci_low: float | None = None
    ci_high: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


@dataclass(frozen=True)
class Difference:
    """One method against another on the same tokens.

    Attributes:
        method, against: the two.
        protocol, length, band_start, band_stop: see `Cell`.
        change: perplexity of `method` over that of `against`, less 1; negative is better.
        ci_low, ci_high: 95 % interval of `change`, paired by document; ``None`` for fewer than two.
        documents: documents that both have read.
    """

    method: str
    against: str
    protocol: str
    length: int
    band_start: int
    band_stop: int
    change: float
    ci_low: float | None
    ci_high: float | None
    documents: int

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


def perplexity(nll: float) -> float:
    """exp of a mean loss in nats; finite for every model that gives finite losses."""
    return math.exp(min(nll, 700.0))


def rows_of(scores: Iterable[Score]) -> list[Row]:
    """One row for each method and cell in which a token was scored.

    Methods come in the order of `scores`, cells by `Cell.place`; documents may come in any order.
    """
    rows = []
    for method, cells in _grouped(scores).items():
        for cell, by_document in sorted(cells.items(), key=lambda item: item[0].place):
            parts = [by_document[number] for number in sorted(by_document)]
            tokens = sum(part.tokens for part in parts)
            if tokens == 0:
                continue
            total, size = math.fsum(part.nll for part in parts), sum(part.bytes for part in parts)
            interval = mean_interval([p.nll for p in parts], [p.tokens for p in parts])
            rows.append(
                Row(
                    method=method,
                    length=cell.length,
                    protocol=cell.protocol,
                    ppl=perplexity(total / tokens),
                    documents=len(parts),
                    windows=sum(part.windows for part in parts),
                    tokens=tokens,
                    scale=parts[0].scale,
                    nll=total / tokens,
                    accuracy=sum(part.hits for part in parts) / tokens,
                    bits_per_byte=total / math.log(2) / size if size else None,
                    band_start=cell.band_start,
                    band_stop=cell.band_stop,
                    ci_low=perplexity(interval[0]) if interval else None,
                    ci_high=perplexity(interval[1]) if interval else None,
                )
            )
    return rows


def differences(scores: Iterable[Score]) -> list[Difference]:
    """Every pair of methods in every cell that both have; each pair once, the later against the
    earlier, on the documents that both have read."""
    grouped = _grouped(scores)
    methods = list(grouped)
    result = []
    for index, method in enumerate(methods):
        for against in methods[:index]:
            for cell, ours in sorted(grouped[method].items(), key=lambda item: item[0].place):
                theirs = grouped[against].get(cell, {})
                pairs = [(ours[n], theirs[n]) for n in sorted(ours.keys() & theirs.keys())]
                counts = [a.tokens for a, _ in pairs]
                if sum(counts) == 0:
                    continue
                a, b = [a.nll for a, _ in pairs], [b.nll for _, b in pairs]
                interval = difference_interval(a, b, counts)
                result.append(
                    Difference(
                        method=method,
                        against=against,
                        protocol=cell.protocol,
                        length=cell.length,
                        band_start=cell.band_start,
                        band_stop=cell.band_stop,
                        change=_change((math.fsum(a) - math.fsum(b)) / sum(counts)),
                        ci_low=_change(interval[0]) if interval else None,
                        ci_high=_change(interval[1]) if interval else None,
                        documents=len(pairs),
                    )
                )
    return result


def _change(nats: float) -> float:
    return math.expm1(min(nats, 700.0))


def _grouped(scores: Iterable[Score]) -> dict[str, dict[Cell, dict[int, Score]]]:
    grouped: dict[str, dict[Cell, dict[int, Score]]] = {}
    for score in scores:
        cells = grouped.setdefault(score.method, {})
        cells.setdefault(score.cell, {})[score.document] = score
    return grouped


class ScoreLog:
    """Scores in the order in which they were measured, kept on disk if a path is given.

    A document's scores under one method are written together, and a process that is killed loses
    the document that it was reading, nothing else.

    Args:
        path: ``documents.jsonl``; what it holds is taken over.

    Raises:
        CheckpointError: a line that is not the last one is damaged.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._units: dict[tuple[str, int], tuple[Score, ...]] = {}
        if path is not None and path.is_file():
            self._read(path)

    @property
    def scores(self) -> list[Score]:
        """All scores, a method's together, methods and documents in the order of measuring."""
        order = {method: i for i, method in enumerate(dict.fromkeys(m for m, _ in self._units))}
        units = sorted(self._units.items(), key=lambda unit: order[unit[0][0]])
        return [score for _, unit in units for score in unit]

    def has(self, method: str, document: int) -> bool:
        """Whether a document was measured."""
        return (method, document) in self._units

    def add(self, method: str, document: int, scores: Sequence[Score]) -> None:
        """Keep the scores of one document under one method.

        Raises:
            OutputError: the file cannot be written.
        """
        self._units[method, document] = tuple(scores)
        if self.path is None:
            return
        with output_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_lines(scores))

    def _read(self, path: Path) -> None:
        # Bytes, since a kill may cut a character in two.
        lines = path.read_bytes().splitlines()
        complete = True
        for number, line in enumerate(lines, start=1):
            try:
                record: Mapping[str, Any] = json.loads(line)
                score = Score.from_dict({k: v for k, v in record.items() if k != "last"})
                complete = bool(record["last"])
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                if number == len(lines):
                    break  # the write that the kill cut off
                raise CheckpointError(f"{path}, line {number} is damaged") from None
            unit = (*self._units.get((score.method, score.document), ()), score)
            self._units[score.method, score.document] = unit
        # A unit whose last line is missing was cut off.
        if not complete and self._units:
            self._units.popitem()
        with new_file(path) as temporary:
            temporary.write_text("".join(map(_lines, self._units.values())), encoding="utf-8")


def _lines(scores: Sequence[Score]) -> str:
    return "".join(
        json.dumps({**asdict(score), "last": score is scores[-1]}) + "\n" for score in scores
    )
