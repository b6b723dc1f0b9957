"""The factor search of LongRoPE: which divisor of each frequency reads long text best.

The objective is the paper's (arXiv 2402.13753): perplexity of windows of the target length. So are
the constraint (factors do not fall from the fastest to the slowest dimension and lie in
[1, 1.25 * scale]), the starts (PI, NTK and YaRN), and the evolution by mutation and crossover.
Two things are ours, since we search in tens of evaluations where the paper takes thousands:
mutations move a band of dimensions in the logarithm, and a list that breaks the order is sorted,
not thrown away. First tokens that keep the plain positions are not searched, as transformers has
none.

Candidate i is a pure function of the seed, i, and the trials of earlier generations. A search that
was stopped anywhere, or is given more evaluations later, ends where an undisturbed one ends.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import datasets
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from .config import ClexConfig
from .data import load_tokens
from .errors import CheckpointError, ConfigError, OutputError, unknown
from .evaluation.perplexity import PerplexityPlan, as_method, cut_windows, measure
from .files import read_json, write_json
from .hf.extend import extension_of, require_extension
from .hf.models import load_base, load_tokenizer
from .rope import RopeSpec
from .scaling import get_scaling

STATE_FILE = "search.json"
RESULT_FILE = "longrope.json"
STARTS = ("linear", "ntk", "yarn")
TEMPERATURES = ("none", "log_n", "yarn")

# Of the paper: the largest factor over the scale, and the chance of a dimension to be mutated.
HEADROOM = 1.25
MUTATED = 0.3


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """How factors are searched.

    Args:
        scale: target length over native length, above 1.
        evaluations: candidates that are measured, the three starts among them.
        population: candidates of a generation; the better half of all so far are its parents.
        windows: texts of the target length that each candidate reads.
        temperature: rule for the attention factor while searching and after: ``"none"``,
            ``"log_n"`` or ``"yarn"``.
        seed: of all that is drawn.

    Raises:
        ConfigError: a value is out of range.
    """

    scale: float = 4.0
    evaluations: int = 64
    population: int = 8
    windows: int = 4
    temperature: str = "log_n"
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 < self.scale <= 4096:
            raise ConfigError(f"scale = {self.scale} is out of range (above 1, at most 4096)")
        least = len(STARTS)
        for name, low in (("evaluations", least), ("population", least + 1), ("windows", 1)):
            if not low <= getattr(self, name) <= 1_000_000:
                raise ConfigError(f"{name} must be at least {low}, not {getattr(self, name)}")
        if self.temperature not in TEMPERATURES:
            raise ConfigError(unknown("temperature", self.temperature, TEMPERATURES))


@dataclass(frozen=True)
class Trial:
    """A measured candidate: `factors` of the F dimensions, mean loss `nll` in nats a token."""

    factors: tuple[float, ...]
    nll: float
    origin: str

    @property
    def ppl(self) -> float:
        """Perplexity, exp(nll)."""
        return math.exp(min(self.nll, 700.0))


@dataclass(frozen=True)
class SearchResult:
    """All trials of a search, in order; the first three are the starts."""

    trials: tuple[Trial, ...]
    search: SearchConfig
    native_length: int

    @property
    def best(self) -> Trial:
        """The trial with the lowest loss; the earlier of two equal ones."""
        return min(self.trials, key=lambda trial: trial.nll)

    def config(self) -> ClexConfig:
        """What to extend the model with, up to the scale that was searched."""
        return ClexConfig(
            method="longrope",
            max_scale=self.search.scale,
            native_length=self.native_length,
            temperature=self.search.temperature,
            options={"long_factor": list(self.best.factors)},
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; ``clex`` is for `ClexConfig.from_dict`."""
        return {
            "clex": self.config().to_dict(),
            "ppl": self.best.ppl,
            "origin": self.best.origin,
            "starts": {t.origin: t.ppl for t in self.trials[: len(STARTS)]},
            "search": asdict(self.search),
        }


