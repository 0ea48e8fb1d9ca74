"""The inner loop of :meth:`compress.quant.nested.Tree.descend`, for a CPU compiled: rows by themselves.

Rows are taken LANES at a time, in innermost loops without branches, which compile to vector instructions. Indices are
unsigned, as a check for negative ones would keep them from doing so.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compress.quant.kmeans_seed import compiled, in_threads

Floats32 = NDArray[np.float32]
Integers = NDArray[np.int64]
Flags = NDArray[np.bool_]
Codes = NDArray[np.int32]
U = np.uint64
LANES = 64  # rows


@compiled
def weigh(entries: Floats32, ideal: Floats32, share: Floats32, costs: Floats32) -> None:
    """Cost every node of the code tree, from the leaves up: its own error plus that of the best path below it.

    ``entries``, [W, C, LANES], has those of the w-th number of bits first in its row of C; ``ideal``, [W, LANES], is what they
    should be, ``share`` [W]; ``costs``, [W, C, LANES], are overwritten.
    """
    last = U(share.shape[0] - 1)
    for w in range(last, -1, -1):
        above = last - U(w)
        nodes = U(entries.shape[1]) >> above
        for node in range(nodes):
            if above == U(0):
                for lane in range(U(LANES)):
                    away = entries[U(w), node, lane] - ideal[U(w), lane]
                    costs[U(w), node, lane] = share[w] * away * away
            else:
                left, right = node + node, node + node + U(1)
                for lane in range(U(LANES)):
                    away = entries[U(w), node, lane] - ideal[U(w), lane]
                    below = min(costs[U(w) + U(1), left, lane], costs[U(w) + U(1), right, lane])
                    costs[U(w), node, lane] = share[w] * away * away + below


@compiled
def best_paths(costs: Floats32, best: Floats32, new: Codes) -> None:
    """Find the codes [LANES] of the best paths."""
    levels, entries = costs.shape[0], costs.shape[1]
    for lane in range(U(LANES)):
        new[lane], best[lane] = 0, costs[0, 0, lane]
    for node in range(U(1), U(entries) >> U(levels - 1)):
        for lane in range(U(LANES)):
            less = costs[0, node, lane] < best[lane]
            new[lane] = node if less else new[lane]
            best[lane] = costs[0, node, lane] if less else best[lane]
    for w in range(U(1), U(levels)):
        for lane in range(U(LANES)):
            left = U(new[lane] + new[lane])
            new[lane] = left + U(1) if costs[w, left + U(1), lane] < costs[w, left, lane] else left


@compiled
def _tell(
    entries: Floats32, old: Codes, new: Codes, size: Floats32, slope: Floats32, hessian: Floats32, j: int
) -> None:
    """Add column j's change to the slopes [W, B, LANES] of later columns, and put it in place of its own slope."""
    last = U(entries.shape[0] - 1)
    for w in range(U(entries.shape[0])):
        above, moved = last - w, slope[w, j]
        for lane in range(U(LANES)):
            moved[lane] = entries[w, U(new[lane]) >> above, lane] - entries[w, U(old[lane]) >> above, lane]
            moved[lane] *= size[lane]
        for k in range(U(j + 1), U(hessian.shape[0])):
            by = hessian[j, k]
            for lane in range(U(LANES)):
                slope[w, k, lane] += moved[lane] * by


