"""Speed and memory of training on one and two GPUs, against `clex plan`, with random weights.

    python -m benchmarks.scaling --out FOLDER [--only TEXT] [--budget SECONDS] [--commit HASH]
        [--smoke]
    python -m benchmarks.scaling --fit FILE.json
    python -m benchmarks.scaling --page FILE.json

Each case is a process (or one for each GPU) with a time limit of its own; results are written after
each case, and a case that fails is a line in the table. Cases of one GPU run side by side on as
many GPUs as there are. The first step warms up and is not timed. The cases whose name begins with
``equal`` train a small model in float32 on the same global batch under each engine; what differs
from one process, losses and gradients of the first step, is in a table of its own. --fit prints the
speeds for `clex.planning` that fit the cases of one GPU best; those of two are then predictions.
--page writes the tables of a results file again beside it, with the plan as it is now.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import itertools
import json
import math
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}
ENGINES: dict[str, dict[str, str]] = {
    "one": {},
    "ddp": {},
    "fsdp2": FSDP,
    "cp": {
        **FSDP,
        "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
        "PARALLELISM_CONFIG_CP_SIZE": "2",
        "PARALLELISM_CONFIG_DP_SHARD_SIZE": "1",
    },
}


@dataclass(frozen=True)
class Case:
    """One run. `batch` windows go into a forward pass of one process."""

    shape: str
    length: int
    engine: str = "one"
    depth: str = "full"
    batch: int = 1
    steps: int = 4
    compile: bool = False
    limit: int = 120

    @property
    def gpus(self) -> int:
        """Processes, one for each GPU."""
        return 1 if self.engine == "one" else 2

    @property
    def name(self) -> str:
        """Unique in a list of cases."""
        extra = "-compiled" if self.compile else ""
        return f"{self.shape}-{self.depth}-{self.length}-{self.engine}{extra}"


# The most telling first: where the time runs out the rest is left out.
CASES = (
    *(
        Case("equal", 1024, engine, steps=2, batch=1 if engine in ("ddp", "fsdp2") else 2, limit=60)
        for engine in ("one", "ddp", "fsdp2", "cp")
    ),
    Case("smollm2-135m", 8192, batch=2, steps=8, limit=60),
    Case("llama-1b", 8192, steps=6, limit=70),
    Case("llama-8b", 32768, depth="lora", steps=3, limit=110),
    Case("llama-1b", 32768, steps=4, limit=80),
    Case("llama-1b", 8192, "ddp", steps=6, limit=70),
    Case("smollm2-135m", 8192, "ddp", batch=2, steps=8, limit=60),
    Case("llama-1b", 32768, "fsdp2", steps=4, limit=80),
    Case("llama-1b", 131072, "cp", steps=3, limit=100),
    Case("llama-1b", 131072, steps=2, limit=110),
    Case("smollm2-135m", 131072, steps=3, limit=90),
    Case("smollm2-135m", 131072, "cp", steps=3, limit=70),
    Case("smollm2-135m", 32768, steps=4, limit=60),
    Case("llama-1b", 8192, "fsdp2", steps=6, limit=70),
    Case("llama-1b", 32768, "cp", steps=4, limit=70),
    Case("smollm2-135m", 32768, "ddp", steps=4, limit=60),
    Case("smollm2-135m", 8192, batch=2, steps=8, compile=True, limit=110),
    Case("smollm2-135m", 131072, "ddp", steps=3, limit=90),
)
SMOKE = (
    *(
        Case("equal", 128, engine, steps=2, batch=1 if engine in ("ddp", "fsdp2") else 2)
        for engine in ("one", "ddp", "fsdp2", "cp")
    ),
    Case("tiny", 256, steps=3),
    Case("tiny", 256, "ddp", steps=3),
    Case("tiny", 256, depth="lora", steps=3),
)


# The process that trains.


def work(case: Case, folder: Path) -> None:
    """Run a case in this process, one of `case.gpus`; the first writes the result."""
    import datasets
    import numpy as np
    import torch
    import transformers
    from torch.distributed.tensor import DTensor

    from clex import processes
    from clex.config import ClexConfig
    from clex.files import write_json
    from clex.hf.extend import extend
    from clex.shapes import SHAPES, shape
    from clex.training import TrainConfig, make_trainer

    processes.join()
    cuda, equal = torch.cuda.is_available(), case.shape == "equal"
    if case.shape in SHAPES:
        host = shape(case.shape)
    else:
        host = transformers.LlamaConfig(
            vocab_size=1000,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=4,  # float32 attention of unequal heads has no ring
            max_position_embeddings=case.length // 4,
            initializer_range=0.1,
        )
    torch.manual_seed(0)
    place = "cuda" if cuda else "cpu"
    dtype = torch.float32 if case.depth == "full" or not cuda else torch.bfloat16
    with torch.device(place):
        plain = transformers.AutoModelForCausalLM.from_config(host, dtype=dtype)
    model = extend(plain, ClexConfig(max_scale=16))
    rng = np.random.default_rng(0)
    texts = [rng.integers(1000, size=case.length + 64).tolist() for _ in range(4)]
    tokens = datasets.Dataset.from_dict(
        {"input_ids": texts, "length": [len(text) for text in texts]}
    )
    config = TrainConfig(
        depth=case.depth,
        train_length=case.length,
        steps=case.steps,
        batch_size=case.batch,
        global_batch=2 if equal else None,
        precision="fp32" if equal else "auto",
        clip=1e9 if equal else 1.0,
        compile=case.compile,
    )
    trainer = make_trainer(model, tokens, config, folder)
    trainer.args.save_strategy = "no"
    ends: list[float] = []
    gradients: dict[str, Any] = {}

    class Clock(transformers.TrainerCallback):
        """Times of the steps; gradients of the first where they are compared."""

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.on_step_end()

        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            for name, p in kwargs["model"].named_parameters() if equal and not gradients else ():
                if p.grad is not None:
                    whole = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
                    gradients[name.removeprefix("module.")] = whole.float().cpu().clone()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            if cuda:
                torch.cuda.synchronize()
            ends.append(time.perf_counter())

    trainer.add_callback(Clock())
    trainer.train()
    if not processes.is_main():
        return
    if equal:
        torch.save(gradients, folder / "gradients.pt")
    seconds = [b - a for a, b in itertools.pairwise(ends)]
    write_json(
        folder / "result.json",
        {
            "first_step_seconds": seconds[0],
            "step_seconds": statistics.median(seconds[1:] or seconds),
            "steps_timed": len(seconds) - 1,
            "tokens_per_step": case.length * config.windows_per_step,
            "peak_bytes": torch.cuda.max_memory_allocated() if cuda else None,
            "reserved_bytes": torch.cuda.max_memory_reserved() if cuda else None,
            "losses": [r["loss"] for r in trainer.state.log_history if "loss" in r],
        },
    )


# The driver.


class Running:
    """The processes of a case."""

    def __init__(self, case: Case, folder: Path, cards: list[int]) -> None:
        self.case, self.folder, self.cards = case, folder, cards
        self.started = time.monotonic()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.processes = []
        for rank in range(case.gpus):
            place: dict[str, Any] = {
                **os.environ,
                **ENGINES[case.engine],
                "CUDA_VISIBLE_DEVICES": ",".join(map(str, cards)),
                "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
                "TOKENIZERS_PARALLELISM": "false",
                "OMP_NUM_THREADS": "1",
            }
            if case.gpus > 1:
                place |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": case.gpus}
                place |= {"LOCAL_WORLD_SIZE": case.gpus}
                place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            about = json.dumps(dataclasses.asdict(case))
            command = [sys.executable, "-m", "benchmarks.scaling", "--work", about, str(folder)]
            log = (folder / f"log-{rank}.txt").open("w")
            self.processes.append(
                subprocess.Popen(
                    command,
                    env={name: str(value) for name, value in place.items()},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )

    def poll(self) -> dict[str, Any] | None:
        """The row of the case when it has ended, well or not."""
        codes = [process.poll() for process in self.processes]
        late = time.monotonic() - self.started > self.case.limit
        lost = any(code not in (None, 0) for code in codes)
        if None in codes and not late and not lost:
            return None
        if lost and None in codes and not late:
            time.sleep(2)  # the others are about to say why
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        row: dict[str, Any] = {"case": self.case.name, **dataclasses.asdict(self.case)}
        row["gpus"] = self.case.gpus
        row["wall_seconds"] = round(time.monotonic() - self.started, 1)
        result = self.folder / "result.json"
        if result.is_file():
            return {**row, **json.loads(result.read_text())}
        logs = [(self.folder / f"log-{r}.txt").read_text() for r in range(self.case.gpus)]
        why = "over its time limit" if late else _last_error(logs)
        return {**row, "error": why, "log": "\n".join(log[-1500:] for log in logs)}


def _last_error(logs: list[str]) -> str:
    lines = [line for log in logs for line in log.splitlines() if "Error" in line]
    return lines[-1][:200] if lines else "ended without a result"


def planned(row: dict[str, Any]) -> Any:
    """What `clex plan` says of a measured case, or `None`."""
    from clex.planning import Layout, Sizes, estimate
    from clex.shapes import SHAPES, shape

    if row["shape"] not in SHAPES:
        return None
    layout = Layout(
        gpus=row["gpus"],
        pieces=2 if row["engine"] == "cp" else 1,
        sharded=row["engine"] in ("fsdp2", "cp"),
        checkpointing=row["length"] > 16384,
        batch=row["batch"],
    )
    return estimate(Sizes.of(shape(row["shape"])), row["length"], row["depth"], layout)


def differences(folder: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Losses and gradients of the ``equal`` cases against one process."""
    import torch

    good = {row["engine"]: row for row in rows if row["shape"] == "equal" and "losses" in row}
    if "one" not in good:
        return []
    found = []
    wanted = torch.load(folder / good["one"]["case"] / "gradients.pt")
    for engine, row in good.items():
        if engine == "one":
            continue
        ours = torch.load(folder / row["case"] / "gradients.pt")
        pairs = zip(row["losses"], good["one"]["losses"], strict=True)
        ratios = {
            name: (
                (ours[name] - wanted[name]).abs().max() / wanted[name].abs().max().clamp(min=1e-12)
            ).item()
            for name in wanted
        }
        worst = max(ratios, key=lambda name: ratios[name])
        found.append(
            {
                "engine": engine,
                "same_names": ours.keys() == wanted.keys(),
                "loss": row["losses"][0],
                "largest_loss_difference": max(abs(a - b) for a, b in pairs),
                "largest_gradient_difference": ratios[worst],
                "of": worst,
            }
        )
    return found


