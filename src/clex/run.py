"""The whole job behind `clex extend`: check everything, measure, train, measure again, report."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from rich.console import Console
from torch import nn
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from . import processes
from .config import ClexConfig
from .data import load_mixture, load_tokens, parse_sources, split_documents
from .errors import CheckpointError, ConfigError, DataError
from .evaluation.alignment import Aligner
from .evaluation.longppl import KEYS_FILE, Evaluator, key_tokens_of
from .evaluation.perplexity import (
    PerplexityPlan,
    Row,
    as_method,
    evaluate_extended,
    evaluate_methods,
    select_documents,
)
from .evaluation.report import tables, write_report
from .evaluation.scores import DOCUMENTS_FILE, Difference, ScoreLog, differences
from .evaluation.token_bytes import token_bytes
from .files import read_json, write_json
from .hf.adapter import ADAPTER_CONFIG, load_adapter
from .hf.checkpoint import (
    CONFIG_FILE,
    Weights,
    base_name,
    is_checkpoint,
    load,
    load_config,
    read_about,
    require_loadable,
    require_whole,
    result_folder,
)
from .hf.extend import config_of, extend
from .hf.models import load_base, load_tokenizer
from .measured import load_measured, own_name, training_free
from .run_folder import RUN_FILE, claimed, holds_run
from .start import can_be_base, choose_base
from .training import TrainConfig, check_plan, learned_parameters, train

_BASELINE_FILE = "baseline.json"
# Name of the evaluator that is not extended, so that it favours no extension.
NATIVE_EVALUATOR = "native"
# Multiplications and additions that two CPU cores do in about three minutes.
_CPU_BUDGET = 1e13


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """How a model is measured before and after training.

    Args:
        lengths: tokens; L/4, L/2, L, 2L, 4L ... up to the longest the extension allows if not
            given.
        documents: most held-out documents; 10 if not given.
        windows: most windows of each document.
        rivals: training-free methods measured beside; ``base`` is the model as it is.
        protocols: see `clex.evaluation.perplexity`.
        sliding: windows of protocol ``sliding``; L and the longest length if not given.
        stride: tokens by which they move.
        sliding_tokens: most tokens of a document for them; all if not given.
        evaluator: model that finds the key tokens of protocol ``longppl``, or ``native``, see
            `long_context_evaluator`; the extended model itself, or a plain one under YaRN, if not
            given.
        truncation: tokens of its short context; L/2 if not given.
    """

    lengths: tuple[int, ...] | None = None
    documents: int | None = None
    windows: int = 1
    rivals: tuple[str, ...] = ("base", "yarn")
    protocols: tuple[str, ...] = ("window", "target", "position")
    sliding: tuple[int, ...] | None = None
    stride: int = 256
    sliding_tokens: int | None = None
    evaluator: str | None = None
    truncation: int | None = None

    def __post_init__(self) -> None:
        for name in ("documents", "windows", "sliding_tokens"):
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
            protocols=self.protocols,
            sliding=self.sliding,
            stride=self.stride,
            sliding_tokens=self.sliding_tokens,
            truncation=self.truncation,
        )
        if next(model.parameters()).device.type == "cpu":
            plan = self._affordable(model, plan, native_length)
        return plan

    def _affordable(
        self, model: nn.Module, plan: PerplexityPlan, native_length: int
    ) -> PerplexityPlan:
        """Drop lengths, then documents, that nobody asked for and a CPU would take hours for."""
        weights = sum(p.numel() for p in model.parameters())
        texts = (len(self.rivals) + 1) * self.windows
        lengths, documents = list(plan.lengths), plan.documents or 10
        # Each window is read from its start and from its end, but once at the full length.
        while texts * documents * 2 * weights * (2 * sum(lengths) - lengths[-1]) > _CPU_BUDGET:
            if self.lengths is None and lengths[-1] > native_length:
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
    data: str | Path | Sequence[str],
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
    interrupted goes on when it is started again with the same settings. Of several processes, which
    `torchrun` or `accelerate launch` started, all train; the main one measures and writes.

    Args:
        model_name: see `clex.hf.models.load_base`.
        data: training text, see `clex.data.load_tokens`; or several, see
            `clex.data.parse_sources`.
        out: folder for the result; made if it does not exist.
        clex: how the model is extended.
        training: how it is trained.
        evaluation: how it is measured.
        eval_data: held-out text; a tenth of the documents of `data` is held out if not given.
        choose_start: instead of taking `clex.base`, go on with the closed form that `start` was
            trained under, or else try which one is the best base curve (`clex.start`) before
            dynamics are fitted on windows of their true lengths.
        field: column or key of the text.
        start: a result to go on from, instead of a fresh extension of `model_name`: its weights
            or its adapter, where it holds such, and its extension. Where `clex` is another method,
            the weights or the adapter alone, under a fresh extension. An adapter is trained on
            at depth ``lora`` and stays as it is at depth ``dynamics``.
        overwrite: delete what an earlier run left in `out`.
        device: ``auto``, ``cpu``, ``cuda`` ...
        console: where progress and tables go.

    Returns:
        Rows for the rivals (the plain model and training-free YaRN by default) and for the
        extended model; none in other processes than the main one.

    Raises:
        ClexError: one line that says what is wrong with the input or the output folder.
    """
    processes.join()
    main = processes.is_main()
    console = console if console and main else Console(stderr=True, quiet=not main)
    out = Path(out)
    sources = parse_sources([str(data)] if isinstance(data, str | Path) else data)
    if len(sources) > 1:
        training = dataclasses.replace(training, shares=tuple(sources.values()))
    settings = {
        "model": model_name,
        "data": list(sources) if len(sources) > 1 else next(iter(sources)),
        "eval_data": str(eval_data) if eval_data else None,
        "choose_start": choose_start,
        "field": field,
        "start": str(start) if start else None,
        "clex": clex.to_dict(),
        "training": training.to_dict(),
        "evaluation": dataclasses.asdict(evaluation),
    }
    place = choose_device(device)
    if "longppl" in evaluation.protocols:
        raise ConfigError("LongPPL needs an evaluator; measure it with clex eval ppl")

    def finished() -> bool:
        if not overwrite:
            _require_same_batch(out, training.to_dict()["global_batch"])
        begun = holds_run(out, settings, overwrite, "clex extend")
        whole = begun and (out / "results.json").is_file() and is_checkpoint(out)
        if whole:
            try:
                require_whole(out, read_about(out))
            except CheckpointError as error:
                raise CheckpointError(
                    f"{error}; delete {out / CONFIG_FILE} and give the same command again to make"
                    " the result anew from the last checkpoint"
                ) from None
        return whole

    if processes.agreed(finished):
        if not main:
            return []
        rows = [Row(**row) for row in read_json(out / "results.json")]
        console.print(f"{out} holds this run, finished; --overwrite starts it anew")
        _say_result(console, rows, out, load_config(out).native_length)
        return rows
    console.print(f"loading [bold]{model_name}[/bold]")
    held: Weights = "none" if start is None else _weights_of(start, model_name, training)
    trained = held == "full"
    source = start if start is not None and trained else model_name
    frozen = training.depth != "full" and place.type == "cuda" and training.precision != "fp32"
    # Weights that were trained are kept as they are: with the result they are saved again.
    dtype = torch.bfloat16 if frozen and not trained else torch.float32
    plain = load_base(source, dtype=dtype, device=place)
    tokenizer = load_tokenizer(model_name)
    tokens = load_mixture(list(sources), tokenizer, field)
    if eval_data is None:
        tokens, held_out = split_documents(tokens)
    else:
        held_out = load_tokens(eval_data, tokenizer, field)
    fresh = start is None
    if start is not None:
        require_loadable(start, plain)
        before = load_config(start)
        fresh = held != "none" and before.method != clex.method
        asked = ["method", "preset", "max_scale"]
        asked += ["per_layer"] if clex.per_layer != "none" else []
        for name in [] if fresh else asked:
            if getattr(before, name) != getattr(clex, name):
                raise ConfigError(
                    f"{start} has {name} {getattr(before, name)}, not {getattr(clex, name)}"
                )
        if fresh and choose_start and clex.method == "clex" and can_be_base(before.method):
            # The weights have learned under that curve.
            clex = clex.replace(base=before.method, options=clex.options or before.options)
            choose_start = False
        clex = clex if fresh else before
    elif clex.method == "clex" and clex.fitted_scale is None and training.max_scale is not None:
        clex = clex.replace(fitted_scale=training.max_scale)
    with as_method(plain, clex) as probe:
        resolved = config_of(probe)
        if training.depth == "dynamics" and not learned_parameters(probe):
            raise ConfigError(f"method {clex.method!r} has nothing to train at depth 'dynamics'")
    native = resolved.native_length
    assert native is not None
    check_plan(resolved, training, tokens)
    plan = evaluation.plan(plain, native, resolved.max_scale)
    select_documents(held_out, plan)
    free = training_free(plain, evaluation.rivals, resolved)
    if evaluation.lengths is None and plan.lengths[-1] * 2 <= native * resolved.max_scale:
        console.print(
            f"measuring up to {plan.lengths[-1]:,} tokens only, this being a CPU;"
            " pass --eval-lengths for more"
        )
    _say_lengths(console, list(tokens["length"]), native, resolved.max_scale)

    sizes = token_bytes(tokenizer)
    with claimed(out, settings, overwrite) if main else contextlib.nullcontext():
        log = ScoreLog(out / DOCUMENTS_FILE) if main else None

        def baseline() -> dict[str, Any]:
            if (out / _BASELINE_FILE).is_file():
                return dict(read_json(out / _BASELINE_FILE))
            # The rivals get no training, so that they are those of the model as it was.
            untrained = load_base(model_name, device=place) if trained and free else plain
            with autocast(place, training.precision):
                rows = evaluate_methods(
                    untrained, held_out, plan, free, console, token_bytes=sizes, log=log
                )
                base = None
                fitted = training.depth == "dynamics" and training.true_lengths
                if choose_start and fitted and fresh and clex.method == "clex":
                    with _adapted(plain, start if held == "adapter" else None) as read:
                        base = choose_base(read, tokens, clex, seed=training.seed, console=console)
            found = {"rows": [row.to_dict() for row in rows], "base": base}
            write_json(out / _BASELINE_FILE, found)
            return found

        before_training = processes.agreed(baseline)
        rows = [Row(**row) for row in before_training["rows"]]
        if before_training["base"] is not None:
            clex = clex.replace(base=before_training["base"])
        torch.manual_seed(training.seed)
        model = extend(plain, clex) if start is None or fresh else load(start, plain)
        if start is not None and fresh and held == "adapter":
            model = load_adapter(model, result_folder(start))
        model = train(
            model,
            tokens,
            training,
            out,
            base_model=str(start) if trained and training.depth == "lora" else model_name,
            tokenizer=tokenizer,
            weights=held if training.depth == "dynamics" else None,
            console=console,
        )
        if not main:
            return []
        assert log is not None
        if processes.cut_up(model):  # it answers to all processes together only
            unset_hf_deepspeed_config()  # or loading waits for the others, which are gone
            model = load(out, dtype=dtype, device=place)
        with autocast(place, training.precision):
            name = own_name(clex.method, free)
            rows += evaluate_extended(
                model, held_out, plan, name, console, token_bytes=sizes, log=log
            )
        pairs = differences(log.scores)
        write_report(rows, out, native, pairs)
    _say_result(console, rows, out, native, pairs)
    return rows


