"""The job behind `clex compare`: every method trained and measured, failures noted, one report."""

from __future__ import annotations

import gc
import hashlib
import json
import shlex
import shutil
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from torch import nn

from ..errors import ClexError, OutputError
from ..files import new_file, new_folder, output_errors, read_json, write_json
from ..hf.checkpoint import load
from ..hf.extend import extend, restore
from ..hf.models import load_base
from ..run import EvalConfig, autocast, choose_device, run_extend
from ..run_folder import claimed, holds_run, versions
from ..training import CHECKPOINTS_FOLDER, TrainConfig
from .measures import Subject, measures_of
from .plan import (
    FAILURES_FILE,
    LOG_FILE,
    MODEL_FOLDER,
    TRAINED_FILE,
    Job,
    Plan,
    make_plan,
    plan_table,
)
from .recipe import BASE, read_recipe, with_changes
from .summary import summarise
from .writing import write_comparison

COMMANDS_FILE = "commands.json"


def run_compare(
    recipe_path: str | Path,
    out: str | Path,
    *,
    only: tuple[str, ...] = (),
    data: str | None = None,
    eval_data: str | None = None,
    seeds: tuple[int, ...] = (),
    join: tuple[str | Path, ...] = (),
    dry_run: bool = False,
    overwrite: bool = False,
    device: str = "auto",
    console: Console | None = None,
) -> list[str]:
    """Train and measure all methods of a recipe at equal budget, and write the report.

    What is finished is kept: a run that was killed goes on when it is started again, and methods or
    seeds may be added to a recipe that has been run. A method that fails is reported as failed; the
    others go on.

    Args:
        recipe_path: TOML, see `clex.comparison.recipe`.
        out: folder for ``results.json``, ``results.csv``, pictures, ``report.html`` and the models.
        only: methods to run now (with those that they build on); all if empty.
        data, eval_data, seeds: in place of the recipe's, see `clex.comparison.recipe.with_changes`.
        join: folders of other runs of this recipe, with other methods or seeds: what they hold and
            `out` does not is copied first.
        dry_run: only print what would be run.
        overwrite: delete what earlier runs of these methods left.
        device: ``auto``, ``cpu``, ``cuda`` ...
        console: where progress goes.

    Returns:
        One line for each failure; empty if all went well.

    Raises:
        ClexError: recipe, model, texts or folder are wrong. Nothing has been run then.
    """
    console, out = console or Console(stderr=True), Path(out)
    recipe = with_changes(read_recipe(recipe_path), data=data, eval_data=eval_data, seeds=seeds)
    place = choose_device(device)
    for name in only:
        recipe.method(name)
    console.print(f"reading [bold]{recipe.model}[/bold] and texts")
    plan = make_plan(recipe)
    jobs = plan.chosen(only)
    console.print(plan_table(plan, jobs))
    if dry_run:
        return []
    command = ["clex", "compare", str(recipe_path), "--out", str(out)]
    command += ["--only", ",".join(only)] if only else []
    command += ["--data", data] if data else []
    command += ["--eval-data", eval_data] if eval_data else []
    command += ["--seeds", ",".join(map(str, seeds))] if seeds else []
    for folder in join:
        command += ["--join", str(folder)]
    command += ["--device", device] if device != "auto" else []
    command += ["--overwrite"] if overwrite else []
    settings = {"command": "compare", "model": recipe.model}
    for folder in join:
        if not holds_run(Path(folder), settings, False, "clex compare"):
            raise OutputError(f"{folder} holds no comparison to join")
    holds_run(out, settings, False, "clex compare")
    run = Run(plan, out, place, console)
    if not overwrite:
        run.check(jobs)
    with claimed(out, settings, False):
        if overwrite:
            for job in jobs:
                shutil.rmtree(out / job.folder, ignore_errors=True)
        commands = read_json(out / COMMANDS_FILE) if (out / COMMANDS_FILE).is_file() else []
        for folder in join:
            commands += _join(Path(folder), out, plan)
        commands.append({"command": shlex.join(command), "started": now(), "versions": versions()})
        write_json(out / COMMANDS_FILE, commands)
        failures = run.all(jobs)
        summary = summarise(plan, out, run.measured, run.errors, commands, now())
        write_comparison(summary, out)
    for line in failures:
        console.print(f"[red]failed[/red] {line}", highlight=False)
    console.print(f"in [bold]{out}[/bold]: report.html, results.json, results.csv, pictures")
    return failures


