"""Temporary: settings of the kernel that turns keys, against a copy, and the host's time."""

from __future__ import annotations

import cProfile
import itertools
import pstats
import sys
import time
from typing import Any

import torch
from transformers import DynamicCache

import clex.kernels.cache_move_triton as kernel
from benchmarks.cache_move import SHAPES, exact_turn, host
from benchmarks.report import relative_error
from benchmarks.timing import copy_bandwidth, time_calls
from clex.hf.cache import key_layouts, move_cache
from clex.kernels.cache_move import turn_keys

# Pairs, heads, warps, programs, eviction.
SETTINGS = [
    (1024, 1, 4, 1024, ""),
    (1024, 1, 4, 8192, ""),
    (1024, 1, 4, 32768, ""),
    (1024, 2, 4, 4096, ""),
    (1024, 2, 4, 8192, ""),
    (1024, 2, 4, 16384, ""),
    (1024, 2, 4, 32768, ""),
    (1024, 4, 4, 8192, ""),
    (1024, 4, 4, 16384, ""),
    (512, 2, 2, 16384, ""),
    (512, 4, 2, 16384, ""),
    (256, 4, 1, 32768, ""),
    (2048, 2, 8, 8192, ""),
    (2048, 1, 4, 8192, ""),
    (1024, 1, 4, 8192, "evict_first"),
    (1024, 2, 4, 8192, "evict_first"),
]
NAMES = ("_PAIRS_AT_ONCE", "_HEADS_AT_ONCE", "_WARPS", "_PROGRAMS", "_EVICT")


@torch.inference_mode()
def main() -> None:
    peak = copy_bandwidth(torch.device("cuda"))
    print(f"copy {peak:.3g} B/s", torch.cuda.get_device_name(), flush=True)
    for name, (layers, heads, size) in SHAPES.items():
        length = int(sys.argv[1]) if len(sys.argv) > 1 else 65536
        keys = [
            torch.randn(1, heads, length, size, device="cuda", dtype=torch.bfloat16)
            for _ in range(layers)
        ]
        delta = -torch.rand(1, size // 2, device="cuda", dtype=torch.float64)
        positions = torch.arange(length, device="cuda", dtype=torch.float64)[None]
        one = torch.ones(1, device="cuda")
        targets = [torch.empty_like(x) for x in keys]
        ways: dict[Any, Any] = {
            "copy": lambda i, t=targets, k=keys: [a.copy_(b) for a, b in zip(t, k, strict=True)]
        }

        def call(
            i: int, setting: Any, keys: Any = keys, rest: Any = (positions, delta, one)
        ) -> None:
            for attribute, value in zip(NAMES, setting, strict=True):
                setattr(kernel, attribute, value)
            turn_keys(keys, 0, *rest, False, 8192)

        for setting in SETTINGS:
            # All of two layers, after a turn of copies, against float64.
            some = [keys[0].clone(), keys[-1].clone()]
            call(0, setting, some)
            off = max(
                relative_error(a, exact_turn(b, delta))
                for a, b in zip(some, (keys[0], keys[-1]), strict=True)
            )
            assert off < 5e-3, (setting, off)
            ways[setting] = lambda i, s=setting: call(i, s)
        timings = time_calls(ways, torch.device("cuda"), most_seconds=40)
        moved = 2 * sum(x.numel() * x.element_size() for x in keys)
        for way, timing in sorted(timings.items(), key=lambda pair: pair[1].median):
            share = moved / (timing.median / 1e3) / peak
            print(
                f"{name} {way}: {timing.median:.4f} ms ({min(timing.times):.4f}), {share:.3f}",
                flush=True,
            )

    for attribute, value in zip(NAMES, SETTINGS[4], strict=True):
        setattr(kernel, attribute, value)
    model = host(30, 3, 64, "cuda")
    layouts = key_layouts(model)
    cache = DynamicCache(config=model.config)
    for layer in range(30):
        small = torch.randn(1, 3, 64, 64, device="cuda", dtype=torch.bfloat16)
        cache.update(small, small.clone(), layer)
    scales = itertools.cycle([(4.0, 8.0), (8.0, 4.0)])
    for _ in range(20):
        move_cache(model, cache, *next(scales), layouts=layouts)
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(200):
        move_cache(model, cache, *next(scales), layouts=layouts)
    print(f"host, 64 keys a layer: {1e3 * (time.perf_counter() - started) / 200:.3f} ms a call")
    torch.cuda.synchronize()
    profile = cProfile.Profile()
    profile.enable()
    for _ in range(200):
        move_cache(model, cache, *next(scales), layouts=layouts)
    profile.disable()
    pstats.Stats(profile).sort_stats("tottime").print_stats(22)
    pstats.Stats(profile).sort_stats("cumtime").print_stats(22)


if __name__ == "__main__":
    main()
