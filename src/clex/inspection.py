"""What an extension does to one model: its rotary modules, and every method's frequencies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.table import Table
from torch import nn

from .config import ClexConfig
from .errors import ConfigError
from .files import new_file, write_json
from .hf.extend import config_of, extend, extension_of, require_extension, restore
from .hf.skeleton import load_skeleton

# More curves than this in one panel cannot be told apart.
_MOST_SCALES = 6
_COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2")

Vectors = dict[str, list[list[float]]]


@dataclass(frozen=True)
class RotaryRow:
    """One frequency vector that an extension replaces.

    Attributes:
        path: name of the rotary module inside the model.
        module: class of the host's module.
        layer_type: the layers that use the vector; ``"all"`` where a model has one vector.
        rotary_dim: rotated entries of a head.
        native_length: tokens that t = 1 stands for.
        theta: base of the frequencies.
        per_row: whether the host's code takes one vector for each row of a batch at once; rows are
            gone through one by one otherwise.
    """

    path: str
    module: str
    layer_type: str
    rotary_dim: int
    native_length: int
    theta: float
    per_row: bool


@dataclass(frozen=True)
class Curves:
    """Frequencies of one method.

    Attributes:
        method: its name; a result of ``clex extend`` has "(this model)" behind it.
        inv_freq: for each layer type one list of F numbers per scale, radians per token.
        attention_factor: the factor on cos and sin at each scale.
    """

    method: str
    inv_freq: Vectors
    attention_factor: list[float]


@dataclass(frozen=True)
class Inspection:
    """All that `inspect_model` found; `scales` are the t of every list in `curves`."""

    model: str
    modules: list[RotaryRow]
    scales: list[float]
    native: dict[str, list[float]]
    curves: list[Curves]


def inspect_model(
    name: str | Path,
    methods: Sequence[str] = ("linear", "yarn", "critical_ntk"),
    *,
    scale: float | None = None,
    native_length: int | None = None,
) -> Inspection:
    """Look at the rotary modules of a model, and at what methods would make of its frequencies.

    No weights are loaded. For a result of ``clex extend`` its own curve comes first.

    Args:
        name: a plain model, or a result of ``clex extend``.
        methods: registered methods that need no options.
        scale: largest t; 8 if not given, or the largest of the result.
        native_length: of a plain model whose config does not say it.

    Raises:
        ConfigError: no such model or method, or a scale that is not above 1, or above the largest
            of the result.
        UnsupportedModelError: the model has no rotary module that clex can extend.
    """
    model = load_skeleton(name)
    own = config_of(model) if extension_of(model) else None
    largest = scale if scale is not None else own.max_scale if own else 8.0
    if not largest > 1 or not math.isfinite(largest):
        raise ConfigError(f"the scale must be above 1, not {largest:g}")
    if own and largest > own.max_scale:
        raise ConfigError(f"scale {largest:g} is above the max_scale {own.max_scale:g} of {name}")
    if not methods and not own:
        raise ConfigError("name at least one method")
    scales = _scales(largest)
    curves = []
    if own:
        curves.append(_curves(model, f"{own.method} (this model)", scales))
        native_length = own.native_length
    modules = _modules(model) if own else []
    native = _native(model) if own else {}
    for method in methods:
        layer_types = own.layer_types if own else None
        config = ClexConfig(
            method=method,
            max_scale=largest,
            native_length=native_length,
            layer_types=layer_types,
        )
        extend(restore(model), config)
        curves.append(_curves(model, method, scales))
        modules, native = modules or _modules(model), native or _native(model)
    return Inspection(str(name), modules, scales, native, curves)


def modules_table(found: Inspection) -> Table:
    """The replaced modules for a terminal."""
    table = Table(title=f"rotary modules of {found.model} that clex replaces")
    table.add_column("module and class", no_wrap=True)
    table.add_column("layers", overflow="fold")
    for title in ("rotary\ndim", "native\nlength", "base"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("rows of\na batch", no_wrap=True)
    for row in found.modules:
        table.add_row(
            f"{row.path}\n{row.module}",
            row.layer_type,
            str(row.rotary_dim),
            str(row.native_length),
            f"{row.theta:g}",
            "at once" if row.per_row else "one by one",
        )
    return table


def write_inspection(found: Inspection, folder: str | Path) -> None:
    """Write ``inspect.json`` and ``inspect.png`` into `folder`.

    Raises:
        OutputError: the folder cannot be written.
    """
    folder = Path(folder)
    write_json(folder / "inspect.json", asdict(found))
    figure = _draw(found)
    with new_file(folder / "inspect.png") as path:
        figure.savefig(path, dpi=150, format="png")
    plt.close(figure)


def _scales(largest: float) -> list[float]:
    """1, `largest`, and between them powers of two (or of four, ...) as can be told apart."""
    octaves = math.ceil(math.log2(largest))
    step = math.ceil(octaves / (_MOST_SCALES - 1))
    return [*(2.0**k for k in range(0, octaves, step)), largest]


def _modules(model: nn.Module) -> list[RotaryRow]:
    rope = require_extension(model)
    path = next(name for name, module in model.named_modules() if module is rope)
    rows = []
    for key, module in rope.scalings.items():
        spec: Any = module.spec
        rows.append(
            RotaryRow(
                path=path,
                module=type(rope.stock).__name__,
                layer_type=key,
                rotary_dim=spec.rotary_dim,
                native_length=spec.native_length,
                theta=spec.rope_theta,
                per_row=rope._takes_rows,
            )
        )
    return rows


def _native(model: nn.Module) -> dict[str, list[float]]:
    """The model's own frequencies by layer type."""
    scalings: Any = require_extension(model).scalings
    return {key: module.inv_freq_native.tolist() for key, module in scalings.items()}


