"""kill -9 at random moments of training, tokenising, comparing and exporting, and what is left.

    OMP_NUM_THREADS=1 python -m benchmarks.kills --kills 50 --out DIR

Each job runs once without interruption. Then it runs in other folders and is killed at a moment
drawn uniformly from that run's duration, again and again; a folder whose run got to its end is
compared with the uninterrupted one, byte for byte, and a new folder is begun. After every kill all
that looks finished must be the very thing of the uninterrupted run. Runs are forked from one
process, since a new interpreter would spend its time on imports, where there is nothing to kill.
"""

from __future__ import annotations

import argparse
import gzip
import json
import multiprocessing
import os
import random
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch

from clex import cli
from clex.data import load_tokens
from clex.digests import digests_of, require_digests
from clex.errors import CheckpointError
from clex.export.record import RECORD_FILE
from clex.files import TEMPORARY, read_json, write_json
from clex.hf.checkpoint import CONFIG_FILE, is_checkpoint, weight_digests
from clex.hf.models import assets_folder, load_tokenizer
from clex.run_folder import claimed

# One command at a time may take this long; it takes seconds.
_TIMEOUT = 600
_RECIPE = """
model = "tiny-llama"
data = "{data}"
max_scale = 2.0

[budget]
depth = "dynamics"
steps = 3
save_every = 1

[evaluation]
lengths = [256, 512]
documents = 1

[methods.yarn]
method = "yarn"
train = false

[methods.clex]
method = "clex"
"""


@dataclass(frozen=True)
class Job:
    """Something that is killed.

    Attributes:
        run: does it, into a folder, from the inputs in another.
        result: all that must be the same as without interruption; raises `CheckpointError` where
            that is not there.
        finished: parts that look finished, by name; each must be that of an uninterrupted run.
    """

    run: Callable[[Path, Path], None]
    result: Callable[[Path], dict[str, Any]]
    finished: Callable[[Path], dict[str, Any]]


def _command(*arguments: object) -> None:
    sys.argv = ["clex", *map(str, arguments)]
    cli.main()


def _extend(*more: object) -> Callable[[Path, Path], None]:
    def run(out: Path, inputs: Path) -> None:
        _command(
            *("extend", "tiny-llama", "--data", inputs / "books.jsonl", "--out", out),
            *("--max-scale", 2, "--save-every", 1, "--base", "dynamic_ntk", "--set", "steps=4"),
            *("--rivals", "base", "--eval-documents", 1, "--eval-lengths", "256,512", *more),
        )

    return run


