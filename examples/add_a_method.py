"""A scaling method of your own, in a file of your own, against YaRN and the plain model.

    python examples/add_a_method.py
    python examples/add_a_method.py --model your/model --data books/

Importing this file is all it takes: `clex.ClexConfig(method="bent")` is known from then on, as a
method of its own, and as the base curve of learned dynamics (`base="bent"`). What a method may
use and must keep is in docs/adding_a_method.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from torch import Tensor

from clex import ClexConfig, RopeSpec, Scaling, register_scaling
from clex.data import load_tokens
from clex.evaluation.perplexity import PerplexityPlan, Row, evaluate_methods
from clex.evaluation.report import tables
from clex.hf.models import assets_folder, load_base, load_tokenizer

BOOKS = assets_folder() / "books" / "test.jsonl.gz"


@dataclass(frozen=True)
class BentOptions:
    """`power` bends the ramp: below 1 more dimensions are slowed, above 1 fewer."""

    power: float = 0.5


@register_scaling("bent")
class Bent(Scaling):
    """f_i / t**(s_i**power): the fastest dimension (s = 0) stays, the slowest is divided by t."""

    source = "examples/add_a_method.py"
    Options = BentOptions
    default_temperature = "log_n"
    share: Tensor

    def __init__(self, spec: RopeSpec, config: ClexConfig) -> None:
        super().__init__(spec, config)
        # A buffer, so that it follows the model to its device.
        self.register_buffer("share", spec.slope() ** self.options.power, persistent=False)

    def ratio(self, t: Tensor) -> Tensor:
        """f(t) / f(1), (B, F), for scales t (B,)."""
        return t[:, None] ** -self.share

    def rate(self, t: Tensor) -> Tensor:
        """-d ln f / d ln t, (B, F); only needed by those who learn around it."""
        return self.share.expand(len(t), -1)


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Measure the new method beside two others; the rows of the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny-llama", help="folder, hub id or bundled name")
    parser.add_argument("--data", default=BOOKS, help="text files, a folder, or a dataset id")
    parser.add_argument("--max-scale", type=float, default=4)
    parser.add_argument("--documents", type=int, default=2)
    args = parser.parse_args(arguments)

    model, tokenizer = load_base(args.model), load_tokenizer(args.model)
    tokens = load_tokens(args.data, tokenizer)
    native, scale = model.config.max_position_embeddings, args.max_scale
    plan = PerplexityPlan.for_model(native, scale, documents=args.documents)
    console = Console(stderr=True)
    rows = evaluate_methods(
        model,
        tokens,
        plan,
        {
            "the model as it is": None,
            "yarn": ClexConfig(method="yarn", max_scale=scale),
            "bent": ClexConfig(method="bent", max_scale=scale),
            "bent, power 0.25": ClexConfig(method="bent", max_scale=scale, options={"power": 0.25}),
        },
        console,
    )
    for table in tables(rows, native):
        console.print(table)
    return rows


if __name__ == "__main__":
    main()
