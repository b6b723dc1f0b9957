"""Speed of decoding of an extended model against the plain one, at several lengths of context.

    python -m benchmarks.decoding smollm2 --contexts 2048,16384,65536 --out DIR
    python -m benchmarks.decoding smollm2 --contexts 2048,16384,65536 --cache static --compile \\
        --out DIR
    python -m benchmarks.decoding Llama-3.2-1B --contexts 65536 --cache static --graph --out DIR

MODEL may also be a shape of `benchmarks.models`, with random weights. Both models have the same
weights, the same kind of cache and the same random tokens. For each context the cache is filled
once; then `--tokens` single tokens are decoded again and again, the two models in turn, so that a
change in the state of the machine meets both. ``--graph`` records one step as a CUDA graph and
replays it, for both. The plain model is measured beyond its window as well: what it says there is
of no use, but takes as long. The extended one decodes at the scale of context + tokens, held as
`generate` does. Only forward passes are timed, not sampling.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import DynamicCache, StaticCache

from benchmarks.crossings import add_model_arguments, load_extended
from benchmarks.models import SHAPES, pair
from benchmarks.report import write_result
from benchmarks.timing import Stopwatch, graphed
from clex.hf.extend import at_scale, config_of, restore, scale_for
from clex.hf.session import prefill
from clex.run import choose_device

MODELS = ("plain", "extended")


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """One model at one length of context.

    Attributes:
        context: tokens in the cache when decoding starts.
        model: ``plain`` or ``extended``.
        tokens_per_second: of each repetition.
        share: median of the ratios to the plain model, repetition by repetition; 1 is as fast.
        peak_bytes: most GPU memory while decoding; 0 on a CPU.
    """

    context: int
    model: str
    tokens_per_second: list[float]
    share: float
    peak_bytes: int


class Decoder:
    """A model with a filled cache, ready to decode from the same place again and again."""

    def __init__(
        self,
        model: Any,
        forward: Callable[..., Any],
        held: AbstractContextManager[None],
        ids: Tensor,
        tokens: int,
        static: bool,
        chunk: int,
    ) -> None:
        self.model, self.forward, self.held = model, forward, held
        self.context, self.tokens = ids.shape[1], tokens
        self.device, self.token = ids.device, ids[:, :1].clone()
        if static:
            self.cache: Any = StaticCache(config=model.config, max_cache_len=ids.shape[1] + tokens)
        else:
            self.cache = DynamicCache(config=model.config)
        # The scale is held over all repetitions, as it is over all tokens of one `generate`.
        self.held.__enter__()
        prefill(model, ids, self.cache, chunk=chunk)
        self.peak_bytes = 0
        self.step = self._step

    def _step(self, position: Tensor) -> None:
        self.forward(
            input_ids=self.token,
            position_ids=position[None],
            past_key_values=self.cache,
            use_cache=True,
        )

    @torch.no_grad()
    def record(self) -> None:
        """Replace the step by a CUDA graph of itself."""
        position = torch.full((1,), self.context, device=self.device)
        replay = graphed(lambda _: self._step(position))
        self._forget()

        def step(wanted: Tensor) -> None:
            position.copy_(wanted)
            replay(0)

        self.step = step

    @torch.no_grad()
    def run(self) -> float:
        """Decode, forget what was decoded, and return the tokens per second."""
        watch = Stopwatch(self.device)
        positions = torch.arange(self.context, self.context + self.tokens, device=self.device)
        with watch.running():
            for position in positions.split(1):
                self.step(position)
        self.peak_bytes = max(self.peak_bytes, watch.peak_bytes)
        self._forget()
        return self.tokens / watch.seconds

    def _forget(self) -> None:
        for layer in self.cache.layers:
            if layer.is_sliding:
                continue  # it keeps its size, and takes as long whatever it holds
            if isinstance(self.cache, StaticCache):
                layer.cumulative_length.fill_(self.context)
            else:
                layer.crop(-self.tokens)


def measure(
    pair: dict[str, Any], scale: float, ids: Tensor, args: argparse.Namespace
) -> list[Decoding]:
    """Rows of both models for the context `ids` (1, T)."""
    decoders = {}
    for name, model in pair.items():
        forward = model.forward
        if args.compile:
            forward = torch.compile(forward, mode=args.compile_mode, backend=args.backend)
        held = at_scale(model, scale) if name == "extended" else nullcontext()
        decoders[name] = Decoder(
            model, forward, held, ids, args.tokens, args.cache == "static", args.chunk
        )
        if args.graph:
            decoders[name].record()
    speeds: dict[str, list[float]] = {name: [] for name in MODELS}
    for repetition in range(args.repeats + args.warmup):
        # The one that goes first changes, so that being second is no advantage.
        for name in MODELS if repetition % 2 else MODELS[::-1]:
            speed = decoders[name].run()
            if repetition >= args.warmup:
                speeds[name].append(speed)
    for decoder in decoders.values():
        decoder.held.__exit__(None, None, None)
    pairs = list(zip(speeds["extended"], speeds["plain"], strict=True))
    shares = {"plain": 1.0, "extended": statistics.median(a / b for a, b in pairs)}
    return [
        Decoding(
            context=ids.shape[1],
            model=name,
            tokens_per_second=speeds[name],
            share=shares[name],
            peak_bytes=decoders[name].peak_bytes,
        )
        for name in MODELS
    ]


def decoding_table(rows: Sequence[Decoding]) -> str:
    """Markdown: a line for each context."""
    lines = [
        "| context | plain, tokens/s (range) | extended, tokens/s (range) | share (median) |",
        "| ---: | ---: | ---: | ---: |",
    ]
    for plain, extended in zip(rows[::2], rows[1::2], strict=True):
        cells = [
            f"{statistics.median(row.tokens_per_second):.1f}"
            f" ({min(row.tokens_per_second):.1f} to {max(row.tokens_per_second):.1f})"
            for row in (plain, extended)
        ]
        lines.append(f"| {plain.context:,} | {' | '.join(cells)} | {extended.share:.3f} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> list[Decoding]:
    """Run the benchmark that the arguments describe."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_model_arguments(parser)
    parser.add_argument(
        "--contexts", type=lambda t: tuple(map(int, t.split(","))), default=(2048, 16384, 65536)
    )
    parser.add_argument("--tokens", type=int, default=64, help="decoded in each repetition")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--cache", choices=("dynamic", "static"), default="dynamic")
    parser.add_argument("--compile", action="store_true", help="torch.compile the decoding step")
    parser.add_argument("--graph", action="store_true", help="CUDA graph of a step; static cache")
    parser.add_argument("--compile-mode", default=None, help="reduce-overhead: CUDA graphs")
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--chunk", type=int, default=2048)
    args = parser.parse_args(arguments)
    console, started = Console(stderr=True, width=120), time.perf_counter()
    if args.model in SHAPES:
        kind = "random weights"
        plain, extended = pair(args.model, choose_device(args.device).type, args.max_scale)
    else:
        extended, _, kind = load_extended(args)
        plain = restore(copy.deepcopy(extended))
    device = next(extended.parameters()).device
    generator = torch.Generator().manual_seed(0)
    vocabulary = extended.config.get_text_config().vocab_size
    rows: list[Decoding] = []
    settings: dict[str, Any] = {
        "model": str(args.model),
        "extension": f"{kind}, max_scale {config_of(extended).max_scale:g}",
        "dtype": str(extended.dtype).removeprefix("torch."),
        "device": device.type,
        "tokens": args.tokens,
        "repeats": args.repeats,
        "cache": args.cache,
        "graph": args.graph,
        "compiled": f"{args.backend}, {args.compile_mode or 'default'}" if args.compile else "no",
    }
    form = "-compiled" * args.compile + "-graph" * args.graph
    name = f"decoding-{args.cache}{form}"
    for context in args.contexts:
        ids = torch.randint(vocabulary, (1, context), generator=generator).to(device)
        scale = scale_for(extended, context + args.tokens)
        rows += measure({"plain": plain, "extended": extended}, scale, ids, args)
        torch.compiler.reset()
        settings["run_seconds"] = round(time.perf_counter() - started, 1)
        # After each context: borrowed machines may not wait for the last one.
        text = decoding_table(rows)
        stem = write_result(args.out, name, settings, rows, text)
        console.print(f"context {context:,}: {settings['run_seconds']:.0f} s")
    console.print(f"{text}\nwritten: {args.out / stem}.json and .md", soft_wrap=True, markup=False)
    return rows


if __name__ == "__main__":
    main()
