"""How much of each unit (a block, or one linear) goes: uniform, random, and what the literature measures.

Every rule takes a :class:`Budget` and what it needs to know of the units, and returns one sparsity per unit, all
within the budget's bounds and meeting its target; :func:`whole_numbers` turns them into exact counts. All are
deterministic; ``random`` depends on its generator only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from compress.errors import CompressError

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Budget:
    """What an allocation has to meet.

    Attributes:
        sizes: parameters of each unit.
        sparsity: share of zeros over all units.
        floor: least sparsity of a unit.
        cap: largest sparsity of a unit.
    """

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

    Args:
        budget: to meet.
        shape: parameter in [-1, 2] -> wanted sparsity of each unit, not falling; clipped to the bounds here.
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
    """The target plus offsets, all shifted alike so that the mean over parameters is the target."""
    return meet(budget, lambda shift: shift + offsets)


def _between(values: Sequence[float] | Floats, width: float) -> Floats:
    """Values mapped linearly onto 0 .. width; all 0 where they are equal."""
    found = np.asarray(values, np.float64)
    extent = float(found.max() - found.min())
    return (found - found.min()) / extent * width if extent > 0 else np.zeros_like(found)


def uniform(budget: Budget) -> list[float]:
    """The target everywhere."""
    return [budget.sparsity] * len(budget.sizes)


def random(budget: Budget, spread: float, generator: torch.Generator) -> list[float]:
    """Evenly distributed within ``spread`` of the target: what any measured allocation has to beat."""
    draws = torch.rand(len(budget.sizes), generator=generator, dtype=torch.float64).numpy()
    return _around(budget, (2 * draws - 1) * spread)


def atp(budget: Budget, spread: float) -> list[float]:
    """Evenly rising from the first unit to the last, over twice ``spread`` (ATP; its slope is that over L - 1)."""
    return _around(budget, np.linspace(-spread, spread, len(budget.sizes)))


def owl(budget: Budget, outliers: Sequence[float], spread: float) -> list[float]:
    """Blocks with more outliers keep more, over a range of twice ``spread`` (OWL, arXiv 2310.05175; its lambda).

    Args:
        budget: to meet.
        outliers: share of each block's Wanda scores above M times their mean.
        spread: half the distance between the densest and the sparsest block.
    """
    return _around(budget, -_between(outliers, 2 * spread))


def dlp(budget: Budget, medians: Sequence[float], spread: float) -> list[float]:
    """Importance ``1 - median / sum of medians``, mapped like OWL's (DLP; its alpha is ``spread``).

    Args:
        budget: to meet.
        medians: of each block's Wanda scores.
        spread: half the distance between the densest and the sparsest block.
    """
    found = np.asarray(medians, np.float64)
    return _around(budget, -_between(1 - found / (found.sum() or 1.0), 2 * spread))


def alpha(budget: Budget, exponents: Sequence[float], spread: float) -> list[float]:
    """Sparsity proportional to ``1 - spread .. 1 + spread`` by power-law exponent (AlphaPruning, arXiv 2410.10912).

    Args:
        budget: to meet.
        exponents: of each unit's spectrum; a small one (heavy tail, well trained) is pruned less, an infinite one
            like the largest.
        spread: epsilon, a share of the target.
    """
    found = np.asarray(exponents, np.float64)
    most = found[np.isfinite(found)].max(initial=0.0)
    factors = 1 - spread + _between(np.where(np.isfinite(found), found, most), 2 * spread)
    return meet(budget, lambda scale: factors * max(scale, 0.0))


def clusters(budget: Budget, losses: Sequence[float], spread: float, count: int = 4) -> list[float]:
    """Log-level clusters of the estimated losses, one sparsity each (arXiv 2409.20094, section 3; our reading).

    One-dimensional k-means of ``log10(loss)``; the clusters, from the least loss to the largest, stand at equal distances
    from ``+spread`` to ``-spread``, and all are shifted to meet the target.

    Args:
        budget: to meet.
        losses: estimated loss per weight of each unit, not negative.
        spread: half the distance between the first and the last cluster.
        count: number of clusters; fewer where there are fewer distinct losses.
    """
    found = np.asarray(losses, np.float64)
    positive = found[found > 0]
    least = float(positive.min()) if positive.size else 1.0
    rank = _levels(np.log10(np.maximum(found, least * 1e-3)), count)
    most = max(int(rank.max()), 1)
    return _around(budget, spread * (1 - 2 * rank / most))


def _levels(values: Floats, count: int) -> Floats:
    """Optimal one-dimensional k-means by dynamic programming: the cluster (from the smallest) of each value."""
    order = np.argsort(values, kind="stable")
    x = values[order]
    count = min(count, len(np.unique(x)))
    sums, squares = np.concatenate([[0], x.cumsum()]), np.concatenate([[0], (x * x).cumsum()])

    def cost(first: int, end: int) -> float:
        total = float(sums[end] - sums[first])
        return max(float(squares[end] - squares[first]) - total * total / (end - first), 0.0)

    n = len(x)
    best = [0.0] + [cost(0, end) for end in range(1, n + 1)]
    starts: list[list[int]] = [[0] * (n + 1)]
    for used in range(2, count + 1):
        row, start = [np.inf] * (n + 1), [0] * (n + 1)
        for end in range(used, n + 1):
            row[end], start[end] = min((best[first] + cost(first, end), first) for first in range(used - 1, end))
        best = row
        starts.append(start)
    ranks, end = np.zeros(n), n
    for cluster in range(count - 1, -1, -1):
        first = starts[cluster][end]
        ranks[order[first:end]] = cluster
        end = first
    return ranks


def whole_numbers(budget: Budget, sparsities: Sequence[float]) -> list[int]:
    """Zeros of each unit: the shares rounded so that their sum is the target, rounded to a whole weight.

    Rounding is cumulative: the first l units together have as many zeros as their shares, to within half a weight; the
    last takes what is left.
    """
    exact = np.cumsum(np.asarray(sparsities) * np.asarray(budget.sizes, np.float64))
    edges = [0, *(int(value + 0.5) for value in exact[:-1]), round(budget.sparsity * sum(budget.sizes))]
    return [after - before for before, after in pairwise(edges)]
