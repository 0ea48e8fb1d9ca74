"""Weighted one-dimensional k-means per output row, as a tree of codebooks nested over numbers of bits.

The seed codebook is (near) optimal by dynamic programming, and each further bit splits every cell at its exact best
point: the incremental upscaling of Any-Precision LLM (Park et al., arXiv 2402.10517, section 3.2) with the two
heuristics it uses, k-means++ and a binary search for a 2-means fixed point, replaced by optimal counterparts. (Every
step is optimal; the whole tree is not, as a worse seed can by chance have the better children.)

Nothing here is random and no sum is shared between rows, so results do not depend on the number of threads.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from compress.quant.format import Codes
from compress.quant.kmeans_seed import (
    Floats,
    Scratch,
    allocate_scratch,
    compiled,
    distinct_values,
    in_threads,
    seed_row,
    sort_row,
)

MAX_BITS = 8


@compiled
def _mean(x: Floats, w: Floats, a: int, b: int) -> tuple[float, float]:
    """Return (mean, mass) of the points a..b, summed relative to one of them: exact for a single point."""
    reference = x[(a + b) // 2]
    # Two chains each: a sum waits for the latency of its addition, and the compiler may not reorder floats.
    s0 = t0 = s1 = t1 = 0.0
    for i in range(a, b - 1, 2):
        s0 += w[i]
        t0 += w[i + 1]
        s1 += w[i] * (x[i] - reference)
        t1 += w[i + 1] * (x[i + 1] - reference)
    if (b - a) % 2:
        s0 += w[b - 1]
        s1 += w[b - 1] * (x[b - 1] - reference)
    mean = reference + (s1 + t1) / (s0 + t0)
    return min(max(mean, x[a]), x[b - 1]), s0 + t0


@compiled
def _best_split(x: Floats, w: Floats, a: int, b: int, mean: float, mass: float) -> int:
    """Find the border in a < i < b that minimises the two parts' squared error; b if there is none.

    With S1 the left part's sum of w (x - mean), splitting saves S1^2 (1/left + 1/right), left and right the parts'
    masses. Ratios are compared crosswise, as a division per point would dominate.
    """
    if b - a < 2:
        return b
    # The best border is the midpoint of the parts' means, which lie in [x[a], mean] and [mean, x[b - 1]].
    low, high = 0.5 * (x[a] + mean), 0.5 * (mean + x[b - 1])
    left = s1 = 0.0
    i = a
    while x[i + 1] < low:
        left += w[i]
        s1 += w[i] * (x[i] - mean)
        i += 1
    best_saving, best_scale = -1.0, 1.0
    border = b
    while i < b - 1 and x[i] <= high:
        left += w[i]
        s1 += w[i] * (x[i] - mean)
        saving = s1 * s1
        scale = left * (mass - left)
        i += 1
        if saving * best_scale > best_saving * scale:
            best_saving, best_scale = saving, scale
            border = i
    return border


@compiled
def _split_zero_cell(x: Floats, w: Floats, a: int, b: int, zero: int) -> tuple[int, bool]:
    """Find the best border of the cell a..b whose part with the zeros stays centred on 0, and whether that part is the upper.

    Cutting off a part saves S1^2 / S0 of that part. Without anything to cut, the border is b.
    """
    best = -1.0
    border = b
    upper = False
    s0 = s1 = 0.0
    for i in range(a, zero):
        s0 += w[i]
        s1 += w[i] * x[i]
        if s1 * s1 / s0 > best:
            best = s1 * s1 / s0
            border = i + 1
            upper = True
    s0 = s1 = 0.0
    for i in range(b - 1, zero, -1):
        s0 += w[i]
        s1 += w[i] * x[i]
        saving = s1 * s1 / s0
        if saving > best or (saving == best and not upper):
            best = saving
            border = i
            upper = False
    return border, upper


@compiled
def _set_centroids(cells: int, zero_cell: int, scratch: Scratch) -> None:
    """Set the centroids of the cells with members; the others keep what they inherited."""
    for c in range(cells):
        a, b = scratch.borders[c], scratch.borders[c + 1]
        if c == zero_cell:
            scratch.centroids[c] = 0.0
        elif a < b:
            scratch.centroids[c], scratch.masses[c] = _mean(scratch.x, scratch.w, a, b)


@compiled
def _split_cells(cells: int, zero: int, zero_cell: int, scratch: Scratch) -> int:
    """Replace cell c by its children 2c and 2c + 1, in place; return the zeros' new cell."""
    x, w, borders, centroids = scratch.x, scratch.w, scratch.borders, scratch.centroids
    new_zero_cell = -1
    borders[2 * cells] = borders[cells]
    for c in range(cells - 1, -1, -1):  # downwards: entries 2c and 2c + 1 are never read again
        a, b = borders[c], borders[c + 1]
        if c == zero_cell:
            border, upper = _split_zero_cell(x, w, a, b, zero)
            new_zero_cell = 2 * c + upper
        else:
            border = _best_split(x, w, a, b, centroids[c], scratch.masses[c])
        borders[2 * c], borders[2 * c + 1] = a, border
        centroids[2 * c] = centroids[2 * c + 1] = centroids[c]
    return new_zero_cell