def page(rows: list[dict[str, Any]], equal: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        f"# Training on one and two GPUs, {about['date']}",
        "",
        f"```\n{about['command']}\n```",
        "",
        f"{about['versions']['device']}; torch {about['versions']['torch']}, transformers"
        f" {about['versions']['transformers']}, Python {about['versions']['python']}; commit"
        f" {about['commit']}; seed 0, random weights, one window in a forward pass (SmolLM2 at 8k:"
        " two), the median of the steps after the first. Peak: torch's allocator, GiB of one GPU.",
        "",
        "| case | GPUs | s/step | tokens/s | peak | plan: tokens/s | plan: peak |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['case']} | {row['gpus']} | {row['error']} | | | | |")
            continue
        speed = row["tokens_per_step"] / row["step_seconds"]
        peak = (row["peak_bytes"] or 0) / 2**30
        plan = planned(row)
        cells = ["", ""]
        if plan is not None and peak:
            memory = plan.allocated / 2**30
            cells = [
                f"{plan.tokens_per_second:,.0f} ({plan.tokens_per_second / speed - 1:+.0%})",
                f"{memory:.1f} ({memory / peak - 1:+.0%})",
            ]
        lines.append(
            f"| {row['case']} | {row['gpus']} | {row['step_seconds']:.3f} | {speed:,.0f} |"
            f" {peak:.1f} | {cells[0]} | {cells[1]} |"
        )
    lines += ["", "Efficiency of two GPUs: tokens/s over twice those of one GPU.", ""]
    lines += ["| case | efficiency |", "| --- | ---: |"]
    alone = {
        (r["shape"], r["length"], r["depth"]): r
        for r in rows
        if r["engine"] == "one" and "error" not in r and not r["compile"]
    }
    for row in rows:
        one = alone.get((row["shape"], row["length"], row["depth"]))
        if row["gpus"] == 2 and one and "error" not in row and row["shape"] != "equal":
            a = row["tokens_per_step"] / row["step_seconds"]
            b = one["tokens_per_step"] / one["step_seconds"]
            lines.append(f"| {row['case']} | {a / b / 2:.2f} |")
    lines += [
        "",
        "A small model in float32, the same global batch: against one process.",
        "",
        "| engine | loss of step 1 | largest difference: loss | gradient, relative | where |",
        "| --- | ---: | ---: | ---: | --- |",
    ]
    lines += [
        f"| {e['engine']} | {e['loss']:.4f} | {e['largest_loss_difference']:.1e} |"
        f" {e['largest_gradient_difference']:.1e} | {e['of']} |"
        for e in equal
    ]
    return "\n".join(lines) + "\n"


