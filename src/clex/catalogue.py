"""What each registered method is, read from the registry: the table of ``clex methods``."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table

from .config import ClexConfig
from .errors import ConfigError
from .rope import RopeSpec
from .scaling import Scaling, scaling_methods


@dataclass(frozen=True)
class MethodRow:
    """One registered method.

    Attributes:
        name: what `ClexConfig.method` takes.
        what: first line of the class's docstring.
        source: paper or code of the formula.
        kind: ``"learned"`` where it has parameters, ``"closed form"`` where it has none.
        temperature: the rule that belongs to it, where the config names none.
        exact_at_one: whether t = 1 gives the model's own frequencies bit for bit.
        exportable: whether its frequencies at any one t are a positive vector, which programs that
            take a list of factors can use.
        needs: options without a default.
    """

    name: str
    what: str
    source: str
    kind: str
    temperature: str
    exact_at_one: bool
    exportable: bool
    needs: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        return {**dataclasses.asdict(self), "needs": list(self.needs)}


def method_rows() -> list[MethodRow]:
    """All registered methods by name, each built on a small rotary embedding to be looked at."""
    return [_row(name, method) for name, method in scaling_methods().items()]


def methods_table(rows: list[MethodRow]) -> Table:
    """The rows for a terminal."""
    table = Table(title="scaling methods", show_lines=True)
    table.add_column("method", no_wrap=True)
    table.add_column("what, and its source", overflow="fold")
    for title in ("kind", "temperature", "t = 1", "a fixed\nvector"):
        table.add_column(title, no_wrap=True)
    for row in rows:
        what = [escape(row.what), f"[dim]{escape(row.source)}[/dim]"]
        if row.needs:
            what.append(f"needs the options {', '.join(row.needs)}")
        table.add_row(
            f"[bold]{row.name}[/bold]",
            "\n".join(what),
            row.kind.replace(" ", "\n"),
            row.temperature,
            "exact" if row.exact_at_one else "changed",
            "yes" if row.exportable else "no",
        )
    return table


def _row(name: str, method: type[Scaling]) -> MethodRow:
    needs = _required(method)
    config = ClexConfig(method=name)
    scaling = _example(name, method, needs)
    return MethodRow(
        name=name,
        what=(method.__doc__ or "").strip().split("\n")[0],
        source=method.source,
        kind="learned" if any(True for _ in scaling.parameters()) else "closed form",
        temperature=config.temperature or method.default_temperature,
        exact_at_one=method.exact_at_one,
        exportable=_is_positive_vector(scaling),
        needs=needs,
    )


def _required(method: type[Scaling]) -> tuple[str, ...]:
    missing = dataclasses.MISSING
    return tuple(
        f.name
        for f in dataclasses.fields(method.Options)
        if f.default is missing and f.default_factory is missing
    )


def _example(name: str, method: type[Scaling], needs: tuple[str, ...]) -> Scaling:
    """The method on a head of 64 entries, base 10,000, 2,048 tokens.

    Raises:
        ConfigError: it cannot be built, which is a mistake in the method.
    """
    inv_freq = 10_000.0 ** -(torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    spec = RopeSpec(inv_freq.float(), native_length=2048, rope_theta=10_000.0)
    # What has no default so far is a divisor for each frequency (longrope).
    options = {option: [2.0] * len(inv_freq) for option in needs}
    try:
        return method(spec, ClexConfig(method=name, options=options)).eval()
    except ConfigError as error:
        raise ConfigError(f"method {name!r} cannot be shown: {error}") from error


def _is_positive_vector(scaling: Scaling) -> bool:
    with torch.no_grad():
        inv_freq = scaling.inv_freq(torch.tensor([1.0, 4.0, 16.0]))
    return bool((inv_freq.isfinite() & (inv_freq > 0)).all())
