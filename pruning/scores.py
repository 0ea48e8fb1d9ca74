"""What a weight is worth, and which weights go: scores, comparison groups, n:m patterns.

Smaller scores are pruned first; equal scores by position, so that the result never depends on the sorting routine.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from compress.pruning.settings import Group

COLUMNS = 128
"""Width of a block of columns: SparseGPT's lazy batch and its comparison group."""

DEFAULT_GROUP: dict[str, Group] = {"magnitude": "matrix", "wanda": "row", "sparsegpt": "columns"}
"""The comparison group of each score's original implementation."""


def magnitude(weight: Tensor) -> Tensor:
    """``|W|``, [N, K]."""
    return weight.abs()


def wanda(weight: Tensor, squares: Tensor) -> Tensor:
    """``|W_ij| * ||X_j||`` (arXiv 2306.11695, equation 1).

    Args:
        weight: float32 [N, K].
        squares: float32 [K], each input's sum (or mean) of squares.
    """
    return weight.abs() * squares.sqrt()


def removal(weight: Tensor, diagonal: Tensor) -> Tensor:
    """``|W_ij| / U_jj``: half its square is what removing a weight costs when all columns before it are settled.

    U is the upper Cholesky factor of the inverse Hessian. SparseGPT's score (arXiv 2301.00774, section 3.2) is the
    square, which orders weights alike; the root has the unit of Wanda's, so that the same multiple of the mean is an outlier.

    Args:
        weight: float32 [N, K] (or any part of its columns).
        diagonal: float32 [K], ``U_jj``; infinite for an input that is always zero, whose weights cost nothing.
    """
    return (weight / diagonal).abs()


def shares(total: int, parts: int) -> list[int]:
    """``total`` in ``parts`` whole numbers that differ by one at most, spread evenly."""
    edges = [total * index // parts for index in range(parts + 1)]
    return [after - before for before, after in pairwise(edges)]


def column_blocks(columns: int, width: int = COLUMNS) -> list[tuple[int, int]]:
    """(first, end) of every block of columns."""
    return [(start, min(start + width, columns)) for start in range(0, columns, width)]


def column_shares(zeros: int, columns: int, width: int = COLUMNS) -> list[int]:
    """Zeros of a matrix divided over its blocks of columns in proportion to their widths."""
    edges = [zeros * end // columns for _, end in column_blocks(columns, width)]
    return [after - before for before, after in zip([0, *edges], edges, strict=False)]


def select(scores: Tensor, zeros: int, group: Group) -> Tensor:
    """The weights to prune: exactly ``zeros`` of them, the smallest of every comparison group.

    Args:
        scores: float32 [N, K].
        zeros: 0 <= zeros <= N * K.
        group: ``row`` gives every row the same number of zeros (to within one), ``columns`` every block of 128
            columns the same share, ``matrix`` compares all weights.

    Returns:
        bool [N, K], true where pruned.
    """
    rows, columns = scores.shape
    if group == "row":
        counts = torch.tensor(shares(zeros, rows), device=scores.device)
        order = scores.argsort(dim=1, stable=True)
        first = torch.arange(columns, device=scores.device) < counts[:, None]
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, first)
    if group == "columns":
        counted = zip(column_blocks(columns), column_shares(zeros, columns), strict=True)
        return torch.cat([select(scores[:, a:b], count, "matrix") for (a, b), count in counted], dim=1)
    pruned = torch.zeros(rows * columns, dtype=torch.bool, device=scores.device)
    pruned[scores.flatten().argsort(stable=True)[:zeros]] = True
    return pruned.view(rows, columns)


def select_pattern(scores: Tensor, kept: int, of: int) -> Tensor:
    """``kept`` survivors among every ``of`` consecutive inputs of a row.

    Args:
        scores: float32 [N, K]. A last group of r < ``of`` columns keeps ceil(r * kept / of) and fits the pattern
            once padded with zeros.
        kept: n of an n:m pattern.
        of: m.

    Returns:
        bool [N, K], true where pruned.
    """
    rows, columns = scores.shape
    whole = columns // of * of
    groups = scores[:, :whole].reshape(rows, -1, of)
    order = groups.argsort(dim=2, stable=True)
    first = (torch.arange(of, device=scores.device) < of - kept).expand_as(groups)
    pruned = torch.zeros_like(groups, dtype=torch.bool).scatter_(2, order, first).reshape(rows, whole)
    if whole == columns:
        return pruned
    rest = columns - whole
    survivors = -(-rest * kept // of)
    return torch.cat([pruned, select_pattern(scores[:, whole:], survivors, rest)], dim=1)


def pattern_zeros(rows: int, columns: int, kept: int, of: int) -> int:
    """How many weights :func:`select_pattern` prunes."""
    whole, rest = divmod(columns, of)
    return rows * (whole * (of - kept) + rest - -(-rest * kept // of))


def levels(scores: Tensor, group: Group) -> Tensor:
    """The sparsity of the matrix at which each weight goes, float32 [N, K] in (0, 1].

    :func:`select` with ``zeros`` prunes (up to rounding) the weights whose level is at most ``zeros / (N * K)``.
    """
    rows, columns = scores.shape
    if group == "columns":
        return torch.cat([levels(scores[:, a:b], "matrix") for a, b in column_blocks(columns)], dim=1)
    compared = scores if group == "row" else scores.reshape(1, -1)
    size = compared.shape[1]
    order = compared.argsort(dim=1, stable=True)
    rank = torch.arange(1, size + 1, device=scores.device, dtype=torch.float32) / size
    return torch.empty_like(compared).scatter_(1, order, rank.expand_as(compared)).view(rows, columns)
