"""From the files of the jobs to the one summary that the tables, pictures and the page show."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..evaluation.retrieval import SCORES
from ..evaluation.scores import Score, perplexity, rows_of
from ..files import read_json
from ..run_folder import versions
from .measures import measures_of
from .plan import LOG_FILE, TRAINED_FILE, Job, Plan, how
from .recipe import BASE, EQUAL, Method
from .statistics import FEW_DOCUMENTS, Losses, level

# The protocol that the first sentence is about: the first of these that was measured.
_TOLD = {
    "target": "same-target",
    "window": "whole-window",
    "longppl": "key-token",
    "sliding": "sliding-window",
}
Cell = dict[str, Any]
Key = tuple[str, str, int]  # method, protocol, length
Results = list[tuple[Job, Any]]
Fresh = Callable[[Job, str], bool]
Errors = Callable[[Job], Mapping[str, str]]
RETRIEVAL_TITLES = {"passkey": "Passkey in filler", "needle": "Needle in real text"}


def summarise(
    plan: Plan,
    out: Path,
    fresh: Fresh,
    errors: Errors,
    commands: Sequence[Mapping[str, Any]],
    written: str,
) -> Cell:
    """All that is known about a comparison, as plain JSON types.

    Args:
        plan: what was to be done.
        out: the folder with what has been done.
        fresh: whether the file of a job's measure is there and was made with today's settings.
        errors: what of a job has failed, with one line for each.
        commands: that were run on this folder, oldest first.
        written: the time, ISO 8601.

    Returns:
        ``perplexity``, ``differences`` (to the recipe's reference), ``verdicts``, ``positions``,
        ``retention``, ``frequencies``, ``maps``, ``retrieval`` and ``tasks``: lists of cells, seeds
        averaged; ``rows``: perplexity of each seed; ``methods``, ``failures``, ``commands``,
        ``versions``, ``recipe``: how they came about.
    """
    recipe = plan.recipe
    found = read_results(plan, out, fresh)
    table = Table(plan, found["perplexity"])
    budget = next((job for job in plan.jobs if job.training and not job.method.deviates), None)
    return {
        "title": recipe.title,
        "written": written,
        "model": {
            "name": recipe.model,
            "native_length": plan.native_length,
            "max_scale": recipe.max_scale,
        },
        "text": {
            "data": recipe.data,
            "eval_data": recipe.eval_data,
            "documents": table.documents,
            "windows": max((row["windows"] for row in table.rows), default=0),
            "target": plan.perplexity.target,
        },
        "budget": _budget(budget),
        "seeds": list(recipe.seeds),
        "reference": recipe.reference,
        "methods": [_method(plan, method, out, fresh, errors) for method in recipe.methods],
        "perplexity": table.cells(),
        "differences": table.differences(recipe.reference),
        "verdicts": table.verdicts(),
        "sentences": table.sentences(recipe.seeds),
        "level_rule": _LEVEL_RULE,
        "positions": table.positions(),
        "retention": table.retention(),
        "frequencies": [
            {"method": job.method.name, "seed": job.seed, **curve}
            for job, curves in found["frequencies"]
            for curve in curves
        ],
        "maps": [
            part for task in RETRIEVAL_TITLES for part in retrieval_maps(task, found.get(task, []))
        ],
        "retrieval": [
            row for task in RETRIEVAL_TITLES for row in retrieval_rows(task, found.get(task, []))
        ],
        "tasks": task_rows(found.get("harness", [])),
        "rows": table.rows,
        "failures": _failures(plan, out, errors),
        "commands": list(commands),
        "versions": versions(),
        "recipe": recipe.text,
    }


_LEVEL_RULE = (
    "Level: the 95 % bootstrap interval over documents of the paired difference to the best one"
    " includes 0, or the ranges over seeds overlap."
)


def read_results(plan: Plan, out: Path, fresh: Fresh) -> dict[str, Results]:
    """What each measure has left so far, by its name, in the order of the jobs."""
    return {
        name: [
            (job, read_json(out / job.folder / f"{name}.json")["result"])
            for job in plan.jobs
            if fresh(job, name)
        ]
        for name in measures_of(plan)
    }


class Table:
    """Perplexities of all methods, with what can be said about their differences.

    Args:
        plan: of the comparison.
        results: scores by document of each job.
    """

    def __init__(self, plan: Plan, results: Results) -> None:
        self.plan = plan
        self.rows: list[Cell] = []
        by_seed: dict[Key, list[Losses]] = {}
        for job, records in results:
            scores = [Score(**{**record, "method": job.method.name}) for record in records]
            self.rows += [{"seed": job.seed, **row.to_dict()} for row in rows_of(scores)]
            cells: dict[Key, list[Score]] = {}
            for score in scores:
                if score.protocol != "position":
                    key = (score.method, score.protocol, score.length)
                    cells.setdefault(key, []).append(score)
            for key, parts in cells.items():
                if sum(part.tokens for part in parts):
                    parts.sort(key=lambda part: part.document)
                    losses = Losses(tuple(p.nll for p in parts), tuple(p.tokens for p in parts))
                    by_seed.setdefault(key, []).append(losses)
        self.by_seed = by_seed
        self.losses = {key: Losses.mean(seeds) for key, seeds in by_seed.items()}
        self.documents = max((len(one.sums) for one in self.losses.values()), default=0)

    def cells(self) -> list[Cell]:
        """One for each method, protocol and length."""
        verdicts = {(v["protocol"], v["length"]): v for v in self.verdicts()}
        result = []
        for key, losses in self.losses.items():
            method, protocol, length = key
            interval, verdict = losses.interval(), verdicts[protocol, length]
            seeds = [perplexity(one.nll) for one in self.by_seed[key]]
            rows = [r for r in self.rows if (r["method"], r["protocol"], r["length"]) == key]
            rank = "tie" if method in verdict["ties"] else None
            result.append(
                {
                    "method": method,
                    "protocol": protocol,
                    "length": length,
                    "scale": rows[0]["scale"],
                    "ppl": perplexity(losses.nll),
                    "low": perplexity(interval[0]) if interval else None,
                    "high": perplexity(interval[1]) if interval else None,
                    "seeds": seeds,
                    "min": min(seeds),
                    "max": max(seeds),
                    "accuracy": _mean([row["accuracy"] for row in rows]),
                    "bits_per_byte": _mean([row["bits_per_byte"] for row in rows]),
                    "documents": len(losses.sums),
                    "tokens": sum(losses.tokens),
                    "rank": "best" if verdict["best"] == method else rank,
                }
            )
        return result

    def differences(self, reference: str) -> list[Cell]:
        """Paired by document, in per cent of the reference's perplexity."""
        result = []
        for method, protocol, length in self.losses:
            other = (reference, protocol, length)
            if method == reference or other not in self.losses:
                continue
            result.append(
                {"method": method, "protocol": protocol, "length": length}
                | self._change((method, protocol, length), other)
            )
        return result

    def _change(self, key: Key, other: Key) -> Cell:
        ours, theirs = self.losses[key], self.losses[other]
        interval = ours.difference(theirs)
        return {
            "percent": _percent(ours.nll - theirs.nll),
            "low": _percent(interval[0]) if interval else None,
            "high": _percent(interval[1]) if interval else None,
        }

    def verdicts(self) -> list[Cell]:
        """The best method of each protocol and length, and those that are level with it."""
        result = []
        for protocol, length in sorted({key[1:] for key in self.losses}):
            keys = [key for key in self.losses if key[1:] == (protocol, length)]
            best = min(keys, key=lambda key: self.losses[key].nll)
            ties = [key[0] for key in keys if key != best and self._level(key, best)]
            ppl = perplexity(self.losses[best].nll)
            cell: Cell = {"protocol": protocol, "length": length, "best": best[0], "ppl": ppl}
            result.append({**cell, "ties": ties})
        return result

    def _level(self, key: Key, best: Key) -> bool:
        return level(
            self.losses[key].difference(self.losses[best]),
            [one.nll for one in self.by_seed[key]],
            [one.nll for one in self.by_seed[best]],
        )

    def positions(self) -> list[Cell]:
        """Perplexity in bands of position of the longest text, seeds averaged."""
        bands: dict[tuple[str, int, int], list[float]] = {}
        for row in self.rows:
            if row["protocol"] == "position":
                key = (row["method"], row["band_start"], row["band_stop"])
                bands.setdefault(key, []).append(row["nll"])
        return [
            {"method": method, "start": start, "stop": stop, "ppl": perplexity(sum(n) / len(n))}
            for (method, start, stop), n in bands.items()
        ]

    def sentences(self, seeds: Sequence[int]) -> list[str]:
        """What the tables say, and how far they can be trusted."""
        result = []
        verdicts = self.verdicts()
        protocol = next((p for p in _TOLD if any(v["protocol"] == p for v in verdicts)), None)
        if protocol is not None:
            found = [verdict for verdict in verdicts if verdict["protocol"] == protocol]
            result.append(self._told(max(found, key=lambda v: int(v["length"])), _TOLD[protocol]))
        if len(seeds) == 1:
            result.append(
                "One seed: how much trained methods differ from one training to the next is not"
                " known, and small differences between them prove nothing."
            )
        if 0 < self.documents < FEW_DOCUMENTS:
            result.append(
                f"Only {self.documents} documents: the intervals are rough and tend to be too"
                " narrow."
            )
        return result

    def _told(self, verdict: Cell, kind: str) -> str:
        """The best at a length, and whether it is the best beyond doubt."""
        labels = {method.name: method.label for method in self.plan.recipe.methods}
        best, times = labels[verdict["best"]], verdict["length"] / self.plan.native_length
        where = f"At {verdict['length']:,} tokens ({times:g} times the native window)"
        if verdict["ties"]:
            others = ", ".join(labels[name] for name in verdict["ties"])
            return (
                f"{where} {best} has the lowest {kind} perplexity, {verdict['ppl']:.2f}, but cannot"
                f" be told from {others}."
            )
        return f"{where} {best} is ahead of all others: {kind} perplexity {verdict['ppl']:.2f}."

    def retention(self) -> list[Cell]:
        """Whole-window perplexity up to the native window, and its change from the plain model."""
        result = []
        for method, protocol, length in self.losses:
            if protocol != "window" or length > self.plan.native_length:
                continue
            key, base = (method, protocol, length), (BASE, protocol, length)
            cell: Cell = {
                "method": method,
                "length": length,
                "ppl": perplexity(self.losses[key].nll),
            }
            missing = {"percent": None, "low": None, "high": None}
            result.append(cell | (self._change(key, base) if base in self.losses else missing))
        return result


def retrieval_maps(task: str, results: Results) -> list[Cell]:
    """Shares found by depth and length, for each score and method; seeds averaged."""
    shares: dict[tuple[str, str], dict[tuple[float, int], list[float]]] = {}
    for job, result in results:
        for cell in result["cells"]:
            for score in SCORES:
                if cell[score] is not None:
                    places = shares.setdefault((score, job.method.name), {})
                    places.setdefault((cell["depth"], cell["length"]), []).append(cell[score])
    maps = []
    for (score, method), places in shares.items():
        depths, lengths = sorted({d for d, _ in places}), sorted({n for _, n in places})
        maps.append(
            {
                "task": task,
                "title": RETRIEVAL_TITLES[task],
                "score": score,
                "method": method,
                "chance": results[0][1]["chance"] if score != "exact" else 0.0,
                "lengths": lengths,
                "depths": depths,
                "values": [[_mean(places.get((d, n), [])) for n in lengths] for d in depths],
            }
        )
    return maps


def retrieval_rows(task: str, results: Results) -> list[Cell]:
    """Shares found by length; the interval spans those of all seeds."""
    found: dict[tuple[str, str, int], list[Cell]] = {}
    for job, result in results:
        for row in result["by_length"]:
            found.setdefault((row["score"], job.method.name, row["length"]), []).append(row)
    return [
        {
            "task": task,
            "score": score,
            "method": method,
            "length": length,
            "mean": _mean([row["mean"] for row in rows]),
            "low": min(row["low"] for row in rows),
            "high": max(row["high"] for row in rows),
            "trials": sum(row["trials"] for row in rows),
            "above_chance": all(row["above_chance"] for row in rows),
        }
        for (score, method, length), rows in found.items()
    ]


def task_rows(results: Results) -> list[Cell]:
    """Scores of the harness; the interval spans those of all seeds."""
    found: dict[tuple[str, str, str], list[Cell]] = {}
    for job, scores in results:
        for score in scores:
            found.setdefault((score["task"], score["metric"], job.method.name), []).append(score)
    rows = []
    for (task, metric, method), scores in found.items():
        lows = [score["low"] for score in scores if score["low"] is not None]
        highs = [score["high"] for score in scores if score["high"] is not None]
        rows.append(
            {
                "task": task,
                "metric": metric,
                "method": method,
                "value": _mean([score["value"] for score in scores]),
                "low": min(lows) if lows else None,
                "high": max(highs) if highs else None,
                "items": scores[0]["items"],
                "cut": scores[0]["cut"],
            }
        )
    return rows


def _failures(plan: Plan, out: Path, errors: Errors) -> list[Cell]:
    result = []
    for job in plan.jobs:
        log = job.folder / LOG_FILE
        found = str(log) if (out / log).is_file() else None
        where = {"method": job.method.name, "seed": job.seed, "log": found}
        result += [{**where, "what": what, "error": line} for what, line in errors(job).items()]
    return result


def _budget(job: Job | None) -> Cell:
    if job is None or job.training is None:
        return {"tokens": 0, "steps": 0, "settings": {}}
    settings = {name: getattr(job.training, name) for name in EQUAL}
    return {"tokens": job.tokens, "steps": job.training.steps, "settings": settings}


def _method(plan: Plan, method: Method, out: Path, fresh: Fresh, errors: Errors) -> Cell:
    jobs = [job for job in plan.jobs if job.method is method]
    runs = [_run(plan, job, out, fresh, errors) for job in jobs]
    states = {run["state"] for run in runs}
    training = jobs[0].training
    return {
        "name": method.name,
        "label": method.label,
        "how": how(method, training),
        "trained": method.trained or method.weights is not None,
        "weights": method.weights,
        "deviates": method.deviates,
        "tokens": jobs[0].tokens,
        "tokens_before": jobs[0].before,
        "train_seconds": _mean([run["train_seconds"] for run in runs]),
        "measure_seconds": _mean([run["measure_seconds"] for run in runs]),
        "state": states.pop() if len(states) == 1 else "in part",
        "runs": runs,
        "clex": method.clex.to_dict(),
        "training": training.to_dict() if training else None,
    }


def _run(plan: Plan, job: Job, out: Path, fresh: Fresh, errors: Errors) -> Cell:
    folder = out / job.folder
    names = list(measures_of(plan)) if job.method.measured else []
    done = [name for name in names if fresh(job, name)]
    trained = folder / TRAINED_FILE
    whole = len(done) == len(names) and (job.training is None or trained.is_file())
    state = "done" if whole else "in part" if done else "not run"
    seconds = [read_json(folder / f"{name}.json")["seconds"] for name in done]
    return {
        "seed": job.seed,
        "state": "failed" if errors(job) else state,
        "folder": str(job.folder),
        "train_seconds": read_json(trained)["seconds"] if trained.is_file() else None,
        "measure_seconds": sum(seconds) if seconds else None,
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _percent(difference: float) -> float:
    return 100 * math.expm1(min(difference, 700.0))
