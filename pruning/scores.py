"""Score weights and choose those to prune: scores, comparison groups, n:m patterns.

Smaller scores are pruned first; equal scores by position, so that the result never depends on the sorting routine.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from compress.errors import CompressError
from compress.passes import Block
from compress.pruning.settings import Group, Score
from compress.ranks import Ranks
from compress.statistics import Moments, all_finite, check_inputs, check_weight

COLUMNS = 128
"""Columns in a block: SparseGPT's lazy batch and its comparison group."""

DEFAULT_GROUP: dict[str, Group] = {"magnitude": "matrix", "wanda": "row", "sparsegpt": "columns"}
"""The comparison group of each score's original implementation."""
_MOST_DAMPING = 1e6


def magnitude(weight: Tensor) -> Tensor:
    """Score by ``|W|``, [N, K]."""
    return weight.abs()


def wanda(weight: Tensor, squares: Tensor) -> Tensor:
    """Score by ``|W_ij| * ||X_j||`` (arXiv 2306.11695, equation 1); ``squares`` [K] are the inputs' means (or sums) of squares."""
    return weight.abs() * squares.sqrt()


def removal(weight: Tensor, diagonal: Tensor) -> Tensor:
    """Score by ``|W_ij| / U_jj``: half its square is what removing a weight costs once all columns before it are settled.

    U is the upper Cholesky factor of the inverse Hessian. SparseGPT's score (arXiv 2301.00774, section 3.2) is the
    square, which orders weights alike; the root has the unit of Wanda's, so that the same multiple of the mean is an outlier.
    ``diagonal`` is ``U_jj``, float32 [K]; infinite for an input that is always zero, whose weights cost nothing.
    """
    return (weight / diagonal).abs()


@dataclass(frozen=True)
class Factor:
    """Hold the upper Cholesky factor of the inverse of one damped Hessian."""

    upper: Tensor  # float32 [K, K]
    dead: Tensor  # bool [K], inputs that were zero in every sample
    damping: float  # share of the mean diagonal that was added: as asked, or the first ten-fold of it that factorised

    @property
    def diagonal(self) -> Tensor:
        """Return ``U_jj`` [K], infinite for dead inputs: their weights cost nothing."""
        return self.upper.diagonal().masked_fill(self.dead, torch.inf)


def factorise(hessian: Tensor, damping: float, name: str) -> Factor:
    """Factor the inverse of ``H + damping * mean(diag H) * I``, float32 [K, K], written to; more damping where that fails.

    Raises:
        CompressError: values that are not finite.
    """
    check_inputs(name, hessian)
    diagonal = hessian.diagonal().clone()
    dead = diagonal == 0
    mean = float(diagonal[~dead].mean()) if not dead.all() else 1.0
    diagonal += torch.where(dead, mean, 0.0)
    while damping <= _MOST_DAMPING:
        hessian.diagonal().copy_(diagonal + damping * mean)
        factor, failed = torch.linalg.cholesky_ex(hessian)
        if not failed:
            factor = torch.cholesky_inverse(factor)
            factor, failed = torch.linalg.cholesky_ex(factor, upper=True)
            if not failed and all_finite(factor):
                return Factor(factor, dead, damping)
        damping *= 10
    raise CompressError(f"{name}: the Hessian of its inputs does not factorise however much it is damped.")


@dataclass(frozen=True)
class Measured:
    """Hold the scores of a block."""

    scores: dict[str, Tensor]  # linear -> float32 [N, K]
    factors: dict[str, Factor]  # linear -> of its inputs' Hessian, for ``sparsegpt``; linears of one input share it


def measure(block: Block, names: Iterable[str], score: Score, damping: float) -> Measured:
    """Score some linears of a block on the samples it was given.

    Raises:
        CompressError: weights or inputs that are not finite.
    """
    weights = {name: block.linears[name].weight for name in names}
    for name, weight in weights.items():
        check_weight(name, weight)
    if score == "magnitude":
        return Measured({name: magnitude(weight) for name, weight in weights.items()}, {})
    inputs = Moments(full=score == "sparsegpt", ranks=block.ranks)
    block.for_each_input(inputs.add, end_lot=inputs.end_lot)
    for name in weights.keys() - inputs.owner.keys():  # an expert that no token was sent to
        inputs.assume(name, weights[name])
    if score == "wanda":
        return Measured({name: wanda(weight, inputs.mean(name)) for name, weight in weights.items()}, {})
    assert score == "sparsegpt", score  # a new score has its branch above
    factors = _factors(inputs, {name: weight.shape[1] for name, weight in weights.items()}, damping, block.ranks)
    return Measured({name: removal(w, factors[name].diagonal) for name, w in weights.items()}, factors)