@compiled
def _descend_rows(
    codes: Integers,
    fixed: Flags,
    sizes: Floats32,
    codebooks: Floats32,
    share: Floats32,
    kept: int,
    gradient: Floats32,
    hessian: Floats32,
) -> None:
    """Choose the codes of one block of columns; arguments as for :class:`Descent`, with codebooks [W, 2**parent, N]."""
    rows, columns = codes.shape
    levels, parent = share.shape[0], round(np.log2(codebooks.shape[1]))
    below = parent - kept
    codebook = np.zeros((levels, 1 << parent, LANES), np.float32)
    entries = np.zeros((levels, 1 << below, LANES), np.float32) if kept else codebook  # that the kept bits leave
    costs, slope = np.zeros_like(entries), np.zeros((levels, columns, LANES), np.float32)
    old, new, top = np.zeros(LANES, np.int32), np.zeros(LANES, np.int32), np.zeros(LANES, np.int32)
    path, free = np.zeros((columns, LANES), np.int32), np.zeros((columns, LANES), np.int32)  # free: 1 or 0
    room, size = np.zeros(LANES, np.float32), np.ones((columns, LANES), np.float32)
    ideal = np.zeros((levels, LANES), np.float32)
    for start in range(0, rows, LANES):
        here = slice(start, min(start + LANES, rows))
        filled = here.stop - start
        codebook[:, :, :filled] = codebooks[:, :, here]
        path[:, :filled], free[:, :filled] = codes[here].T, ~fixed[here].T
        if sizes.shape[1]:
            size[:, :filled] = sizes[here].T
        for w in range(levels):
            slope[w, :, :filled] = gradient[w, here].T
        for j in range(columns):
            for lane in range(U(LANES)):
                top[lane], old[lane] = path[j, lane] >> below, path[j, lane] & ((1 << below) - 1)
            if kept:
                for w in range(U(levels)):
                    nodes = U(1 << below) >> U(levels - 1 - w)
                    for node in range(nodes):
                        for lane in range(U(LANES)):
                            entries[w, node, lane] = codebook[w, U(top[lane]) * nodes + node, lane]
            for w in range(levels):
                for lane in range(U(LANES)):
                    held = entries[w, U(old[lane]) >> U(levels - 1 - w), lane]
                    ideal[w, lane] = held - slope[w, j, lane] / size[j, lane] / hessian[j, j]
            weigh(entries, ideal, share, costs)
            best_paths(costs, room, new)
            for lane in range(U(LANES)):
                new[lane] = old[lane] + free[j, lane] * (new[lane] - old[lane])
                path[j, lane] = (top[lane] << below) + new[lane]
            _tell(entries, old, new, size[j], slope, hessian, j)
        codes[here] = path[:, :filled].T
        for w in range(levels):
            gradient[w, here] = slope[w, :, :filled].T


class Descent:
    """Choose the paths of blocks of columns anew, one column after another.

    ``codebooks`` holds [N, 2**bits] for W consecutive numbers of bits up to the parent's, ``share``, [W], what the error of
    each counts; the highest ``kept`` bits of a code stay.
    """

    def __init__(self, codebooks: Mapping[int, Floats32], share: Floats32, kept: int) -> None:
        self._share, self._kept = share, kept
        self._pool = ThreadPoolExecutor(torch.get_num_threads())  # its threads end with it
        rows, entries = codebooks[max(codebooks)].shape
        self._codebooks = np.zeros((len(codebooks), entries, rows), np.float32)
        for w, bits in enumerate(sorted(codebooks)):
            self._codebooks[w, : 2**bits] = codebooks[bits].T

    def __call__(self, codes: Integers, fixed: Flags, sizes: Floats32, gradient: Floats32, hessian: Floats32) -> None:
        """Change parent codes [N, B] in place, but for weights that are ``fixed`` [N, B], given the Hessian [B, B].

        Entries are multiplied by ``sizes`` [N, B], by 1 if it is [N, 0]. ``gradient``, [W, N, B], is half that of the error at each
        number of bits; the changes of the weights overwrite it.
        """

        def run(rows: slice) -> None:
            of_rows = codes[rows], fixed[rows], sizes[rows], self._codebooks[..., rows]
            _descend_rows(*of_rows, self._share, self._kept, gradient[:, rows], hessian)

        in_threads(run, len(codes), torch.get_num_threads(), self._pool)


class GpuDescent:
    """Do what :class:`Descent` does, on tensors on a GPU: one launch for a block of columns."""

    def __init__(self, codebooks: Mapping[int, Tensor], share: Floats32, kept: int) -> None:
        self._bits, self._kept = sorted(codebooks), kept
        self._codebooks = torch.cat([codebooks[bits] for bits in self._bits], 1)
        self._share = torch.from_numpy(share).to(self._codebooks.device)

    def __call__(self, codes: Tensor, fixed: Tensor, sizes: Tensor, gradient: Tensor, hessian: Tensor) -> None:
        """Change parent codes, int64 [N, B], in place, and the gradient, float32 [W, N, B]; all are contiguous."""
        from compress.kernels.triton_descent import descend

        (rows, columns), entries, new = codes.shape, self._codebooks.shape[1], torch.empty_like(codes)
        constants = {"LEVELS": len(self._bits), "PARENT": self._bits[-1], "KEPT": self._kept}
        constants["SIZES"] = int(sizes.shape[1] > 0)
        with torch.cuda.device(codes.get_device()):
            descend[(rows,)](
                *(codes, new, fixed, sizes, self._codebooks, self._share, gradient, hessian, rows, columns, entries),
                **constants,
                BLOCK=1 << (columns - 1).bit_length(),
                num_warps=1,
            )
        codes.copy_(new)


