"""Which decoder families of the installed transformers can be extended, found by trying each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from transformers import __version__ as transformers_version

from ..config import ClexConfig
from ..errors import ClexError
from .discovery import layer_types
from .extend import at_scale, extend, require_extension
from .rotary import ALL_LAYERS
from .specimens import VOCABULARY, family_names, has_rotary_code, model_class, small_model

_LENGTH, _PROMPT = 24, 16
_STATUSES = ("works", "refused", "not built")
_COMMAND = "clex families --markdown > docs/families.md"
_COLUMNS = (
    "family",
    "status",
    "pairs",
    "table",
    "rotated",
    "extended / kept",
    "positions",
    "decode",
)


@dataclass(frozen=True, kw_only=True)
class Family:
    """What was found of one family.

    Attributes:
        name: the `model_type` of its text config.
        model: the class of its causal language model, or of its decoder.
        status: ``"works"``, ``"refused"``, or ``"not built"`` where no small model of it could be
            made, so that nothing is known.
        reason: why it does not work.
        pairs: which entries of a head turn together: ``"half"`` (i and i + d/2) or
            ``"interleaved"`` (2i and 2i + 1).
        table: what its rotary gives: ``"cos, sin"``, these in ``"half width"``, or ``"complex"``.
        latent: whether keys and values come from one compressed vector (MLA).
        rotated: share of the entries of a cached key that turn.
        layer_types: layer types with a frequency vector of their own that are extended.
        kept: such layer types that keep theirs, unless `ClexConfig.layer_types` names them.
        position_rows: rows of position numbers for each text, 3 or 4 where images have a place.
        decode_error: largest difference of logits between cached decoding and one forward pass
            over the same tokens at t = 2.7, float32.
    """

    name: str
    model: str
    status: str
    reason: str = ""
    pairs: str = ""
    table: str = ""
    latent: bool = False
    rotated: float = 0.0
    layer_types: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    position_rows: int = 1
    decode_error: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        return {**asdict(self), "layer_types": list(self.layer_types), "kept": list(self.kept)}


def families(console: Console | None = None) -> list[Family]:
    """All families, in about a minute; `console` (stderr) shows how far it is."""
    console = console or Console(stderr=True)
    return [find_out(n) for n in track(family_names(), "trying each family", console=console)]


def find_out(name: str) -> Family:
    """Try one family: build a small random model, extend it, look at what it does.

    Raises:
        ConfigError: transformers has no family of this name.
    """
    about: dict[str, Any] = {"name": name, "model": model_class(name).__name__}
    if not has_rotary_code(name):
        return Family(**about, status="refused", reason="no rotary class of the common form")
    try:
        model = extend(small_model(name), ClexConfig(method="linear"))
        error, layout = _decode_error(model), _layout(model)
    except ClexError as refusal:
        reason = str(refusal).removeprefix(f"{about['model']} ")
        return Family(**about, status="refused", reason=reason)
    except Exception as failure:  # the host's own, of any kind: each family is picky in its own way
        words = str(failure).strip().splitlines() or [""]
        reason = f"{type(failure).__name__}: {words[0]}"
        return Family(**about, status="not built", reason=reason)
    return Family(**about, status="works", decode_error=error, **layout)


def _tokens() -> Tensor:
    """Ordinary tokens (2, L), all different in a row."""
    # The first ones are padding, start and end.
    return torch.stack(
        [torch.arange(3, 3 + _LENGTH), torch.arange(VOCABULARY - _LENGTH, VOCABULARY)]
    )


def logits_of(output: Any) -> Tensor:
    """Logits, or the hidden states of a decoder that has no head."""
    result: Tensor = output.logits if hasattr(output, "logits") else output.last_hidden_state
    return result


@torch.no_grad()
def decode(model: nn.Module, ids: Tensor, prompt: int) -> Tensor:
    """Logits (B, T, V) of `ids` (B, T), read as a prompt and then token by token from the cache."""
    output = model(input_ids=ids[:, :prompt], use_cache=True)
    parts = [logits_of(output)]
    for i in range(prompt, ids.shape[1]):
        output = model(
            input_ids=ids[:, i : i + 1],
            # Given, as `generate` gives them: some families cannot tell them from their cache.
            position_ids=torch.full((len(ids), 1), i),
            past_key_values=output.past_key_values,
            use_cache=True,
        )
        parts.append(logits_of(output))
    return torch.cat(parts, dim=1)


@torch.no_grad()
def _decode_error(model: nn.Module) -> float:
    ids = _tokens()
    with at_scale(model, 2.7):
        whole = logits_of(model(input_ids=ids, use_cache=False))
        return (decode(model, ids, _PROMPT) - whole).abs().max().item()


@torch.no_grad()
def _layout(model: nn.Module) -> dict[str, Any]:
    """What one turn of all rotating dimensions by 1 rad does; `model` is spoilt by it."""
    rope = require_extension(model)
    calls: list[tuple[Any, Any]] = []
    rope.register_forward_hook(
        lambda _, args, named, output: calls.append(({**dict(enumerate(args)), **named}, output)),
        with_kwargs=True,
    )
    natives: list[Tensor] = [s.inv_freq_native for s in rope.scalings.values()]  # type: ignore[misc]
    rotating = [native > 0 for native in natives]
    caches = []
    for radians in (0.0, 1.0):
        for native, mask in zip(natives, rotating, strict=True):
            native.copy_(mask * radians)
        caches.append(_cached(model))
    pairs, share = _pairs(*caches)
    inputs, output = calls[0]
    position_ids = inputs.get("position_ids", inputs.get(1))
    extended = () if ALL_LAYERS in rope.scalings else tuple(rope.scalings)
    return {
        "pairs": pairs,
        "rotated": share,
        "table": _table(output, 2 * len(natives[0])),
        "latent": bool(getattr(model.config, "kv_lora_rank", None)),
        "layer_types": extended,
        "kept": tuple(sorted(set(layer_types(rope.stock)) - set(extended))),
        "position_rows": len(position_ids) if position_ids.dim() == 3 else 1,
    }


def _cached(model: nn.Module) -> list[Tensor]:
    """All that a model caches of texts of one token at position 1, (tokens, entries) each.

    One token attends to itself alone, so nothing here but the rotation depends on frequencies.
    """
    # At least as many as any small head has entries.
    ids = torch.arange(3, 3 + 48)[:, None]
    with at_scale(model, 1.0):
        cache = model(input_ids=ids, position_ids=torch.ones_like(ids), use_cache=True)
    return [
        kept[:, 0, 0]
        for layer in cache.past_key_values.layers
        for kept in (getattr(layer, "keys", None), getattr(layer, "values", None))
        if isinstance(kept, Tensor) and kept.dim() == 4
    ]


def _pairs(still: list[Tensor], turned: list[Tensor]) -> tuple[str, float]:
    """How entries turn together, and the share of them that does.

    What is cached is linear in what it was before the turn, so least squares over all tokens gives
    the matrix of the turn, and its entries off the diagonal are the pairs.
    """
    for before, after in zip(still, turned, strict=True):
        if torch.equal(before, after):
            continue
        turn = torch.linalg.lstsq(before.double(), after.double()).solution
        # sin(1) is 0.84; what does not turn is 0 here but for rounding.
        pairs = [(i, j) for i, j in (turn.abs() > 0.4).nonzero().tolist() if i < j]
        distances = {j - i for i, j in pairs}
        kind = "interleaved" if distances == {1} else "half" if len(distances) == 1 else "other"
        return kind, 2 * len(pairs) / len(turn)
    return "not cached", 0.0


def _table(output: Any, rotary_dim: int) -> str:
    if isinstance(output, Tensor):
        return "complex" if output.is_complex() else "one tensor"
    return "half width" if output[0].shape[-1] < rotary_dim else "cos, sin"


def families_table(rows: Iterable[Family]) -> Table:
    """The rows for a terminal."""
    table = Table(title=f"text decoders of transformers {transformers_version}")
    for title in _COLUMNS:
        table.add_column(title, overflow="fold")
    for row in rows:
        table.add_row(*map(escape, _cells(row)))
    return table


def families_markdown(rows: Iterable[Family]) -> str:
    """The page docs/families.md."""
    rows = list(rows)
    count = {status: sum(row.status == status for row in rows) for status in _STATUSES}
    lines = [
        "# Families",
        "",
        f"Made by `{_COMMAND}` with transformers {transformers_version}; do not edit.",
        "",
        f"Of {len(rows)} text decoders in transformers' tables {count['works']} work,"
        f" {count['refused']} are refused, {count['not built']} could not be built small and are"
        " not known. Each that works is tested on a small random model"
        " (`tests/hf/test_families.py`): bit-equal to the plain model at t = 1, another at t = 4,"
        " gradients, cached decoding, a scale for each row, saving, restoring. Trained weights were"
        " used for few of them.",
        "",
        _table_text(_COLUMNS, [_cells(row) for row in rows if row.status == "works"]),
        "",
        "- pairs: entries of a head that turn together, i and i + d/2 (half) or 2i and 2i + 1"
        " (interleaved); found by turning the small model's keys. MLA: keys come from a compressed"
        " vector.",
        "- rotated: share of the entries of a cached head that turn.",
        "- extended, kept: layer types with frequencies of their own; `ClexConfig.layer_types`"
        " chooses.",
        "- positions: rows of position numbers where images have a place; the largest sets t.",
        "- decode: largest difference of logits (float32, standard deviation about 1) between"
        " cached decoding and one forward pass at t = 2.7.",
        "",
        "## Refused, and why",
        "",
        _table_text(
            ("family", "status", "why"),
            [(row.name, row.status, row.reason) for row in rows if row.status != "works"],
        ),
        "",
    ]
    return "\n".join(lines)


def _table_text(titles: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    body = [tuple(titles), *map(tuple, rows)]
    body.insert(1, ("---",) * len(body[0]))
    return "\n".join(f"| {' | '.join(row)} |" for row in body)


def _cells(row: Family) -> tuple[str, ...]:
    if row.status != "works":
        return (row.name, row.status, row.reason, "", "", "", "", "")
    return (
        row.name,
        row.status,
        row.pairs + (", MLA" if row.latent else ""),
        row.table,
        f"{row.rotated:.3g}",
        f"{' '.join(row.layer_types)} / {' '.join(row.kept)}" if row.layer_types else "all",
        str(row.position_rows),
        f"{row.decode_error:.0e}",
    )