def fit(file: Path) -> None:
    """Speeds that make the plan of the cases of one GPU agree with what was measured."""
    import numpy as np

    from clex.shapes import shape

    rows = [
        (row, plan)
        for row in json.loads(file.read_text())["rows"]
        if "error" not in row and row["gpus"] == 1 and not row["compile"]
        if (plan := planned(row)) is not None
    ]
    names = ["matmul", "attention", "layer"]
    work = np.array(
        [
            [p.linear_flops / 1e12, p.attention_flops / 1e12, shape(row["shape"]).num_hidden_layers]
            for row, p in rows
        ]
    )
    # Too like the others to be fitted with them: at the speed that a copy was measured to have.
    known = np.array([p.moved / p.machine.elementwise for _, p in rows])
    seconds = np.array([row["step_seconds"] for row, _ in rows])
    found, *_ = np.linalg.lstsq(work / seconds[:, None], 1 - known / seconds, rcond=None)
    for name, value in zip(names, found, strict=True):
        print(name, f"{value:.4f}" if name == "layer" else f"{1e12 / value:.3g}")
    for (row, _), s, w in zip(rows, seconds, work @ found + known, strict=True):
        print(f"{row['case']}: {s:.3f} s, fitted {w:.3f} ({w / s - 1:+.0%})")


