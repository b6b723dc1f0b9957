"""A thousand steps in bfloat16 at ten times the default rates, and what is finite at the end.

    OMP_NUM_THREADS=1 python -m benchmarks.stress --steps 1000 --out stress.json

A small random model on random text, at each depth and with both presets. The gradient norm of every
step and the loss are in the log of the run; at the end every parameter and every frequency is
looked at, up to the largest scale.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from rich.console import Console

import clex
from clex.config import PRESETS
from clex.errors import TrainingError
from clex.files import write_json
from clex.training import DEPTHS, TrainConfig, train

_NATIVE = 64
_MAX_SCALE = 8.0
_FACTOR = 10  # of the default rates


def stress(depth: str, preset: str, steps: int, seed: int, folder: Path) -> dict[str, Any]:
    """One run; a record of it."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": _NATIVE,
        "initializer_range": 0.15,
    }
    model: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    model = clex.extend(model, clex.ClexConfig(preset=preset, max_scale=_MAX_SCALE))
    plain = TrainConfig(depth=depth)
    config = TrainConfig(
        depth=depth,
        steps=steps,
        rate=_FACTOR * plain.rate,
        dynamics_rate=_FACTOR * (plain.dynamics_rate or 2e-4),
        precision="bf16",
        save_every=steps,
        seed=seed,
    )
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(128, (700,), generator=generator).tolist() for _ in range(8)]
    tokens = datasets.Dataset.from_dict({"input_ids": rows, "length": [700] * len(rows)})
    record: dict[str, Any] = {"depth": depth, "preset": preset, "steps": steps, "stopped": None}
    silent = Console(file=io.StringIO())
    try:
        model = train(model, tokens, config, folder, console=silent)
    except TrainingError as error:
        record["stopped"] = str(error)
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    norms = [row["grad_norm"] for row in log]
    found = [clex.frequencies(model, t) for t in (1.0, 1.7, 4.0, _MAX_SCALE)]
    record |= {
        "steps_done": len(log),
        "gradients_not_finite": sum(not math.isfinite(norm) for norm in norms),
        "largest_gradient_norm": max(norms),
        "loss": [log[0]["loss"], log[-1]["loss"]],
        "parameters_finite": all(bool(p.isfinite().all()) for p in model.parameters()),
        "frequencies_positive_and_finite": all(
            bool((f > 0).all() and f.isfinite().all()) for f in found if isinstance(f, torch.Tensor)
        ),
        "largest_learned_number": max(
            float(p.detach().abs().max())
            for n, p in model.named_parameters()
            if ".scalings." in n and p.numel()
        ),
    }
    return record


def main() -> None:
    """Run all depths with both presets, and print a record of each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--depth", action="append", choices=list(DEPTHS))
    given = parser.parse_args()
    records = []
    for depth, preset in itertools.product(given.depth or DEPTHS, PRESETS):
        with tempfile.TemporaryDirectory() as place:
            records.append(stress(depth, preset, given.steps, given.seed, Path(place)))
        print(json.dumps(records[-1]), flush=True)
        if given.out:
            write_json(given.out, records)


if __name__ == "__main__":
    main()
