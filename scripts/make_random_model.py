"""A model folder with random weights, to measure speed and memory of `clex extend`.

    python scripts/make_random_model.py llama-1b --out random-1b [--dtype bfloat16]

The tokenizer is the one of tiny-llama: its tokens are some of the model's.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from clex.files import new_folder
from clex.hf.models import load_tokenizer
from clex.shapes import SHAPES, shape


def main() -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    config = shape(args.shape)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, args.dtype))
    with new_folder(args.out) as temporary:
        model.save_pretrained(temporary)
        load_tokenizer("tiny-llama").save_pretrained(temporary)


if __name__ == "__main__":
    main()
