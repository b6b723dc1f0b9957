"""What a conversation loses where its text outgrows the scale of its cache, and what that costs.

    python -m benchmarks.crossings smollm2 --data TEXT --lengths 8192,16384,32768 --out DIR
    python -m benchmarks.crossings tiny-llama --data TEXT --lengths 256,512,1024 --tokens 64 \\
        --out DIR

MODEL is a plain model, extended here by `--method` without training, or a result of `clex extend`.
Real text is fed to it (teacher forcing), and some hundred tokens (`--tokens`) are compared with one
full forward pass over the whole text at its scale. For each pair of neighbouring lengths P, Q:

- path ``jump``: P tokens are in a cache of the scale of P; then t becomes that of Q at once, as
  when a long document is pasted, and the tokens behind P are measured.
- path ``grid``: the text grows from P to Q in turns of P / 16 tokens, with a move at each border
  of the grid of t, and the last tokens before Q are measured.

Policies: ``hold`` (keep the old t), ``rerotate`` (turn the cached keys), ``refill`` (read all
anew). KL is from the full forward pass to the policy, in nats a token; `refill` shows what rounding
makes of it. Seconds are those of the crossing: one move (``jump``) or the whole way from P to Q
(``grid``), reading of the new turns included. `copies` is the time of the move over that of copying
the same numbers once, so 1 would be the speed of memory.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from benchmarks.report import write_result
from benchmarks.timing import Stopwatch, time_calls
from clex.config import ClexConfig
from clex.data import load_tokens, long_enough
from clex.errors import ConfigError
from clex.hf.cache import KeyLayout, key_layouts, move_cache
from clex.hf.checkpoint import base_name, is_checkpoint, load
from clex.hf.extend import at_scale, config_of, extend, scale_for
from clex.hf.models import load_base, load_tokenizer
from clex.hf.session import ON_GROWTH, Session, prefill
from clex.run import choose_device

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Crossing:
    """One document, path and policy.

    Attributes:
        length: tokens P before the crossing.
        until: tokens Q whose scale is that after it.
        kl: nats a token from the full forward pass, mean over the measured tokens.
        agreement: share of measured tokens with the same first choice as the full forward pass.
        nll: mean loss of the measured tokens in nats; `nll_full` that of the full forward pass.
        seconds: see the top of this file.
        copies: time of the move over that of one copy of the same keys (``jump``, ``rerotate``).
        peak_bytes: most GPU memory during the crossing over that before it; 0 on a CPU.
    """

    document: int
    length: int
    until: int
    path: str
    policy: str
    t_from: float
    t_to: float
    kl: float
    agreement: float
    nll: float
    nll_full: float
    seconds: float
    copies: float | None = None
    peak_bytes: int = 0


@torch.no_grad()
def full_logits(model: Any, ids: Tensor, last: int, t: float) -> Tensor:
    """Logits (last, V) at the last tokens of `ids`, by one forward pass without a cache."""
    with at_scale(model, t):
        output = model(input_ids=ids, use_cache=False, logits_to_keep=last)
    logits: Tensor = output.logits[0]
    return logits


@torch.no_grad()
def cached_logits(model: Any, cache: Any, ids: Tensor, t: float) -> Tensor:
    """Logits at `ids`, which follow what is in `cache`; it holds them as well afterwards."""
    with at_scale(model, t):
        output = model(input_ids=ids, past_key_values=cache, use_cache=True)
    logits: Tensor = output.logits[0]
    return logits


def compare(logits: Tensor, full: Tensor, targets: Tensor) -> dict[str, float]:
    """`kl`, `agreement`, `nll` and `nll_full` of a `Crossing`; logits (N, V), targets (N,)."""
    ours, theirs = log_softmax(logits.float(), -1), log_softmax(full.float(), -1)
    return {
        "kl": kl_div(ours, theirs, log_target=True, reduction="batchmean").item(),
        "agreement": (ours.argmax(-1) == theirs.argmax(-1)).float().mean().item(),
        "nll": cross_entropy(logits.float(), targets).item(),
        "nll_full": cross_entropy(full.float(), targets).item(),
    }


def jump(
    model: Any,
    ids: Tensor,
    length: int,
    until: int,
    tokens: int,
    layouts: Sequence[KeyLayout | None],
    chunk: int,
) -> Iterator[dict[str, Any]]:
    """The path ``jump`` of one document; rows for all policies."""
    t_from, t_to = scale_for(model, length), scale_for(model, until)
    device, text = ids.device, ids[:, : length + tokens]
    targets = ids[0, length + 1 : length + tokens + 1]
    full = full_logits(model, text, tokens, t_to)
    start = Session(model, chunk=chunk)
    with at_scale(model, t_from):
        prefill(model, ids[:, :length], start.cache, chunk=chunk)
    for policy in ON_GROWTH:
        cache, watch, copies = copy.deepcopy(start.cache), Stopwatch(device), None
        if policy == "rerotate":
            with watch.running():
                move_cache(model, cache, t_from, t_to, layouts=layouts)
            copies = watch.seconds / copy_seconds(cache, layouts, device)
        elif policy == "refill":
            cache = Session(model).cache
            with watch.running(), at_scale(model, t_to):
                prefill(model, ids[:, :length], cache, chunk=chunk)
        t = t_from if policy == "hold" else t_to
        logits = cached_logits(model, cache, text[:, length:], t)
        yield {
            "path": "jump",
            "policy": policy,
            "t_from": t_from,
            "t_to": t,
            "seconds": watch.seconds,
            "copies": copies,
            "peak_bytes": watch.peak_bytes,
            **compare(logits, full, targets),
        }


def grow(
    model: Any, ids: Tensor, length: int, until: int, tokens: int, chunk: int
) -> Iterator[dict[str, Any]]:
    """The path ``grid`` of one document; rows for all policies."""
    text, targets = ids[:, :until], ids[0, until - tokens + 1 : until + 1]
    full = full_logits(model, text, tokens, scale_for(model, until))
    values, end = ids[0].tolist(), until - tokens
    for policy in ON_GROWTH:
        session, watch = Session(model, on_growth=policy, chunk=chunk), Stopwatch(ids.device)
        session.append(values[:length])
        session.prefill()
        t_from = session.scale
        turns = [values[i : min(i + length // 16, end)] for i in range(length, end, length // 16)]
        with watch.running(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="the text has")  # hold: that is the point
            for turn in turns:
                session.append(turn)
                session.prefill()
        assert session.scale is not None
        # The session keeps its last token unread, for the model to go on from.
        logits = cached_logits(model, session.cache, text[:, end - 1 :], session.scale)[1:]
        yield {
            "path": "grid",
            "policy": policy,
            "t_from": t_from,
            "t_to": session.scale,
            "seconds": watch.seconds,
            "peak_bytes": watch.peak_bytes,
            **compare(logits, full, targets),
        }


def copy_seconds(cache: Any, layouts: Sequence[KeyLayout | None], device: torch.device) -> float:
    """Time to read and write once all that a move turns, as plain copies."""
    parts = []
    for layer, layout in zip(cache.layers, layouts, strict=False):
        if layout is not None:
            tensor = getattr(layer, layout.where)
            parts.append(tensor[..., : layout.rotary_dim].contiguous())
    targets = [torch.empty_like(part) for part in parts]

    def copy_all(_: int) -> None:
        for target, part in zip(targets, parts, strict=True):
            target.copy_(part)

    return time_calls({"copy": copy_all}, device, repeats=5)["copy"].median / 1e3


def load_extended(args: argparse.Namespace) -> tuple[Any, str, str]:
    """The extended model of the arguments, the name of its plain model, and what it is called."""
    device = choose_device(args.device)
    name = "bfloat16" if device.type == "cuda" else "float32"
    dtype = DTYPES[args.dtype or name]
    if is_checkpoint(args.model):
        return load(args.model, dtype=dtype, device=device), base_name(args.model), "trained"
    model: nn.Module = load_base(args.model, dtype=dtype, device=device)
    extend(model, ClexConfig(method=args.method, max_scale=args.max_scale))
    return model, args.model, f"{args.method}, training-free"


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model, in what form, and where."""
    parser.add_argument("model")
    parser.add_argument("--method", default="dynamic_ntk", help="for a plain model")
    parser.add_argument("--max-scale", type=float, default=8.0, help="for a plain model")
    parser.add_argument("--dtype", choices=DTYPES, help="bfloat16 on a GPU, float32 elsewhere")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", required=True, type=Path)


