"""The exponent of a weight matrix's spectrum, by which AlphaPruning (arXiv 2410.10912) judges it."""

from __future__ import annotations

import torch
from torch import Tensor

_BINS = 100


def exponent(weight: Tensor) -> float:
    """Power-law exponent of the tail of the eigenvalues of ``W^T W``.

    ``alpha = 1 + n / sum ln(x_i / x_min)`` over the n eigenvalues from x_min on. Among those up to 1.5 times the peak of
    the histogram of ``log10 x`` (100 bins), x_min is the one whose fit has the least Kolmogorov-Smirnov distance. The
    original also has a lower bound, but compares a logarithm with a value there, so that it does not bind.

    Args:
        weight: float32 [N, K].

    Returns:
        The exponent; infinite for a matrix without two distinct eigenvalues (nothing to tell it from noise).
    """
    small = weight if weight.shape[0] <= weight.shape[1] else weight.t()
    x = torch.linalg.eigvalsh(small.double() @ small.double().t())
    x = x[x > float(x[-1]) * 1e-12]
    if x.numel() < 2 or float(x[0]) == float(x[-1]):
        return float("inf")
    logs = x.log10()
    low, high = float(logs[0]), float(logs[-1])
    peak = int(torch.histc(logs, _BINS, low, high).argmax())
    largest = 1.5 * 10 ** (low + peak * (high - low) / _BINS)
    best = (float("inf"), float("inf"))
    for first in range(x.numel() - 1):
        if first and float(x[first]) > largest:
            break
        tail = x[first:]
        slope = float((tail / tail[0]).log().mean())
        if slope > 0:
            found = 1 + 1 / slope
            fitted = 1 - (tail / tail[0]) ** (1 - found)
            steps = torch.arange(tail.numel(), dtype=torch.float64, device=x.device) / tail.numel()
            best = min(best, (float((fitted - steps).abs().max()), found))
    return best[1]
