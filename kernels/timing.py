"""Time on a GPU as a server sees it: captured once in a CUDA graph, replayed, with no weight left in the cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

Call = Callable[[], object]


class Timer(Protocol):
    """Seconds that one of several equal calls takes."""

    def __call__(self, calls: Sequence[Call]) -> float:
        """Run every call in turn, often enough to be sure; the mean of a call."""
        ...


def graph_time(calls: Sequence[Call]) -> float:
    """Return the seconds of one call: the median over replays of a CUDA graph that goes round all calls."""
    from triton.testing import do_bench_cudagraph

    def round_of_calls() -> None:
        for call in calls:
            call()

    milliseconds: float = do_bench_cudagraph(round_of_calls, return_mode="median")
    return milliseconds / 1e3 / len(calls)


def copies(nbytes: int, cache: int, limit: int = 64) -> int:
    """How many equal sets of weights to go round, so that none is in a cache of so many bytes when its turn comes."""
    return max(2, min(limit, -(-4 * cache // max(nbytes, 1))))


def cache_bytes() -> int:
    """The second-level cache of the current GPU; 1 where there is none."""
    if not torch.cuda.is_available():
        return 1
    return int(getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "L2_cache_size", 50 << 20))


def bandwidth(timer: Timer) -> tuple[float, str]:
    """Bytes per second of the GPU's memory, and where the number is from: its clock and bus, or else a measured read."""
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        clock, width = getattr(properties, "memory_clock_rate", 0), getattr(properties, "memory_bus_width", 0)
        if clock and width:
            return 2e3 * clock * width / 8, "memory clock and bus width"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = 1 << 28 if device == "cuda" else 1 << 10
    data = [torch.ones(size, dtype=torch.int32, device=device) for _ in range(2)]
    return data[0].nbytes / timer([lambda part=part: part.amax() for part in data]), "measured read"  # type: ignore[misc]
