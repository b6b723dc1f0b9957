"""Fit the dynamics of an extended model on your text, in Python.

    python examples/train.py --out fitted
    python examples/train.py --model your/model --data books/ --depth full --steps 400 --out fitted

The command line's `clex extend` does the same and measures before and after. Here the steps are in
your hands. A run that was interrupted goes on when it is started again with the same `--out`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch

import clex
from clex.data import load_tokens
from clex.hf.models import assets_folder, load_base, load_tokenizer
from clex.training import TrainConfig, learned_parameters, train

BOOKS = assets_folder() / "books" / "train.jsonl.gz"


def main(arguments: Sequence[str] | None = None) -> list[float]:
    """Train and save; the loss of every step."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny-llama", help="folder, hub id or bundled name")
    parser.add_argument("--data", default=BOOKS, help="text files, a folder, or a dataset id")
    parser.add_argument("--depth", default="dynamics", choices=("dynamics", "lora", "full"))
    parser.add_argument("--max-scale", type=float, default=4, help="longest text over the window")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(arguments)

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_base(args.model, device=device), load_tokenizer(args.model)
    tokens = load_tokens(args.data, tokenizer)
    print(f"{len(tokens)} documents, the longest of {max(tokens['length']):,} tokens")

    # Every scale from 1 to max_scale is drawn in training. `base` is the closed form around which
    # the field learns; `clex extend` tries which one suits the model best.
    model = clex.extend(model, clex.ClexConfig(max_scale=args.max_scale, base="yarn"))
    count = sum(p.numel() for p in learned_parameters(model))
    print(f"{count} numbers in the dynamics, {sum(p.numel() for p in model.parameters()):,} in all")

    trained = train(
        model,
        tokens,
        TrainConfig(depth=args.depth, steps=args.steps, save_every=10),
        args.out,
        base_model=args.model,
        tokenizer=tokenizer,
    )

    lines = (args.out / "log.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    print(f"loss {losses[0]:.3f} in the first step, {losses[-1]:.3f} in the last")
    scales = torch.tensor([1.0, 2.0, args.max_scale])
    slowest = [float(clex.frequencies(trained, t)[-1]) for t in scales.tolist()]
    print("slowest frequency at t =", dict(zip(scales.tolist(), slowest, strict=True)))
    print(f"in {args.out}: clex.load('{args.out}')")
    return losses


if __name__ == "__main__":
    main()
