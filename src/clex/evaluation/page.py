"""One HTML page that holds a whole comparison: data, style and script inside, no network."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

from ..files import new_file
from ..hf.models import assets_folder

# In the order in which the browser reads them.
_SCRIPTS = ("dom.js", "chart.js", "sections.js", "main.js")


def render_page(summary: Mapping[str, Any]) -> str:
    """The page for a comparison's `summary` (`clex.comparison.summary`)."""
    assets = assets_folder() / "report"

    def asset(name: str) -> str:
        return (assets / name).read_text(encoding="utf-8")

    return Template(asset("page.html")).substitute(
        title=html.escape(str(summary["title"])),
        style=asset("style.css"),
        script="\n".join(asset(name) for name in _SCRIPTS),
        data=_embedded(summary),
    )


def write_page(summary: Mapping[str, Any], path: Path) -> None:
    """Write the page to `path`, whole or not at all."""
    page = render_page(summary)
    with new_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _embedded(value: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    return json.dumps(finite(value), allow_nan=False).replace("<", "\\u003c")


def finite(value: Any) -> Any:
    """`value` with ``None`` for numbers that JSON does not know: NaN and the infinities."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value