def crossing_table(rows: Sequence[Crossing]) -> str:
    """Markdown: a line for each crossing, path and policy, over all documents."""
    lines = [
        "| crossing | path | policy | t | KL (worst document) | same first choice"
        " | PPL (full pass) | seconds | copies | peak MiB |",
        "| --- | --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for key in dict.fromkeys((r.length, r.until, r.path, r.policy) for r in rows):
        part = [r for r in rows if (r.length, r.until, r.path, r.policy) == key]

        def mean(name: str, part: list[Crossing] = part) -> float:
            return statistics.fmean(getattr(row, name) for row in part)

        ppl, full = (torch.tensor(mean(n)).exp().item() for n in ("nll", "nll_full"))
        copies = [row.copies for row in part if row.copies is not None]
        seconds = statistics.median(row.seconds for row in part)
        lines.append(
            f"| {key[0]:,} to {key[1]:,} | {key[2]} | {key[3]}"
            f" | {part[0].t_from:.3g} to {part[0].t_to:.3g}"
            f" | {mean('kl'):.4f} ({max(r.kl for r in part):.4f}) | {mean('agreement'):.3f}"
            f" | {ppl:.2f} ({full:.2f}) | {seconds:.4f}"
            f" | {f'{statistics.median(copies):.1f}' if copies else ''}"
            f" | {max(r.peak_bytes for r in part) / 2**20:.0f} |"
        )
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> list[Crossing]:
    """Run the benchmark that the arguments describe."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_model_arguments(parser)
    parser.add_argument("--data", required=True)
    parser.add_argument(
        "--lengths",
        type=lambda text: tuple(map(int, text.split(","))),
        default=(8192, 16384, 32768),
    )
    parser.add_argument("--tokens", type=int, default=512, help="measured after each crossing")
    parser.add_argument("--documents", type=int, default=4)
    parser.add_argument("--chunk", type=int, default=2048)
    args = parser.parse_args(arguments)
    console, started = Console(stderr=True, width=160), time.perf_counter()
    model, base, kind = load_extended(args)
    config, device = config_of(model), next(model.parameters()).device
    limit = (config.native_length or 0) * config.max_scale
    if args.lengths[-1] > limit:
        raise ConfigError(f"length {args.lengths[-1]} is above the window of {limit:g} tokens")
    table = load_tokens(args.data, load_tokenizer(base))
    size = args.lengths[-1] + 1
    long_enough(list(table["length"]), size, "the benchmark")
    chosen = [i for i, n in enumerate(table["length"]) if n >= size][: args.documents]
    layouts = key_layouts(model)
    rows: list[Crossing] = []
    # A crossing of the first document that is not counted: the first calls are slow.
    pairs = list(zip(args.lengths, args.lengths[1:], strict=False))
    for number, i in enumerate([chosen[0], *chosen]):
        ids = torch.tensor([table[i]["input_ids"][:size]], device=device)
        for length, until in pairs if number else pairs[:1]:
            found = [
                *jump(model, ids, length, until, args.tokens, layouts, args.chunk),
                *grow(model, ids, length, until, args.tokens, args.chunk),
            ]
            if number:
                rows += [Crossing(document=i, length=length, until=until, **row) for row in found]
        if number:
            console.print(
                f"document {number} of {len(chosen)}: {time.perf_counter() - started:.0f} s"
            )
    text = crossing_table(rows)
    settings = {
        "model": str(args.model),
        "extension": f"{kind}, grid {config.grid}, max_scale {config.max_scale:g}",
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": device.type,
        "documents": len(chosen),
        "tokens": args.tokens,
        "chunk": args.chunk,
        "run_seconds": round(time.perf_counter() - started, 1),
    }
    stem = write_result(args.out, "crossings", settings, rows, text)
    console.print(f"{text}\nwritten: {args.out / stem}.json and .md", soft_wrap=True, markup=False)
    return rows


if __name__ == "__main__":
    main()
