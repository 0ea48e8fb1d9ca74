"""The inner loop of :meth:`compress.quant.tree.Tree.descend` for a CPU: rows by themselves, compiled."""

from __future__ import annotations

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
    below: int,
    gradient: Floats32,
    metric: Floats32,
) -> None:
    """Rows of one block of columns, in place; arguments as for :func:`descend_columns`."""
    rows, columns = codes.shape
    widths = share.shape[0]
    parent = round(np.log2(tables.shape[1])) - 1
    seed = parent - widths + 1
    # Entries and nodes are numbered as in a heap: the children of node n are 2n and 2n + 1.
    costs = np.empty(tables.shape[1], np.float32)
    for r in range(rows):
        for j in range(columns):
            if fixed[r, j]:
                continue
            leaf = 2**parent + codes[r, j]
            # What moving to each entry would change of the error, from the leaves up: the best below every node.
            for w in range(widths - 1, -1, -1):
                bits = seed + w
                first, end = 2**bits, 2 ** (bits + 1)
                if below >= 0:
                    first = (leaf >> (parent - below)) << (bits - below)
                    end = first + 2 ** (bits - below)
                now = tables[r, leaf >> (parent - bits)]
                curvature, slope = share[w] * metric[w, j, j], share[w] * np.float32(2.0) * gradient[r, w, j]
                for node in range(first, end):
                    moved = tables[r, node] - now
                    costs[node] = moved * (curvature * moved + slope)
                if bits < parent:
                    for node in range(first, end):
                        costs[node] += min(costs[2 * node], costs[2 * node + 1])
            node = first
            for other in range(first + 1, end):
                if costs[other] < costs[node]:
                    node = other
            for _ in range(widths - 1):
                node = 2 * node + (costs[2 * node + 1] < costs[2 * node])
            codes[r, j] = node - 2**parent
            for w in range(widths):
                up = parent - seed - w
                moved = tables[r, node >> up] - tables[r, leaf >> up]
                if moved != 0.0:
                    for k in range(j + 1, columns):
                        gradient[r, w, k] += moved * metric[w, j, k]


def descend_columns(
    codes: Integers,
    fixed: NDArray[np.bool_],
    tables: Floats32,
    share: Floats32,
    below: int,
    gradient: Floats32,
    metric: Floats32,
    threads: int,
) -> None:
    """Choose the paths of a block of columns anew, one column after another, in place.

    Args:
        codes: [N, B], parent codes; changed.
        fixed: [N, B], weights that stay.
        tables: [N, 2**(parent + 1)], the entries of width b from column ``2**b`` on.
        share: [W], what the error of each of the W largest widths counts.
        below: width whose codes are kept, or -1.
        gradient: [N, W, B], half the gradient of each width's error; changed.
        metric: [W, B, B].
        threads: rows are spread over them; the result does not depend on it.
    """
    bounds = [codes.shape[0] * i // threads for i in range(threads + 1)]

    def run(first: int, last: int) -> None:
        rows = slice(first, last)
        _descend_rows(codes[rows], fixed[rows], tables[rows], share, below, gradient[rows], metric)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(run, bounds[:-1], bounds[1:]))
