"""Removing columns of a linear at the least error of its output, the columns that stay making up for them.

With H the second moments of the inputs, the output error of ``W - W'`` is ``tr((W - W') H (W - W')^T)``. The best W'
without the columns S costs ``tr(W_S (H^-1_SS)^-1 W_S^T)``: the optimal brain surgeon for columns of a matrix (as in SparseGPT,
arXiv 2301.00774, which does it for weights, and ZipLM, arXiv 2302.04089, for structures). Columns are removed one unit
after the other, each the cheapest given those that have gone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DAMPING = 0.01
"""Added to the diagonal of H, as a share of its mean."""
STEPS = 256
"""Removals after which costs are computed anew; more units than that go several at a time."""


@dataclass
class Moments:
    """Second moments of a linear's inputs over the calibration tokens, and of those that a bias cannot make up for.

    Attributes:
        gram: float64 [K, K], the sum, then :meth:`finish`: the mean of ``x x^T``, or the covariance if ``centred``.
        mean: float64 [K], the sum, then the mean.
        tokens: how many.
        centred: whether the linear has a bias, which then absorbs the inputs' means.
    """

    gram: Tensor
    mean: Tensor
    centred: bool
    tokens: int = 0

    @classmethod
    def empty(cls, columns: int, centred: bool, device: torch.device) -> Moments:
        """Nothing seen yet."""
        zeros = torch.zeros(columns, dtype=torch.float64, device=device)
        return cls(torch.zeros(columns, columns, dtype=torch.float64, device=device), zeros, centred)

    def add(self, x: Tensor) -> None:
        """Inputs [tokens, K]; products in their own precision, sums in float64."""
        self.gram += x.t() @ x
        self.mean += x.sum(0)
        self.tokens += x.shape[0]

    def finish(self) -> Moments:
        """Sums to means."""
        self.gram /= self.tokens
        self.mean /= self.tokens
        if self.centred:
            self.gram -= torch.outer(self.mean, self.mean)
        return self

    def damped(self) -> Tensor:
        """The matrix to be inverted."""
        diagonal = self.gram.diagonal()
        added = DAMPING * diagonal.mean().clamp_min(torch.finfo(torch.float32).tiny)
        return self.gram + torch.diag(torch.full_like(diagonal, float(added)))


def costs(weight: Tensor, inverse: Tensor, columns: Tensor) -> Tensor:
    """Least output error of removing each unit alone.

    Args:
        weight: float64 [N, K].
        inverse: float64 [K, K], of the damped second moments.
        columns: int64 [U, c].

    Returns:
        float64 [U], in units of the output's mean square, summed over outputs.
    """
    if columns.shape[1] == 1:
        one = columns[:, 0]
        return weight[:, one].square().sum(0) / inverse.diagonal()[one]
    inner = inverse[columns[:, :, None], columns[:, None, :]]  # [U, c, c]
    parts = weight[:, columns].permute(1, 2, 0)  # [U, c, N]
    found: Tensor = (parts * torch.linalg.solve(inner, parts)).sum((1, 2))
    return found


def removal_order(
    weight: Tensor, moments: Moments, columns: Tensor, classes: Tensor, count: int
) -> tuple[list[int], list[float]]:
    """Units in the order in which they go, and the output error after each.

    Args:
        weight: float [N, K].
        moments: of the inputs.
        columns: int64 [U, c], columns of each unit.
        classes: int64 [U]; every class loses ``count / classes`` units.
        count: how many go.
    """
    weight, inverse = weight.double().clone(), torch.linalg.inv(moments.damped())
    columns, classes = columns.to(weight.device), classes.to(weight.device)
    quota = torch.full((int(classes.max()) + 1,), count // (int(classes.max()) + 1), device=weight.device)
    gone = torch.zeros(len(columns), dtype=torch.bool, device=weight.device)
    order: list[int] = []
    errors: list[float] = []
    total = 0.0
    at_once = 1 if len(quota) > 1 else -(-count // STEPS)
    while len(order) < count:
        cost = costs(weight, inverse, columns).masked_fill(gone | (quota[classes] == 0), float("inf"))
        chosen = cost.argsort(stable=True)[: min(at_once, count - len(order))]
        for unit in chosen.tolist():
            total += float(cost[unit])
            order.append(unit)
            errors.append(total)
        gone[chosen] = True
        quota -= torch.bincount(classes[chosen], minlength=len(quota))
        _take_out(weight, inverse, columns[chosen].flatten())
    return order, errors


def _take_out(weight: Tensor, inverse: Tensor, lost: Tensor) -> None:
    """Remove columns from W and from the inverse of H, in place; what is left of both belongs to the rest."""
    factor = torch.linalg.solve(inverse[lost[:, None], lost], inverse[lost])  # [c, K]
    weight -= weight[:, lost] @ factor
    inverse -= inverse[:, lost] @ factor
    weight[:, lost] = 0.0
    inverse[lost] = 0.0
    inverse[:, lost] = 0.0
    inverse[lost, lost] = 1.0  # only to be divided by


def compensated(weight: Tensor, bias: Tensor | None, moments: Moments, kept: Tensor) -> tuple[Tensor, Tensor | None]:
    """The columns that stay, changed so that the output is as near as possible to the whole linear's.

    Args:
        weight: [N, K].
        bias: [N] or None.
        moments: of the inputs.
        kept: int64, columns that stay.

    Returns:
        [N, kept] and the bias, in the dtypes they came in.
    """
    matrix, whole = moments.damped(), weight.double()
    # The damping pulls towards the columns as they were, not towards zero.
    target = whole @ moments.gram[:, kept] - whole[:, kept] @ moments.gram[kept[:, None], kept]
    change = torch.linalg.solve(matrix[kept[:, None], kept], target.t()).t()
    result = whole[:, kept] + change
    if bias is not None and moments.centred:
        shift = whole @ moments.mean - result @ moments.mean[kept]
        bias = (bias.double() + shift).to(bias.dtype)
    return result.to(weight.dtype), bias


def output_error(weight: Tensor, changed: Tensor, moments: Moments, kept: Tensor) -> float:
    """Mean square of the output's error by that of the output (about their means where a bias makes up for those)."""
    whole = weight.double()
    difference = whole.clone()
    difference[:, kept] -= changed.double()
    scale = float(((whole @ moments.gram) * whole).sum())
    return float(((difference @ moments.gram) * difference).sum()) / scale if scale > 0 else 0.0
