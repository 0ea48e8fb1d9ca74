"""The inner loop of :meth:`compress.quant.tree.Tree.descend` for a CPU: rows by themselves, compiled."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from compress.quant.kmeans_seed import compiled

Floats32 = NDArray[np.float32]
Integers = NDArray[np.int64]
U = np.uint64
LANES = 64  # rows


@compiled
def _descend_rows(
    codes: Integers,
    fixed: NDArray[np.bool_],
    tables: Floats32,
    share: Floats32,
    kept: int,
    gradient: Floats32,
    metric: Floats32,
    place: Integers,
    code: Integers,
) -> None:
    """Rows of one block of columns; arguments as for :class:`Descent`, but rows last, and tables laid out by :func:`_places`.

    Rows are taken LANES at a time, in innermost loops without branches, which compilers turn into vector instructions.
    (Indices are unsigned, as a check for negative ones would keep them from doing so.)
    """
    columns, rows = codes.shape
    widths = share.shape[0]
    parent = round(np.log2(place.shape[0]))
    first, below = parent - widths + 1, parent - kept
    lanes = U(LANES)
    table = np.zeros((widths << parent, LANES), np.float32)
    under = (
        np.zeros((widths << below, LANES), np.float32) if kept else table
    )  # the entries that a code's kept bits leave
    costs = np.empty((widths << below, LANES), np.float32)
    slope = np.zeros((widths, columns, LANES), np.float32)
    path, free = np.zeros((columns, LANES), np.int32), np.zeros((columns, LANES), np.int32)  # free: 1 or 0
    old, new, top = np.zeros(LANES, np.int32), np.zeros(LANES, np.int32), np.zeros(LANES, np.int32)
    best, moved = np.zeros(LANES, np.float32), np.zeros(LANES, np.float32)
    for start in range(0, rows, LANES):
        filled = min(LANES, rows - start)
        for w in range(widths):
            for node in range(1 << (first + w)):
                for lane in range(filled):
                    table[(w << parent) + node, lane] = tables[(1 << (first + w)) + node, start + lane]
            for j in range(columns):
                for lane in range(filled):
                    slope[w, j, lane] = gradient[w, j, start + lane]
        for j in range(U(columns)):
            for lane in range(U(filled)):
                path[j, lane] = place[U(codes[j, U(start) + lane])]
                free[j, lane] = not fixed[j, U(start) + lane]
        for j in range(U(columns)):
            for lane in range(lanes):
                top[lane], old[lane] = path[j, lane] >> below, path[j, lane] & ((1 << below) - 1)
            # How far every entry is from the ideal weight, from the leaves up: the best below every node.
            for w in range(widths - 1, -1, -1):
                nodes, here = U(1 << (first + w - kept)), U(w << below)
                if kept:
                    for node in range(nodes):
                        for lane in range(lanes):
                            under[here + node, lane] = table[U(w << parent) + U(top[lane]) * nodes + node, lane]
                for lane in range(lanes):
                    now = under[here + (U(old[lane]) & (nodes - U(1))), lane]
                    best[lane] = now - slope[U(w), j, lane] / metric[j, j]
                for node in range(nodes):
                    if w == widths - 1:
                        for lane in range(lanes):
                            away = under[here + node, lane] - best[lane]
                            costs[here + node, lane] = share[w] * away * away
                    else:
                        left, right = U((w + 1) << below) + node, U((w + 1) << below) + nodes + node
                        for lane in range(lanes):
                            away = under[here + node, lane] - best[lane]
                            costs[here + node, lane] = share[w] * away * away + min(
                                costs[left, lane], costs[right, lane]
                            )
            for lane in range(lanes):
                new[lane], best[lane] = 0, costs[0, lane]
            for node in range(U(1), U(1 << (first - kept))):
                for lane in range(lanes):
                    less = costs[node, lane] < best[lane]
                    new[lane] = node if less else new[lane]
                    best[lane] = costs[node, lane] if less else best[lane]
            for w in range(1, widths):
                nodes, here = U(1 << (first + w - 1 - kept)), U(w << below)
                for lane in range(lanes):
                    at_left = here + U(new[lane])
                    new[lane] += nodes if costs[at_left + nodes, lane] < costs[at_left, lane] else U(0)
            for lane in range(lanes):
                new[lane] = old[lane] + free[j, lane] * (new[lane] - old[lane])
                path[j, lane] = (top[lane] << below) + new[lane]
            for w in range(widths):
                inside, here = U((1 << (first + w - kept)) - 1), U(w << below)
                for lane in range(lanes):
                    moved[lane] = (
                        under[here + (U(new[lane]) & inside), lane] - under[here + (U(old[lane]) & inside), lane]
                    )
                for k in range(j + U(1), U(columns)):
                    by = metric[j, k]
                    for lane in range(lanes):
                        slope[U(w), k, lane] += moved[lane] * by
        for j in range(U(columns)):
            for lane in range(U(filled)):
                codes[j, U(start) + lane] = code[U(path[j, lane])]


def _places(bits: int, kept: int) -> Integers:
    """Where a width's entries lie: in order of their top ``kept`` bits, then of the others reversed.

    So the children of entry p of the n under a node are p and p + n of the next width, and loops over entries run over neighbours.
    """
    codes = np.arange(2**bits)
    places = codes >> (bits - kept)
    for bit in range(bits - kept):
        places = 2 * places + (codes >> bit & 1)
    return places


class Descent:
    """Choose the paths of blocks of columns anew, one column after another.

    Args:
        tables: width -> [N, 2**width], for W consecutive widths up to the parent's.
        share: [W], what the error of each counts.
        kept: how many of a code's highest bits stay.
        threads: rows are spread over them; the result does not depend on it.
    """

    def __init__(self, tables: Mapping[int, Floats32], share: Floats32, kept: int, threads: int) -> None:
        self._share, self._kept, self._threads = share, kept, threads
        self._place = _places(max(tables), kept)
        self._tables = np.zeros(
            (2 * len(self._place), len(tables[max(tables)])), np.float32
        )  # width b from row 2**b on
        for bits, table in tables.items():
            self._tables[2**bits : 2 ** (bits + 1)] = table.T[np.argsort(_places(bits, kept))]

    def __call__(self, codes: Integers, fixed: NDArray[np.bool_], gradient: Floats32, metric: Floats32) -> None:
        """Change codes in place.

        Args:
            codes: [B, N], parent codes.
            fixed: [B, N], weights that stay.
            gradient: [W, B, N], half the gradient of each width's error.
            metric: [B, B].
        """
        code = np.argsort(self._place)

        def run(rows: slice) -> None:
            _descend_rows(
                codes[:, rows], fixed[:, rows], self._tables[:, rows], self._share, self._kept,
                gradient[..., rows], metric, self._place, code,
            )  # fmt: skip

        _in_threads(run, codes.shape[1], self._threads)


@compiled
def _gather_rows(codes: Integers, spread: Floats32, sums: Floats32) -> None:
    for r in range(U(codes.shape[0])):
        for k in range(U(codes.shape[1])):
            code = U(codes[r, k])
            for d in range(U(spread.shape[1])):
                sums[r, code, d] += spread[k, d]


def gather_columns(codes: Integers, spread: Floats32, entries: int, threads: int) -> Floats32:
    """[N, entries, D]: for every row of ``codes`` [N, K], sums of ``spread`` [K, D] over the columns with each code.

    Rows are spread over ``threads``; the result does not depend on them.
    """
    sums = np.zeros((len(codes), entries, spread.shape[1]), np.float32)
    _in_threads(lambda rows: _gather_rows(codes[rows], spread, sums[rows]), len(codes), threads)
    return sums


def _in_threads(work: Callable[[slice], None], rows: int, threads: int) -> None:
    bounds = [rows * i // threads for i in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, map(slice, bounds[:-1], bounds[1:])))
