"""Moving a key cache to a new scale, against one copy of the same keys.

    python -m benchmarks.cache_move --out DIR

Random keys in the shape of SmolLM2-135M and of Llama-3.2-1B. ``turn`` is the kernel alone;
``move_cache`` is all of it, with the frequencies of both scales solved anew.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from benchmarks.report import Log, common_arguments, measured, relative_error
from benchmarks.timing import copy_bandwidth, time_calls
from clex.config import ClexConfig
from clex.hf.cache import key_layouts, move_cache
from clex.hf.extend import extend
from clex.kernels.cache_move import turn_keys

# Layers, heads of keys and their size.
SHAPES = {"SmolLM2-135M": (30, 3, 64), "Llama-3.2-1B": (16, 8, 64)}


def host(layers: int, heads: int, size: int, device: str) -> Any:
    """A model with nothing but the wanted cache: one query head for each of the keys."""
    config = LlamaConfig(
        hidden_size=heads * size,
        intermediate_size=16,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=16,
        max_position_embeddings=8192,
    )
    return extend(LlamaForCausalLM(config).to(device, torch.bfloat16), ClexConfig(max_scale=16))


def exact_turn(keys: Tensor, delta: Tensor) -> Tensor:
    """Half-split keys turned by position * delta, in float64."""
    angle = torch.arange(keys.shape[2], device=keys.device).double()[:, None] * delta
    cos, sin, half = angle.cos(), angle.sin(), keys.shape[-1] // 2
    a, b = keys.double()[..., :half], keys.double()[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


@torch.inference_mode()
def run_case(log: Log, name: str, length: int, device: str, repeats: int, peak: float) -> None:
    """Kernel, whole move and copy, of a cache of `length` tokens."""
    layers, heads, size = SHAPES[name]
    keys = [
        torch.randn(1, heads, length, size, device=device, dtype=torch.bfloat16)
        for _ in range(layers)
    ]
    delta = -torch.rand(1, size // 2, device=device, dtype=torch.float64)
    positions = torch.arange(length, device=device, dtype=torch.float64)[None]
    one = torch.ones(1, device=device)
    turned = keys[0].clone()
    turn_keys([turned], 0, positions, delta, one, False, 8192)
    error = relative_error(turned, exact_turn(keys[0], delta))
    if not error < 5e-3:
        raise AssertionError(f"keys are off by {error:.2g}")

    model = host(layers, heads, size, device)
    layouts = key_layouts(model)
    cache = DynamicCache(config=model.config)
    for layer, tensor in enumerate(keys):
        cache.update(tensor, tensor.clone(), layer)
    scales = itertools.cycle([(4.0, 8.0), (8.0, 4.0)])
    targets = [torch.empty_like(tensor) for tensor in keys]
    ways = {
        "copy": lambda i: [a.copy_(b) for a, b in zip(targets, keys, strict=True)],
        "turn": lambda i: turn_keys(keys, 0, positions, delta, one, False, 8192),
        "move_cache": lambda i: move_cache(model, cache, *next(scales), layouts=layouts),
    }
    timings = time_calls(ways, torch.device(device), repeats=repeats)
    moved = 2 * sum(tensor.numel() * tensor.element_size() for tensor in keys)
    more = {
        way: {"of copy bandwidth": moved / (timing.median / 1e3) / peak}
        for way, timing in timings.items()
    }
    more["turn"]["error"] = error
    log.add(measured(f"{name}, {length:,}", timings, more))


def main(arguments: Sequence[str] | None = None) -> Log:
    """Run the benchmark that the arguments describe."""
    parser = common_arguments(__doc__.splitlines()[0])
    parser.add_argument("--lengths", default="65536")
    args = parser.parse_args(arguments)
    lengths = [64] if args.small else [int(x) for x in args.lengths.split(",")]
    log = Log("cache_move", args.out, {"device": args.device, "dtype": "bfloat16"})
    peak = copy_bandwidth(torch.device(args.device), 16 if args.small else 1024)
    log.settings["copy_bytes_per_second"] = f"{peak:.3g}"
    for length in lengths:
        for name in SHAPES:
            run_case(log, name, length, args.device, args.repeats, peak)
    return log


if __name__ == "__main__":
    main()
