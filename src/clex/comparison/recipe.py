"""What a comparison is: a TOML file, every key of which is checked.

A recipe names one model, its texts, one budget and any number of methods. Methods differ in how
they scale frequencies and place positions; all that decides how much a method is allowed to learn
(`EQUAL`) stands once, in ``[budget]``. A method that changes one of those must say so itself, in
``deviates``, and the report marks it. `recipes/quick.toml` shows every table.
"""

from __future__ import annotations

import dataclasses
import os
import re
import tomllib
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import ClexConfig
from ..errors import ConfigError, unknown
from ..evaluation.harness import HarnessConfig, require_lm_eval
from ..evaluation.haystacks import RetrievalPlan
from ..hf.models import BUNDLED, assets_folder
from ..training import DEPTHS, TrainConfig

# What keeps a recipe from asking for unbounded memory.
_MOST_BYTES = 2**20
_MOST_SEEDS = 1000
_MOST_COUNT = 65_536  # of documents, windows of a document, bands
_MOST_NAME = 100  # of a method, which is the name of a folder

# The plain model as it is. Always measured: what the methods cost at short lengths is told by it.
BASE = "base"
# Texts that come with the package: for training and for measuring.
BUNDLED_TEXT = {"books": ("books/train.jsonl.gz", "books/test.jsonl.gz")}

TEXT_OF_NEEDLES = assets_folder() / BUNDLED_TEXT["books"][1]
RETRIEVAL = ("lengths", "depths", "needles", "hidden", "distractors", "seed", "generate")
HARNESS = (
    *("tasks", "longbench", "texts", "max_length", "limit", "chat", "ruler_lengths"),
    *("batch_tokens", "precision"),
)

# One budget means that these are the same for all methods: what is seen, how often, and the rule
# by which weights move.
EQUAL = (
    "depth",
    "train_length",
    "true_lengths",
    "steps",
    "batch_size",
    "accumulation",
    "rate",
    "warmup",
    "weight_decay",
    "clip",
    "end_weight",
    "lora_rank",
    "precision",
)
# A method's own: how it spends the budget.
OWN = (
    "dynamics_rate",
    "native_share",
    "min_scale",
    "max_scale",
    "scale_power",
    "margin",
    "span_margin",
    "curriculum",
)
_RUNNING = ("save_every", "checkpointing", "compile")
# Settings of `ClexConfig` that a method has in its own table; the rest goes into its `clex`.
_SCALING = ("method", "preset", "base", "positions", "temperature", "options", "post")
_SHARED = ("max_scale", "native_length", "layer_types")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How perplexity is measured; see `clex.evaluation.perplexity.PerplexityPlan`.

    Args:
        lengths: tokens; a quarter, a half and 1, 2, 4 ... times the native window if not given.
        documents: most held-out documents.
        windows: most windows of each document.
        protocols: some of ``window``, ``target``, ``position``, ``longppl``, ``sliding``.
        bands, sliding, stride, sliding_tokens, truncation: of the last three.
        evaluator: model that finds the key tokens of LongPPL, the same for all methods, or
            ``native``: the plain model inside its own window; with YaRN if not given.
    """

    lengths: tuple[int, ...] | None = None
    documents: int = 10
    windows: int = 1
    protocols: tuple[str, ...] = ("window", "target")
    bands: int = 16
    sliding: tuple[int, ...] | None = None
    stride: int = 256
    sliding_tokens: int | None = None
    truncation: int | None = None
    evaluator: str | None = None

    def __post_init__(self) -> None:
        for name in ("documents", "windows", "bands"):
            if not 1 <= getattr(self, name) <= _MOST_COUNT:
                raise ConfigError(
                    f"{name} must be from 1 to {_MOST_COUNT}, not {getattr(self, name)}"
                )


@dataclass(frozen=True, kw_only=True)
class Method:
    """One line of the comparison.

    Attributes:
        name: key of its table, and of its folder.
        label: how the report calls it.
        clex: how the model is extended.
        trained: whether weights or dynamics move; if not, the method costs nothing.
        training: values of `TrainConfig` that differ from the budget.
        weights: another method, whose trained weights this one reads with its own frequencies.
        start: another method, from whose result the training goes on: from its weights and its
            extension, or from its weights alone where that is another method than this.
        measured: whether it is a row of the report, and not only what others build on.
        choose_base: try which closed form is the best base curve.
        deviates: why the budget differs; ``None`` where it does not.
    """

    name: str
    label: str
    clex: ClexConfig
    trained: bool = True
    training: Mapping[str, Any] = field(default_factory=dict)
    weights: str | None = None
    start: str | None = None
    measured: bool = True
    choose_base: bool = False
    deviates: str | None = None


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A comparison, checked as far as it can be without reading model and texts.

    Attributes:
        title: of the report.
        model: see `clex.hf.models.load_base`.
        data, eval_data: texts, see `clex.data.load_tokens`; a tenth of the documents of `data` is
            held out where there is no `eval_data`.
        text_field: column or key of the text.
        max_scale: longest text over the native window.
        seeds: every trained method is trained once for each.
        reference: the method that differences are taken against.
        budget: training that all methods share, but for its seed.
        evaluation: how perplexity is measured.
        passkey, needle: values of `RetrievalPlan`, where that is measured.
        harness: tasks of lm-evaluation-harness, where they are measured.
        methods: in the order of the file, `BASE` first.
        text: the file.
    """

    title: str
    model: str
    data: str
    eval_data: str | None
    text_field: str
    max_scale: float
    seeds: tuple[int, ...]
    reference: str
    budget: Mapping[str, Any]
    evaluation: Evaluation
    passkey: Mapping[str, Any] | None
    needle: Mapping[str, Any] | None
    harness: HarnessConfig | None
    methods: tuple[Method, ...]
    text: str

    def method(self, name: str) -> Method:
        """The method called `name`.

        Raises:
            ConfigError: there is none.
        """
        methods = {method.name: method for method in self.methods}
        if name not in methods:
            raise ConfigError(unknown("method", name, methods))
        return methods[name]

    def training(self, method: Method, seed: int) -> TrainConfig:
        """How `method` is trained with `seed`."""
        return TrainConfig(**{**self.budget, **method.training}, seed=seed)

    def seeds_of(self, method: Method) -> tuple[int, ...]:
        """A method that learns nothing is the same for every seed."""
        return self.seeds if method.trained or method.weights else self.seeds[:1]


