"""The kernels in plain Triton: what the interpreter, other makers' GPUs and float32 tables use.

The same layout and the same functions as :mod:`compress.kernels.triton_ptx`, with shifts and loads from the tables. Sums are in
float32 in the same fixed order every time; parts of a split sum go to ``y`` one after the other and :func:`reduce` adds them.
"""

import triton
import triton.language as tl


@triton.jit
def group_sizes(groups, n, w, words):
    """Load the sizes of the groups of columns that words w of rows n are in, whole numbers as float32."""
    return tl.load(groups + n // 32 * ((words + 1) // 2 * 32) + w // 2 * 32 + n % 32).to(tl.float32)


@triton.jit
def _weights(
    codes,
    tables,
    groups,
    sizes,
    w,
    n,
    words,
    plane_stride,
    BITS: tl.constexpr,
    HEAD: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Look up rows n and words w, both below their ends: float32 [rows, words, 32]."""
    column = tl.arange(0, 32)[None, None, :]
    block, place = column // 8, column % 8
    first = codes + (n // 32 * words * 32 + n % 32)[:, None, None] + (w * 32)[None, :, None]
    code = tl.zeros([n.shape[0], w.shape[0], 32], tl.int32)
    for plane in tl.static_range(BITS):
        if HEAD == 4 and plane < 4:
            word, bit = block, 4 * place + plane
        elif HEAD == 2 and plane < 2:
            word, bit = block % 2, 4 * place + 2 * (block // 2) + plane
        else:
            word, bit = 0 * block + plane, 4 * place + block
        code |= ((tl.load(first + word.to(tl.int64) * plane_stride) >> bit) & 1) << plane
    row = (n // 32 * (32 * 2**BITS) + n % 32)[:, None, None]
    weight = tl.load(tables + row + code * 32).to(tl.float32)
    if GROUPS:
        weight *= (group_sizes(groups, n[:, None], w[None, :], words) * tl.load(sizes + n)[:, None])[:, :, None]
    return weight


@triton.jit
def gemv(
    x, codes, tables, groups, sizes, bias, y, rows, columns, words, chunk, plane_stride, x_stride, y_stride,
    M: tl.constexpr, BITS: tl.constexpr, HEAD: tl.constexpr, STEP: tl.constexpr, SPLIT: tl.constexpr, BIAS: tl.constexpr,
    GROUPS: tl.constexpr,
):  # fmt: skip
    """Multiply M rows of activations with 32 rows of weights: y[m, n] = sum of x[m, k] w[n, k]."""
    part = tl.program_id(1)
    n = tl.program_id(0).to(tl.int64) * 32 + tl.arange(0, 32)
    place = tl.arange(0, STEP)
    column = tl.arange(0, 32)
    totals = ()
    for _ in tl.static_range(M):
        totals = totals + (tl.zeros([32], tl.float32),)
    end = tl.minimum((part + 1) * chunk, words)
    for start in range(part * chunk, end, STEP):
        w = start + place
        at = tl.minimum(w, words - 1)
        weight = _weights(codes, tables, groups, sizes, at, n, words, plane_stride, BITS, HEAD, GROUPS)
        k = w[:, None] * 32 + column[None, :]
        inside = (k < columns) & (w < end)[:, None]
        new = ()
        for m in tl.static_range(M):
            row = tl.load(x + m * x_stride + k, mask=inside, other=0.0).to(tl.float32)
            new = new + (totals[m] + tl.sum(tl.sum(weight * row[None, :, :], 2), 1),)
        totals = new
    for m in tl.static_range(M):
        total = totals[m]
        if SPLIT == 1:
            if BIAS:
                total += tl.load(bias + n, mask=n < rows, other=0.0).to(tl.float32)
            tl.store(y + m * y_stride + n, total.to(y.dtype.element_ty), mask=n < rows)
        else:
            tl.store(y + (part * M + m).to(tl.int64) * rows + n, total, mask=n < rows)


@triton.jit
def dot(
    x, codes, tables, groups, sizes, bias, y, count, rows, columns, words, chunk, plane_stride, x_stride, y_stride,
    BITS: tl.constexpr, HEAD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STEP: tl.constexpr, SPLIT: tl.constexpr,
    BIAS: tl.constexpr, UPCAST: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Multiply many rows of activations by matrix instructions: weights of BN rows are looked up once for BM of them."""
    part = tl.program_id(1)
    n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    m = tl.program_id(2).to(tl.int64) * BM + tl.arange(0, BM)
    held = tl.minimum(n, (rows + 31) // 32 * 32 - 1)
    place = tl.arange(0, STEP)
    total = tl.zeros([BN, BM], tl.float32)
    end = tl.minimum((part + 1) * chunk, words)
    for start in range(part * chunk, end, STEP):
        w = start + place
        at = tl.minimum(w, words - 1)
        weight = _weights(codes, tables, groups, sizes, at, held, words, plane_stride, BITS, HEAD, GROUPS)
        k = start * 32 + tl.arange(0, STEP * 32)
        inside = (k < columns) & (k < end * 32)
        right = tl.load(x + m[None, :] * x_stride + k[:, None], mask=inside[:, None] & (m < count)[None, :], other=0.0)
        if UPCAST:  # the interpreter computes bfloat16 wrongly
            right = right.to(tl.float32)
        total = tl.dot(tl.reshape(weight, [BN, STEP * 32]).to(right.dtype), right, total, input_precision="ieee")
    keep = (n < rows)[:, None] & (m < count)[None, :]
    if SPLIT == 1:
        if BIAS:
            total += tl.load(bias + n, mask=n < rows, other=0.0).to(tl.float32)[:, None]
        tl.store(y + m[None, :] * y_stride + n[:, None], total.to(y.dtype.element_ty), mask=keep)
    else:
        tl.store(y + (part * count + m)[None, :] * rows + n[:, None], total, mask=keep)


@triton.jit
def look_up(
    codes, tables, groups, sizes, out, first_tile, words, plane_stride,
    BITS: tl.constexpr, HEAD: tl.constexpr, STEP: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Look up the weights of 32 rows: [rows, 32 * words] in the type of ``out``."""
    n = tl.program_id(0).to(tl.int64) * 32 + tl.arange(0, 32)
    w = tl.program_id(1) * STEP + tl.arange(0, STEP)
    at, held = tl.minimum(w, words - 1), first_tile * 32 + n
    weight = _weights(codes, tables, groups, sizes, at, held, words, plane_stride, BITS, HEAD, GROUPS)
    k = w[:, None] * 32 + tl.arange(0, 32)[None, :]
    place = n[:, None, None] * (words * 32) + k[None, :, :]
    tl.store(out + place, weight.to(out.dtype.element_ty), mask=(w < words)[None, :, None])


@triton.jit
def reduce(parts, bias, y, count, rows, y_stride, SPLIT: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr):
    """Add the parts of a split sum in their order: parts float32 [SPLIT, count, rows] to y [count, rows]."""
    m = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = n < rows
    total = tl.zeros([BLOCK], tl.float32)
    for part in tl.static_range(SPLIT):
        total += tl.load(parts + (part * count + m) * rows + n, mask=inside, other=0.0)
    if BIAS:
        total += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + m * y_stride + n, total.to(y.dtype.element_ty), mask=inside)
