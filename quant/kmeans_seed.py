"""Sorting of a row and the best weighted one-dimensional k-means of it: the loops behind `kmeans`.

A row's distinct values are sorted, so that a cell is an interval of them and its weighted squared error follows from
prefix sums. The best cells are found by dynamic programming over candidate borders: all of them where the row has
few distinct values (the exact optimum), else a choice that adapts to the row's scales, refined by Lloyd steps.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
from numba import njit
from numpy.typing import NDArray

_Function = TypeVar("_Function", bound=Callable[..., Any])
Floats = NDArray[np.float64]
Indices = NDArray[np.int64]

CANDIDATES = 512  # rows with at most this many distinct values get the exact optimum
CANDIDATES_PER_CELL = 4
END_CANDIDATES = 8  # outermost positions that are always candidates, so that lone outliers get their own cells
LLOYD_STEPS = 10
SENSITIVITY_FLOOR = 1e-6  # of the row's mean: a cell whose sensitivities are all zero still has a mean
ROUNDING = 1e-15  # a few units of fp64 rounding: costs below it, relative to the prefix sums, are noise


def compiled(function: _Function) -> _Function:
    """Compile with numba, and keep the function's type, which numba's untyped decorator would lose."""
    return cast(_Function, njit(cache=True, nogil=True, error_model="numpy")(function))


_ROWS_OF_A_THREAD = 64  # at least


def in_threads(work: Callable[[slice], None], rows: int, threads: int, pool: ThreadPoolExecutor | None = None) -> None:
    """Spread rows over threads in contiguous parts; no result depends on their number.

    A few rows are done at once: starting threads would take longer.
    """
    threads = max(1, min(threads, rows // _ROWS_OF_A_THREAD))
    if threads == 1:
        work(slice(0, rows))
        return
    bounds = [rows * i // threads for i in range(threads + 1)]
    with nullcontext(pool) if pool else ThreadPoolExecutor(threads) as chosen:
        list(chosen.map(work, map(slice, bounds[:-1], bounds[1:])))


class Scratch(NamedTuple):
    """Hold the buffers of one thread for rows of K weights, M candidate borders at most and k seed cells."""

    order: NDArray[np.uint64]  # [K] sort key in the upper half, column in the lower half
    swap: NDArray[np.uint64]  # [K]
    counts: Indices  # [3, 2048] digit histograms
    x: Floats  # [K] distinct values, ascending
    w: Floats  # [K] summed effective sensitivities of each distinct value
    start: Indices  # [K + 1] first sorted position of each distinct value
    prefix: Floats  # [3, K + 1] sums of w, w d and w d^2 over distinct values, d the distance from the centre
    measure: Floats  # [K]
    chosen: NDArray[np.bool_]  # [K + 1]
    candidates: Indices  # [M + 1] borders the seed may use, as indices into x
    sums: Floats  # [3, M + 1] prefix sums at the candidates
    mirror: Floats  # [3, M + 1] the same from the right end
    table: Floats  # [2, k + 1, M + 1] least cost of t cells over the first i candidate intervals; [1] is mirrored
    origin: NDArray[np.int32]  # [2, k + 1, M + 1] where the last of those cells begins
    borders: Indices  # [2**parent + 1] cell c holds the distinct values borders[c]..borders[c + 1]
    trial: Indices  # [2**parent + 1]
    centroids: Floats  # [2**parent]
    masses: Floats  # [2**parent] summed effective sensitivities of each cell, where it has members


@compiled
def allocate_scratch(columns: int, seed_cells: int, parent_cells: int) -> Scratch:
    """Allocate the buffers for rows of ``columns`` weights."""
    limit = max(CANDIDATES, CANDIDATES_PER_CELL * seed_cells)
    m = limit + 2 * END_CANDIDATES + 8
    return Scratch(
        np.empty(columns, np.uint64),
        np.empty(columns, np.uint64),
        np.empty((3, 2048), np.int64),
        np.empty(columns, np.float64),
        np.empty(columns, np.float64),
        np.empty(columns + 1, np.int64),
        np.empty((3, columns + 1), np.float64),
        np.empty(columns, np.float64),
        np.empty(columns + 1, np.bool_),
        np.empty(m, np.int64),
        np.empty((3, m), np.float64),
        np.empty((3, m), np.float64),
        np.empty((2, seed_cells + 1, m), np.float64),
        np.empty((2, seed_cells + 1, m), np.int32),
        np.empty(parent_cells + 1, np.int64),
        np.empty(parent_cells + 1, np.int64),
        np.empty(parent_cells, np.float64),
        np.empty(parent_cells, np.float64),
    )


@compiled
def sort_row(row: NDArray[np.float32], scratch: Scratch) -> NDArray[np.uint64]:
    """Sort by the least significant digit first (radix); return the buffer that holds (key << 32) | column, ascending."""
    bits = row.view(np.uint32)
    source, target, counts = scratch.order, scratch.swap, scratch.counts
    mask = np.uint64(2047)
    counts[:] = 0
    for i in range(row.size):
        # IEEE floats order like sign-magnitude integers: flip all bits of negatives, the sign bit of the others.
        flip = np.uint32(0xFFFFFFFF) if bits[i] >> np.uint32(31) else np.uint32(0x80000000)
        item = (np.uint64(bits[i] ^ flip) << np.uint64(32)) | np.uint64(i)
        source[i] = item
        counts[0, (item >> np.uint64(32)) & mask] += 1
        counts[1, (item >> np.uint64(43)) & mask] += 1
        counts[2, item >> np.uint64(54)] += 1
    for digit in range(3):
        shift = np.uint64(32 + 11 * digit)
        count = counts[digit]
        if count[(source[0] >> shift) & mask] == row.size:
            continue  # e.g. the low bits of weights that were bfloat16
        total = 0
        for value in range(2048):
            here = count[value]
            count[value] = total
            total += here
        for i in range(row.size):
            value = (source[i] >> shift) & mask
            target[count[value]] = source[i]
            count[value] += 1
        source, target = target, source
    return source


@compiled
def _floor_and_scale(
    row: NDArray[np.float32], sensitivity: NDArray[np.float32], keep_zeros: bool
) -> tuple[float, float]:
    """Return (floor, scale) such that `floor + scale * F` is a positive weight of mean about one."""
    total = 0.0
    count = 0
    for i in range(row.size):
        if not (keep_zeros and row[i] == 0.0):
            total += sensitivity[i]
            count += 1
    return (SENSITIVITY_FLOOR, count / total) if total > 0.0 else (1.0, 0.0)


@compiled
def _points_up_to(x: Floats, count: int, value: float) -> int:
    """Count how many of the ascending x[:count] are <= value."""
    low, high = 0, count
    while low < high:
        middle = (low + high) // 2
        if x[middle] <= value:
            low = middle + 1
        else:
            high = middle
    return low


@compiled
def distinct_values(
    row: NDArray[np.float32],
    sensitivity: NDArray[np.float32],
    order: NDArray[np.uint64],
    keep_zeros: bool,
    scratch: Scratch,
) -> tuple[int, int]:
    """Merge equal values into one point each; return their number and the index of a zero to keep, or -1.

    Merging is what guarantees that equal weights share a code at every number of bits.
    """
    x, w, start = scratch.x, scratch.w, scratch.start
    floor, scale = _floor_and_scale(row, sensitivity, keep_zeros)
    count = 0
    zero = -1
    last = np.float32(np.nan)
    for i in range(row.size):
        column = order[i] & np.uint64(0xFFFFFFFF)
        value = row[column]
        if value != last:
            last = value
            x[count] = value
            w[count] = 0.0
            start[count] = i
            count += 1
        w[count - 1] += floor + scale * sensitivity[column]
    start[count] = row.size
    if keep_zeros:
        last_point = _points_up_to(x, count, 0.0) - 1
        if last_point >= 0 and x[last_point] == 0.0:
            zero = last_point
            w[zero] = 0.0
    return count, zero


@compiled
def _prefix_sums(x: Floats, w: Floats, count: int, pivot: int, prefix: Floats) -> None:
    """Compute prefix sums of w, w d and w d^2 with d = x - x[pivot], zero at the pivot and growing outwards.

    Outliers lie at the ends, so in this form they cannot swamp the sums of the cells between them and the pivot.
    """
    centre = x[pivot]
    s0 = s1 = s2 = 0.0
    prefix[:, pivot] = 0.0
    for i in range(pivot, count):
        d = x[i] - centre
        s0 += w[i]
        s1 += w[i] * d
        s2 += w[i] * d * d
        prefix[0, i + 1] = s0
        prefix[1, i + 1] = s1
        prefix[2, i + 1] = s2
    s0 = s1 = s2 = 0.0
    for i in range(pivot - 1, -1, -1):
        d = x[i] - centre
        s0 -= w[i]
        s1 -= w[i] * d
        s2 -= w[i] * d * d
        prefix[0, i] = s0
        prefix[1, i] = s1
        prefix[2, i] = s2


@compiled
def _cost(sums: Floats, a: int, b: int, noise: float) -> float:
    """Return the weighted squared error of the cell between borders a < b around its own mean.

    The difference cancels in a cell much narrower than its distance from the centre; what is left of a lone outlier
    would hide the cost of all other cells, so a result within the rounding of the prefix sums counts as zero.
    """
    s0 = sums[0, b] - sums[0, a]
    s1 = sums[1, b] - sums[1, a]
    s2 = sums[2, b] - sums[2, a]
    cost = s2 - s1 * s1 / s0
    return cost if cost * s0 > noise * s2 else 0.0


@compiled
def _choose_candidates(count: int, zero: int, limit: int, scratch: Scratch) -> int:
    """Fill scratch.candidates with ascending borders, 0 and count included; return the number of intervals.

    Half are equally spaced in rank and half in the measure sum sqrt(gap sqrt(w)), near the density
    gap^(2/3) w^(1/3) of optimal borders (Panter and Dite 1951) but without its powers.
    """
    x, w, chosen, measure = scratch.x, scratch.w, scratch.chosen, scratch.measure
    chosen[: count + 1] = count <= limit
    if count > limit:
        chosen[: END_CANDIDATES + 1] = True
        chosen[count - END_CANDIDATES : count + 1] = True
        if zero >= 0:
            chosen[zero] = chosen[zero + 1] = True
        half = limit // 2
        for i in range(half):
            chosen[i * count // half] = True
        for i in range(1, count):
            measure[i] = np.sqrt((x[i] - x[i - 1]) * np.sqrt(w[i]))
        total = 0.0
        for i in range(1, count):
            total += measure[i]
        density = half / total
        reached = 0.0
        level = 1.0
        for i in range(1, count):
            reached += measure[i] * density
            if reached >= level:
                chosen[i] = True
                level = np.floor(reached) + 1.0
    m = 0
    for i in range(count + 1):
        if chosen[i]:
            scratch.candidates[m] = i
            m += 1
    return m - 1


@compiled
def _best_origin(sums: Floats, before: Floats, i: int, low: int, high: int, noise: float) -> tuple[float, int]:
    """Find the least before[j] + cost(j, i) over low <= j <= high, and the lowest j that attains it."""
    best = np.inf
    origin = low
    for j in range(low, high + 1):
        cost = before[j] + _cost(sums, j, i, noise)
        if cost < best:
            best = cost
            origin = j
    return best, origin


@compiled
def _fill_layer(sums: Floats, table: Floats, origin: NDArray[np.int32], t: int, m: int, noise: float) -> None:
    """Compute layer t of the table from layer t - 1, by divide and conquer on the monotone origin.

    Borders are visited in halving strides, so that each one's origin is bounded by its two visited neighbours'; it
    is also at least the origin with one cell fewer (Song and Zhong 2020, Ckmeans.1d.dp).
    """
    if t == 1:
        for i in range(1, m + 1):
            table[1, i] = _cost(sums, 0, i, noise)
            origin[1, i] = 0
        return
    stride = 1
    while 2 * stride <= m:
        stride *= 2
    while stride > 0:
        for i in range(stride, m + 1, 2 * stride):
            if i < t:
                continue
            low = max(t - 1, int(origin[t - 1, i]))
            if i - stride >= t:
                low = max(low, int(origin[t, i - stride]))
            high = i - 1
            if i + stride <= m:
                high = min(high, int(origin[t, i + stride]))
            table[t, i], origin[t, i] = _best_origin(sums, table[t - 1], i, min(low, high), high, noise)
        stride //= 2


@compiled
def _trace(origin: NDArray[np.int32], cells: int, end: int, borders: Indices) -> None:
    """Write the candidate borders of `cells` cells over the first `end` intervals to borders[0..cells]."""
    for t in range(cells, 0, -1):
        borders[t] = end
        end = origin[t, end]
    borders[0] = end


@compiled
def _seed(cells: int, m: int, noise: float, scratch: Scratch) -> int:
    """Find the best seed borders over the candidates; return the number of cells used, at most one per interval."""
    used = min(cells, m)
    table, origin, borders = scratch.table[0], scratch.origin[0], scratch.borders
    for t in range(1, used):
        _fill_layer(scratch.sums, table, origin, t, m, noise)
    if used == 1:
        origin[1, m] = 0
    else:
        origin[used, m] = _best_origin(scratch.sums, table[used - 1], m, used - 1, m - 1, noise)[1]
    _trace(origin, used, m, borders)
    for c in range(used + 1):
        borders[c] = scratch.candidates[borders[c]]
    return used


@compiled
def _best_zero_border(sums: Floats, table: Floats, cells: int, end: int) -> tuple[float, int]:
    """Find the least cost of `cells` cells of their own followed by values up to border `end` that are mapped to zero."""
    if cells == 0:
        return sums[2, end] - sums[2, 0], 0
    best = np.inf
    border = cells
    for a in range(cells, end + 1):
        cost = table[cells, a] + (sums[2, end] - sums[2, a])
        if cost < best:
            best = cost
            border = a
    return best, border


@compiled
def _seed_around_zero(cells: int, m: int, zero: int, noise: float, scratch: Scratch) -> tuple[int, int]:
    """Find the best seed borders where the cell that holds the zeros is centred on 0; return (cells used, zero's cell).

    Needs sums centred on zero. Negatives and positives are solved apart for every number of cells, the positives
    from the right end; the cell of zeros takes what lies between.
    """
    table, origin, sums, mirror, borders = scratch.table, scratch.origin, scratch.sums, scratch.mirror, scratch.borders
    negatives = 0
    while scratch.candidates[negatives] < zero:
        negatives += 1
    positives = m - negatives - 1
    for i in range(positives + 1):
        for moment in range(3):
            mirror[moment, i] = -sums[moment, m - i]
    most_left, most_right = min(cells - 1, negatives), min(cells - 1, positives)
    for t in range(1, most_left + 1):
        _fill_layer(sums, table[0], origin[0], t, negatives, noise)
    for t in range(1, most_right + 1):
        _fill_layer(mirror, table[1], origin[1], t, positives, noise)
    best = np.inf
    left = right = left_border = right_border = 0
    for tried in range(most_left + 1):
        other = min(cells - 1 - tried, most_right)
        left_cost, a = _best_zero_border(sums, table[0], tried, negatives)
        right_cost, b = _best_zero_border(mirror, table[1], other, positives)
        if left_cost + right_cost < best:
            best = left_cost + right_cost
            left, right, left_border, right_border = tried, other, a, b
    _trace(origin[1], right, right_border, scratch.trial)
    _trace(origin[0], left, left_border, borders)
    used = left + 1 + right
    for c in range(right + 1):
        borders[used - c] = m - scratch.trial[c]
    for c in range(used + 1):
        borders[c] = scratch.candidates[borders[c]]
    return used, left


@compiled
def _total_cost(prefix: Floats, borders: Indices, cells: int, zero_cell: int, noise: float) -> float:
    total = 0.0
    for c in range(cells):
        a, b = borders[c], borders[c + 1]
        total += prefix[2, b] - prefix[2, a] if c == zero_cell else _cost(prefix, a, b, noise)
    return total


@compiled
def _lloyd(count: int, cells: int, centre: float, zero_cell: int, noise: float, scratch: Scratch) -> None:
    """Move the seed borders from candidates to the full data by Lloyd steps, while they lower the cost."""
    x, prefix, borders, trial = scratch.x, scratch.prefix, scratch.borders, scratch.trial
    cost = _total_cost(prefix, borders, cells, zero_cell, noise)
    for _ in range(LLOYD_STEPS):
        trial[0], trial[cells] = 0, count
        previous = 0.0
        for c in range(cells):
            a, b = borders[c], borders[c + 1]
            mean = centre
            if c != zero_cell:
                mean += (prefix[1, b] - prefix[1, a]) / (prefix[0, b] - prefix[0, a])
            if c > 0:
                trial[c] = _points_up_to(x, count, 0.5 * (previous + mean))
            previous = mean
        moved = False
        for c in range(1, cells + 1):
            if trial[c] <= trial[c - 1]:
                return  # an emptied cell would be wasted
            moved = moved or trial[c] != borders[c]
        if not moved:
            return
        trial_cost = _total_cost(prefix, trial, cells, zero_cell, noise)
        if not trial_cost < cost:
            return
        cost = trial_cost
        for c in range(cells + 1):  # a slice assignment would cost seconds of compilation
            borders[c] = trial[c]


@compiled
def seed_row(count: int, zero: int, cells: int, scratch: Scratch) -> tuple[int, int]:
    """Set the seed borders of a row of `count` distinct values; return (cells used, the zeros' cell or -1)."""
    limit = max(CANDIDATES, CANDIDATES_PER_CELL * cells)
    pivot = zero if zero >= 0 else count // 2
    prefix = scratch.prefix
    _prefix_sums(scratch.x, scratch.w, count, pivot, prefix)
    noise = ROUNDING * (prefix[0, count] - prefix[0, 0])
    m = _choose_candidates(count, zero, limit, scratch)
    for i in range(m + 1):
        for moment in range(3):
            scratch.sums[moment, i] = prefix[moment, scratch.candidates[i]]
    zero_cell = -1
    if zero >= 0:
        used, zero_cell = _seed_around_zero(cells, m, zero, noise, scratch)
    else:
        used = _seed(cells, m, noise, scratch)
    if count > limit:
        _lloyd(count, used, scratch.x[pivot], zero_cell, noise, scratch)
    scratch.borders[used : cells + 1] = count
    return used, zero_cell