def _curves(model: nn.Module, name: str, scales: Sequence[float]) -> Curves:
    scalings: Any = require_extension(model).eval().scalings
    t = torch.tensor(scales)
    with torch.no_grad():
        vectors = {key: module.inv_freq(t).tolist() for key, module in scalings.items()}
        factor = next(iter(scalings.values())).attention_factor(t).tolist()
    return Curves(name, vectors, factor)


def _draw(found: Inspection) -> Figure:
    """Ratios above, a small panel for each method; wavelengths below. First layer type only."""
    count = len(found.curves)
    columns = min(count, 4)
    rows = math.ceil(count / columns)
    figure = plt.figure(figsize=(max(9.0, 3.6 * columns), 3.2 * rows + 4.6), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=[3.2 * rows, 4.6])
    panels = parts[0].subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    _draw_ratios(list(panels.flat), found)
    # Beside the panels: inside one it would hide curves.
    lines, names = panels[0, 0].get_legend_handles_labels()
    parts[0].legend(lines, names, loc="outside right upper", fontsize=8)
    parts[0].supylabel("f(t) / f(1)", fontsize="medium")
    _draw_wavelengths(parts[1].subplots(), found)
    row = found.modules[0]
    layers = "" if len(found.native) == 1 else f", layers: {row.layer_type}"
    figure.suptitle(
        f"{found.model}: rotary dimension {row.rotary_dim}, base {row.theta:g},"
        f" native length {row.native_length:,}{layers}"
    )
    return figure


def _draw_ratios(axes: list[Axes], found: Inspection) -> None:
    key = found.modules[0].layer_type
    native = torch.tensor(found.native[key])
    colours = plt.get_cmap("viridis_r")
    last = len(found.scales) - 1
    for axis, curves in zip(axes, found.curves, strict=False):
        for k, (t, vector) in enumerate(zip(found.scales, curves.inv_freq[key], strict=True)):
            # The lightest end of the map is hard to see on white.
            colour = colours(0.15 + 0.85 * k / max(last, 1))
            axis.plot(_ratio(vector, native), color=colour, label=f"t = {t:g}")
        if not any(curves.inv_freq[key][-1]):
            axis.text(0.5, 0.5, "no rotation", transform=axis.transAxes, ha="center")
        axis.set_title(curves.method)
        axis.set_yscale("log", base=2)
        axis.yaxis.set_major_formatter(lambda value, _: _fraction(value))
        axis.set_xlabel("dimension, fastest first")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.tick_params(labelbottom=True)
        axis.grid(alpha=0.3)
    for axis in axes[len(found.curves) :]:
        axis.set_axis_off()


def _draw_wavelengths(axis: Axes, found: Inspection) -> None:
    key, length, largest = (
        found.modules[0].layer_type,
        found.modules[0].native_length,
        found.scales[-1],
    )
    axis.plot(_wavelengths(found.native[key]), color="black", label="native, t = 1", linewidth=2)
    for k, curves in enumerate(found.curves):
        axis.plot(
            _wavelengths(curves.inv_freq[key][-1]),
            color=_COLOURS[k % len(_COLOURS)],
            # Methods often lie on one another; the lower one shows at the sides or in the gaps.
            linewidth=max(1.2, 3.2 - 0.5 * k),
            linestyle=("-", "--", "-.", ":")[k % 4],
            label=f"{curves.method}, t = {largest:g}",
        )
    for tokens, name in ((length, "native length"), (length * largest, "target length")):
        axis.axhline(tokens, color="#555555", linewidth=0.9, linestyle=":")
        axis.annotate(
            f"{name}, {tokens:,.0f}",
            (0.01, tokens),
            xycoords=("axes fraction", "data"),
            va="bottom",
            fontsize=8,
        )
    axis.set_yscale("log")
    axis.set_xlabel("dimension, fastest first")
    axis.set_ylabel("wavelength in tokens")
    axis.set_title(f"wavelength at t = {largest:g} against the window")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="lower right")


def _ratio(vector: Sequence[float], native: torch.Tensor) -> list[float]:
    """NaN, which is not drawn, where either does not rotate."""
    return [
        f / n if f > 0 and n > 0 else math.nan for f, n in zip(vector, native.tolist(), strict=True)
    ]


def _wavelengths(vector: Sequence[float]) -> list[float]:
    return [2 * math.pi / f if f > 0 else math.nan for f in vector]


def _fraction(value: float) -> str:
    """A power of two below one as 1/8."""
    return f"1/{1 / value:.3g}" if value < 1 else f"{value:.3g}"
