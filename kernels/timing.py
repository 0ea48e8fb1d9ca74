"""Time on a GPU as a server sees it: captured once in a CUDA graph, replayed, with no weight left in the cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

Call = Callable[[], object]
Timer = Callable[[Sequence[Call]], float]
"""Runs equal calls in turn, often enough to be sure, and returns the mean seconds of one."""


def graph_time(calls: Sequence[Call], milliseconds: int = 20) -> float:
    """Return the seconds of one call: the median over ten replays of a CUDA graph that goes round all calls so long."""
    from triton.testing import do_bench_cudagraph

    def round_of_calls() -> None:
        for call in calls:
            call()

    found: float = do_bench_cudagraph(round_of_calls, rep=milliseconds, return_mode="median")
    return found / 1e3 / len(calls)


def copies(nbytes: int) -> int:
    """Return how many equal sets of weights to go round, so that the GPU's second-level cache has none when its turn comes."""
    cache = 1
    if torch.cuda.is_available():
        cache = int(getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "L2_cache_size", 50 << 20))
    return max(2, min(64, -(-4 * cache // max(nbytes, 1))))


def bandwidth(timer: Timer) -> tuple[float, str]:
    """Return bytes per second of the GPU's memory, and the source: its clock and bus, or else what is measured."""
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        clock, width = getattr(properties, "memory_clock_rate", 0), getattr(properties, "memory_bus_width", 0)
        if clock and width:
            return 2e3 * clock * width / 8, "memory clock and bus width"
    return memory_rate(timer, 1 << 28 if on_gpu else 1 << 10, "cuda" if on_gpu else "cpu"), "measured"


def memory_rate(timer: Timer, size: int, device: str) -> float:
    """Measure the bytes per second at which ``size`` integers of 32 bits are read, or copied, whichever is faster."""
    data = [torch.ones(size, dtype=torch.int32, device=device) for _ in range(2)]
    read = data[0].nbytes / timer([part.amax for part in data])
    return max(read, 2 * data[0].nbytes / timer([partial(data[0].copy_, data[1])]))
