"""The inner loop of :meth:`compress.quant.tree.Tree.descend` for a CPU: rows by themselves, compiled."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from compress.quant.kmeans_seed import compiled

Floats32 = NDArray[np.float32]
Integers = NDArray[np.int64]


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
    """Rows of one block of columns, in place; arguments as for :func:`descend_columns`, tables laid out by :func:`_places`."""
    rows, columns = codes.shape
    widths = share.shape[0]
    parent = round(np.log2(code.shape[0]))
    first = parent - widths + 1
    costs = np.empty((widths, 2 ** (parent - kept)), np.float32)
    for r in range(rows):
        for j in range(columns):
            if fixed[r, j]:
                continue
            top, old = divmod(place[codes[r, j]], 2 ** (parent - kept))
            # What moving to each entry would change of the error, from the leaves up: the best below every node.
            for w in range(widths - 1, -1, -1):
                nodes = 2 ** (first + w - kept)
                begin = 2 ** (first + w) + top * nodes
                table, cost = tables[r, begin : begin + nodes], costs[w, :nodes]
                now = table[old & (nodes - 1)]
                curvature, slope = share[w] * metric[w, j, j], share[w] * np.float32(2.0) * gradient[r, w, j]
                if w == widths - 1:
                    for node in range(nodes):
                        moved = table[node] - now
                        cost[node] = moved * (curvature * moved + slope)
                else:
                    left, right = costs[w + 1, :nodes], costs[w + 1, nodes : 2 * nodes]
                    for node in range(nodes):
                        moved = table[node] - now
                        cost[node] = moved * (curvature * moved + slope) + min(left[node], right[node])
            nodes, new = 2 ** (first - kept), 0
            for node in range(1, nodes):
                if costs[0, node] < costs[0, new]:
                    new = node
            for w in range(1, widths):
                if costs[w, new + nodes] < costs[w, new]:
                    new += nodes
                nodes *= 2
            if new == old:
                continue
            codes[r, j] = code[top * nodes + new]
            for w in range(widths):
                nodes = 2 ** (first + w - kept)
                begin = 2 ** (first + w) + top * nodes
                moved = tables[r, begin + (new & (nodes - 1))] - tables[r, begin + (old & (nodes - 1))]
                if moved != 0.0:
                    later, row = gradient[r, w, j + 1 :], metric[w, j, j + 1 :]
                    for k in range(later.shape[0]):
                        later[k] += moved * row[k]


def _places(bits: int, kept: int) -> Integers:
    """Where a width's entries lie: in order of their top ``kept`` bits, then of the others reversed.

    So the children of entry p of the n under a node are p and p + n of the next width, and loops over entries run over neighbours.
    """
    codes = np.arange(2**bits)
    places = codes >> (bits - kept)
    for bit in range(bits - kept):
        places = 2 * places + (codes >> bit & 1)
    return places


def descend_columns(
    codes: Integers,
    fixed: NDArray[np.bool_],
    tables: Mapping[int, Floats32],
    share: Floats32,
    kept: int,
    gradient: Floats32,
    metric: Floats32,
    threads: int,
) -> None:
    """Choose the paths of a block of columns anew, one column after another, in place.

    Args:
        codes: [N, B], parent codes; changed.
        fixed: [N, B], weights that stay.
        tables: width -> [N, 2**width], for W consecutive widths up to the parent's.
        share: [W], what the error of each counts.
        kept: how many of a code's highest bits stay.
        gradient: [N, W, B], half the gradient of each width's error; changed.
        metric: [W, B, B].
        threads: rows are spread over them; the result does not depend on it.
    """
    place = _places(max(tables), kept)
    code = np.argsort(place)
    laid = np.zeros((len(codes), 2 * len(place)), np.float32)  # width b from column 2**b on
    for bits, table in tables.items():
        laid[:, 2**bits : 2 ** (bits + 1)] = table[:, np.argsort(_places(bits, kept))]
    bounds = [codes.shape[0] * i // threads for i in range(threads + 1)]

    def run(first: int, last: int) -> None:
        rows = slice(first, last)
        _descend_rows(codes[rows], fixed[rows], laid[rows], share, kept, gradient[rows], metric, place, code)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(run, bounds[:-1], bounds[1:]))