def _factors(inputs: Moments, columns: Mapping[str, int], damping: float, ranks: Ranks) -> dict[str, Factor]:
    """Factor the Hessian of every distinct input of linears, given with their columns, each in one process."""
    first = {inputs.owner[name]: name for name in reversed(list(columns))}
    tensors, used = dict[str, Tensor](), dict[str, float]()
    for owner in ranks.share({inputs.owner[name]: float(count) ** 3 for name, count in columns.items()}):
        # SparseGPT's Hessian is that of the sum of squared errors.
        found = factorise(inputs.take(first[owner]).mul_(2), damping, first[owner])
        tensors |= {f"upper {owner}": found.upper, f"dead {owner}": found.dead}
        used[owner] = found.damping
    tensors, used = ranks.joined(tensors), ranks.noted(used)
    shared = {owner: Factor(tensors[f"upper {owner}"], tensors[f"dead {owner}"], used[owner]) for owner in first}
    return {name: shared[inputs.owner[name]] for name in columns}


def shares(total: int, parts: int) -> list[int]:
    """Divide ``total`` into ``parts`` whole numbers that differ by one at most, spread evenly."""
    edges = [total * index // parts for index in range(parts + 1)]
    return [after - before for before, after in pairwise(edges)]


def column_blocks(columns: int, size: int = COLUMNS) -> list[tuple[int, int]]:
    """Return (first, end) of every block of columns."""
    return [(start, min(start + size, columns)) for start in range(0, columns, size)]


def column_shares(zeros: int, columns: int, size: int = COLUMNS) -> list[int]:
    """Divide the zeros of a matrix over its blocks of columns in proportion to their sizes."""
    edges = [0, *(zeros * end // columns for _, end in column_blocks(columns, size))]
    return [after - before for before, after in pairwise(edges)]


def select(scores: Tensor, zeros: int, group: Group) -> Tensor:
    """Choose the weights to prune: exactly ``zeros`` of them, the smallest of every comparison group.

    Returns bool [N, K], true where pruned. Of groups, ``row`` gives every row the same number of zeros (to within one),
    ``columns`` every block of 128 columns the same share, and ``matrix`` compares all weights.
    """
    rows, columns = scores.shape
    if group == "row":
        counts, chunks = torch.tensor(shares(zeros, rows), device=scores.device), row_chunks(scores)
        each = zip(chunks, torch.split(counts, [len(chunk) for chunk in chunks]), strict=True)
        return torch.cat([_smallest(chunk, count) for chunk, count in each])
    if group == "columns":
        counted = zip(column_blocks(columns), column_shares(zeros, columns), strict=True)
        return torch.cat([select(scores[:, a:b], count, "matrix") for (a, b), count in counted], dim=1)
    return _smallest(scores.reshape(1, -1), torch.tensor([zeros], device=scores.device)).view(rows, columns)


def row_chunks(matrix: Tensor) -> tuple[Tensor, ...]:
    """Divide a matrix by rows into views of about 4 million entries."""
    return torch.split(matrix, max(1, (1 << 22) // max(matrix.shape[1], 1)))


def _smallest(scores: Tensor, counts: Tensor) -> Tensor:
    """Choose the smallest of every row, so many each or all: bool [N, K]. Several times as fast as by sorting."""
    counts = counts.clamp(max=scores.shape[1])  # a plan asks some rows of a matrix for the zeros of all
    most = scores.new_full((len(scores), 1), -torch.inf)
    for count in set(counts.tolist()) - {0}:
        rows = counts == count
        some = scores if rows.all() else scores[rows]
        most[rows] = some.kthvalue(count, dim=1, keepdim=True).values
    pruned = scores <= most
    extra = pruned.sum(1) - counts
    if extra.any():  # of equal scores the last stay
        last = (scores == most) & (extra > 0)[:, None]
        row, column = last.nonzero(as_tuple=True)
        equal = torch.bincount(row, minlength=len(scores))
        place = torch.arange(len(row), device=row.device) - (equal.cumsum(0) - equal)[row]
        pruned[row, column] = place < (equal - extra)[row]
    return pruned


def select_pattern(scores: Tensor, kept: int, of: int) -> Tensor:
    """Choose the weights to prune so that ``kept`` survive of every ``of`` consecutive inputs of a row (n:m).

    Returns bool [N, K], true where pruned. A last group of r < ``of`` columns keeps ceil(r * kept / of) and fits the pattern
    once padded with zeros.
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
    """Return how many weights :func:`select_pattern` prunes."""
    whole, rest = divmod(columns, of)
    return rows * (whole * (of - kept) + rest - -(-rest * kept // of))


def levels(scores: Tensor, group: Group) -> Tensor:
    """Return the sparsity of the matrix at which each weight goes, float32 [N, K] in (0, 1].

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
