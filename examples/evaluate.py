"""Measure how far a model reads, with training-free rivals beside it, in Python.

    python examples/evaluate.py --out measured
    python examples/evaluate.py --model your/model --data books/ --rivals base,ntk --out measured
    python examples/evaluate.py --model fitted --data books/ --out measured

`--model` is a plain model or a result of `clex extend` or of `examples/train.py`. The same as
`clex eval ppl`, in the open: texts, plan, rows, differences paired by document, files.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from clex.data import load_tokens
from clex.evaluation.perplexity import (
    PerplexityPlan,
    Row,
    evaluate_extended,
    evaluate_methods,
)
from clex.evaluation.report import tables, write_report
from clex.evaluation.scores import ScoreLog, differences
from clex.evaluation.token_bytes import token_bytes
from clex.hf.models import assets_folder, load_tokenizer
from clex.measured import load_measured
from clex.run import choose_device

BOOKS = assets_folder() / "books" / "test.jsonl.gz"


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Measure and write the report; the rows of the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny-llama", help="plain, or a result of clex extend")
    parser.add_argument("--data", default=BOOKS, help="text that the model was not trained on")
    parser.add_argument("--rivals", default="base,yarn", help="base is the model as it is")
    parser.add_argument("--max-scale", type=float, default=4, help="for a plain model")
    parser.add_argument("--documents", type=int, default=2)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(arguments)

    console = Console(stderr=True)
    measured = load_measured(
        str(args.model),
        args.rivals.split(","),
        max_scale=args.max_scale,
        device=choose_device(args.device),
    )
    tokenizer = load_tokenizer(measured.source)
    tokens, sizes = load_tokens(args.data, tokenizer), token_bytes(tokenizer)
    native = measured.native_length

    # Every method and length sees the same windows of the same documents.
    plan = PerplexityPlan.for_model(native, measured.config.max_scale, documents=args.documents)
    log = ScoreLog()
    rows = evaluate_methods(
        measured.plain, tokens, plan, measured.rivals, console, token_bytes=sizes, log=log
    )
    if measured.extended is not None:
        rows += evaluate_extended(
            measured.extended, tokens, plan, console=console, token_bytes=sizes, log=log
        )

    pairs = differences(log.scores)
    for table in tables(rows, native, pairs):
        console.print(table)
    args.out.mkdir(parents=True, exist_ok=True)
    write_report(rows, args.out, native, pairs)
    console.print(f"in {args.out}: results.json, results.csv, perplexity.png")
    return rows


if __name__ == "__main__":
    main()
