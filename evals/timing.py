"""Take times, and say how they spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import torch


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median and quartiles, as plain data."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else 3 * [values[0]]
    return {"median": middle, "low": low, "high": high}


def now(device: torch.device) -> float:
    """Return wall time; on one CPU thread its processor time, so that other processes do not count."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif torch.get_num_threads() == 1:
        return time.thread_time()
    return time.perf_counter()
