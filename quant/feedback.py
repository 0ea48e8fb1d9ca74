"""Nested codes by error feedback: every column's error is made up for by the columns after it, as in GPTQ (arXiv 2210.17323).

Here a weight's whole path through the tree is chosen at once, against the sum of its errors at all numbers of bits, each of which
has rows of its own that are left to be made up for.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from compress.quant.descent import LANES, Floats32, Integers, U, best_paths, weigh
from compress.quant.kmeans_seed import compiled, in_threads
from compress.quant.records import GROUP
from compress.quant.shared_fit import group_sizes, sized_at

LARGE = 4096  # columns: above, float64 takes memory that float32 mostly does without


def inverse_factor(hessian: Tensor) -> Tensor:
    """Return U, upper triangular float32 [K, K], with ``U^T U`` the inverse of a positive definite Hessian."""
    if len(hessian) > LARGE:
        lower, failed = torch.linalg.cholesky_ex(hessian)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    if len(hessian) <= LARGE or failed:
        lower = torch.linalg.cholesky(hessian.double())
        upper = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True).float()
    found: Tensor = upper
    return found


def codes_by_feedback(
    targets: Mapping[int, Tensor], tables: Mapping[int, Tensor], factor: Tensor, share: Mapping[int, float]
) -> tuple[Tensor, Tensor]:
    """Choose codes of N rows, group of columns by group, and the size of each group by what is left for it to make up for.

    Args:
        targets: bits -> float32 [N, K], what the rows should be.
        tables: bits -> float32 [2**bits], the entries that all rows share, for consecutive numbers of bits.
        factor: of the inverse Hessian (:func:`inverse_factor`).
        share: bits -> what errors count.

    Returns:
        Codes at the largest number of bits, int64 [N, K], and sizes, float32 [N, ceil(K / 64)].
    """
    bits, sized = sorted(tables), sized_at(tables)
    left = torch.stack([targets[b] for b in bits])
    weights = torch.tensor([share[b] for b in bits], dtype=torch.float32, device=left.device)
    codes, sizes = torch.empty(left.shape[1:], dtype=torch.int64, device=left.device), []
    choose = _compiled if left.device.type == "cpu" else _in_torch
    for start in range(0, left.shape[2], GROUP):
        part, after = slice(start, start + GROUP), slice(start + GROUP, None)
        block, inside = left[..., part].contiguous(), factor[part, part].contiguous()
        sizes.append(group_sizes(block[sized - bits[0]], inside.diagonal() ** -2, tables[sized]))
        codes[:, part] = choose(block, [tables[b] for b in bits], sizes[-1][:, 0], inside, weights)
        for each, errors in zip(left[..., after], block, strict=True):
            each.addmm_(errors, factor[part, after], alpha=-1)  # in place: what is left is much larger than the group
    return codes, torch.cat(sizes, 1)


def _in_torch(left: Tensor, tables: list[Tensor], sizes: Tensor, factor: Tensor, share: Tensor) -> Tensor:
    """Choose the codes of one group, [N, B], of sizes [N]; ``left``, [W, N, B], becomes the errors over the factor's diagonal."""
    codes = torch.empty(left.shape[1:], dtype=torch.int64, device=left.device)
    leaves = [table.repeat_interleave(len(tables[-1]) // len(table)) for table in tables]
    for j in range(left.shape[2]):
        ideal = left[..., j] / sizes
        costs = [
            count * (each - wanted[:, None]).square() for count, each, wanted in zip(share, leaves, ideal, strict=True)
        ]
        codes[:, j] = torch.stack(costs).sum(0).argmin(1)
        found = torch.stack([each[codes[:, j]] for each in leaves]) * sizes
        error = (left[..., j] - found) / factor[j, j]
        left[..., j + 1 :] -= error[..., None] * factor[j, j + 1 :]
        left[..., j] = error
    return codes


def _compiled(left: Tensor, tables: list[Tensor], sizes: Tensor, factor: Tensor, share: Tensor) -> Tensor:
    """Do what :func:`_in_torch` does, a few rows at a time."""
    codes = torch.empty(left.shape[1:], dtype=torch.int64)
    entries = np.zeros((len(tables), len(tables[-1])), np.float32)
    for w, table in enumerate(tables):
        entries[w, : len(table)] = table.numpy()
    errors, size, by, counts, found = left.numpy(), sizes.numpy(), factor.numpy(), share.numpy(), codes.numpy()

    def run(rows: slice) -> None:
        _feed_rows(found[rows], size[rows], entries, counts, errors[:, rows], by)

    in_threads(run, len(codes), torch.get_num_threads())
    return codes


@compiled
def _feed_rows(
    codes: Integers, sizes: Floats32, tables: Floats32, share: Floats32, left: Floats32, factor: Floats32
) -> None:
    rows, columns = codes.shape
    levels, count = tables.shape
    entries, costs = np.zeros((levels, count, LANES), np.float32), np.zeros((levels, count, LANES), np.float32)
    for lane in range(LANES):
        entries[:, :, lane] = tables
    here, size = np.zeros((levels, columns, LANES), np.float32), np.ones(LANES, np.float32)
    ideal, room = np.zeros((levels, LANES), np.float32), np.zeros(LANES, np.float32)
    new, path = np.zeros(LANES, np.int32), np.zeros((columns, LANES), np.int32)
    for start in range(0, rows, LANES):
        some = slice(start, min(start + LANES, rows))
        filled = some.stop - start
        size[:filled] = sizes[some]
        for w in range(levels):
            here[w, :, :filled] = left[w, some].T
        for j in range(columns):
            for w in range(U(levels)):
                for lane in range(U(LANES)):
                    ideal[w, lane] = here[w, U(j), lane] / size[lane]
            weigh(entries, ideal, share, costs)
            best_paths(costs, room, new)
            path[j] = new
            for w in range(levels):
                above, error = U(levels - 1 - w), here[w, j]
                for lane in range(U(LANES)):
                    error[lane] -= entries[w, U(new[lane]) >> above, lane] * size[lane]
                    error[lane] /= factor[j, j]
                for k in range(U(j + 1), U(columns)):
                    by = factor[j, k]
                    for lane in range(U(LANES)):
                        here[w, k, lane] -= error[lane] * by
        codes[some] = path[:, :filled].T
        for w in range(levels):
            left[w, some] = here[w, :, :filled].T