def sums_by_code(values: Tensor, codes: Tensor, entries: int) -> Tensor:
    """Sum values, float32 [N, K, D], over the columns with each code of int64 [N, K], on a GPU: float32 [N, entries, D].

    Unlike ``scatter_add_`` there, it gives the same bits every time. The values may be expanded.
    """
    from compress.kernels.triton_descent import sum_by_code

    rows, columns, parts = values.shape
    codes, sums = codes.contiguous(), values.new_empty(rows, entries, parts)
    warps = max(1, entries // 64)  # a thread then has 32 sums at most
    with torch.cuda.device(codes.get_device()):
        sum_by_code[(rows, parts)](
            values, codes, sums, columns, *values.stride(), ENTRIES=entries, STEP=16, num_warps=warps
        )
    return sums


@compiled
def _gather_rows(codes: Integers, spread: Floats32, sums: Floats32) -> None:
    for r in range(U(codes.shape[0])):
        for k in range(U(codes.shape[1])):
            code = U(codes[r, k])
            for d in range(U(spread.shape[1])):
                sums[r, code, d] += spread[k, d]


def gather_columns(codes: Tensor, spread: Tensor, entries: int) -> Tensor:
    """Sum ``spread`` [K, D] over the columns with each code, for every row of ``codes`` [N, K]: float32 [N, entries, D]."""
    sums = torch.zeros(len(codes), entries, spread.shape[1])
    given, columns, result = codes.numpy(), spread.numpy(), sums.numpy()
    in_threads(lambda rows: _gather_rows(given[rows], columns, result[rows]), len(codes), torch.get_num_threads())
    return sums


@compiled
def _split_rows(
    codes: Integers,
    targets: Floats32,
    weight: Floats32,
    codebook: Floats32,
    zeros: Flags,
    steps: int,
    new: Integers,
    found: Floats32,
) -> None:
    sums = np.zeros((3, found.shape[1]), np.float32)
    mass, total, held = sums[0], sums[1], sums[2]
    for r in range(U(codes.shape[0])):
        border = codebook[r].copy()
        held[:] = 0
        for k in range(U(codes.shape[1])):
            if zeros[r, k]:
                held[U(2 * codes[r, k])] = 1
        for _ in range(steps):
            mass[:], total[:] = 0, 0
            for k in range(U(codes.shape[1])):
                old = U(codes[r, k])
                code = old + old + U(targets[r, k] > border[old] and not zeros[r, k])
                new[r, k] = code
                mass[code] += weight[k]
                total[code] += weight[k] * targets[r, k]
            for c in range(U(len(mass))):
                mean = total[c] / mass[c] if mass[c] > 0 else codebook[r, c >> U(1)]
                found[r, c] = np.float32(0) if held[c] > 0 else mean
            for c in range(U(len(border))):
                border[c] = (found[r, c + c] + found[r, c + c + U(1)]) / np.float32(2)


def split_cells(
    codes: Tensor, targets: Tensor, weight: Tensor, codebook: Tensor, zeros: Tensor, steps: int
) -> tuple[Tensor, Tensor]:
    """Halve every cell of every row by so many steps of two-means from the first borders, ``codebook``, float32 [N, C].

    Takes int64 codes and float32 targets [N, K], float32 [K], what the error of a column counts, and bool [N, K], zeros,
    which stay in the lower half of their cell, whose entry is 0. Returns the new codes, and the means of the halves,
    [N, 2 * C]; that of an empty half is as in ``codebook``.
    """
    new, found = torch.empty_like(codes), torch.empty(len(codebook), 2 * codebook.shape[1])
    old, wanted, borders, fixed = (t.contiguous().numpy() for t in (codes, targets, codebook, zeros))
    columns, halves, means = weight.contiguous().numpy(), new.numpy(), found.numpy()

    def run(rows: slice) -> None:
        _split_rows(old[rows], wanted[rows], columns, borders[rows], fixed[rows], steps, halves[rows], means[rows])

    in_threads(run, len(codes), torch.get_num_threads())
    return new, found
