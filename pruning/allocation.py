"""Divide sparsity over units (blocks, or single linears): uniformly, at random, and by what the literature measures.

Every rule takes a :class:`Budget` and one value per unit, and returns one sparsity per unit, all within the budget's bounds
and meeting its target; :func:`whole_numbers` turns them into exact counts. ``spread`` is half the distance between the
densest and the sparsest unit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compress.errors import CompressError
from compress.quant.kmeans import nested_codebooks

Floats = NDArray[np.float64]
_BINS = 100  # of the histogram of a spectrum


@dataclass(frozen=True)
class Budget:
    """Hold what an allocation has to meet: parameters of each unit, share of zeros over all units, and each unit's bounds."""

    sizes: Sequence[int]
    sparsity: float
    floor: float = 0.0
    cap: float = 1.0

    def __post_init__(self) -> None:
        if not self.floor <= self.sparsity <= self.cap:
            raise CompressError(
                f"sparsity {self.sparsity:g} is not between floor {self.floor:g} and cap {self.cap:g} of every block; "
                "change one of them."
            )


def meet(budget: Budget, shape: Callable[[float], Floats]) -> list[float]:
    """Solve for the one parameter of a family of allocations so that the target is met.

    ``shape`` maps a parameter in [-1, 2] to the wanted sparsity of each unit, not falling; it is clipped to the bounds here.
    """
    sizes = np.asarray(budget.sizes, np.float64)
    target = budget.sparsity * sizes.sum()

    def at(value: float) -> Floats:
        return np.clip(shape(value), budget.floor, budget.cap)

    low, high = -1.0, 2.0
    for _ in range(100):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if float(sizes @ at(middle)) < target else (low, middle)
    return [float(value) for value in at(high)]


def _around(budget: Budget, offsets: Floats) -> list[float]:
    """Add offsets to the target, all shifted alike so that the mean over parameters is the target."""
    return meet(budget, lambda shift: shift + offsets)


def _between(values: Sequence[float] | Floats, top: float) -> Floats:
    """Map values linearly onto 0 .. top; all to 0 where they are equal."""
    found = np.asarray(values, np.float64)
    extent = float(np.ptp(found))
    return (found - found.min()) / extent * top if extent > 0 else np.zeros_like(found)


def uniform(budget: Budget) -> list[float]:
    """Give every unit the target."""
    return [budget.sparsity] * len(budget.sizes)


def random(budget: Budget, spread: float, generator: torch.Generator) -> list[float]:
    """Draw sparsities evenly within ``spread`` of the target: the control of all measured allocations."""
    draws = torch.rand(len(budget.sizes), generator=generator, dtype=torch.float64).numpy()
    return _around(budget, (2 * draws - 1) * spread)


def atp(budget: Budget, spread: float) -> list[float]:
    """Raise sparsity evenly from the first unit to the last, over twice ``spread`` (ATP; its slope is that over L - 1)."""
    return _around(budget, np.linspace(-spread, spread, len(budget.sizes)))


def owl(budget: Budget, outliers: Sequence[float], spread: float) -> list[float]:
    """Keep more of blocks with more outliers (OWL, arXiv 2310.05175; ``spread`` is its lambda).

    ``outliers`` is the share of each block's Wanda scores above M times their mean (:func:`compress.pruning.mrp.outlier_share`).
    """
    return _around(budget, -_between(outliers, 2 * spread))


def dlp(budget: Budget, medians: Sequence[float], spread: float) -> list[float]:
    """Keep more of blocks with a larger importance, ``1 - median / sum of medians`` of Wanda scores (DLP; ``spread`` is its alpha)."""
    found = np.asarray(medians, np.float64)
    return _around(budget, -_between(1 - found / (found.sum() or 1.0), 2 * spread))


def alpha(budget: Budget, exponents: Sequence[float], spread: float) -> list[float]:
    """Scale the target by ``1 - spread .. 1 + spread`` by power-law exponent (AlphaPruning, arXiv 2410.10912; its epsilon).

    A unit with a small exponent (heavy tail, well trained) is pruned less, one with an infinite exponent like the largest.
    """
    found = np.asarray(exponents, np.float64)
    most = found[np.isfinite(found)].max(initial=0.0)
    factors = 1 - spread + _between(np.where(np.isfinite(found), found, most), 2 * spread)
    return meet(budget, lambda scale: factors * max(scale, 0.0))


def exponent(weight: Tensor) -> float:
    """Fit the power-law exponent of the tail of the eigenvalues of ``W^T W``, by which AlphaPruning judges a matrix.

    ``alpha = 1 + n / sum ln(x_i / x_min)`` over the n eigenvalues from x_min on. Among those up to 1.5 times the peak of
    the histogram of ``log10 x`` (100 bins), x_min is the one whose fit has the least Kolmogorov-Smirnov distance. The
    original also has a lower bound, but compares a logarithm with a value there, so that it does not bind. The exponent of
    a matrix [N, K] without two distinct eigenvalues is infinite (nothing tells it from noise).
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


def clusters(budget: Budget, losses: Sequence[float], spread: float) -> list[float]:
    """Cluster units by the logarithm of their estimated loss per weight (arXiv 2409.20094, section 3; our reading).

    One-dimensional k-means makes 4 clusters, or as many as there are distinct losses. From the least loss to the largest
    they stand at equal distances from ``+spread`` to ``-spread``, and all are shifted to meet the target.
    """
    found = np.asarray(losses, np.float64)
    positive = found[found > 0]
    least = float(positive.min()) if positive.size else 1.0
    logs = np.log10(np.maximum(found, least * 1e-3)).astype(np.float32)
    rank = nested_codebooks(logs[None], None, 2, 2).codes[0].numpy()
    most = max(int(rank.max()), 1)
    return _around(budget, spread * (1 - 2 * rank / most))


def whole_numbers(budget: Budget, sparsities: Sequence[float]) -> list[int]:
    """Round sparsities to numbers of zeros whose sum is the target, rounded to a whole weight.

    Rounding is cumulative: the first l units together are right to within half a weight; the last takes what is left.
    """
    exact = np.cumsum(np.asarray(sparsities) * np.asarray(budget.sizes, np.float64))
    edges = [0, *(int(value + 0.5) for value in exact[:-1]), round(budget.sparsity * sum(budget.sizes))]
    return [after - before for before, after in pairwise(edges)]