def read_recipe(path: str | Path) -> Recipe:
    """Read a recipe.

    Paths in it are taken from the folder it lies in.

    Raises:
        ConfigError: one line that names the table, the key or value, and what would be valid.
    """
    path = Path(path)
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ConfigError(f"{path} has {path.stat().st_size:,} bytes and is no recipe")
        text = path.read_text(encoding="utf-8")
        content = tomllib.loads(text)
    except FileNotFoundError:
        raise ConfigError(f"no such recipe: {path}") from None
    except (OSError, UnicodeDecodeError, RecursionError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"cannot read recipe {path}: {error}") from None
    return parse_recipe(content, text, path.parent)


@dataclass(frozen=True, kw_only=True)
class _Top:
    """The keys at the top of a recipe."""

    model: str
    data: str
    max_scale: float
    methods: Mapping[str, Any]
    title: str = "Comparison at equal budget"
    eval_data: str | None = None
    field: str = "text"
    native_length: int | None = None
    seeds: tuple[int, ...] = (0,)
    reference: str | None = None
    budget: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    evaluation: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class _MethodTable:
    """The keys of a method's table."""

    method: str | None = None
    label: str | None = None
    preset: str | None = None
    base: str | None = None
    positions: str | None = None
    temperature: str | None = None
    options: Mapping[str, Any] | None = None
    post: tuple[str, ...] | None = None
    train: bool = True
    measure: bool = True
    weights: str | None = None
    start: str | None = None
    deviates: str | None = None
    clex: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    training: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def parse_recipe(content: Mapping[str, Any], text: str, folder: Path) -> Recipe:
    """`content` of a recipe's file as a `Recipe`; see `read_recipe`."""
    top = _Top(**_checked(_Top, content, "the recipe"))
    if not top.methods:
        raise ConfigError("the recipe has no [methods.NAME] table")
    budget = _checked(TrainConfig, top.budget, "[budget]", (*EQUAL, *OWN, *_RUNNING))
    with _named("[budget]"):
        TrainConfig(**budget)
    shared: dict[str, Any] = {"max_scale": top.max_scale, "native_length": top.native_length}
    with _named("the recipe"):
        plain = ClexConfig(method="none", grid="none", **shared)
    methods = [Method(name=BASE, label="the model as it is", clex=plain, trained=False)]
    for name, table in top.methods.items():
        methods.append(_method(name, table, shared, budget))
    _check_links(methods, budget)
    names = [method.name for method in methods]
    reference = top.reference or names[1]
    if reference not in names:
        raise ConfigError(unknown("reference", reference, names))
    if not methods[names.index(reference)].measured:
        raise ConfigError(f"reference {reference!r} has measure = false; take a measured method")
    return Recipe(
        title=top.title,
        model=_beside(top.model, folder),
        data=_text(top.data, 0, folder),
        eval_data=_text(top.eval_data or top.data, 1, folder)
        if top.eval_data or top.data in BUNDLED_TEXT
        else None,
        text_field=top.field,
        max_scale=top.max_scale,
        seeds=_checked_seeds(top.seeds),
        reference=reference,
        budget=budget,
        **_evaluation(top.evaluation, folder),
        methods=tuple(methods),
        text=text,
    )


