"""What a comparison will do: its jobs, the tokens of each, and whether the budget is equal."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
from rich.table import Table

from ..config import ClexConfig
from ..data import find_files, load_tokens, read_documents, split_documents
from ..errors import ConfigError
from ..evaluation.haystacks import Haystacks, RetrievalPlan
from ..evaluation.perplexity import PerplexityPlan, as_method, select_documents
from ..hf.extend import config_of
from ..hf.models import load_base, load_tokenizer
from ..training import TrainConfig, check_plan, learned_parameters
from .recipe import TEXT_OF_NEEDLES, Method, Recipe

# What a job keeps in its folder, beside a file for each measure.
MODEL_FOLDER = "model"
TRAINED_FILE = "trained.json"
FAILURES_FILE = "failures.json"
LOG_FILE = "error.log"
# A step reads a token once forwards and twice backwards.
_TRAINING_PASSES = 3


@dataclass(frozen=True)
class Job:
    """One model that is made and measured.

    Attributes:
        method: what it is.
        seed: of its training.
        training: how it is trained; ``None`` where it is not.
        tokens: tokens that its training reads.
        before: tokens that the trainings of the method it starts from have read.
        work: forward passes over a token, of training and measuring together; tasks of the harness
            are not counted.
    """

    method: Method
    seed: int
    training: TrainConfig | None
    tokens: int
    before: int
    work: int

    @property
    def name(self) -> str:
        """For progress lines and messages."""
        return f"{self.method.name}, seed {self.seed}"

    @property
    def folder(self) -> Path:
        """Where it lives inside the folder of the comparison."""
        return Path("runs") / self.method.name / f"seed-{self.seed}"


@dataclass(frozen=True)
class Plan:
    """A recipe with all that reading the model and the texts adds to it.

    Attributes:
        recipe: what was asked for.
        native_length: window of the plain model, tokens.
        perplexity: lengths and amount of text.
        passkey, needle: retrieval, where it is measured.
        held_out: documents that are measured on.
        jobs: in the order in which they run.
    """

    recipe: Recipe
    native_length: int
    perplexity: PerplexityPlan
    passkey: RetrievalPlan | None
    needle: RetrievalPlan | None
    held_out: datasets.Dataset
    jobs: tuple[Job, ...]

    def chosen(self, only: tuple[str, ...]) -> tuple[Job, ...]:
        """The jobs of the methods `only`, and of those that they build on; all if it is empty.

        Raises:
            ConfigError: there is no such method.
        """
        wanted = {self.recipe.method(name).name for name in only}
        for method in reversed(self.recipe.methods):
            if method.name in wanted:
                wanted |= {name for name in (method.weights, method.start) if name}
        return tuple(job for job in self.jobs if not only or job.method.name in wanted)


def make_plan(recipe: Recipe) -> Plan:
    """Read model and texts, and check all that a long run would otherwise stumble over.

    Raises:
        ClexError: the model cannot be extended so, texts are too short, or a method would train on
            other tokens than the rest and does not say so.
    """
    model = load_base(recipe.model)
    tokenizer = load_tokenizer(recipe.model)
    tokens = load_tokens(recipe.data, tokenizer, recipe.text_field)
    if recipe.eval_data is None:
        tokens, held_out = split_documents(tokens)
    else:
        held_out = load_tokens(recipe.eval_data, tokenizer, recipe.text_field)
    resolved: dict[str, ClexConfig] = {}
    for method in recipe.methods:
        with as_method(model, method.clex) as extended:
            resolved[method.name] = config_of(extended)
            dynamics = recipe.training(method, 0).depth == "dynamics"
            if method.trained and dynamics and not learned_parameters(extended):
                raise ConfigError(
                    f"[methods.{method.name}] {method.clex.method!r} has nothing to train at depth"
                    " 'dynamics'; use train = false"
                )
    native = resolved[recipe.methods[0].name].native_length
    assert native is not None
    del model
    gc.collect()
    settings = asdict(recipe.evaluation)
    del settings["evaluator"]
    lengths = settings.pop("lengths")
    perplexity = PerplexityPlan.for_model(native, recipe.max_scale, lengths, **settings)
    chosen, sizes = select_documents(held_out, perplexity), list(held_out["length"])
    read = sum(perplexity.work(sizes[number]) for number in chosen)
    passkey = _retrieval("passkey", recipe.passkey, perplexity, native)
    needle = _retrieval("needle", recipe.needle, perplexity, native)
    for task in (passkey, needle):
        if task is not None:
            texts = list(read_documents(find_files(TEXT_OF_NEEDLES)))
            Haystacks(tokenizer, task, texts)  # says whether the lengths can hold a question
            read += task.needles * (len(task.depths) + 1) * sum(task.lengths)
    jobs: list[Job] = []
    for method in recipe.methods:
        for seed in recipe.seeds_of(method):
            training, trained_tokens = None, 0
            before = sum(
                job.before + job.tokens
                for job in jobs
                if job.method.name == method.start and job.seed == seed
            )
            if method.trained:
                training = recipe.training(method, seed)
                windows = _window_sizes(resolved[method.name], training, tokens)
                _check_equal(recipe, method, windows, resolved, seed, tokens)
                trained_tokens = sum(windows)
            work = _TRAINING_PASSES * trained_tokens + (read if method.measured else 0)
            jobs.append(Job(method, seed, training, trained_tokens, before, work))
    return Plan(recipe, native, perplexity, passkey, needle, held_out, tuple(jobs))


def _retrieval(
    task: str, values: Mapping[str, Any] | None, perplexity: PerplexityPlan, native: int
) -> RetrievalPlan | None:
    """What is asked, by default at the lengths of perplexity from the native window on."""
    if values is None:
        return None
    lengths = tuple(n for n in perplexity.lengths if n >= native)
    return RetrievalPlan(**{"task": task, "lengths": lengths, **values})


def _window_sizes(config: ClexConfig, training: TrainConfig, tokens: datasets.Dataset) -> list[int]:
    """Tokens of each training window, in order. With the seed they settle which text is read."""
    plan = check_plan(config, training, tokens)
    items = training.steps * training.batch_size * training.accumulation
    if plan.tokens is not None:
        return [plan.tokens] * items
    return [plan.window(plan.scale(i, training.seed)) for i in range(items)]


def _check_equal(
    recipe: Recipe,
    method: Method,
    sizes: list[int],
    resolved: dict[str, ClexConfig],
    seed: int,
    tokens: datasets.Dataset,
) -> None:
    """Windows of other lengths are other tokens, even where every setting of the budget agrees."""
    budget = TrainConfig(**recipe.budget, seed=seed)
    expected = _window_sizes(resolved[recipe.methods[0].name], budget, tokens)
    if sizes != expected and method.deviates is None:
        raise ConfigError(
            f"[methods.{method.name}] would train on {sum(sizes):,} tokens in windows of other"
            f" lengths than the budget's {sum(expected):,}; if that is meant, say why:"
            ' deviates = "..."'
        )


def plan_table(plan: Plan, jobs: tuple[Job, ...]) -> Table:
    """What will run, with tokens and the share of the work."""
    result = Table(title=plan.recipe.title)
    for name in ("method", "how", "seed", "training tokens", "share of the work", "budget"):
        result.add_column(name, justify="right" if name in ("seed", "training tokens") else "left")
    work = sum(job.work for job in jobs)
    for job in jobs:
        budget = "equal" if job.training else "-"
        result.add_row(
            job.method.name,
            how(job.method, job.training),
            str(job.seed),
            tokens_of(job),
            f"{job.work / work:.0%}",
            f"deviates: {job.method.deviates}" if job.method.deviates else budget,
        )
    return result


def tokens_of(job: Job) -> str:
    """The tokens that a job's model has been trained on, for a table."""
    if not job.tokens:
        return "-"
    if not job.before:
        return f"{job.tokens:,}"
    return f"{job.before:,} + {job.tokens:,} = {job.before + job.tokens:,}"


def how(method: Method, training: TrainConfig | None) -> str:
    """How a method gets its weights, in a few words."""
    if method.weights:
        return f"weights of {method.weights}, {method.clex.method} at test"
    if training is None:
        return "no training"
    return f"trained: {training.depth}" + (f", from {method.start}" if method.start else "")
