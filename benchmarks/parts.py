"""Run the commands of a list side by side on the GPUs of one machine, within a time.

    python -m benchmarks.parts benchmarks/evidence.toml --out DIR --at-once 4 --minutes 28 \\
        --set TRAIN=books/train --set TEST=books/test

A list is a TOML file with one table for each job, tried in the order of the file:

    [jobs.fit]
    command = "clex compare recipes/frozen.toml --out {OUT}/fit --data {TRAIN} --only clex-layers"
    needs = ["other"]   # jobs that have to be done before
    minutes = 6         # what it will take: it is not begun with less than that left

Values of --set stand for their names in braces. Jobs that are done are not run again by the same
command; one that failed is. Each job has one GPU of the machine, if there is one, and a log in
DIR/logs.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
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

_POLL = 0.2  # seconds


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
    quoted = {name: shlex.quote(value) for name, value in values.items()}
    jobs = []
    for name, table in tables.items():
        if unknown := sorted(table.keys() - {"command", "needs", "minutes"}):
            raise ConfigError(f"[jobs.{name}] has no {unknown[0]!r}: command, needs, minutes")
        try:
            command = str(table.get("command", "")).format_map(quoted)
        except (KeyError, ValueError, IndexError) as error:
            raise ConfigError(f"[jobs.{name}] command: {error}; give --set NAME=VALUE") from None
        job = Job(name, command, tuple(table.get("needs", ())), float(table.get("minutes", 0)))
        missing = [need for need in job.needs if need not in tables]
        if missing:
            raise ConfigError(f"[jobs.{name}] needs {missing[0]!r}, which is no job")
        if not command:
            raise ConfigError(f"[jobs.{name}] has no command")
        jobs.append(job)
    return jobs


class Parts:
    """The state of a list: what is done, running and left."""

    def __init__(self, jobs: Sequence[Job], out: Path, end: float) -> None:
        self.out, self.end = out, end
        self.running: set[str] = set()
        self.failed: set[str] = set()
        self.lock = threading.Lock()
        for folder in ("done", "logs"):
            (out / folder).mkdir(parents=True, exist_ok=True)
        self.left = [job for job in jobs if not self.done(job.name)]

    def done(self, name: str) -> bool:
        """Whether a job has ended well, now or in an earlier call."""
        return (self.out / "done" / name).exists()

    def next(self) -> Job | None:
        """The first job that can be begun, which counts as running then.

        Jobs that cannot be begun any more are left out: there is too little time, or what they
        need has failed or is left out itself.
        """
        with self.lock:
            minutes = (self.end - time.monotonic()) / 60
            before = None
            while before != len(self.left):
                before = len(self.left)
                coming = self.running | {job.name for job in self.left}
                self.left = [
                    job
                    for job in self.left
                    if job.minutes < minutes
                    and all(self.done(need) or need in coming for need in job.needs)
                ]
            for job in self.left:
                if all(map(self.done, job.needs)):
                    self.left.remove(job)
                    self.running.add(job.name)
                    return job
        return None

    def work(self, slot: int, gpu: str | None) -> None:
        """Run one job after the other until none is left."""
        environment = dict(os.environ) | ({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {})
        while True:
            job = self.next()
            if job is not None:
                self.run(job, slot, environment)
            elif self.left:
                time.sleep(_POLL)
            else:
                return

    def run(self, job: Job, slot: int, environment: Mapping[str, str]) -> None:
        """Run a job to its end, or stop it and all that it has started at the end of the time."""
        started = time.monotonic()
        say(f"{job.name}: begun by {slot}")
        with (self.out / "logs" / job.name).open("a", encoding="utf-8") as log:
            command = ["bash", "-c", job.command]
            process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, start_new_session=True
            )
            while process.poll() is None and time.monotonic() < self.end:
                time.sleep(_POLL)
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
        code = process.wait()
        with self.lock:
            self.running.discard(job.name)
            if code == 0:
                (self.out / "done" / job.name).touch()
            else:
                self.failed.add(job.name)
        how = "done" if code == 0 else f"failed ({code})"
        say(f"{job.name}: {how}, {time.monotonic() - started:.0f} s")


def say(line: str) -> None:
    """Tell what happens, with the time of the day."""
    print(time.strftime("%H:%M:%S"), line, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a list; 1 if a job is not done in the end."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("jobs", type=Path, help="TOML file with [jobs.NAME] tables")
    parser.add_argument("--out", type=Path, required=True, help="folder, {OUT} in commands")
    parser.add_argument("--at-once", type=int, default=1, help="jobs on each GPU at a time")
    parser.add_argument("--minutes", type=float, default=1e6, help="end after that")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--dry-run", action="store_true", help="print the commands alone")
    args = parser.parse_args(arguments)
    try:
        for pair in args.set:
            if "=" not in pair:
                raise ConfigError(f"--set {pair}: give NAME=VALUE")
        values = dict(pair.split("=", 1) for pair in args.set) | {"OUT": str(args.out)}
        jobs = read_jobs(args.jobs, values)
    except ClexError as error:
        print(f"parts: {error}", file=sys.stderr)
        return 1
    if args.dry_run:
        for job in jobs:
            print(f"{job.name}: {job.command}")
        return 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    gpus = [name for name in visible.split(",") if name]
    gpus = gpus or [str(number) for number in range(torch.cuda.device_count())]
    parts = Parts(jobs, args.out, time.monotonic() + 60 * args.minutes)
    threads = [
        threading.Thread(target=parts.work, args=(slot, gpus[slot % len(gpus)] if gpus else None))
        for slot in range(args.at_once * max(len(gpus), 1))
    ]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except KeyboardInterrupt:
        parts.end = 0.0
        for thread in threads:
            thread.join()
    missing = [job.name for job in jobs if not parts.done(job.name)]
    say(f"{len(jobs) - len(missing)} of {len(jobs)} done" + ", not: " * bool(missing))
    for name in missing:
        print(f"  {name}{' (failed)' * (name in parts.failed)}")
    return int(bool(missing))


if __name__ == "__main__":
    raise SystemExit(main())
