"""Scores of groups, built from scores of single weights; the lowest go first.

F1 to F5 are readings of Feature Map Sensitivity (MINI-LLM, arXiv 2407.11681), whose formula mixes weight, activation and gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from compress.pruning.groups import Part
from compress.pruning.settings import Variant


def element_scores(weight: Tensor, norm: Tensor, mean: Tensor, gradient: Tensor | None, variant: Variant) -> Tensor:
    """One number per weight.

    F1 is ``|W_ij| ||X_j|| |g_ij|``; F2 ``|W_ij mean(X_j) g_ij|``; F3 ``|W_ij g_ij|``, first-order Taylor; ``vector`` is F3 with
    its sign, so that a group's sum is the derivative of the loss by scaling the group. Without a gradient F1 is F4; with noise for
    a gradient, F5.

    Args:
        weight: [N, K].
        norm: [K], root mean square of each input.
        mean: [K], signed mean of each input.
        gradient: [N, K], or None for F4.
        variant: which.
    """
    if gradient is None:
        return weight.abs() * norm
    if variant == "F1":
        return weight.abs() * norm * gradient.abs()
    if variant == "F2":
        return (weight * mean * gradient).abs()
    return (weight * gradient).abs() if variant == "F3" else weight * gradient


def group_scores(part: Part, elements: Mapping[str, Tensor], aggregate: Literal["sum", "max"]) -> Tensor:
    """Scores of a part's units, float32 [U].

    Args:
        part: whose units.
        elements: inner name -> score of every weight of a member, [N, K].
        aggregate: how the sums over a unit's rows or columns in each member matrix become one number.
    """
    sums = []
    for name, scores in elements.items():
        lines = scores.sum(0) if name == part.last else scores.sum(1)
        index = part.columns if name == part.last else part.rows[name]
        sums.append(lines[index.to(lines.device)].sum(1))
    stacked = torch.stack(sums).float()
    return stacked.sum(0).abs() if aggregate == "sum" else stacked.abs().amax(0)


def lowest(scores: Tensor, classes: Tensor, count: int) -> list[int]:
    """The units to remove, lowest first; every class loses ``count / classes``."""
    order = scores.cpu().argsort(stable=True).tolist()
    quota = [count // (int(classes.max()) + 1)] * (int(classes.max()) + 1)
    chosen = []
    for unit in order:
        if quota[int(classes[unit])]:
            quota[int(classes[unit])] -= 1
            chosen.append(unit)
    return chosen