def _join(folder: Path, out: Path, plan: Plan) -> list[Any]:
    """Copy from `folder` the jobs that `out` does not have; the commands that made them."""
    new = [job for job in plan.jobs if (folder / job.folder).is_dir()]
    new = [job for job in new if not (out / job.folder).exists()]
    for job in new:
        with new_folder(out / job.folder) as temporary:
            shutil.copytree(folder / job.folder, temporary, dirs_exist_ok=True)
    for file in folder.glob("key-tokens-*.json"):
        if not (out / file.name).exists():
            with new_file(out / file.name) as path:
                shutil.copyfile(file, path)
    return list(read_json(folder / COMMANDS_FILE)) if new else []


class Run:
    """The jobs of a plan on one device, with their folder."""

    def __init__(self, plan: Plan, out: Path, device: torch.device, console: Console) -> None:
        self.plan, self.recipe, self.out = plan, plan.recipe, out
        self.device, self.console, self.measures = device, console, measures_of(plan)
        self.precision = TrainConfig(**self.recipe.budget).precision
        # By folder: errors that could not be written into it, for the report of this run.
        self.unwritten: dict[Path, dict[str, str]] = {}

    def all(self, jobs: Sequence[Job]) -> list[str]:
        """Do what is not done yet; returns a line for each failure."""
        failures: list[str] = []
        todo = [job for job in jobs if not self.finished(job)]
        if len(todo) < len(jobs):
            self.console.print(f"{len(jobs) - len(todo)} of {len(jobs)} are finished already")
        work, done, started = sum(job.work for job in todo), 0, time.monotonic()
        for number, job in enumerate(todo, start=1):
            left = ""
            if done:
                left = f", about {_clock((time.monotonic() - started) * (work - done) / done)} left"
            self.console.rule(f"{number} of {len(todo)}: {job.name} ({done / work:.0%} done{left})")
            failures += self.one(job)
            done += job.work
        return failures

    def check(self, jobs: Sequence[Job]) -> None:
        """Refuse to go on with models that were trained in another way.

        Raises:
            OutputError: names the first such model.
        """
        for job in jobs:
            before = _record(self.out / job.folder / TRAINED_FILE)
            if before and before["settings"] != self._training_settings(job):
                raise OutputError(
                    f"{self.out / job.folder} was trained with other settings;"
                    " pass --overwrite to train it anew"
                )

    def finished(self, job: Job) -> bool:
        """Whether there is nothing left to do."""
        return self._trained(job) and all(self.measured(job, name) for name in self._names(job))

    def _names(self, job: Job) -> list[str]:
        return list(self.measures) if job.method.measured else []

    def one(self, job: Job) -> list[str]:
        """Train and measure; returns a line for each failure, which is kept in the folder too."""
        folder, errors = self.out / job.folder, dict[str, str]()
        with self._noted(job, "folder", errors), output_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for name in (FAILURES_FILE, LOG_FILE):
                (folder / name).unlink(missing_ok=True)
        if not errors:
            with self._noted(job, "training", errors):
                if not self._trained(job):
                    self._train(job)
        model, broken = None, bool(errors)
        for name in self._names(job):
            if broken or self.measured(job, name):
                continue
            with self._noted(job, name, errors):
                if model is None:
                    model = self._load(job)
                self._measure(job, name, model)
        del model
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if errors:
            try:
                write_json(folder / FAILURES_FILE, errors)
            except (OSError, ClexError):
                self.unwritten[job.folder] = errors
        return [f"{job.name}, {what}: {line}" for what, line in errors.items()]

    @contextmanager
    def _noted(self, job: Job, what: str, errors: dict[str, str]) -> Iterator[None]:
        """Turn an error into a line of `errors` and a traceback in the job's log."""
        try:
            yield
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            kind = "" if isinstance(error, ClexError) else f"{type(error).__name__}: "
            errors[what] = kind + lines[0]
            log, trace = self.out / job.folder / LOG_FILE, traceback.format_exc()
            # The folder may be what is wrong; the others go on all the same.
            with suppress(OSError), log.open("a", encoding="utf-8") as file:
                file.write(f"{what}\n{trace}\n")
            self.console.print(f"[red]failed[/red] {what}: {errors[what]}", highlight=False)

    def errors(self, job: Job) -> dict[str, str]:
        """What failed when the job was run last, with one line for each; empty if nothing did."""
        file = self.out / job.folder / FAILURES_FILE
        kept: dict[str, str] = read_json(file) if file.is_file() else {}
        return self.unwritten.get(job.folder, kept)

    def _trained(self, job: Job) -> bool:
        return job.training is None or (self.out / job.folder / TRAINED_FILE).is_file()

    def _train(self, job: Job) -> None:
        assert job.training is not None
        recipe, folder, started = self.recipe, self.out / job.folder, time.monotonic()
        start = self._source(job, job.method.start) if job.method.start else None
        run_extend(
            recipe.model,
            recipe.data,
            folder / MODEL_FOLDER,
            clex=job.method.clex,
            training=job.training,
            # Measured below, as all methods are; here only one text, so that a run has a result.
            evaluation=EvalConfig(
                lengths=(self.plan.native_length,), documents=1, windows=1, rivals=()
            ),
            eval_data=recipe.eval_data,
            choose_start=job.method.choose_base,
            field=recipe.text_field,
            start=start / MODEL_FOLDER if start else None,
            device=str(self.device),
            console=self.console,
        )
        # Many methods and seeds would fill a disk with states that nothing goes on from.
        shutil.rmtree(folder / MODEL_FOLDER / CHECKPOINTS_FOLDER, ignore_errors=True)
        self._finish(folder / TRAINED_FILE, self._training_settings(job), started)

    def measured(self, job: Job, name: str) -> bool:
        """Whether a measure is there, made of this model and with these settings."""
        before = _record(self.out / job.folder / f"{name}.json")
        return before is not None and before["settings"] == self._measure_settings(job, name)

    def _measure(self, job: Job, name: str, model: nn.Module) -> None:
        folder, started = self.out / job.folder, time.monotonic()
        settings = self._measure_settings(job, name)
        subject = Subject(
            model=model,
            method=job.method.name,
            plan=self.plan,
            # What a killed measurement left counts only under the settings it was begun with.
            partial=folder / f"{name}-{_digest(settings)}",
            key_tokens=self.out / f"key-tokens-{_digest(self._texts_settings())}.json",
            checkpoint=folder / MODEL_FOLDER if job.training else None,
            device=self.device,
            console=self.console,
        )
        with autocast(self.device, self.precision):
            result = self.measures[name](subject)
        self._finish(folder / f"{name}.json", settings, started, result=result)

    def _finish(self, file: Path, settings: Any, started: float, **more: Any) -> None:
        record = {
            "settings": settings,
            "finished": now(),
            "seconds": round(time.monotonic() - started, 3),
            "versions": versions(),
        }
        write_json(file, {**record, **more})

    def _load(self, job: Job) -> nn.Module:
        """The model of a job, ready to be measured."""
        if job.training is not None:
            return load(self.out / job.folder / MODEL_FOLDER, device=self.device)
        if job.method.weights:
            source = self._source(job, job.method.weights)
            model = load(source / MODEL_FOLDER, device=self.device)
            model = restore(model.merge_and_unload() if isinstance(model, PeftModel) else model)
        else:
            model = load_base(self.recipe.model, device=self.device)
        return model if job.method.name == BASE else extend(model, job.method.clex)

    def _source(self, job: Job, name: str) -> Path:
        """The folder of the trained model that a job builds on.

        Raises:
            ClexError: its training has failed.
        """
        folder = self.out / "runs" / name / f"seed-{job.seed}"
        if not (folder / TRAINED_FILE).is_file():
            raise ClexError(f"needs {name!r}, seed {job.seed}, which is not trained")
        return folder

    def _training_settings(self, job: Job) -> Any:
        recipe = self.recipe
        return plain_json(
            {
                "model": recipe.model,
                "data": recipe.data,
                "eval_data": recipe.eval_data,
                "text_field": recipe.text_field,
                "clex": job.method.clex.to_dict(),
                "training": job.training.to_dict() if job.training else None,
                "start": job.method.start,
                "choose_base": job.method.choose_base,
            }
        )

    def _measure_settings(self, job: Job, name: str) -> Any:
        """What a measurement depends on; the training by the moment it was finished."""
        plan = self.plan
        own: dict[str, Any] = {
            "frequencies": None,
            "perplexity": self._texts_settings(),
            "passkey": asdict(plan.passkey) if plan.passkey else None,
            "needle": asdict(plan.needle) if plan.needle else None,
            "harness": asdict(self.recipe.harness) if self.recipe.harness else None,
        }
        weights = job.method.weights or job.method.name
        trained = _record(self.out / "runs" / weights / f"seed-{job.seed}" / TRAINED_FILE)
        finished = trained["finished"] if trained else None
        settings = {**self._training_settings(job), "measure": own[name], "trained": finished}
        return plain_json(settings)

    def _texts_settings(self) -> dict[str, Any]:
        recipe = self.recipe
        return {
            "texts": recipe.eval_data or recipe.data,
            "plan": asdict(self.plan.perplexity),
            "evaluator": recipe.evaluation.evaluator,
        }


def _record(file: Path) -> dict[str, Any] | None:
    """What `Run._finish` wrote; ``None`` where there is no such file yet."""
    record: dict[str, Any] | None = read_json(file) if file.is_file() else None
    return record


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]


def plain_json(value: Any) -> Any:
    """`value` as it comes back from a JSON file."""
    return json.loads(json.dumps(value))


def now() -> str:
    """The time, UTC, ISO 8601."""
    return datetime.now(UTC).isoformat()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"