def with_changes(
    recipe: Recipe,
    *,
    data: str | None = None,
    eval_data: str | None = None,
    seeds: tuple[int, ...] = (),
) -> Recipe:
    """A recipe for other texts or seeds; paths are taken as they are.

    Args:
        recipe: what is changed.
        data: training text; with it the recipe's own `eval_data` goes.
        eval_data: held-out text; a tenth of the documents of `data` if only that is given.
        seeds: of the trainings.

    Raises:
        ConfigError: a seed is given twice, or there are too many.
    """
    changes: dict[str, Any] = {}
    if data is not None:
        changes["data"] = _text(data, 0, Path())
        changes["eval_data"] = _text(data, 1, Path()) if data in BUNDLED_TEXT else None
    if eval_data is not None:
        changes["eval_data"] = _text(eval_data, 1, Path())
    if seeds:
        changes["seeds"] = _checked_seeds(seeds)
    return dataclasses.replace(recipe, **changes)


def _checked_seeds(seeds: tuple[int, ...]) -> tuple[int, ...]:
    if not seeds or len(set(seeds)) < len(seeds):
        raise ConfigError(f"seeds must be one or more different numbers, not {list(seeds)}")
    if len(seeds) > _MOST_SEEDS:
        raise ConfigError(f"{len(seeds)} seeds are too many (valid: up to {_MOST_SEEDS})")
    return seeds