def main() -> None:
    """Run the cases and write the tables after each."""
    if len(sys.argv) > 1 and sys.argv[1] == "--work":
        work(Case(**json.loads(sys.argv[2])), Path(sys.argv[3]))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("scaling"))
    parser.add_argument("--fit", type=Path, help="results to fit the speeds of the plan to")
    parser.add_argument("--page", type=Path, help="results to write the tables of again")
    parser.add_argument("--only", default="", help="run the cases whose name contains this")
    parser.add_argument("--budget", type=float, default=math.inf, help="start none after this")
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--smoke", action="store_true", help="tiny cases, on the CPU with gloo")
    args = parser.parse_args()
    if args.fit:
        fit(args.fit)
        return
    if args.page:
        about = json.loads(args.page.read_text(encoding="utf-8"))
        text = page(about["rows"], about["equal"], about)
        args.page.with_suffix(".md").write_text(text, encoding="utf-8")
        return

    import torch

    from clex.files import write_json
    from clex.run_folder import versions

    started = time.monotonic()
    cards = list(range(torch.cuda.device_count()))
    todo = [c for c in (SMOKE if args.smoke else CASES) if args.only in c.name]
    if not args.smoke:
        todo = [case for case in todo if case.gpus <= len(cards)]
    about = {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python -m benchmarks.scaling", *sys.argv[1:]]),
        "versions": versions(),
        "commit": args.commit,
    }
    rows: list[dict[str, Any]] = []
    running: list[Running] = []
    free = cards or [0, 1]
    args.out.mkdir(parents=True, exist_ok=True)
    stem = args.out / f"{about['date']}-scaling"
    with tempfile.TemporaryDirectory() as place:
        while todo or running:
            over = time.monotonic() - started > args.budget
            if over:
                todo = []
            # A case of two GPUs waits for both; until then no later case takes one of them.
            while todo and todo[0].gpus <= len(free):
                case = todo.pop(0)
                folder = Path(place) / case.name
                folder.mkdir()
                used, free = free[: case.gpus], free[case.gpus :]
                running.append(Running(case, folder, used))
            time.sleep(0.2)
            for one in list(running):
                row = one.poll()
                if row is None:
                    continue
                running.remove(one)
                free = sorted(free + one.cards)
                rows.append(row)
                equal = differences(Path(place), rows)
                write_json(stem.with_suffix(".json"), {**about, "rows": rows, "equal": equal})
                text = page(rows, equal, about)
                stem.with_suffix(".md").write_text(text, encoding="utf-8")
                speed = row["error"] if "error" in row else f"{row['step_seconds']:.3f} s/step"
                passed = time.monotonic() - started
                print(f"{passed:6.1f} s  {row['case']}: {speed}", flush=True)
    print(stem.with_suffix(".md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