def _weights_of(start: str | Path, model_name: str, training: TrainConfig) -> Weights:
    """What a result to go on from holds beside its extension.

    Raises:
        CheckpointError: it is damaged.
        ConfigError: it was made from another model, or has an adapter that cannot be trained so.
    """
    held: Weights = read_about(start).get("weights", "none")
    if held == "adapter" and training.depth == "full":
        raise ConfigError(
            f"{start} has an adapter, which cannot be trained on at depth 'full'; take depth"
            " 'lora' or 'dynamics', or start from a result without an adapter"
        )
    if held == "adapter" and training.depth == "lora":
        about = read_json(result_folder(start) / ADAPTER_CONFIG)
        rank = about.get("r") if isinstance(about, dict) else None
        if rank != training.lora_rank:
            raise ConfigError(
                f"the adapter of {start} has rank {rank}, not {training.lora_rank} (lora_rank)"
            )
    if held != "none" and base_name(start) != model_name:
        raise ConfigError(f"{start} was trained from {base_name(start)!r}, not {model_name!r}")
    return held


@contextlib.contextmanager
def _adapted(plain: nn.Module, start: str | Path | None) -> Iterator[nn.Module]:
    """The model with the adapter of `start`, where there is one; plain again afterwards."""
    if start is None:
        yield plain
        return
    with warnings.catch_warnings():
        # It leaves out the layers of an extension, which a plain model has not.
        warnings.filterwarnings("ignore", "You have passed exclude_modules")
        adapted: Any = load_adapter(plain, result_folder(start))
    try:
        yield adapted
    finally:
        adapted.unload()