@compiled
def _nest_rows(
    weight: NDArray[np.float32],
    sensitivity: NDArray[np.float32],
    seed_bits: int,
    parent_bits: int,
    keep_zeros: bool,
    codes: NDArray[np.uint8],
    codebooks: NDArray[np.float32],
) -> None:
    """Cluster all rows of one chunk; the b-bit codebook goes to columns 2**b - 2**seed .. of ``codebooks``.

    sensitivity has either as many rows as weight or a single one for all.
    """
    scratch = allocate_scratch(weight.shape[1], 2**seed_bits, 2**parent_bits)
    borders = scratch.borders
    for r in range(weight.shape[0]):
        f = sensitivity[r % sensitivity.shape[0]]
        order = sort_row(weight[r], scratch)
        count, zero = distinct_values(weight[r], f, order, keep_zeros, scratch)
        cells = 2**seed_bits
        used, zero_cell = seed_row(count, zero, cells, scratch)
        _set_centroids(used, zero_cell, scratch)
        scratch.centroids[used:cells] = scratch.centroids[used - 1]
        for bits in range(seed_bits, parent_bits + 1):
            if bits > seed_bits:
                zero_cell = _split_cells(cells, zero, zero_cell, scratch)
                cells *= 2
                _set_centroids(cells, zero_cell, scratch)
            for c in range(cells):
                codebooks[r, cells - 2**seed_bits + c] = scratch.centroids[c]
        for c in range(cells):
            for i in range(scratch.start[borders[c]], scratch.start[borders[c + 1]]):
                codes[r, order[i] & np.uint64(0xFFFFFFFF)] = c


def _refuse_rows(good: NDArray[np.bool_], what: str) -> None:
    """Refuse a matrix, naming its first row that is not all good."""
    bad = ~good.all(1)
    if bad.any():
        raise ValueError(what.format(bad.argmax()))


def _checked(
    weight: NDArray[np.float32], sensitivity: NDArray[np.float32] | None
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return weight [N, K] and sensitivity ([N, K], or [1, K] of ones for None) contiguous, or refuse them."""
    if weight.ndim != 2 or weight.shape[1] == 0:
        raise ValueError(f"weight must be [N, K] with K >= 1, got shape {weight.shape}")
    if sensitivity is None:
        sensitivity = np.ones((1, weight.shape[1]), np.float32)
    elif sensitivity.shape != weight.shape:
        raise ValueError(f"sensitivity has shape {sensitivity.shape}, weight {weight.shape}: they must be equal")
    if weight.dtype != np.float32 or sensitivity.dtype != np.float32:
        raise TypeError(f"weight and sensitivity must be float32, got {weight.dtype} and {sensitivity.dtype}")
    weight, sensitivity = np.ascontiguousarray(weight), np.ascontiguousarray(sensitivity)
    _refuse_rows(np.isfinite(weight), "weight row {} has a value that is not finite")
    _refuse_rows(
        (sensitivity >= 0) & (sensitivity < np.inf), "sensitivity row {} has a value that is negative or not finite"
    )
    return weight, sensitivity


def nested_codebooks(
    weight: NDArray[np.float32],
    sensitivity: NDArray[np.float32] | None,
    seed_bits: int,
    parent_bits: int,
    keep_zeros: bool = False,
    threads: int = 1,
) -> Codes:
    """Cluster every row at seed_bits, then split every cell once per further bit, up to parent_bits.

    Minimises sum_j F_ij (w_ij - c_q(ij))^2 per row i, the objective of SqueezeLLM (arXiv 2306.07629, section 4.1)
    and Any-Precision LLM (arXiv 2402.10517, section 3.2). The seed is optimal for rows of at most 512 distinct
    values (or 4 per cell, if more) and otherwise optimal over that many candidate borders, then refined by Lloyd
    steps. Every split is the optimal one of its cell. Equal weights always share a code.

    weight: float32 [N, K], finite. sensitivity: float32 [N, K], finite and not negative, or None for all ones; zeros
    count as 1e-6 of the row's mean, and a row of nothing but zeros as ones. keep_zeros: represent the exact zeros of
    a row by exactly 0.0 at every number of bits (their cell's centroid is 0.0 instead of its mean). threads: rows are spread
    over this many threads in contiguous chunks; the result does not depend on it.

    Returns codes uint8 [N, K] and codebooks float32 [N, 2**b] for b = seed_bits..parent_bits, ascending (not strictly)
    within each row. Cells left over where a row has fewer distinct values than 2**b repeat the centroid they were split from.

    Raises ValueError for shapes, for bits outside 1 <= seed_bits <= parent_bits <= 8, for threads < 1 and, naming
    the row, for values that are not finite or negative sensitivities; TypeError for other dtypes.
    """
    if not 1 <= seed_bits <= parent_bits <= MAX_BITS:
        raise ValueError(f"need 1 <= seed_bits <= parent_bits <= {MAX_BITS}, got {seed_bits} and {parent_bits}")
    if threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    weight, sensitivity = _checked(weight, sensitivity)
    rows = weight.shape[0]
    codes = np.empty(weight.shape, np.uint8)
    codebooks = np.empty((rows, 2 ** (parent_bits + 1) - 2**seed_bits), np.float32)

    def run(part: slice) -> None:
        f = sensitivity[part] if sensitivity.shape[0] == rows else sensitivity
        _nest_rows(weight[part], f, seed_bits, parent_bits, keep_zeros, codes[part], codebooks[part])

    in_threads(run, rows, threads)
    parts = np.split(codebooks, [2**b - 2**seed_bits for b in range(seed_bits + 1, parent_bits + 1)], axis=1)
    return Codes(torch.from_numpy(codes), {b: torch.from_numpy(part.copy()) for b, part in enumerate(parts, seed_bits)})
