"""Time of each evaluation, and its agreement with all logits at once.

    python -m benchmarks.evaluation [MODEL] [--data TEXT] [--max-scale 8] [--documents 4] \\
        [--device auto] [--out FILE.json]

Each protocol of `clex eval ppl` is measured alone, on the plain model and on training-free YaRN;
``default`` is what the command does when no protocol is named. Agreement is the largest difference
of a mean loss, in nats, from float64 cross entropy over the full logits of the first window.
`cpu_seconds` is the time of this process, which other work on the machine does not lengthen.
"""

from __future__ import annotations

import argparse
import datetime
import sys
import time
from pathlib import Path
from typing import Any

import datasets
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from clex.config import ClexConfig
from clex.data import load_tokens
from clex.evaluation.longppl import Evaluator, key_tokens_of
from clex.evaluation.perplexity import (
    PROTOCOLS,
    PerplexityPlan,
    as_method,
    cut_windows,
    evaluate_methods,
    measure,
)
from clex.evaluation.token_bytes import token_bytes
from clex.files import write_json
from clex.hf.extend import at_scale, config_of
from clex.hf.models import assets_folder, load_base, load_tokenizer
from clex.run import EvalConfig, choose_device
from clex.run_folder import versions

DEFAULT = EvalConfig().protocols


def agreement(model: nn.Module, tokens: datasets.Dataset, plan: PerplexityPlan) -> float:
    """Largest difference, nats a token, over lengths and the two curves, on one window."""
    number, ids = cut_windows(tokens, plan)[0]
    worst = 0.0
    for row in measure(model, [(number, ids)], plan, "yarn"):
        text = ids[: row.length] if row.protocol == "window" else ids[-row.length :]
        with torch.no_grad(), at_scale(model, row.scale):
            inputs = text[None].to(next(model.parameters()).device)
            logits: Any = model(input_ids=inputs, use_cache=False).logits[0, :-1]
        losses = -logits.double().log_softmax(-1).gather(1, inputs[0, 1:, None])[:, 0]
        scored = losses if row.protocol == "window" else losses[-plan.target :]
        worst = max(worst, abs(row.nll - scored.mean().item()))
    return worst


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="tiny-llama")
    parser.add_argument("--data", default=str(assets_folder() / "books" / "test.jsonl.gz"))
    parser.add_argument("--max-scale", type=float, default=8.0)
    parser.add_argument("--documents", type=int, default=4)
    parser.add_argument("--sliding-tokens", type=int, default=2048)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = choose_device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model, tokenizer = load_base(args.model, dtype=dtype, device=device), load_tokenizer(args.model)
    tokens = load_tokens(args.data, tokenizer)
    yarn = ClexConfig(method="yarn", max_scale=args.max_scale)
    with as_method(model, yarn) as probe:
        native = config_of(probe).native_length
    assert native is not None
    console, sizes = Console(width=110), token_bytes(tokenizer)
    rows: list[dict[str, Any]] = []
    for name, protocols in [("default", DEFAULT), *((p, (p,)) for p in PROTOCOLS)]:
        plan = PerplexityPlan.for_model(
            native,
            args.max_scale,
            documents=args.documents,
            protocols=protocols,
            sliding_tokens=args.sliding_tokens,
        )
        started, worked, keys = time.perf_counter(), time.process_time(), None
        if "longppl" in protocols:
            with as_method(model, yarn) as evaluator:
                keys = key_tokens_of(Evaluator(evaluator), tokens, plan)
        found = time.perf_counter()
        measured = evaluate_methods(
            model, tokens, plan, {"base": None, "yarn": yarn}, token_bytes=sizes, key_tokens=keys
        )
        rows.append(
            {
                "protocol": name,
                "seconds": round(time.perf_counter() - started, 2),
                "cpu_seconds": round(time.process_time() - worked, 2),
                "of_which_key_tokens": round(found - started, 2),
                "scored_tokens": sum(row.tokens for row in measured),
            }
        )
    curves = PerplexityPlan.for_model(native, args.max_scale, documents=1)
    with as_method(model, yarn) as extended:
        worst = agreement(extended, tokens, curves)
    table = Table(title=f"{args.model}, {args.documents} documents, plain and YaRN, {device.type}")
    for column in rows[0]:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*map(str, row.values()))
    console.print(table)
    console.print(f"largest difference from all logits at once: {worst:.1e} nats a token")
    if args.out:
        write_json(
            args.out,
            {
                "command": " ".join(["python -m benchmarks.evaluation", *sys.argv[1:]]),
                "date": datetime.date.today().isoformat(),
                "versions": versions(),
                "threads": torch.get_num_threads(),
                "agreement_nats": worst,
                "rows": rows,
            },
        )


if __name__ == "__main__":
    main()