def _require_same_batch(out: Path, windows: int) -> None:
    """Check that the run in `out`, if there is one, has steps of as many windows.

    Raises:
        ConfigError: it has not, as after another number of processes; says what to pass.
    """
    if not (out / RUN_FILE).is_file():
        return
    try:
        before = read_json(out / RUN_FILE)
    except CheckpointError:
        return  # `holds_run` says what to do about a damaged one
    for key in ("settings", "training", "global_batch"):
        before = before.get(key) if isinstance(before, dict) else None
    if isinstance(before, int) and before != windows:
        raise ConfigError(
            f"{out} holds a run with steps of {before} windows, this one has {windows}; pass"
            f" --global-batch {before} to go on with it"
        )


def _say_result(
    console: Console,
    rows: list[Row],
    out: Path,
    native: int | None,
    pairs: Sequence[Difference] = (),
) -> None:
    for part in tables(rows, native, pairs):
        console.print(part)
    console.print(f"in [bold]{out}[/bold]: results.json, results.csv, perplexity.png")


def _say_lengths(console: Console, lengths: list[int], native: int, max_scale: float) -> None:
    """How many documents reach each length that the extension aims at."""
    parts = []
    size = native
    while size <= native * max_scale:
        parts.append(f"{sum(n >= size for n in lengths)} of {size:,} or more")
        size *= 2
    console.print(f"{len(lengths)} training documents, by length in tokens: {'; '.join(parts)}")


