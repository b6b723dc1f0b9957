"""Run the commands of a list side by side on the GPUs of one machine, within a time.

    python -m benchmarks.parts benchmarks/evidence.toml --out DIR --at-once 4 --minutes 28 \\
        --set TRAIN=books/train --set TEST=books/test

A list is a TOML file with one table for each job, tried in the order of the file:

    [jobs.fit]
    command = "clex compare recipes/frozen.toml --out {OUT}/fit --data {TRAIN} --only clex-layers"
    needs = ["tokens"]   # jobs that have to be done before, and files of `--set` that have to exist
    minutes = 6          # what it will take: it is not begun with less than that left

Jobs that are done are not run again by the same command; one that failed is. Each job has one GPU
of the machine, if there is one, and a log in DIR/logs.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from clex.errors import ClexError, ConfigError


@dataclass(frozen=True)
class Job:
    """A command line, the names it waits for, and the minutes it is expected to take."""

    name: str
    command: str
    needs: tuple[str, ...] = ()
    minutes: float = 0.0


def read_jobs(file: Path, values: Mapping[str, str]) -> list[Job]:
    """The jobs of a list, with `values` in place of their names in braces.

    Raises:
        ConfigError: the list cannot be read, or a job names something that is not there.
    """
    try:
        tables = tomllib.loads(file.read_text(encoding="utf-8"))["jobs"]
    except (OSError, KeyError, ValueError) as error:
        raise ConfigError(f"cannot read jobs from {file}: {error!r}") from None
    jobs = []
    for name, table in tables.items():
        if unknown := sorted(table.keys() - {"command", "needs", "minutes"}):
            raise ConfigError(f"[jobs.{name}] has no {unknown[0]!r}: command, needs, minutes")
        try:
            command = table["command"].format_map(values)
        except KeyError as error:
            raise ConfigError(f"[jobs.{name}] needs --set {error.args[0]}=...") from None
        job = Job(name, command, tuple(table.get("needs", ())), float(table.get("minutes", 0)))
        missing = [n for n in job.needs if n not in tables and n not in values]
        if missing:
            raise ConfigError(f"[jobs.{name}] needs {missing[0]!r}, which is no job")
        jobs.append(job)
    return jobs


class Parts:
    """The state of a list: what is done, running and left."""

    def __init__(self, jobs: Sequence[Job], out: Path, values: Mapping[str, str], end: float):
        self.left, self.out, self.values, self.end = list(jobs), out, values, end
        self.running: set[str] = set()
        self.failed: list[str] = []
        self.lock = threading.Lock()
        for folder in ("done", "logs"):
            (out / folder).mkdir(parents=True, exist_ok=True)
        self.left = [job for job in self.left if not self.done(job.name)]

    def done(self, name: str) -> bool:
        """Whether a job has ended well, or the file that `--set` calls so is there."""
        if name in self.values:
            return Path(self.values[name]).exists()
        return (self.out / "done" / name).exists()

    def next(self) -> Job | None:
        """The first job that can be begun now; it counts as running then."""
        with self.lock:
            left_minutes = (self.end - time.monotonic()) / 60
            for job in self.left:
                if job.minutes <= left_minutes and all(map(self.done, job.needs)):
                    self.left.remove(job)
                    self.running.add(job.name)
                    return job
        return None

    def hopeless(self) -> bool:
        """Whether no job is left that could still be begun."""
        with self.lock:
            within = [j for j in self.left if j.minutes <= (self.end - time.monotonic()) / 60]
            coming = self.running | {j.name for j in within} | self.values.keys()
            return not any(
                all(self.done(n) or n in coming for n in job.needs) for job in within
            ) or (time.monotonic() >= self.end)

    def work(self, slot: int, gpus: int) -> None:
        """Run one job after the other until none can be begun any more."""
        environment = dict(os.environ)
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = str(slot % gpus)
        while True:
            job = self.next()
            if job is None:
                if self.hopeless():
                    return
                time.sleep(0.2)
                continue
            started = time.monotonic()
            say(f"{job.name}: begun by {slot}")
            code: int | str = "stopped at the end of the time"
            with (self.out / "logs" / job.name).open("a", encoding="utf-8") as log:
                process = subprocess.Popen(
                    ["bash", "-c", job.command],
                    stdout=log,
                    stderr=log,
                    env=environment,
                    start_new_session=True,
                )
                try:
                    code = process.wait(timeout=max(0.0, self.end - time.monotonic()))
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, 15)
                    process.wait()
            with self.lock:
                self.running.discard(job.name)
                if code == 0:
                    (self.out / "done" / job.name).touch()
                else:
                    self.failed.append(job.name)
            say(f"{job.name}: {'done' if code == 0 else code}, {time.monotonic() - started:.0f} s")


def say(line: str) -> None:
    """Tell what happens, with the time of the day."""
    print(time.strftime("%H:%M:%S"), line, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a list; the number of jobs that are not done."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("jobs", type=Path, help="TOML file with [jobs.NAME] tables")
    parser.add_argument("--out", type=Path, required=True, help="folder, {OUT} in commands")
    parser.add_argument("--at-once", type=int, default=1, help="jobs on each GPU at a time")
    parser.add_argument("--minutes", type=float, default=1e6, help="end after that")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--dry-run", action="store_true", help="print the commands alone")
    args = parser.parse_args(arguments)
    values = dict(pair.split("=", 1) for pair in args.set if "=" in pair)
    values["OUT"] = shlex.quote(str(args.out))
    try:
        jobs = read_jobs(args.jobs, values)
    except ClexError as error:
        print(f"parts: {error}", file=sys.stderr)
        return 1
    if args.dry_run:
        for job in jobs:
            print(f"{job.name}: {job.command}")
        return 0
    gpus = torch.cuda.device_count()
    end = time.monotonic() + 60 * args.minutes
    parts = Parts(jobs, args.out, values, end)
    slots = range(args.at_once * max(gpus, 1))
    threads = [threading.Thread(target=parts.work, args=(slot, gpus)) for slot in slots]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    missing = [job.name for job in jobs if not parts.done(job.name)]
    say(f"{len(jobs) - len(missing)} of {len(jobs)} done" + ", not: " * bool(missing))
    for name in missing:
        print(f"  {name}{' (failed)' * (name in parts.failed)}")
    return len(missing)


if __name__ == "__main__":
    raise SystemExit(main())
