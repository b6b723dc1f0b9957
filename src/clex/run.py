"""The whole job behind `clex extend`: check everything, measure, train, measure again, report."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import platform
import shutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from torch import nn

from .config import ClexConfig
from .data import load_tokens, split_documents
from .errors import CheckpointError, ConfigError, OutputError
from .evaluation.perplexity import (
    PROTOCOLS,
    PerplexityPlan,
    Row,
    as_method,
    cut_windows,
    evaluate_extended,
    evaluate_methods,
)
from .evaluation.report import table, write_report
from .files import output_errors, read_json, write_json
from .hf.checkpoint import base_name, is_checkpoint, load, load_config, require_loadable
from .hf.extend import config_of, extend
from .hf.models import load_base, load_tokenizer
from .start import choose_base
from .training import TrainConfig, check_plan, learned_parameters, train
from .version import __version__

RUN_FILE = "run.json"
_BASELINE_FILE = "baseline.json"
# Multiplications and additions that two CPU cores do in about three minutes.
_CPU_BUDGET = 1e13


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """How a model is measured before and after training.

    Args:
        lengths: tokens; L, 2L, 4L ... up to the longest the extension allows if not given.
        documents: most held-out documents; 10 if not given.
        windows: most windows of each document.
        rivals: training-free methods measured beside; ``base`` is the model as it is.
    """

    lengths: tuple[int, ...] | None = None
    documents: int | None = None
    windows: int = 1
    rivals: tuple[str, ...] = ("base", "yarn")

    def __post_init__(self) -> None:
        for name in ("documents", "windows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"evaluation {name} must be at least 1, not {value}")

    def plan(self, model: nn.Module, native_length: int, max_scale: float) -> PerplexityPlan:
        """The plan for a model: what was asked for, or what its device does in minutes."""
        plan = PerplexityPlan.for_model(
            native_length,
            max_scale,
            self.lengths,
            documents=self.documents or 10,
            windows=self.windows,
        )
        if next(model.parameters()).device.type == "cpu":
            plan = self._affordable(model, plan)
        return plan

    def _affordable(self, model: nn.Module, plan: PerplexityPlan) -> PerplexityPlan:
        """Drop lengths, then documents, that nobody asked for and a CPU would take hours for."""
        weights = sum(p.numel() for p in model.parameters())
        texts = (len(self.rivals) + 1) * self.windows
        lengths, documents = list(plan.lengths), plan.documents or 10
        # Each window is read from its start and from its end, but once at the full length.
        while texts * documents * 2 * weights * (2 * sum(lengths) - lengths[-1]) > _CPU_BUDGET:
            if self.lengths is None and len(lengths) > 1:
                lengths.pop()
            elif self.documents is None and documents > 1:
                documents -= 1
            else:
                break
        return dataclasses.replace(plan, lengths=tuple(lengths), documents=documents)


def choose_device(name: str = "auto") -> torch.device:
    """``auto`` is the first GPU, or the CPU where there is none.

    Raises:
        ConfigError: the device does not exist.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.zeros(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {name!r}: {str(error).splitlines()[0]}") from None


def autocast(device: torch.device, precision: str = "auto") -> AbstractContextManager[Any]:
    """bfloat16 matrix work on GPUs, plain float32 elsewhere."""
    if precision == "bf16" or (precision == "auto" and device.type == "cuda"):
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


def run_extend(
    model_name: str,
    data: str | Path,
    out: str | Path,
    *,
    clex: ClexConfig,
    training: TrainConfig,
    evaluation: EvalConfig,
    eval_data: str | Path | None = None,
    choose_start: bool = False,
    field: str = "text",
    start: str | Path | None = None,
    overwrite: bool = False,
    device: str = "auto",
    console: Console | None = None,
) -> list[Row]:
    """Extend a model's context window and say what came of it.

    Everything that can be wrong with the input is found before `out` is touched. A run that was
    interrupted goes on when it is started again with the same settings.

    Args:
        model_name: see `clex.hf.models.load_base`.
        data: training text, see `clex.data.load_tokens`.
        out: folder for the result; made if it does not exist.
        clex: how the model is extended.
        training: how it is trained.
        evaluation: how it is measured.
        eval_data: held-out text; a tenth of the documents of `data` is held out if not given.
        choose_start: try which closed form is the best base curve (`clex.start`) before dynamics
            are fitted on windows of their true lengths, instead of taking `clex.base`.
        field: column or key of the text.
        start: an extended model to go on from, instead of a fresh extension of `model_name`.
        overwrite: delete what an earlier run left in `out`.
        device: ``auto``, ``cpu``, ``cuda`` ...
        console: where progress and tables go.

    Returns:
        Rows for the rivals (the plain model and training-free YaRN by default) and for the
        extended model.

    Raises:
        ClexError: one line that says what is wrong with the input or the output folder.
    """
    console = console or Console(stderr=True)
    out = Path(out)
    settings = {
        "model": model_name,
        "data": str(data),
        "eval_data": str(eval_data) if eval_data else None,
        "choose_start": choose_start,
        "field": field,
        "start": str(start) if start else None,
        "clex": clex.to_dict(),
        "training": training.to_dict(),
        "evaluation": dataclasses.asdict(evaluation),
    }
    place = choose_device(device)
    if _is_finished(out, settings, overwrite):
        rows = [Row(**row) for row in read_json(out / "results.json")]
        console.print(f"{out} holds this run, finished; --overwrite starts it anew")
        _say_result(console, rows, out)
        return rows
    console.print(f"loading [bold]{model_name}[/bold]")
    frozen = training.depth != "full" and place.type == "cuda" and training.precision != "fp32"
    dtype = torch.bfloat16 if frozen else torch.float32
    plain = load_base(model_name, dtype=dtype, device=place)
    tokenizer = load_tokenizer(model_name)
    tokens = load_tokens(data, tokenizer, field)
    if eval_data is None:
        tokens, held_out = split_documents(tokens)
    else:
        held_out = load_tokens(eval_data, tokenizer, field)
    if start is not None:
        require_loadable(start, plain)
        before = load_config(start)
        for name in ("method", "preset", "max_scale"):
            if getattr(before, name) != getattr(clex, name):
                raise ConfigError(
                    f"{start} has {name} {getattr(before, name)}, not {getattr(clex, name)}"
                )
        clex = before
    with as_method(plain, clex) as probe:
        resolved = config_of(probe)
        if training.depth == "dynamics" and not learned_parameters(probe):
            raise ConfigError(f"method {clex.method!r} has nothing to train at depth 'dynamics'")
    native = resolved.native_length
    assert native is not None
    check_plan(resolved, training, tokens)
    plan = evaluation.plan(plain, native, resolved.max_scale)
    cut_windows(held_out, plan)
    free = _training_free(evaluation.rivals, resolved)
    for config in free.values():
        with as_method(plain, config):
            pass
    if evaluation.lengths is None and plan.lengths[-1] * 2 <= native * resolved.max_scale:
        console.print(
            f"measuring up to {plan.lengths[-1]:,} tokens only, this being a CPU;"
            " pass --eval-lengths for more"
        )
    _say_lengths(console, list(tokens["length"]), native, resolved.max_scale)

    with _claimed(out, settings, overwrite):
        baseline_file = out / _BASELINE_FILE
        if baseline_file.is_file():
            baseline = read_json(baseline_file)
            rows, base = [Row(**row) for row in baseline["rows"]], baseline["base"]
        else:
            with autocast(place, training.precision):
                rows = evaluate_methods(plain, held_out, plan, free, console)
                base = None
                true_lengths = training.depth == "dynamics" and training.train_length is None
                if choose_start and true_lengths and start is None and clex.method == "clex":
                    base = choose_base(plain, tokens, clex, seed=training.seed, console=console)
            write_json(baseline_file, {"rows": [row.to_dict() for row in rows], "base": base})
        if base is not None:
            clex = clex.replace(base=base)
        torch.manual_seed(training.seed)
        model = load(start, plain) if start is not None else extend(plain, clex)
        model = train(
            model,
            tokens,
            training,
            out,
            base_model=model_name,
            tokenizer=tokenizer,
            console=console,
        )
        with autocast(place, training.precision):
            # A trained method beside its training-free self needs a name of its own.
            name = f"{clex.method}, trained" if clex.method in evaluation.rivals else clex.method
            rows += evaluate_extended(model, held_out, plan, name, console)
        write_report(rows, out, native)
    _say_result(console, rows, out)
    return rows


def _say_result(console: Console, rows: list[Row], out: Path) -> None:
    for protocol in PROTOCOLS:
        console.print(table(rows, protocol))
    console.print(f"in [bold]{out}[/bold]: results.json, results.csv, perplexity.png")


def _say_lengths(console: Console, lengths: list[int], native: int, max_scale: float) -> None:
    """How many documents reach each length that the extension aims at."""
    parts = []
    size = native
    while size <= native * max_scale:
        parts.append(f"{sum(n >= size for n in lengths)} of {size:,} or more")
        size *= 2
    console.print(f"{len(lengths)} training documents, by length in tokens: {'; '.join(parts)}")


def _training_free(names: tuple[str, ...], config: ClexConfig) -> dict[str, ClexConfig | None]:
    """Closed-form rivals of an extension: same native length and range, t not rounded."""
    return {
        name: None
        if name == "base"
        else ClexConfig(
            method=name,
            native_length=config.native_length,
            max_scale=config.max_scale,
            layer_types=config.layer_types,
            grid="none",
        )
        for name in names
    }


def versions() -> dict[str, str]:
    """What a result depends on."""
    return {
        "clex": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def _is_finished(out: Path, settings: Mapping[str, Any], overwrite: bool) -> bool:
    """Whether `out` holds this very run, finished; refuses a folder that holds anything else."""
    if not out.exists():
        return False
    if not out.is_dir():
        raise OutputError(f"{out} is a file, not a folder")
    content = [p.name for p in out.iterdir() if p.name != ".lock"]
    if not content:
        return False
    if RUN_FILE not in content:
        raise OutputError(f"{out} is not empty and was not written by clex extend; choose another")
    if overwrite:
        return False
    try:
        before = read_json(out / RUN_FILE)["settings"]
    except (CheckpointError, KeyError, TypeError):
        raise OutputError(f"{out / RUN_FILE} is damaged; pass --overwrite to start anew") from None
    changed = _differences(before, _plain(settings))
    if changed:
        raise OutputError(
            f"{out} holds a run with other settings ({', '.join(changed)});"
            " pass --overwrite to start anew"
        )
    return (out / "results.json").is_file() and is_checkpoint(out)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _differences(before: Any, now: Any, prefix: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted(before.keys() | now.keys())
        return [
            name
            for key in keys
            for name in _differences(before.get(key), now.get(key), f"{prefix}{key}.")
        ]
    return [] if before == now else [prefix.rstrip(".")]


@contextmanager
def _claimed(out: Path, settings: Mapping[str, Any], overwrite: bool) -> Iterator[None]:
    """Hold the output folder for this process, and record what the run is."""
    with output_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / ".lock").open("w")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise OutputError(f"another process is writing to {out}") from None
        if overwrite:
            for entry in out.iterdir():
                if entry.is_dir():
                    shutil.rmtree(entry)
                elif entry.name != ".lock":
                    entry.unlink()
        write_json(out / RUN_FILE, {"settings": _plain(settings), "versions": versions()})
        yield
        (out / ".lock").unlink(missing_ok=True)


def run_perplexity(
    model_name: str,
    data: str | Path,
    out: str | Path,
    *,
    max_scale: float,
    evaluation: EvalConfig,
    field: str = "text",
    device: str = "auto",
    console: Console | None = None,
) -> list[Row]:
    """Perplexity by length of a plain model, or of a result of `run_extend`, with rivals.

    Args:
        model_name: a plain model, or a folder that `clex.load` reads.
        data: held-out text.
        out: folder for the results.
        max_scale: longest scale of a plain model; an extended one brings its own.
        evaluation: lengths, amount of text, and rivals.
        field: column or key of the text.
        device: ``auto``, ``cpu``, ``cuda`` ...
        console: where progress and tables go.

    Raises:
        ClexError: one line that says what is wrong.
    """
    console, place = console or Console(stderr=True), choose_device(device)
    dtype = torch.bfloat16 if place.type == "cuda" else torch.float32
    extended = load(model_name, dtype=dtype, device=place) if is_checkpoint(model_name) else None
    source = model_name if extended is None else base_name(model_name)
    plain = load_base(source, dtype=dtype, device=place)
    with as_method(plain, ClexConfig(method="none", max_scale=max_scale)) as probe:
        config = config_of(extended or probe)
    native = config.native_length
    assert native is not None
    plan = evaluation.plan(plain, native, config.max_scale)
    tokens = load_tokens(data, load_tokenizer(source), field)
    cut_windows(tokens, plan)
    free = _training_free(evaluation.rivals, config)
    rows = evaluate_methods(plain, tokens, plan, free, console)
    if extended is not None:
        rows += evaluate_extended(extended, tokens, plan, console=console)
    if not rows:
        raise ConfigError("nothing to measure: give --rivals")
    write_report(rows, Path(out), native)
    _say_result(console, rows, Path(out))
    return rows