def run_perplexity(
    model_name: str,
    data: str | Path,
    out: str | Path,
    *,
    max_scale: float,
    evaluation: EvalConfig,
    field: str = "text",
    overwrite: bool = False,
    device: str = "auto",
    console: Console | None = None,
) -> list[Row]:
    """Perplexity by length of a plain model, or of a result of `run_extend`, with rivals.

    A measurement that was interrupted goes on, after the last document that was read, when it is
    started again with the same settings.

    Args:
        model_name: a plain model, or a folder that `clex.load` reads.
        data: held-out text.
        out: folder for the results.
        max_scale: longest scale of a plain model; an extended one brings its own.
        evaluation: protocols, lengths, amount of text, and rivals.
        field: column or key of the text.
        overwrite: delete what an earlier measurement left in `out`.
        device: ``auto``, ``cpu``, ``cuda`` ...
        console: where progress and tables go.

    Raises:
        ClexError: one line that says what is wrong.
    """
    console, place, out = console or Console(stderr=True), choose_device(device), Path(out)
    measured = load_measured(model_name, evaluation.rivals, max_scale=max_scale, device=place)
    plain, extended, config = measured.plain, measured.extended, measured.config
    native = measured.native_length
    plan = evaluation.plan(plain, native, config.max_scale)
    tokenizer = load_tokenizer(measured.source)
    tokens = load_tokens(data, tokenizer, field)
    chosen = select_documents(tokens, plan)
    needed = plan.lengths[-1] if plan.reads_windows() else 2
    short = sum(length < needed for length in tokens["length"])
    console.print(
        f"reading {len(chosen)} of {len(tokens)} documents"
        + (f"; shorter than {needed:,} tokens: {short}" if short else "")
    )
    settings = {
        "model": model_name,
        "data": str(data),
        "field": field,
        "clex": config.to_dict(),
        "evaluation": dataclasses.asdict(evaluation),
        # Another model or text under the same name must not be mixed with what was measured.
        "weights": _weights_digest(plain if extended is None else extended),
        "text": _text_digest(tokens, chosen),
    }
    holds_run(out, settings, overwrite, "clex eval ppl")
    sizes = token_bytes(tokenizer)
    with claimed(out, settings, overwrite):
        log = ScoreLog(out / DOCUMENTS_FILE)
        keys = None
        if "longppl" in plan.protocols:
            with long_context_evaluator(
                evaluation.evaluator, extended, plain, config, tokenizer
            ) as judge:
                keys = key_tokens_of(judge, tokens, plan, out / KEYS_FILE, console)
            if plan.protocols == ("longppl",) and not any(map(len, keys.values())):
                raise DataError(
                    f"no key tokens in {len(keys)} windows: the evaluator"
                    f" {evaluation.evaluator or model_name} finds nothing that needs a long"
                    f" context; give another --evaluator, longer texts or other --protocols"
                )
        rows = evaluate_methods(
            plain,
            tokens,
            plan,
            measured.rivals,
            console,
            token_bytes=sizes,
            key_tokens=keys,
            log=log,
        )
        if extended is not None:
            rows += evaluate_extended(
                extended, tokens, plan, None, console, token_bytes=sizes, key_tokens=keys, log=log
            )
        pairs = differences(log.scores)
        write_report(rows, out, native, pairs)
    _say_result(console, rows, out, native, pairs)
    return rows


