"""Timing, in one way for all benchmarks."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

Call = Callable[[int], object]


class Stopwatch:
    """Seconds and peak memory of a block, to the end of its work on the device."""

    seconds = 0.0
    peak_bytes = 0

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @contextmanager
    def running(self) -> Iterator[None]:
        """Time the block; the device is waited for at both ends."""
        on_gpu, before = self.device.type == "cuda", 0
        if on_gpu:
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
        started = time.perf_counter()
        yield
        if on_gpu:
            torch.cuda.synchronize(self.device)
            self.peak_bytes = torch.cuda.max_memory_allocated(self.device) - before
        self.seconds += time.perf_counter() - started


@dataclass(frozen=True)
class Timing:
    """Times of one call, in milliseconds, and the most memory it took beyond what was there."""

    times: list[float]
    peak_bytes: int = 0

    @property
    def median(self) -> float:
        return statistics.median(self.times)

    def ratio_to(self, other: Timing) -> float:
        """Median of the ratios, repetition by repetition, of these times to the other's."""
        return statistics.median(a / b for a, b in zip(self.times, other.times, strict=True))


def time_calls(
    calls: Mapping[str, Call],
    device: torch.device,
    *,
    repeats: int = 15,
    warmup: int = 3,
    at_least_ms: float = 2.0,
    most_seconds: float = 20.0,
) -> dict[str, Timing]:
    """Time several calls in turn, so that a change in the state of the machine meets them all.

    Args:
        calls: each takes a number that rises with every call, to rotate its inputs by: what is
            read again at once comes from a cache.
        repeats: times of each that count, in turn; every other round goes backwards.
        warmup: rounds before them.
        at_least_ms: a time is that of as many calls as take about this long, divided by them, so
            that short kernels are timed as a queue and not with the start of the first.
        most_seconds: with slow calls there are fewer repeats, at least 5, to stay within it.
    """
    counter = 0

    def run(call: Call, times: int) -> float:
        nonlocal counter
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize(device)
            begin.record()
        started = time.perf_counter()
        for _ in range(times):
            call(counter)
            counter += 1
        if device.type != "cuda":
            return 1e3 * (time.perf_counter() - started) / times
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / times

    batch, total = {}, 0.0
    for name, call in calls.items():
        for _ in range(warmup):
            once = run(call, 1)
        batch[name] = max(1, min(200, round(at_least_ms / max(once, 1e-3))))
        total += once * batch[name]
    repeats = max(5, min(repeats, int(1e3 * most_seconds / total)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for repetition in range(repeats):
        for name in list(calls) if repetition % 2 else list(calls)[::-1]:
            times[name].append(run(calls[name], batch[name]))
    peaks = {}
    for name, call in calls.items():
        watch = Stopwatch(device)
        with watch.running():
            call(counter)
        peaks[name] = watch.peak_bytes
    return {name: Timing(times[name], peaks[name]) for name in calls}


def graphed(call: Call, inputs: int = 1) -> Call:
    """The call as CUDA graphs, one for each of its inputs: device time without the host's."""
    graphs = []
    for i in range(inputs):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call(i)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call(i)
        graphs.append(graph)
    return lambda i: graphs[i % inputs].replay()


def copy_bandwidth(device: torch.device, megabytes: int = 1024) -> float:
    """Bytes read and written per second by a large copy on the device."""
    source = torch.empty(megabytes * 2**20, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    found = time_calls({"copy": lambda i: target.copy_(source)}, device)["copy"]
    return 2 * source.numel() / (found.median / 1e3)