def _evaluation(table: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The table ``[evaluation]`` and those inside it, as fields of `Recipe`."""
    own = [f.name for f in dataclasses.fields(Evaluation)]
    inner = ("passkey", "needle", "harness")
    for key in table:
        if key not in (*own, *inner):
            raise ConfigError("[evaluation]: " + unknown("key", key, (*own, *inner)))
    values = {key: value for key, value in table.items() if key not in inner}
    with _named("[evaluation]"):
        result: dict[str, Any] = {
            "evaluation": Evaluation(**_checked(Evaluation, values, "[evaluation]"))
        }
    for task in ("passkey", "needle"):
        result[task] = None
        if task in table:
            where = f"[evaluation.{task}]"
            result[task] = _checked(RetrievalPlan, table[task], where, RETRIEVAL, whole=False)
    result["harness"] = None
    if "harness" in table:
        where = "[evaluation.harness]"
        given = {"tasks": (), **_checked(HarnessConfig, table["harness"], where, HARNESS, False)}
        if given.get("longbench"):
            given["longbench"] = _beside(given["longbench"], folder)
        given["texts"] = tuple(_beside(file, folder) for file in given.get("texts", ()))
        with _named(where):
            result["harness"] = HarnessConfig(**given)
            require_lm_eval()
    return result


def _method(name: str, table: Any, shared: Mapping[str, Any], budget: Mapping[str, Any]) -> Method:
    where = f"[methods.{name}]"
    if name == BASE:
        raise ConfigError(f"{where}: {BASE!r} is the model as it is, which is always measured")
    if len(name) > _MOST_NAME or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise ConfigError(
            f"{where}: a method's name is made of up to {_MOST_NAME} letters, digits, '-', '_'"
            " and '.'; put the rest into label"
        )
    given = _MethodTable(**_checked(_MethodTable, table, where))
    if given.method is None:
        raise ConfigError(f'{where} has no method, such as method = "yarn"')
    inner = [f.name for f in dataclasses.fields(ClexConfig)]
    inner = [key for key in inner if key not in (*_SCALING, *_SHARED)]
    values = {key: getattr(given, key) for key in _SCALING}
    choose = values["base"] == "auto"
    if choose:
        values["base"] = None
        if given.method != "clex":
            raise ConfigError(f"{where}: base belongs to method 'clex', not to {given.method!r}")
    values |= _checked(ClexConfig, given.clex, f"{where} clex", inner)
    with _named(where):
        clex = ClexConfig.from_dict(
            {k: v for k, v in {**shared, **values}.items() if v is not None}
        )
    keys = (*EQUAL, *OWN, *_RUNNING)
    training = _checked(TrainConfig, given.training, f"{where} training", keys)
    trained = given.train and given.weights is None
    if not trained and (training or given.start or given.deviates):
        raise ConfigError(f"{where} is not trained: training, start and deviates do not apply")
    with _named(f"{where} training"):
        config = TrainConfig(**{**budget, **training})
    changed = [key for key in EQUAL if getattr(config, key) != getattr(TrainConfig(**budget), key)]
    if trained and changed and given.deviates is None:
        raise ConfigError(
            f"{where} training changes {', '.join(changed)}, which the budget makes equal for all;"
            ' if that is meant, say why: deviates = "..."'
        )
    if given.start and given.deviates is None:
        raise ConfigError(
            f"{where} starts from {given.start!r} and is trained for longer by that;"
            ' say so: deviates = "..."'
        )
    return Method(
        name=name,
        label=given.label or name,
        clex=clex,
        trained=trained,
        training=training,
        weights=given.weights,
        start=given.start,
        measured=given.measure,
        choose_base=choose,
        deviates=given.deviates,
    )


def _check_links(methods: list[Method], budget: Mapping[str, Any]) -> None:
    """Methods that others build on exist, are trained, and stand above them."""
    seen: dict[str, Method] = {}
    for method in methods:
        for key in ("weights", "start"):
            other = getattr(method, key)
            if other is None:
                continue
            valid = [name for name, earlier in seen.items() if earlier.trained]
            if other not in valid:
                raise ConfigError(
                    f"[methods.{method.name}] {key} = {other!r} must be a trained method above it"
                    f" (there: {', '.join(valid) or 'none'})"
                )
            depth = TrainConfig(**{**budget, **seen[other].training}).depth
            if key == "weights" and DEPTHS[depth] == "none":
                raise ConfigError(
                    f"[methods.{method.name}] weights = {other!r}: depth {depth!r} leaves the"
                    " weights as they are; use train = false"
                )
            ours, theirs = method.clex.method, seen[other].clex.method
            if key == "start" and ours != theirs and DEPTHS[depth] == "none":
                raise ConfigError(
                    f"[methods.{method.name}] start = {other!r}: depth {depth!r} leaves no weights"
                    f" to go on from, and its dynamics are those of {theirs!r}, not of {ours!r}"
                )
        seen[method.name] = method


def _beside(name: str, folder: Path) -> str:
    """`name` as a path beside the recipe, where there is such a thing."""
    return str(folder / name) if name not in BUNDLED and os.path.exists(folder / name) else name


def _text(name: str, part: int, folder: Path) -> str:
    if name in BUNDLED_TEXT:
        return str(assets_folder() / BUNDLED_TEXT[name][part])
    return _beside(name, folder)


@contextmanager
def _named(where: str) -> Iterator[None]:
    """Put the name of a table before an error about its values."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _checked(
    cls: type, table: Any, where: str, names: Iterable[str] | None = None, whole: bool = True
) -> dict[str, Any]:
    """The entries of a table that sets fields of the dataclass `cls`, lists as tuples.

    Raises:
        ConfigError: a key is unknown, a value has another type, or a required key is missing.
    """
    if not isinstance(table, Mapping):
        raise ConfigError(f"{where} must be a table, not {table!r}")
    hints, fields = typing.get_type_hints(cls), dataclasses.fields(cls)
    valid = list(names) if names is not None else [f.name for f in fields]
    result = {}
    for key, value in table.items():
        if key not in valid:
            raise ConfigError(f"{where}: " + unknown("key", key, valid))
        result[key] = _converted(value, hints[key], f"{where}: {key}")
    for f in fields:
        required = f.default is f.default_factory is dataclasses.MISSING
        if whole and required and f.name not in result:
            raise ConfigError(f"{where}: {f.name} is missing")
    return result


def _converted(value: Any, hint: Any, where: str) -> Any:
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    kinds = tuple(kind for kind in kinds if kind is not type(None))
    for kind in kinds:
        origin = typing.get_origin(kind) or kind
        if origin is tuple and isinstance(value, list | tuple):
            inner = typing.get_args(kind)[0]
            return tuple(_converted(item, inner, where) for item in value)
        if origin is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if origin is int and isinstance(value, bool):
            continue
        if isinstance(origin, type) and isinstance(value, origin):
            return value
    wanted = " or ".join(_KINDS.get(typing.get_origin(k) or k, str(k)) for k in kinds)
    raise ConfigError(f"{where} must be {wanted}, not {value!r}")


_KINDS: dict[Any, str] = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    tuple: "a list",
    Mapping: "a table",
}