@contextlib.contextmanager
def long_context_evaluator(
    name: str | None,
    extended: nn.Module | None,
    plain: nn.Module,
    config: ClexConfig,
    tokenizer: Any,
) -> Iterator[Evaluator]:
    """The model that finds the key tokens of LongPPL, for the length of a block.

    Args:
        name: a plain model or a result of ``clex extend``, or ``native``, the judged models' plain
            one inside its own window; if not given, the extended model, or else the plain one.
        extended, plain: the judged models.
        config: their extension.
        tokenizer: of the judged models. The evaluator may have another one.
    """
    if name is None and extended is not None:
        yield Evaluator(extended)
        return
    if name == NATIVE_EVALUATOR:
        yield Evaluator(plain, window=config.native_length)
        return
    aligner, reach = None, config.max_scale
    if name is not None:
        checkpoint = is_checkpoint(name)
        own = load_tokenizer(base_name(name) if checkpoint else name)
        if own.get_vocab() != tokenizer.get_vocab():
            aligner = Aligner(tokenizer, own)
        dtype, device = next(plain.parameters()).dtype, next(plain.parameters()).device
        if checkpoint:
            yield Evaluator(load(name, dtype=dtype, device=device), aligner)
            return
        plain = load_base(name, dtype=dtype, device=device)
        with as_method(plain, ClexConfig(method="none")) as probe:
            window = config_of(probe).native_length
        assert config.native_length is not None and window is not None
        # It must read what the judged models read, whatever its own window is.
        reach *= config.native_length / window
    # A plain model cannot read past its window; inside it, YaRN changes nothing.
    with as_method(plain, ClexConfig(method="yarn", max_scale=max(1.0, reach))) as judge:
        yield Evaluator(judge, aligner)


def _weights_digest(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        # Reading all weights would take as long as a document; any training moves these.
        some = parameter.detach().flatten()[:64].float().cpu()
        digest.update(name.encode() + some.numpy().tobytes())
    return digest.hexdigest()


def _text_digest(tokens: datasets.Dataset, documents: Sequence[int]) -> str:
    digest = hashlib.sha256()
    for number in documents:
        row = tokens[number]
        digest.update(repr((number, row["length"], row["input_ids"][:1024])).encode())
    return digest.hexdigest()