def search_longrope(
    model: nn.Module,
    tokens: datasets.Dataset,
    config: SearchConfig | None = None,
    folder: str | Path | None = None,
    console: Console | None = None,
) -> SearchResult:
    """Find LongRoPE factors for a model.

    Args:
        model: a plain model; it is plain again afterwards.
        tokens: documents, from `clex.data.load_tokens`; not those of a later measurement.
        config: how to search.
        folder: where `search.json` is written after every evaluation, from which the same call
            goes on, and `longrope.json` at the end.
        console: where progress is shown.

    Returns:
        The trials; none is better than `best`, so the result is never worse than the best start
        on the texts of the search.

    Raises:
        ConfigError: the model is extended, or has a rotary for each of several layer types.
        DataError: no document has the target length.
        OutputError: the folder holds something else, or a search with other settings.
        CheckpointError: `search.json` is damaged.
    """
    config = config or SearchConfig()
    spec = _spec(model, config)
    length = round(config.scale * spec.native_length)
    plan = PerplexityPlan((length,), 1, windows=config.windows, documents=config.windows)
    windows = _spread(cut_windows(tokens, plan), config.windows)
    starts = start_factors(spec, config.scale)
    identity = _identity(model, windows, config)
    state = None if folder is None else Path(folder) / STATE_FILE
    trials = [] if state is None else _read_state(state, identity, starts, config)
    with Progress(
        TextColumn("searching"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("best perplexity {task.fields[best]:.3f}"),
        TimeRemainingColumn(),
        console=console or Console(stderr=True),
    ) as progress:
        task = progress.add_task("searching", total=config.evaluations, best=math.nan)
        while True:
            done = tuple(trials[: config.evaluations])
            if done:
                best = min(trial.ppl for trial in done)
                progress.update(task, completed=len(done), best=best)
            if len(done) == config.evaluations:
                break
            factors, origin = candidate(len(trials), trials, starts, config)
            again = SearchResult((Trial(factors, 0.0, origin),), config, spec.native_length)
            with as_method(model, again.config()):
                row = measure(model, windows, plan, origin)[0]
            trials.append(Trial(factors, row.nll, origin))
            if state is not None:
                write_json(state, {"identity": identity, "trials": [asdict(t) for t in trials]})
    result = SearchResult(done, config, spec.native_length)
    if folder is not None:
        write_json(Path(folder) / RESULT_FILE, result.to_dict())
    return result


def run_search(
    model_name: str,
    data: str | Path,
    out: str | Path,
    *,
    search: SearchConfig,
    field: str = "text",
    device: torch.device | None = None,
    console: Console | None = None,
) -> SearchResult:
    """The job behind ``clex search-longrope``: load, search, say what was found.

    Args:
        model_name: of a plain model, see `load_base`.
        data: texts for the objective.
        out: folder for state and result.
        search: how to search.
        field: column or key of the text.
        device: where the model runs; the CPU if not given.
        console: where progress and the table go.

    Raises:
        ClexError: one line that says what is wrong.
    """
    out, console = Path(out), console or Console(stderr=True)
    device = device or torch.device("cpu")
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file, not a folder")
    if out.is_dir() and any(out.iterdir()) and not (out / STATE_FILE).is_file():
        raise OutputError(
            f"{out} is not empty and was not written by clex search-longrope; choose another"
        )
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = load_base(model_name, dtype=dtype, device=device)
    tokens = load_tokens(data, load_tokenizer(model_name), field)
    result = search_longrope(model, tokens, search, out, console)
    for trial in result.trials[: len(STARTS)]:
        console.print(f"{trial.origin:>10}  perplexity {trial.ppl:.3f}")
    console.print(f"{'longrope':>10}  perplexity {result.best.ppl:.3f}  ({result.best.origin})")
    console.print(f"factors in {out / RESULT_FILE}")
    return result


def start_factors(spec: RopeSpec, scale: float) -> dict[str, tuple[float, ...]]:
    """f / f(scale) of PI, NTK and YaRN, inside the constraint, by name of the method."""
    factors = {}
    for name in STARTS:
        scaling = get_scaling(name)(spec, ClexConfig(method=name, max_scale=scale)).eval()
        with torch.no_grad():
            ratio = scaling.ratio(torch.tensor([scale]))[0].double()
        # Dimensions that do not rotate take the factor of the one before.
        divisor = torch.where(spec.rotates(), 1 / ratio, torch.ones_like(ratio)).cummax(0).values
        factors[name] = tuple(divisor.clamp(1.0, HEADROOM * scale).tolist())
    return factors


def candidate(
    index: int,
    trials: Sequence[Trial],
    starts: dict[str, tuple[float, ...]],
    config: SearchConfig,
) -> tuple[tuple[float, ...], str]:
    """Candidate `index` and where it comes from; reads the trials of earlier generations only."""
    names = list(starts)
    if index < len(names):
        return starts[names[index]], names[index]
    random = Random(f"{config.seed}/{index}")
    born = index - index % config.population
    ranked = sorted(trials[:born], key=lambda trial: trial.nll)
    parents = [t.factors for t in ranked[: max(2, config.population // 2)]]
    parents = parents or list(starts.values())
    known = {trial.factors for trial in trials[:index]}
    most = HEADROOM * config.scale
    for _ in range(100):
        if index % 2:
            child, origin = _mutate(random.choice(parents), most, random), "mutation"
        else:
            one, other = random.sample(parents, 2)
            child, origin = _cross(one, other, random), "crossover"
            if child in known:
                child, origin = _mutate(child, most, random), "crossover and mutation"
        if child not in known:
            break
    return child, origin


def _mutate(factors: tuple[float, ...], most: float, random: Random) -> tuple[float, ...]:
    """Move a band of dimensions together, and single ones a little, in the logarithm."""
    n, spread = len(factors), 0.25 * math.log(most)
    first, last = sorted((random.randrange(n), random.randrange(n)))
    band = random.gauss(0, spread)
    moved = []
    for i, factor in enumerate(factors):
        step = band if first <= i <= last else 0.0
        if random.random() < MUTATED:
            step += random.gauss(0, spread / 4)
        moved.append(round(min(max(factor * math.exp(step), 1.0), most), 4))
    return tuple(sorted(moved))


def _cross(a: tuple[float, ...], b: tuple[float, ...], random: Random) -> tuple[float, ...]:
    """A band of dimensions from `b`, the others from `a`."""
    first, last = sorted((random.randrange(len(a)), random.randrange(len(a))))
    mixed = [y if first <= i <= last else x for i, (x, y) in enumerate(zip(a, b, strict=True))]
    return tuple(sorted(mixed))


def _spec(model: nn.Module, config: SearchConfig) -> RopeSpec:
    if extension_of(model) is not None:
        raise ConfigError("the factor search wants a plain model; call clex.restore(model) first")
    with as_method(model, ClexConfig(method="none", max_scale=config.scale)):
        scalings: list[Any] = list(require_extension(model).scalings.values())
    if len(scalings) > 1:
        raise ConfigError(f"{type(model).__name__} has {len(scalings)} rotary types; one is wanted")
    spec: RopeSpec = scalings[0].spec
    return spec


def _spread(windows: list[tuple[int, Tensor]], count: int) -> list[tuple[int, Tensor]]:
    """`count` windows over as many documents as there are: first those that begin a document."""
    turns: dict[int, int] = {}
    ranked = []
    for place, (number, _) in enumerate(windows):
        turns[number] = turns.get(number, -1) + 1
        ranked.append((turns[number], place))
    return [windows[place] for _, place in sorted(ranked)[:count]]


def _identity(
    model: nn.Module, windows: Sequence[tuple[int, Tensor]], config: SearchConfig
) -> dict[str, Any]:
    """All that the trials depend on. The budget is not: a longer search goes on from a shorter."""
    text, weights = hashlib.sha256(), hashlib.sha256()
    for _, ids in windows:
        text.update(ids.numpy().tobytes())
    for name, parameter in model.named_parameters():
        # Reading all weights would take as long as an evaluation; any training moves these.
        some = parameter.detach().flatten()[:64].float().cpu()
        weights.update(name.encode() + some.numpy().tobytes())
    settings = {name: value for name, value in asdict(config).items() if name != "evaluations"}
    return {**settings, "text": text.hexdigest(), "weights": weights.hexdigest()}


def _read_state(
    file: Path,
    identity: dict[str, Any],
    starts: dict[str, tuple[float, ...]],
    config: SearchConfig,
) -> list[Trial]:
    if not file.exists():
        return []
    state = read_json(file)
    damaged = CheckpointError(f"{file} is damaged; delete it to search anew")
    try:
        before: dict[str, Any] = dict(state["identity"])
        trials = [Trial(tuple(t["factors"]), float(t["nll"]), t["origin"]) for t in state["trials"]]
    except (KeyError, TypeError, ValueError):
        raise damaged from None
    changed = [n for n in identity.keys() | before.keys() if before.get(n) != identity.get(n)]
    if changed:
        raise OutputError(
            f"{file.parent} holds a search with other settings ({', '.join(sorted(changed))});"
            " choose another folder"
        )
    for index, trial in enumerate(trials):
        if (trial.factors, trial.origin) != candidate(index, trials[:index], starts, config):
            raise damaged
        if not math.isfinite(trial.nll):
            raise damaged
    return trials
