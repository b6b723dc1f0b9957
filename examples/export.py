"""Export a model at one scale, load it without clex, and see that both say the same.

    python examples/export.py --out exported
    python examples/export.py --model fitted --scale 4 --out exported

`--model` is a result of `clex extend` or of `examples/train.py`, or a plain model, which is then
extended by training-free YaRN. `clex export` has the other targets: vLLM and GGUF.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import clex
from clex.data import read_documents
from clex.export import export
from clex.hf.checkpoint import is_checkpoint
from clex.hf.models import assets_folder, load_base

BOOKS = assets_folder() / "books" / "test.jsonl.gz"


def main(arguments: Sequence[str] | None = None) -> float:
    """Export and compare; the largest difference of a log-probability, in nats."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny-llama", help="plain, or a result of clex extend")
    parser.add_argument("--scale", type=float, default=4, help="longest text over the window")
    parser.add_argument("--out", type=Path, required=True, help="new folder for the export")
    args = parser.parse_args(arguments)

    config = None
    if not is_checkpoint(args.model):
        # Without a grid any scale can be held.
        config = clex.ClexConfig(method="yarn", max_scale=args.scale, grid="none")
    # In float32, to see that nothing but rounding differs; "auto" is the type of the checkpoint.
    record = export(
        args.model, args.out, target="hf", scale=args.scale, clex=config, dtype="float32"
    )
    print(f"{record.length:,} tokens at t = {record.scale:g}; the queries: {record.queries}")

    live = clex.extend(load_base(args.model), config) if config else clex.load(args.model)

    # From here on nothing of clex is needed.
    exported = AutoModelForCausalLM.from_pretrained(args.out).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.out)
    text = next(read_documents([BOOKS]))[: 20 * record.length]
    ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][:, : record.length]

    with torch.no_grad(), clex.at_scale(live, record.scale):
        ours = live(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
    with torch.no_grad():
        theirs = exported(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
    difference = float((ours - theirs).abs().max())
    print(f"{ids.shape[1]} tokens, largest difference of a log-probability: {difference:.1e} nats")
    return difference


if __name__ == "__main__":
    main()
