"""A longer window in Python: extend a model, read and write past its window, save and load.

    python examples/extend.py --out extended
    python examples/extend.py --model your/model --text book.txt --max-scale 8 --out extended

Nothing is trained here: the frequencies are the closed-form start, which `examples/train.py` goes
on from. With the bundled tiny-llama (window 256) this takes a few seconds.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import clex
from clex.data import read_documents
from clex.hf.extend import scale_for
from clex.hf.models import assets_folder, load_base, load_tokenizer

BOOKS = assets_folder() / "books" / "test.jsonl.gz"


def nats(model: Any, ids: torch.Tensor, last: int) -> float:
    """Mean loss of the last `last` tokens of a text (1, T), in nats a token."""
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0, -last - 1 : -1]
    return torch.nn.functional.cross_entropy(logits.float(), ids[0, -last:]).item()


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Extend, compare, generate, save, load; the losses by name."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny-llama", help="folder, hub id or bundled name")
    parser.add_argument("--text", type=Path, default=BOOKS, help="file with a long text")
    parser.add_argument("--max-scale", type=float, default=8, help="longest text over the window")
    parser.add_argument("--out", type=Path, required=True, help="folder for the extended model")
    args = parser.parse_args(arguments)

    model, tokenizer = load_base(args.model), load_tokenizer(args.model)
    native = model.config.max_position_embeddings
    text = next(read_documents([args.text]))
    ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"]
    long, short, scored = ids[:, : 4 * native], ids[:, :native], native // 2

    plain = {"plain, window": nats(model, short, scored), "plain, 4x": nats(model, long, scored)}

    # The extension replaces the rotary module of this one instance.
    clex.extend(model, clex.ClexConfig(max_scale=args.max_scale))
    losses = {
        **plain,
        "extended, window": nats(model, short, scored),
        "extended, 4x": nats(model, long, scored),
    }
    for name, loss in losses.items():
        print(f"{name:20} {loss:.4f} nats a token")
    print(f"a text of {long.shape[1]} tokens is read at t = {scale_for(model, long.shape[1]):g}")

    # One t for the whole text, prompt and answer, is chosen by `generate`.
    prompt = long[:, : 2 * native]
    answer = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, do_sample=False
    )
    print("it goes on:", tokenizer.decode(answer[0, prompt.shape[1] :]))

    # A frozen model needs a few kilobytes; `load` takes the weights from the base model.
    clex.save(model, args.out, weights="none", base_model=args.model, tokenizer=tokenizer)
    again = clex.load(args.out)
    losses["loaded, 4x"] = nats(again, long, scored)
    print(f"saved to {args.out}; loaded again: {losses['loaded, 4x']:.4f} nats a token")
    return losses


if __name__ == "__main__":
    main()
