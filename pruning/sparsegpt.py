"""Prune column by column and let the columns to the right make up for it: SparseGPT (arXiv 2301.00774).

With H = 2/n sum x x^T and U the upper Cholesky factor of its (damped) inverse, ``U_j,j: / U_jj`` is what optimal brain
surgery adds to the columns j.. per unit of error in column j once all columns before j are settled. One
factorisation serves all rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compress.pruning.scores import COLUMNS, Factor, column_blocks, column_shares, removal, select, select_pattern
from compress.pruning.settings import Group

_STRIP = 16  # columns that are updated one by one; those after them in the block at once


@dataclass(frozen=True)
class Rule:
    """Hold which weights of a matrix go: a number in comparison groups, or ``pattern`` = (n, m), n kept of every m."""

    zeros: int
    group: Group = "columns"
    pattern: tuple[int, int] | None = None

    def mask(self, scores: Tensor) -> Tensor:
        """Choose the weights to prune from scores that no update changes: bool [N, K], true where pruned."""
        return select_pattern(scores, *self.pattern) if self.pattern else select(scores, self.zeros, self.group)


@dataclass(frozen=True)
class Swept:
    """Hold the result of a sweep."""

    weight: Tensor  # float32 [N, K]
    pruned: Tensor  # bool [N, K]
    loss: float  # ``1/2 sum (w - q)^2 / U_jj^2``, the increase of ``1/n ||(W - W') X||^2`` (without damping)

    def figures(self, factor: Factor) -> dict[str, Any]:
        """Return the figures for the record of a block."""
        return {"loss": self.loss, "damping": factor.damping, "dead_inputs": int(factor.dead.sum())}


def sweep(
    weight: Tensor, factor: Factor, rule: Rule, round_to: Callable[[Tensor], Tensor] | None = None, size: int = COLUMNS
) -> Swept:
    """Prune (and round) every column of a weight [N, K] from left to right, updating the columns after it.

    Masks by blocks of columns, and n:m patterns, are chosen as the sweep arrives there, on updated weights; masks by row
    or matrix beforehand, so that ``size``, the columns in a lazy batch, does not change the result. Weights that are zero go
    first and stay zero. ``round_to`` rounds what survives of one column [N], row by row.
    """
    result = weight.clone()
    columns, upper, diagonal = weight.shape[1], factor.upper, factor.diagonal
    strip = _STRIP
    if rule.pattern:
        size -= size % rule.pattern[1]
        strip = max(strip - strip % rule.pattern[1], rule.pattern[1])
    zero = weight == 0

    def scores(part: Tensor, first: int, end: int) -> Tensor:
        return removal(part, diagonal[first:end]).masked_fill(zero[:, first:end], -1.0)

    by_block = rule.pattern is None and rule.group == "columns"
    counts = column_shares(rule.zeros, columns, size) if by_block else []
    pruned = torch.zeros_like(zero) if by_block or rule.pattern else rule.mask(scores(weight, 0, columns))
    loss = 0.0
    for index, (start, end) in enumerate(column_blocks(columns, size)):
        part = result[:, start:end].t().contiguous()  # one row per column: updates are contiguous
        if by_block:
            pruned[:, start:end] = select(scores(part.t(), start, end), counts[index], "matrix")
        gone = (pruned[:, start:end] | zero[:, start:end]).t().contiguous()
        errors = torch.empty_like(part)
        inside = upper[start:end, start:end]
        for first, last in column_blocks(end - start, strip):
            for j in range(first, last):
                if rule.pattern and (j - first) % rule.pattern[1] == 0:
                    ahead = min(j + rule.pattern[1], last)
                    group = scores(part[j:ahead].t(), start + j, start + ahead)
                    gone[j:ahead] |= select_pattern(group, *rule.pattern).t()
                kept = part[j] if round_to is None else round_to(part[j])
                kept = kept.masked_fill(gone[j], 0.0)
                errors[j] = (part[j] - kept) / inside[j, j]
                part[j + 1 : last].addr_(inside[j, j + 1 : last], errors[j], alpha=-1)
                part[j] = kept
            part[last:].addmm_(inside[first:last, last:].t(), errors[first:last], alpha=-1)
        pruned[:, start:end] = gone.t()
        result[:, start:end] = part.t()
        result[:, end:].addmm_(errors.t(), upper[start:end, end:], alpha=-1)
        loss += 0.5 * float(errors[~factor.dead[start:end]].square().sum(dtype=torch.float64))
    return Swept(result, pruned, loss)
