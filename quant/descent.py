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
    tables: Floats32,
    widths: Integers,
    share: Floats32,
    below: int,
    dense: Floats32,
    gradient: Floats32,
    metric: Floats32,
    change: Floats32,
    fixed: NDArray[np.bool_],
) -> None:
    """Rows of one block of columns, in place; arguments as for :func:`descend_columns`."""
    top = widths.shape[0] - 1
    parent = widths[top]
    costs, paths = np.empty(2**parent, np.float32), np.empty(2**parent, np.int64)
    for r in range(codes.shape[0]):
        for j in range(codes.shape[1]):
            if fixed[r, j]:
                change[:, r, j] = 0.0
                continue
            # What moving to each entry would change of the error, from the leaves up: the best below every node.
            for w in range(top, -1, -1):
                bits = widths[w]
                first, count = 0, 2**bits
                if below >= 0:
                    first = (codes[r, j] >> (parent - below)) << (bits - below)
                    count = 2 ** (bits - below)
                curvature, slope = metric[w, j, j], np.float32(2.0) * gradient[w, r, j]
                for e in range(count):
                    moved = tables[r, 2**bits + first + e] - dense[w, r, j]
                    own = share[w] * moved * (curvature * moved + slope)
                    if w == top:
                        costs[e], paths[e] = own, first + e
                    else:
                        best = 2 * e + (costs[2 * e + 1] < costs[2 * e])
                        costs[e], paths[e] = costs[best] + own, paths[best]
            best = 0
            for e in range(1, count):
                if costs[e] < costs[best]:
                    best = e
            codes[r, j] = paths[best]
            for w in range(top + 1):
                value = tables[r, 2 ** widths[w] + (paths[best] >> (parent - widths[w]))]
                moved = value - dense[w, r, j]
                dense[w, r, j], change[w, r, j] = value, moved
                if moved != 0.0:
                    for k in range(codes.shape[1]):
                        gradient[w, r, k] += moved * metric[w, j, k]


def descend_columns(
    codes: Integers,
    tables: Floats32,
    widths: Integers,
    share: Floats32,
    below: int,
    dense: Floats32,
    gradient: Floats32,
    metric: Floats32,
    change: Floats32,
    fixed: NDArray[np.bool_],
    threads: int,
) -> None:
    """Choose the paths of a block of columns anew, one column after another, in place.

    Args:
        codes: [N, B], parent codes; changed.
        tables: [N, 2**(parent + 1)], the entries of width b from column ``2**b`` on.
        widths: [W], consecutive and ascending; the last is the parent's.
        share: [W], what each width's error counts.
        below: width whose codes are kept, or -1.
        dense: [W, N, B], weights at each width; changed.
        gradient: [W, N, B], half the gradient of each width's error; changed within the block.
        metric: [W, B, B].
        change: [W, N, B]; by how much the weights were moved.
        fixed: [N, B], weights that stay.
        threads: rows are spread over them; the result does not depend on it.
    """
    bounds = [codes.shape[0] * i // threads for i in range(threads + 1)]

    def run(first: int, last: int) -> None:
        rows = slice(first, last)
        _descend_rows(
            codes[rows], tables[rows], widths, share, below,
            dense[:, rows], gradient[:, rows], metric, change[:, rows], fixed[rows],
        )  # fmt: skip

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(run, bounds[:-1], bounds[1:]))
