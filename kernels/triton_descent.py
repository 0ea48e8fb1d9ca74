"""The codebook search on a GPU: its column loop, one launch for a block of columns, and its sums by code. A program has one row.

:func:`descend` does what :class:`compress.quant.descent.Descent` does on a CPU. A row is a warp's: its gradients stay in registers from the first
column of the block to the last, and a column needs two sums over the warp for each number of bits and one minimum. A path through the code
tree is its leaf, so the best path is the leaf with the smallest sum of errors: there is no tree to climb.
"""

import triton
import triton.language as tl


@triton.jit
def descend(
    codes, new_codes, fixed, sizes, codebooks, share, gradient, hessian, rows, columns, entries,
    LEVELS: tl.constexpr, PARENT: tl.constexpr, KEPT: tl.constexpr, SIZES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Choose the codes of one row in a block of at most BLOCK columns, column after column.

    Codes, ``fixed`` and, if SIZES, ``sizes``, by which entries are multiplied, are [rows, columns], codebooks float32 [rows, entries], those of LEVELS numbers of bits up to PARENT one
    after the other, ``share`` float32 [LEVELS], ``hessian`` float32 [columns, columns]. ``gradient``, float32 [LEVELS, rows, columns], is
    half that of the errors; the changes of the weights overwrite it. The highest KEPT bits of a code stay.
    """
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < columns
    leaf = tl.arange(0, 1 << (PARENT - KEPT))
    codebooks += row * entries
    slopes = ()  # from the leaves' number of bits to the fewest, as everything here: sums depend on the order
    for up in tl.static_range(LEVELS):
        place = gradient + ((LEVELS - 1 - up) * rows + row) * columns + at
        slopes = slopes + (tl.load(place, mask=inside, other=0.0),)
    for column in range(columns):
        old = tl.load(codes + row * columns + column).to(tl.int32)
        held = tl.load(fixed + row * columns + column)
        first = old >> (PARENT - KEPT) << (PARENT - KEPT)
        by = tl.load(hessian + column * columns + at, mask=inside, other=0.0)
        curvature = tl.load(hessian + column * columns + column)
        size = tl.load(sizes + row * columns + column) if SIZES else 1.0
        cost = tl.zeros([1 << (PARENT - KEPT)], tl.float32)
        for up in tl.static_range(LEVELS):
            table = codebooks + ((1 << (PARENT - up)) - (1 << (PARENT - LEVELS + 1)))
            slope = tl.sum(tl.where(at == column, slopes[up], 0.0), 0)
            ideal = tl.load(table + (old >> up)) - slope / size / curvature
            away = tl.load(table + ((first + leaf) >> up)) - ideal
            cost = tl.load(share + LEVELS - 1 - up) * away * away + cost
        new = tl.where(held != 0, old, first + tl.argmin(cost, 0))
        told = ()
        for up in tl.static_range(LEVELS):
            table = codebooks + ((1 << (PARENT - up)) - (1 << (PARENT - LEVELS + 1)))
            moved = (tl.load(table + (new >> up)) - tl.load(table + (old >> up))) * size
            later = slopes[up] + moved * by
            told = told + (tl.where(at > column, later, tl.where(at == column, moved, slopes[up])),)
        slopes = told
        tl.store(new_codes + row * columns + column, new.to(new_codes.dtype.element_ty))
    for up in tl.static_range(LEVELS):
        place = gradient + ((LEVELS - 1 - up) * rows + row) * columns + at
        tl.store(place, slopes[up], mask=inside)


@triton.jit
def sum_by_code(
    values, codes, sums, columns, row_stride, column_stride, part_stride,
    ENTRIES: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Sum the values of one row, in one of several parts, over the columns with each code: float32 [rows, ENTRIES, parts].

    Values are float32 at the strides given, codes [rows, columns]. The sums are the same every time, as atomic additions' are not.
    """
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    entry = tl.arange(0, ENTRIES)
    total = tl.zeros([STEP, ENTRIES], tl.float32)
    values += row * row_stride + part * part_stride
    for start in range(0, columns, STEP):
        k = start + tl.arange(0, STEP)
        code = tl.load(codes + row * columns + k, mask=k < columns, other=-1).to(tl.int32)
        value = tl.load(values + k * column_stride, mask=k < columns, other=0.0)
        total += tl.where(code[:, None] == entry[None, :], value[:, None], 0.0)
    place = sums + (row * ENTRIES + entry) * tl.num_programs(1) + part
    tl.store(place, tl.sum(total, 0))
