"""What is measured of one model of a comparison; each measure is kept as a file of its own."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from ..config import ClexConfig
from ..data import find_files, read_documents
from ..evaluation.harness import run_harness
from ..evaluation.haystacks import Haystacks, RetrievalPlan
from ..evaluation.longppl import key_tokens_of
from ..evaluation.perplexity import evaluate_extended, evaluate_methods
from ..evaluation.retrieval import cells_of, run_retrieval, summarise
from ..evaluation.scores import ScoreLog
from ..evaluation.token_bytes import token_bytes
from ..evaluation.trials import TrialLog
from ..hf.checkpoint import save
from ..hf.extend import config_of, extension_of, frequencies, require_extension
from ..hf.models import load_base, load_tokenizer
from ..run import long_context_evaluator
from .plan import Plan
from .recipe import TEXT_OF_NEEDLES


@dataclass(frozen=True)
class Subject:
    """A model to be measured.

    Attributes:
        model: plain or extended, in evaluation mode.
        method: name of its method.
        plan: of the comparison.
        partial: path, without suffix, for what a measurement has so far.
        key_tokens: file of LongPPL's key tokens, for all models.
        checkpoint: folder that `clex.load` reads, where the model was trained.
        device: where it is.
        console: where progress is shown.
    """

    model: nn.Module
    method: str
    plan: Plan
    partial: Path
    key_tokens: Path
    checkpoint: Path | None
    device: torch.device
    console: Console


def measure_frequencies(subject: Subject) -> list[dict[str, Any]]:
    """By layer type and scale t: the ratio f(t) / f(1) of each dimension, the attention factor."""
    model = subject.model
    if extension_of(model) is None:
        return []
    config = config_of(model)
    doublings = int(math.log2(config.max_scale) + 1e-6)
    scales = sorted({2.0**k for k in range(1, doublings + 1)} | {config.max_scale})
    result = []
    for key, module in require_extension(model).scalings.items():
        scaling: Any = module
        device = scaling.inv_freq_native.device
        at = []
        for t in scales:
            found = frequencies(model, t)
            vector: Tensor = found if isinstance(found, Tensor) else found[key]
            with torch.no_grad():
                factor = scaling.attention_factor(torch.tensor([t], device=device)).item()
            ratio = (vector / scaling.inv_freq_native).double().tolist()
            at.append({"scale": t, "ratio": ratio, "attention_factor": factor})
        native = scaling.inv_freq_native.double().tolist()
        result.append({"layer_type": key, "inv_freq": native, "scales": at})
    return result


def measure_perplexity(subject: Subject) -> list[dict[str, Any]]:
    """Scores of `clex.evaluation.scores`: sums for each document, protocol and length."""
    plan, console = subject.plan, subject.console
    tokenizer = load_tokenizer(plan.recipe.model)
    log = ScoreLog(subject.partial.with_suffix(".jsonl"))
    keys = None
    if "longppl" in plan.perplexity.protocols:
        file = subject.key_tokens
        plain = load_base(plan.recipe.model, device=subject.device)
        name = plan.recipe.evaluation.evaluator
        base = plan.recipe.methods[0].clex.replace(native_length=plan.native_length)
        with long_context_evaluator(name, None, plain, base, tokenizer) as judge:
            keys = key_tokens_of(judge, plan.held_out, plan.perplexity, file, console)
    more: dict[str, Any] = {"token_bytes": token_bytes(tokenizer), "key_tokens": keys, "log": log}
    held_out, lengths = plan.held_out, plan.perplexity
    if extension_of(subject.model) is None:
        plain_only: dict[str, ClexConfig | None] = {subject.method: None}
        evaluate_methods(subject.model, held_out, lengths, plain_only, console, **more)
    else:
        evaluate_extended(subject.model, held_out, lengths, subject.method, console, **more)
    return [asdict(score) for score in log.scores]


def measure_retrieval(subject: Subject, plan: RetrievalPlan) -> dict[str, Any]:
    """Shares found, by length and depth, and by length alone."""
    texts: list[str] = []
    if plan.task == "needle":
        texts = list(read_documents(find_files(TEXT_OF_NEEDLES)))
    haystacks = Haystacks(load_tokenizer(subject.plan.recipe.model), plan, texts)
    log = TrialLog(subject.partial.with_suffix(".jsonl"))
    trials = run_retrieval(subject.model, haystacks, plan, subject.method, log.done, log.keep)
    return {
        "chance": plan.chance,
        "cells": [cell.to_dict() for cell in cells_of(trials)],
        "by_length": [row.to_dict() for row in summarise(trials, plan)],
    }


def measure_passkey(subject: Subject) -> dict[str, Any]:
    """A number in repeated filler."""
    assert subject.plan.passkey is not None
    return measure_retrieval(subject, subject.plan.passkey)


def measure_needle(subject: Subject) -> dict[str, Any]:
    """A statement in real text."""
    assert subject.plan.needle is not None
    return measure_retrieval(subject, subject.plan.needle)


def measure_harness(subject: Subject) -> list[dict[str, Any]]:
    """Scores of the tasks of lm-evaluation-harness, which loads models by itself."""
    recipe = subject.plan.recipe
    assert recipe.harness is not None
    folder, source = subject.partial, str(subject.checkpoint or "")
    copy = folder.with_name(f"{folder.name}-model")
    if extension_of(subject.model) is None:
        source = recipe.model
    elif subject.checkpoint is None:
        trained = recipe.method(subject.method).weights is not None
        save(
            subject.model,
            copy,
            weights="full" if trained else "none",
            base_model=recipe.model,
        )
        source = str(copy)
    scores = run_harness(
        source, folder, recipe.harness, device=subject.device, console=subject.console
    )
    shutil.rmtree(copy, ignore_errors=True)
    return [score.to_dict() for score in scores]


Measure = Callable[[Subject], Any]


def measures_of(plan: Plan) -> dict[str, Measure]:
    """What a plan measures of every model, by name, in the order in which it is taken."""
    wanted: dict[str, Measure] = {
        "frequencies": measure_frequencies,
        "perplexity": measure_perplexity,
    }
    if plan.passkey is not None:
        wanted["passkey"] = measure_passkey
    if plan.needle is not None:
        wanted["needle"] = measure_needle
    if plan.recipe.harness is not None:
        wanted["harness"] = measure_harness
    return wanted
