"""Maximum Redundancy Pruning (arXiv 2503.18377): again and again, a little more of the most redundant block.

Redundancy is the non-outlier ratio (NOR) of a block: the share of its scores that are not above M times their mean. It is
measured on the sparse block. Two readings of that are here: ``survivors`` keeps the threshold of the dense block and
takes the ratio over the weights that are left; ``all`` takes both over all entries of the sparse block, zeros
included. The first falls as a block gets sparser, at any sparsity, so that the search equalises it over the blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from compress.pruning.allocation import Budget
from compress.pruning.scores import levels, row_chunks
from compress.pruning.settings import Group, Ratio

_NARROW = 1e-9


def outlier_share(scores: Iterable[Tensor], outlier: float) -> float:
    """Return the share of a block's scores above ``outlier`` times their mean (OWL's measure)."""
    held = list(scores)
    threshold = outlier * _mean(held)
    return sum(int((score > threshold).sum()) for score in held) / sum(score.numel() for score in held)


def _mean(scores: Sequence[Tensor]) -> float:
    return sum(float(score.sum(dtype=torch.float64)) for score in scores) / sum(score.numel() for score in scores)


def non_outlier_ratio(
    scores: Mapping[str, Tensor], pruned: Mapping[str, Tensor] | None, outlier: float, ratio: Ratio
) -> float:
    """Return the NOR of a block, in [0, 1]; 1 where nothing is left.

    ``scores``, [N, K] by linear, are those of the dense block; ``pruned``, bool alike, is None for the dense block itself;
    ``outlier`` is M.
    """
    dense = list(scores.values())
    if ratio == "all":
        kept = [score[~pruned[name]] for name, score in scores.items()] if pruned else dense
        return _ratio_of_all(kept, sum(score.numel() for score in dense), outlier)
    threshold, above, survivors = outlier * _mean(dense), 0, 0
    for name, score in scores.items():
        high = score > threshold
        above += int((high & ~pruned[name]).sum() if pruned else high.sum())
        survivors += int((~pruned[name]).sum()) if pruned else score.numel()
    return 1 - above / survivors if survivors else 1.0


def _ratio_of_all(kept: Sequence[Tensor], entries: int, outlier: float) -> float:
    """Return the NOR over all entries of a sparse block, of which only the survivors' scores are given."""
    mean = sum(float(score.sum(dtype=torch.float64)) for score in kept) / entries
    return 1 - sum(int((score > outlier * mean).sum()) for score in kept) / entries


def grid(low: float, high: float, step: float) -> list[float]:
    """Return ``low, low + step, …``, and ``high``."""
    count = int(np.floor((high - low) / step + _NARROW))
    points = [low + index * step for index in range(count + 1)]
    return points if high - points[-1] < _NARROW else [*points, high]


def curve(
    scores: Mapping[str, Tensor], groups: Mapping[str, Group], points: Sequence[float], outlier: float, ratio: Ratio
) -> list[float]:
    """Return the NOR of a block at every sparsity of an ascending grid, all its linears pruned alike, by one sort.

    ``groups`` holds the comparison group of each linear; the other arguments are those of :func:`non_outlier_ratio`.
    """
    held = list(scores.values())
    entries = sum(score.numel() for score in held)
    edges = torch.tensor(points, dtype=torch.float32, device=held[0].device) + 1e-7
    if ratio == "survivors":
        threshold = outlier * _mean(held)
        every, outliers = (torch.zeros(len(points) + 1, dtype=torch.long, device=edges.device) for _ in range(2))
        for name, score in scores.items():
            for part in _compared(score, groups[name]):
                gone = _first_gone(part, groups[name], edges)
                every += torch.bincount(gone, minlength=len(every))
                outliers += torch.bincount(gone[part.flatten() > threshold], minlength=len(every))
        left, above = entries - every[:-1].cumsum(0), outliers.sum() - outliers[:-1].cumsum(0)
        return [float(value) for value in torch.where(left > 0, 1 - above / left.clamp(min=1), 1.0).double()]
    gone_of = [_first_gone(score, groups[name], edges) for name, score in scores.items()]
    found = []
    for index in range(len(points)):
        kept = [score.flatten()[gone > index] for gone, score in zip(gone_of, held, strict=True)]
        found.append(_ratio_of_all(kept, entries, outlier))
    return found


def _compared(scores: Tensor, group: Group) -> Sequence[Tensor]:
    """Return parts of a matrix whose weights are not compared with others': what is sorted takes many times their bytes."""
    return row_chunks(scores) if group == "row" else [scores]


def _first_gone(scores: Tensor, group: Group, edges: Tensor) -> Tensor:
    """Return, for every weight, the first point of a grid at which it is gone; the number of points if it never is."""
    return torch.bucketize(levels(scores, group).flatten(), edges)


@dataclass(frozen=True)
class Step:
    """Record one iteration: a block's sparsity before and after, and its NOR, the largest of all blocks below the cap."""

    iteration: int
    unit: int
    before: float
    after: float
    nor: float


@dataclass(frozen=True)
class Search:
    """Hold the state of the search: sparsities of all blocks, the steps taken, and whether the target is met."""

    sparsities: list[float]
    steps: list[Step]
    finished: bool


def search(
    budget: Budget, points: Sequence[float], curves: Sequence[Sequence[Sequence[float]]], step: float, refresh: int = 0
) -> Search:
    """Raise the sparsity of the block with the largest NOR by ``step``, again and again, until the target is met.

    All blocks start at ``budget.floor``. Ties go to the first block; the last step is shortened to meet the target.
    ``curves`` are, of every round of measurements and every block, the NOR at the sparsities ``points``, linear between them.
    A round is good for ``refresh`` iterations, 0 for as many as there are; without another round the search stops unfinished.
    """
    sizes = budget.sizes
    now = [budget.floor] * len(sizes)
    missing = (budget.sparsity - budget.floor) * sum(sizes)
    steps: list[Step] = []
    ratios: list[float] = []
    while missing > 0.5:
        number = len(steps) // refresh if refresh else 0
        if number >= len(curves):
            return Search(now, steps, False)
        if not steps or (refresh and len(steps) % refresh == 0):
            ratios = [float(np.interp(s, points, nor)) for s, nor in zip(now, curves[number], strict=True)]
        able = [unit for unit in range(len(sizes)) if now[unit] < budget.cap - _NARROW]
        if not able:  # what is left of the target is rounding
            break
        unit = max(able, key=ratios.__getitem__)
        before = now[unit]
        now[unit] = min(before + step, budget.cap, before + missing / sizes[unit])
        missing -= (now[unit] - before) * sizes[unit]
        steps.append(Step(len(steps), unit, before, now[unit], ratios[unit]))
        ratios[unit] = float(np.interp(now[unit], points, curves[number][unit]))
    return Search(now, steps, True)
