"""Time on a GPU as a server sees it: captured once in a CUDA graph, replayed, with no weight left in the cache."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

Call = Callable[[], object]


class Timer(Protocol):
    """Seconds that one of several equal calls takes."""

    def __call__(self, calls: Sequence[Call]) -> float:
        """Run every call in turn, often enough to be sure; the mean of a call."""
        ...


class GraphTimer:
    """Replays of a CUDA graph that holds every call once; the median over the replays.

    Args:
        replays: how many are timed.
        warm: calls before the capture, which compile what has to be compiled.
    """

    def __init__(self, replays: int = 20, warm: int = 2) -> None:
        self.replays, self.warm = replays, warm

    def __call__(self, calls: Sequence[Call]) -> float:
        """Seconds per call."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(self.warm):
                for call in calls:
                    call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        graph.replay()
        seconds: list[float] = []
        for _ in range(self.replays):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            seconds.append(begin.elapsed_time(end) / 1000 / len(calls))
        return statistics.median(seconds)


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
