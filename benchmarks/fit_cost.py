"""What fitting dynamics costs while the weights stay: a window of each length, and a whole fit.

    python -m benchmarks.fit_cost SmolLM2-135M --out DIR
    python -m benchmarks.fit_cost Llama-3.2-1B --whole 8 --out DIR

`clex.training.train` with a curve for each layer, on random tokens and a shape of
`benchmarks.models` with random weights in bfloat16, as `clex extend --train dynamics` holds them.
A window is a step of one, beside the plain model's reading of as many tokens; ``--whole T`` is a
fit with the default settings up to scale T, from the first of the windows that choose a step to the
result on disk.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import torch
from rich.console import Console

from benchmarks.models import SHAPES, plain_model, random_tokens
from benchmarks.report import Log, common_arguments, measured
from benchmarks.timing import Timing, time_calls
from clex.config import ClexConfig
from clex.hf.extend import extend
from clex.training import TrainConfig, train
from clex.training_log import LOG_FILE


def reading(shape: str, length: int, device: str, repeats: int) -> Timing:
    """The plain model's forward pass over `length` tokens."""
    model, ids = plain_model(shape, device), random_tokens(shape, length, device)

    def read(_: int) -> None:
        with torch.no_grad():
            model(ids, logits_to_keep=1, use_cache=False)

    return time_calls({"": read}, torch.device(device), repeats=repeats, warmup=1)[""]


def fit(shape: str, tokens: datasets.Dataset, device: str, scale: float, **settings: Any) -> Timing:
    """A fit's steps in milliseconds, without the first, or all of it if it has the default ones.

    The memory is the most that the process had, the weights included.
    """
    model = extend(plain_model(shape, device), ClexConfig(max_scale=16, per_layer="curve"))
    config = TrainConfig(depth="dynamics", max_scale=scale, **settings)
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        train(model, tokens, config, folder, console=Console(quiet=True))
        whole = 1e3 * (time.perf_counter() - started)
        lines = (Path(folder) / LOG_FILE).read_text().splitlines()
    ends = [1e3 * json.loads(line)["seconds"] for line in lines]
    peak = torch.cuda.max_memory_allocated() if device != "cpu" else 0
    steps = [after - before for before, after in pairwise(ends)]
    return Timing(steps if settings else [whole], peak)


def main(arguments: Sequence[str] | None = None) -> Log:
    """Run the benchmark that the arguments describe."""
    parser = common_arguments(__doc__.splitlines()[0])
    parser.add_argument("shape", choices=sorted(SHAPES.keys() - {"tiny"}))
    parser.add_argument("--scales", default="1,2,4,8,16")
    parser.add_argument("--whole", type=float, help="a whole fit up to this scale alone")
    args = parser.parse_args(arguments)
    shape = "tiny" if args.small else args.shape
    native = SHAPES[shape]["max_position_embeddings"]
    scales = [args.whole] if args.whole else [float(x) for x in args.scales.split(",")]
    longest = round(1.1 * max(scales) * native)  # windows have a margin
    ids = random_tokens(shape, longest, "cpu")[0].tolist()
    tokens = datasets.Dataset.from_dict({"input_ids": [ids, ids[::-1]], "length": [longest] * 2})
    log = Log("fit_cost", args.out, {"device": args.device, "model": shape})
    if args.whole:
        whole = fit(shape, tokens, args.device, args.whole)
        log.add(measured(f"{shape}, whole fit to {args.whole:g}", {"fit": whole}))
        return log
    for scale in scales:
        length = round(scale * native)
        read = reading(shape, length, args.device, args.repeats)
        steps = fit(
            shape,
            tokens,
            args.device,
            scale,
            min_scale=scale,
            steps=len(read.times) + 1,
            accumulation=1,
            select_windows=0,
        )
        log.add(measured(f"{shape}, {length:,}", {"reading": read, "window": steps}))
    return log


if __name__ == "__main__":
    main()
