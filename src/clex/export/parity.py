"""Whether an export, in the engine that will serve it, is the model that was extended."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from ..config import ClexConfig
from ..data import read_documents
from ..errors import ConfigError
from ..hf.extend import at_scale
from ..hf.models import assets_folder
from ..serving.length_classes import length_at
from .engines import Tolerance, engine_for, live_log_probs, scores_of
from .record import ExportRecord, read_record
from .source import Source

# Tokens that are rated at the end of each prompt.
COUNT = 16
_SHORT, _LONG = 64, 4096

# Weights that were rounded for the export differ by themselves: their means are held instead.
_HALF = Tolerance(most=None, mean=0.1)
_QUANTISED = Tolerance(most=None, mean=0.25)
_HALF_TYPES = ("bfloat16", "float16", "BF16", "F16")
_EXACT_TYPES = ("float32", "F32")


@dataclass(frozen=True, kw_only=True)
class ParityRow:
    """An engine against the live extended model, on one prompt.

    Differences are of log-probabilities of the tokens of the text, in nats.

    Attributes:
        tokens: length of the prompt.
        scale: t that it was read at.
        most: largest difference to the extended model.
        mean: mean difference to the extended model.
        best: share of places where the engine's most likely token is the extended model's, or as
            good as it.
        from_base: mean difference of the engine to the plain model.
        base: mean difference of the extended model to the plain one: what a deaf engine shows.
        agrees: whether all of this is within tolerance.
    """

    tokens: int
    scale: float
    most: float
    mean: float
    best: float
    from_base: float
    base: float
    agrees: bool


@dataclass(frozen=True, kw_only=True)
class Parity:
    """The result of `verify`.

    Attributes:
        engine: module name of the engine.
        tolerance: what was allowed.
        rows: one for each prompt.
    """

    engine: str
    tolerance: Tolerance
    rows: tuple[ParityRow, ...]

    @property
    def agrees(self) -> bool:
        """Whether the export is right in this engine, on every prompt."""
        return all(row.agrees for row in self.rows)

    def table(self) -> Table:
        """One line for each prompt and scale."""
        most = "any" if self.tolerance.most is None else f"{self.tolerance.most:g}"
        table = Table(title=f"{self.engine}: differences of log-probabilities, nats")
        heads = ("tokens", "t", f"max (<= {most})", f"mean (<= {self.tolerance.mean:g})")
        for head in (*heads, "same best", "engine to base", "model to base", "agrees"):
            table.add_column(head, justify="right")
        for row in self.rows:
            table.add_row(
                f"{row.tokens:,}",
                f"{row.scale:g}",
                f"{row.most:.2g}",
                f"{row.mean:.2g}",
                f"{row.best:.0%}",
                f"{row.from_base:.2g}",
                f"{row.base:.2g}",
                "yes" if row.agrees else "NO",
            )
        return table


def verify(
    folder: str | Path,
    *,
    lengths: tuple[int, ...] | None = None,
    ids: list[int] | None = None,
    engine: str | None = None,
    console: Console | None = None,
) -> Parity:
    """Load an export in the engine that it is for, and compare it with the live extended model.

    Both rate the last 16 tokens of prompts of a book. The live model runs in float32 at the scale
    of the export, or at each of its scales. An export agrees where it is within tolerance of the
    extended model and, unless t is 1, nearer to it than to the plain one.

    Args:
        folder: written by `export`; its source must still be where it was.
        lengths: of the prompts in tokens; a short one and a long one if not given.
        ids: the text as tokens; a bundled book if not given.
        engine: target whose engine is taken (``hf``, ``vllm``, ``gguf``); the export's own if not
            given.
        console: where progress goes.

    Returns:
        One row for each prompt and scale, and the verdict.

    Raises:
        ConfigError: the engine is not installed, a prompt is longer than the export allows, or
            `folder` is no export.
        UnsupportedModelError: the engine cannot load the export.
    """
    console = console or Console(stderr=True)
    folder, record = Path(folder), read_record(folder)
    kind = engine_for(engine or record.target)
    source = _source(record)
    lengths = lengths or _default_lengths(record)
    for length in lengths:
        if not COUNT < length < record.length:
            raise ConfigError(
                f"a prompt of {length} tokens cannot be rated (valid: {COUNT + 1} to"
                f" {record.length - 1})"
            )
    text = ids or _book(source, max(lengths))
    if len(text) < max(lengths):
        raise ConfigError(f"the text has {len(text)} tokens, and {max(lengths)} are wanted")
    tolerance = _tolerance(record, kind.exact)
    cases = [(text[:length], t) for t, length in _cases(record, lengths)]
    with console.status("") as status:
        status.update("live model")
        model = source.load(torch.float32)
        live = []
        for prompt, t in cases:
            with at_scale(model, t):
                live.append(live_log_probs(model, prompt, COUNT))
        del model
        gc.collect()
        status.update("plain model")
        plain_model = source.load_plain(torch.float32)
        plain = [live_log_probs(plain_model, prompt, COUNT) for prompt, _ in cases]
        del plain_model
        gc.collect()
        status.update(kind.package)
        running = kind.open(folder, record, max(lengths))
        rows = []
        for (prompt, t), wanted, base in zip(cases, live, plain, strict=True):
            found = running.scores(prompt, COUNT, t)
            own, other = scores_of(wanted, prompt), scores_of(base, prompt)
            difference = (found.log_probs - own.log_probs).abs()
            from_base = float((found.log_probs - other.log_probs).abs().mean())
            slack = 2 * (tolerance.most or 0.0)
            as_good = wanted.gather(1, found.best[:, None])[:, 0] >= wanted.amax(-1) - slack
            exact = tolerance.most is None or bool(
                float(difference.max()) <= tolerance.most and as_good.all()
            )
            mean = float(difference.mean())
            rows.append(
                ParityRow(
                    tokens=len(prompt),
                    scale=t,
                    most=float(difference.max()),
                    mean=mean,
                    best=float(as_good.double().mean()),
                    from_base=from_base,
                    base=float((own.log_probs - other.log_probs).abs().mean()),
                    agrees=exact and mean <= tolerance.mean and (t == 1 or mean < from_base),
                )
            )
        del running
        gc.collect()
    return Parity(engine=kind.package, tolerance=tolerance, rows=tuple(rows))


def _source(record: ExportRecord) -> Source:
    plain = record.source == record.base_model and record.trained_weights == "none"
    return Source.find(record.source, ClexConfig.from_dict(record.clex) if plain else None)


def _default_lengths(record: ExportRecord) -> tuple[int, ...]:
    longest = min(record.length - 1, _LONG)
    return tuple(sorted({min(_SHORT, longest), longest}))


def _cases(record: ExportRecord, lengths: tuple[int, ...]) -> list[tuple[float, int]]:
    """Scales and prompt lengths; a prompt is cut to what its length class holds."""
    if not record.scales:
        return [(record.scale, length) for length in lengths]
    most = {t: length_at(record.native_length, t) - 1 for t in record.scales}
    return sorted({(t, min(length, most[t])) for t in most for length in lengths})


def _tolerance(record: ExportRecord, exact: Tolerance) -> Tolerance:
    if record.weights in _EXACT_TYPES:
        return exact
    return _HALF if record.weights in _HALF_TYPES else _QUANTISED


def _book(source: Source, length: int) -> list[int]:
    """The first tokens of a bundled book, which is long enough for any prompt one would wait for.

    Raises:
        ConfigError: the model has no tokenizer, or the books are too short.
    """
    tokenizer = source.tokenizer()
    if tokenizer is None:
        raise ConfigError(f"{source.base} has no tokenizer; pass ids to clex.export.verify")
    book = next(read_documents([assets_folder() / "books" / "test.jsonl.gz"]))
    # No tokenizer takes more than 16 letters of English for a token, on average.
    return list(tokenizer(book[: 16 * length], add_special_tokens=False)["input_ids"][:length])
