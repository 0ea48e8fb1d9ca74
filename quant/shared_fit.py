"""Fit shared codebooks (:mod:`compress.quant.shared`): factors of columns, sizes of groups, entries of bases."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial
from itertools import count

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from compress.quant.descent import Floats32, U
from compress.quant.hessian import Hessian
from compress.quant.kmeans import nested_codebooks
from compress.quant.kmeans_seed import Floats, compiled, in_threads
from compress.quant.records import GROUP
from compress.quant.shared import Shared

_SIZE, _INPUT = 0.5, -0.15  # powers of a column's weights and of its inputs in its factor; measured
_NEARLY = 1e-6  # share of the mean diagonal that keeps least squares solvable
_POOLED = 1 << 16  # weights that are clustered together
_TRIED = tuple(step / 20 for step in range(8, 23))  # of the size at which the largest weight is the largest entry
_SIZED_BITS = 4  # bits at which sizes are tried
_SIZED_ROWS = 1 << 12  # rows that are tried at a time
_ROUNDS = 2
_SPLIT_STEPS = 3
Codes8 = NDArray[np.uint8]
Work = Callable[[slice], dict[str, Tensor]]


def column_factors(weight: Tensor, inputs: Tensor) -> Tensor:
    """Return the factor of every column of a weight [N, K], given the mean squares [K] of its inputs: float32 [K], mean 1.

    Values are those of float16, so that what is divided by them is what is stored.
    """
    size = weight / weight.square().mean(1, keepdim=True).sqrt().clamp_min(1e-30)
    factors = _floored(size.square().mean(0)) ** (_SIZE / 2) * _floored(inputs) ** _INPUT
    return (factors / factors.mean()).half().float()


def _floored(squares: Tensor) -> Tensor:
    """Keep columns of zeros from a factor of zero."""
    mean = squares.mean()
    return squares.clamp_min(1e-4 * torch.where(mean > 0, mean, 1.0))


def fit_shared(
    weight: Tensor, cost: Tensor, columns: Tensor, seed: int, parent: int, over: Callable[[Work], dict[str, Tensor]]
) -> Shared:
    """Find sizes of groups, and bases, for a weight that is rounded to the nearest entries.

    ``weight``, float32 [N, K], is divided by ``columns``; ``cost``, float32 [K], is that of an error in each column; ``over`` does
    some work on all parts of the rows.
    """
    basis = _nested(_bell(), torch.ones(_POOLED, dtype=torch.float32), seed, parent, weight.device)
    for _ in range(_ROUNDS):
        sizes = over(partial(_sizes_of, weight, cost, basis[sized_at(basis)]))["sizes"]
        if not weight.any():
            break
        basis = _clustered(weight, sizes, cost, seed, parent)
    scale = torch.stack([entries.abs().amax() for entries in basis.values()]).amax()
    return sized(
        Shared(columns, sizes, None, {bits: part[None] / scale for bits, part in basis.items()}), sizes * scale
    )


def sized_at(bits: Collection[int]) -> int:
    """Return the number of bits, of those there are, at which sizes of groups are chosen."""
    return max(min(bits), min(max(bits), _SIZED_BITS))


def _sizes_of(weight: Tensor, cost: Tensor, entries: Tensor, part: slice) -> dict[str, Tensor]:
    return {"sizes": group_sizes(weight[part], cost, entries)}


def group_sizes(weight: Tensor, cost: Tensor, entries: Tensor) -> Tensor:
    """Choose the size of every group, [N, ceil(K / 64)], at which rounding a weight [N, K] to the nearest entries costs least."""
    cost, reach = by_group(cost[None]), entries.abs().amax()
    largest = torch.cat([by_group(part).abs().amax(2) for part in torch.split(weight, _SIZED_ROWS)]) / reach
    largest = largest.clamp_min(1e-3 * largest.mean() + 1e-30)
    parts = zip(torch.split(weight, _SIZED_ROWS), torch.split(largest, _SIZED_ROWS), strict=True)
    choose = _compiled if weight.device.type == "cpu" else _in_torch
    return torch.cat([choose(by_group(part), cost, entries, most) for part, most in parts])


def _in_torch(groups: Tensor, cost: Tensor, entries: Tensor, largest: Tensor) -> Tensor:
    """Choose the sizes of groups, [N, G, 64]; with a size of ``largest``, [N, G], the largest weight is the largest entry."""
    border, best, least = (entries[1:] + entries[:-1]) / 2, largest, torch.full_like(largest, torch.inf)
    for multiple in _TRIED:
        size = largest * multiple
        inside = groups / size[..., None]
        error = entries[torch.bucketize(inside, border)].sub_(inside).square_().mul_(cost).sum(2) * size.square()
        best = torch.where(error < least, size, best)
        least = torch.minimum(error, least)
    return best


def _compiled(groups: Tensor, cost: Tensor, entries: Tensor, largest: Tensor) -> Tensor:
    """Do what :func:`_in_torch` does, group by group."""
    best, border = torch.empty_like(largest), (entries[1:] + entries[:-1]) / 2
    found, values, most = best.numpy(), groups.contiguous().numpy(), largest.contiguous().numpy()
    given = cost[0].numpy(), entries.contiguous().numpy(), border.numpy(), np.array(_TRIED, np.float32)

    def run(rows: slice) -> None:
        _try_sizes(found[rows], values[rows], most[rows], *given)

    in_threads(run, len(groups), torch.get_num_threads())
    return best


@compiled
def _try_sizes(
    best: Floats32,
    groups: Floats32,
    largest: Floats32,
    cost: Floats32,
    entries: Floats32,
    border: Floats32,
    multiples: Floats32,
) -> None:
    inside, nearest = np.empty(GROUP, np.float32), np.empty(GROUP, np.float32)
    for n in range(U(groups.shape[0])):
        for group in range(U(groups.shape[1])):
            least = np.float32(np.inf)
            best[n, group] = largest[n, group]
            for multiple in multiples:
                size = largest[n, group] * multiple
                for k in range(U(GROUP)):
                    inside[k] = groups[n, group, k] / size
                    nearest[k] = entries[0]
                for place in range(U(len(border))):
                    above, entry = border[place], entries[place + U(1)]
                    for k in range(U(GROUP)):
                        nearest[k] = entry if inside[k] > above else nearest[k]
                for k in range(U(GROUP)):
                    error = nearest[k] - inside[k]
                    inside[k] = error * error * cost[group, k]
                half = U(GROUP // 2)
                while half:
                    for k in range(half):
                        inside[k] += inside[k + half]
                    half >>= U(1)
                total = inside[0] * (size * size)
                if total < least:
                    least, best[n, group] = total, size


def sums_by_codes(codes: Tensor, sizes: Tensor, hessian: Hessian, count: int) -> Tensor:
    """Sum a Hessian [K, K], times the sizes of both columns, over all pairs of columns with each two codes.

    Takes uint8 codes and float32 sizes [N, K]; returns [count, count], of all rows together: what a least-squares problem for
    ``count`` entries that rows share needs.
    """
    if codes.device.type != "cpu":
        return _sums_in_torch(codes, sizes, hessian, count)
    half = np.zeros((count, count))
    _add_pairs(codes.contiguous().numpy(), sizes.contiguous().numpy(), hessian.matrix.contiguous().numpy(), half)
    return torch.from_numpy(half + half.T).to(sizes.dtype)


def _sums_in_torch(codes: Tensor, sizes: Tensor, hessian: Hessian, count: int) -> Tensor:
    """Do what :func:`sums_by_codes` does, on any device."""
    of, sums = codes.long().flatten(), sizes.new_zeros(count, count)
    for code, row in enumerate(sums):
        row.index_add_(0, of, hessian.times(sizes * (codes == code)).mul_(sizes).flatten())
    return sums


@compiled
def _add_pairs(codes: Codes8, sizes: Floats32, hessian: Floats32, half: Floats) -> None:
    """Add pairs of columns that are in order, and half of what a column has with itself."""
    columns = U(codes.shape[1])
    for j in range(columns):
        for n in range(U(codes.shape[0])):
            row, size = half[codes[n, j]], sizes[n, j]
            row[codes[n, j]] += 0.5 * (size * size * hessian[j, j])
            for k in range(j + U(1), columns):
                row[codes[n, k]] += size * sizes[n, k] * hessian[j, k]


def by_group(values: Tensor) -> Tensor:
    """Cut rows into groups of columns, [N, K] to [N, ceil(K / 64), 64], filled up with zeros."""
    missing = -values.shape[1] % GROUP
    return (pad(values, (0, missing)) if missing else values).reshape(len(values), -1, GROUP)


def sized(shared: Shared, sizes: Tensor) -> Shared:
    """Take other sizes of groups, positive float32 [N, ceil(K / 64)], as they are stored."""
    rows = sizes.amax(1, keepdim=True)
    groups = (sizes / rows * 255).round().clamp(1, 255)
    return replace(shared, rows=rows, groups=groups.to(torch.uint8))


def _bell() -> Tensor:
    """Return values that lie as those of a normal distribution do, float32 [_POOLED]."""
    found: Tensor = torch.special.ndtri((torch.arange(_POOLED, dtype=torch.float64) + 0.5) / _POOLED).float()
    return found


def _clustered(weight: Tensor, sizes: Tensor, cost: Tensor, seed: int, last: int) -> dict[int, Tensor]:
    """Cluster weights [N, K] of all rows together, each weighed by what its error costs: bits -> float32 [2**bits]."""
    columns, fewest = weight.shape[1], max(1, weight.numel() // _POOLED)
    every = next(step for step in count(fewest) if math.gcd(step, columns) == 1)  # all columns have their turn
    places = torch.arange(0, weight.numel(), every, device=weight.device)
    size = sizes[places // columns, places % columns // GROUP]
    mass = size.square() * cost[places % columns]
    return _nested(weight.flatten()[::every] / size, mass / mass.mean(), seed, last, weight.device)


def _nested(values: Tensor, mass: Tensor, seed: int, last: int, device: torch.device) -> dict[int, Tensor]:
    one, weights = (tensor.cpu()[None].contiguous().numpy() for tensor in (values, mass))
    found = nested_codebooks(one, weights, seed, last).codebooks
    return {bits: entries[0].to(device) for bits, entries in found.items()}


def halved(values: Tensor, mass: Tensor, cells: Tensor, entries: Tensor) -> Tensor:
    """Split every cell in two by two-means over all values in it, [2 * cells]; ``values``, ``mass`` and ``cells`` are [N, K]."""
    cells, border, found = cells.long().flatten(), entries, entries.repeat_interleave(2)
    values, mass = values.flatten(), mass.flatten()
    for _ in range(_SPLIT_STEPS):
        halves = 2 * cells + (values > border[cells])
        held = torch.zeros_like(found).index_add_(0, halves, mass)
        total = torch.zeros_like(found).index_add_(0, halves, mass * values)
        found = torch.where(held > 0, total / held.clamp_min(1e-30), found)
        border = found.view(-1, 2).mean(1)
    return found


def solved(inner: Tensor, right: Tensor) -> Tensor:
    """Solve symmetric problems [N, V, V] with right sides [N, V], in float64; directions that nothing depends on stay near 0."""
    inner = inner.double()
    diagonal = inner.diagonal(dim1=1, dim2=2)
    diagonal += _NEARLY * diagonal.mean(1, keepdim=True) + 1e-30
    result: Tensor = torch.linalg.solve(inner, right.double())
    return result.to(right.dtype)