def _extend_finished(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if is_checkpoint(out):
        require_digests(out, read_json(out / CONFIG_FILE)["sha256"])
        found["weights"] = weight_digests(out)
    if (out / "results.json").is_file():
        found["rows"] = read_json(out / "results.json")
        found["tables"] = digests_of(out, ["results.csv", "perplexity.png"])
    for file in sorted((out / "checkpoints").glob("*/complete.json")):
        require_digests(file.parent, read_json(file)["sha256"])
    return found


def _whole(finished: Callable[[Path], dict[str, Any]], *parts: str) -> Callable[..., Any]:
    def result(out: Path) -> dict[str, Any]:
        found = finished(out)
        for part in parts:
            if part not in found:
                raise CheckpointError(f"{out} has no {part}")
        return found

    return result


def _tokenise(out: Path, inputs: Path) -> None:
    with claimed(out, {}, False):
        tokens = load_tokens(inputs / "many.jsonl", load_tokenizer("tiny-llama"))
        write_json(out / "tokens.json", [row["input_ids"] for row in tokens])


def _tokenise_finished(out: Path) -> dict[str, Any]:
    file = out / "tokens.json"
    return {"tokens": read_json(file)} if file.is_file() else {}


def _compare(out: Path, inputs: Path) -> None:
    _command("compare", inputs / "recipe.toml", "--out", out)


def _compare_finished(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for file in sorted(out.glob("runs/*/seed-*/*.json")):
        record = read_json(file)
        found[str(file.relative_to(out))] = record.get("result")
        if file.name == "trained.json":
            found["weights"] = _extend_finished(file.parent / "model")["weights"]
    if (out / "results.json").is_file():
        found["rows"] = read_json(out / "results.json")["rows"]
    return found


def _export(*target: object) -> Callable[[Path, Path], None]:
    def run(out: Path, inputs: Path) -> None:
        _command(
            *("export", "tiny-llama", "--method", "yarn", "--scale", 4, "--out", out),
            *("--target", *target),
        )

    return run


def _export_finished(out: Path) -> dict[str, Any]:
    if not (out / RECORD_FILE).is_file():
        return {}
    files = [p.name for p in out.iterdir()]
    require_digests(out, read_json(out / RECORD_FILE)["sha256"])
    return {"files": digests_of(out, files)}


JOBS = {
    "training, dynamics": Job(
        _extend("--steps", 6), _whole(_extend_finished, "weights", "rows"), _extend_finished
    ),
    "training, all weights": Job(
        _extend("--steps", 4, "--train", "full", "--train-length", 128),
        _whole(_extend_finished, "weights", "rows"),
        _extend_finished,
    ),
    "tokenising": Job(_tokenise, _whole(_tokenise_finished, "tokens"), _tokenise_finished),
    "comparing": Job(_compare, _whole(_compare_finished, "weights", "rows"), _compare_finished),
    "exporting, hf": Job(_export("hf"), _whole(_export_finished, "files"), _export_finished),
    "exporting, gguf": Job(_export("gguf"), _whole(_export_finished, "files"), _export_finished),
}


def write_inputs(folder: Path) -> None:
    """A few short documents, many of them, and a recipe."""
    folder.mkdir(parents=True, exist_ok=True)
    with gzip.open(assets_folder() / "books" / "train.jsonl.gz", "rt", encoding="utf-8") as lines:
        books = [json.loads(line)["text"] for line in lines]
    text = "".join(books)
    parts = [text[i : i + 3000] for i in range(0, 30_000, 3000)]
    many = [text[i : i + 20_000] for i in range(0, min(len(text), 2_000_000), 20_000)]
    for name, documents in (("books", parts), ("many", many)):
        lines_out = "".join(json.dumps({"text": part}) + "\n" for part in documents)
        (folder / f"{name}.jsonl").write_text(lines_out, encoding="utf-8")
    recipe = _RECIPE.format(data=folder / "books.jsonl")
    (folder / "recipe.toml").write_text(recipe, encoding="utf-8")


def _child(job: Job, out: Path, inputs: Path) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive a fork
    # PyTorch makes its pool of threads anew at the first use after a fork. Where a model is loaded
    # by several threads, two may be the first, and one finds no pool.
    torch.set_num_threads(torch.get_num_threads())
    # Tables of tokens are an output as well: killed with their run, found again by the next.
    datasets.config.HF_DATASETS_CACHE = out.with_name(f"{out.name}-cache")
    with out.with_name(f"{out.name}.log").open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        job.run(out, inputs)


def start(job: Job, out: Path, inputs: Path) -> Any:
    """A process that does the job."""
    out.parent.mkdir(parents=True, exist_ok=True)
    process = multiprocessing.get_context("fork").Process(target=_child, args=(job, out, inputs))
    process.start()
    return process


def to_the_end(job: Job, out: Path, inputs: Path) -> float:
    """Do the job without interruption; returns seconds.

    Raises:
        CheckpointError: it ends with an error.
    """
    began = time.monotonic()
    process = start(job, out, inputs)
    process.join(_TIMEOUT)
    if process.exitcode != 0:
        log = out.with_name(f"{out.name}.log").read_text().strip().splitlines()
        raise CheckpointError(f"{out.name} ended with {process.exitcode}: {log[-1:]}")
    return time.monotonic() - began


def wrong_parts(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Names of parts that look finished and are not those of an uninterrupted run."""
    return [name for name, value in found.items() if wanted.get(name, value) != value]


def kill_job(name: str, kills: int, folder: Path, inputs: Path, rng: random.Random) -> Any:
    """Kill one job `kills` times; a record of what came of it."""
    job, folder = JOBS[name], folder / name.replace(", ", "-")
    seconds = to_the_end(job, folder / "whole", inputs)
    wanted = job.result(folder / "whole")
    failures: list[str] = []
    tried, folders, out, pending = 0, 0, folder / "cut-0", 0
    survived = 0

    def close() -> None:
        nonlocal survived, pending, folders, out
        try:
            to_the_end(job, out, inputs)
            parts = [k for k, v in wanted.items() if job.result(out).get(k) != v]
            left = [p.name for p in out.parent.rglob(f"{TEMPORARY}*") if "-cache" not in str(p)]
            if parts or left:
                failures.append(f"{out.name}: differs in {parts}, left {left}")
            else:
                survived += pending
        except CheckpointError as error:
            failures.append(f"{out.name}: {error}")
        for place in (out, out.with_name(f"{out.name}-cache")):
            shutil.rmtree(place, ignore_errors=True)
        folders, pending = folders + 1, 0
        out = folder / f"cut-{folders}"

    while tried < kills:
        process = start(job, out, inputs)
        process.join(rng.uniform(0, seconds))
        if process.exitcode is not None:  # it was faster this time
            close()
            continue
        process.kill()
        process.join()
        tried, pending = tried + 1, pending + 1
        try:
            wrong = wrong_parts(job.finished(out), wanted)
        except CheckpointError as error:
            wrong = [str(error)]
        if wrong:
            failures.append(f"{out.name}: after kill {tried} {wrong} looks finished and is not")
        if pending == 4:
            close()
    if pending:
        close()
    return {
        "job": name,
        "kills": tried,
        "survived": max(0, survived - len(failures)),
        "folders": folders,
        "seconds_uninterrupted": round(seconds, 2),
        "failures": failures,
    }


def run(kills: int, out: Path, seed: int, names: Sequence[str]) -> list[Any]:
    """Share `kills` among the jobs `names`; returns their records."""
    rng = random.Random(seed)
    write_inputs(out / "inputs")
    load_tokenizer("tiny-llama")  # imports what every run needs
    results = []
    for number, name in enumerate(names):
        share = kills // len(names) + (number < kills % len(names))
        results.append(kill_job(name, share, out, out / "inputs", rng))
        print(json.dumps(results[-1]), flush=True)
        write_json(out / "kills.json", results)
    return results


def main() -> None:
    """Kill, and print what came of it; exit code 1 where a kill was not survived."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--job", action="append", choices=list(JOBS))
    given = parser.parse_args()
    results = run(given.kills, given.out.resolve(), given.seed, given.job or list(JOBS))
    tried, survived = (sum(r[key] for r in results) for key in ("kills", "survived"))
    print(f"kills survived / tried: {survived} / {tried}")
    sys.exit(survived < tried)


if __name__ == "__main__":
    main()
