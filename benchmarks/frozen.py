"""Fit several extensions of one frozen model on the same windows and compare them.

    python -m benchmarks.frozen smollm2 --data TRAIN --eval-data VAL --variants variants.json \\
        --out DIR --max-scale 8

A variant is ``{"name": ..., "clex": {...}, "train": {...}}``; the two sections hold settings of
ClexConfig and TrainConfig; ``"train": null`` measures it as it is. Each starts from the same plain
model. Rows go to ``DIR/results.json`` as they come, and variants that are in there are left
out, so an interrupted comparison resumes. `free_vector`, defined here, is the ceiling: a number
for each frequency, for one scale, without any smoothness.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

from clex.config import ClexConfig
from clex.data import load_tokens
from clex.evaluation.perplexity import Row, as_method, cut_windows, measure
from clex.evaluation.report import tables, write_report
from clex.files import read_json, write_json
from clex.hf.checkpoint import extension_state
from clex.hf.extend import config_of, extend, frequencies, restore
from clex.hf.models import load_base, load_tokenizer
from clex.rope import RopeSpec
from clex.run import EvalConfig, autocast, choose_device
from clex.run_folder import versions
from clex.scaling import Scaling, get_scaling, register_scaling
from clex.training import TrainConfig, train


@register_scaling("free_vector")
class FreeVector(Scaling):
    """Every frequency its own number, for one scale only: what a curve could reach at best."""

    default_temperature = "learned"

    def __init__(self, spec: RopeSpec, config: ClexConfig) -> None:
        super().__init__(spec, config)
        self.start = get_scaling("dynamic_ntk")(spec, ClexConfig(method="dynamic_ntk"))
        self.shift = nn.Parameter(torch.zeros(spec.inv_freq.numel()))

    def ratio(self, t: Tensor) -> Tensor:
        return self.start.ratio(t) * self.shift.exp()


def main() -> None:
    """Run the comparison that the arguments describe."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--eval-data", required=True)
    parser.add_argument("--variants", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--max-scale", type=float, default=8.0)
    parser.add_argument("--lengths", type=lambda text: tuple(map(int, text.split(","))))
    parser.add_argument("--documents", type=int)
    parser.add_argument("--windows", type=int, default=1)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    console, device = Console(stderr=True, width=120), choose_device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model, tokenizer = load_base(args.model, dtype=dtype, device=device), load_tokenizer(args.model)
    tokens, held_out = load_tokens(args.data, tokenizer), load_tokens(args.eval_data, tokenizer)
    with as_method(model, ClexConfig(method="none", max_scale=args.max_scale)) as probe:
        native = config_of(probe).native_length
    assert native is not None
    evaluation = EvalConfig(lengths=args.lengths, documents=args.documents, windows=args.windows)
    plan = evaluation.plan(model, native, args.max_scale)
    windows = cut_windows(held_out, plan)
    file = args.out / "results.json"
    rows = [Row(**row) for row in read_json(file)] if file.is_file() else []
    about = args.out / "variants.json"
    details = read_json(about) if about.is_file() else {}
    for variant in json.loads(args.variants.read_text()):
        name = variant["name"]
        if any(row.method == name for row in rows):
            continue
        settings = variant.get("clex", {})
        started = time.monotonic()
        if settings is not None:
            extend(model, ClexConfig.from_dict({"max_scale": args.max_scale, **settings}))
            if variant.get("train"):
                train(
                    model,
                    tokens,
                    TrainConfig(**variant["train"]),
                    args.out / "runs" / name.replace(" ", "_"),
                    console=console,
                )
        fitted = time.monotonic()
        with autocast(device):
            rows += measure(model, windows, plan, name)
        details[name] = {
            **variant,
            "fit_seconds": round(fitted - started, 1),
            "eval_seconds": round(time.monotonic() - fitted, 1),
            "versions": versions(),
        }
        if settings is not None:
            state = extension_state(model)
            details[name]["numbers"] = sum(v.numel() for v in state.values())
            native_freq = frequencies(model, 1.0)
            details[name]["ratios"] = {
                str(t): [round(x, 4) for x in (frequencies(model, t) / native_freq).tolist()]
                for t in (2.0, args.max_scale)
            }
            small = {k: v.tolist() for k, v in state.items() if v.numel() == 1}
            details[name]["scalars"] = small
        restore(model)
        write_report(rows, args.out, native)
        write_json(about, details)
        console.print(name, details[name]["fit_seconds"], details[name]["eval_seconds"])
    for part in tables(rows, native):
        console.print(part)


if __name__ == "__main__":
    main()
