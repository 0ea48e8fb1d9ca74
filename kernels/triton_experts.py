"""Products of every token with the experts that a router has chosen for it, in one launch: plain Triton, as :mod:`triton_plain` has it."""

import triton
import triton.language as tl

from compress.kernels.triton_plain import _weights


@triton.jit
def dot(
    x,
    experts,
    firsts,
    ends,
    codes,
    tables,
    groups,
    sizes,
    bias,
    y,
    rows,
    columns,
    words,
    tiles,
    plane_stride,
    x_stride,
    BITS: tl.constexpr,
    HEAD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STEP: tl.constexpr,
    BIAS: tl.constexpr,
    UPCAST: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Multiply rows of activations that lie sorted by expert with BN rows of the expert that program 0 is given, or do nothing."""
    expert = tl.load(experts + tl.program_id(0)).to(tl.int64)
    if expert >= 0:
        n = tl.program_id(1).to(tl.int64) * BN + tl.arange(0, BN)
        m = tl.load(firsts + tl.program_id(0)) + tl.arange(0, BM)
        count = tl.load(ends + tl.program_id(0))
        held = expert * tiles * 32 + tl.minimum(n, tiles * 32 - 1)
        place = tl.arange(0, STEP)
        total = tl.zeros([BN, BM], tl.float32)
        for start in range(0, words, STEP):
            at = tl.minimum(start + place, words - 1)
            weight = _weights(codes, tables, groups, sizes, at, held, words, plane_stride, BITS, HEAD, GROUPS)
            k = start * 32 + tl.arange(0, STEP * 32)
            inside = (k < columns)[:, None] & (m < count)[None, :]
            right = tl.load(x + m[None, :] * x_stride + k[:, None], mask=inside, other=0.0)
            if UPCAST:  # the interpreter computes bfloat16 wrongly
                right = right.to(tl.float32)
            total = tl.dot(tl.reshape(weight, [BN, STEP * 32]).to(right.dtype), right, total, input_precision="ieee")
        if BIAS:
            total += tl.load(bias + expert * rows + n, mask=n < rows, other=0.0).to(tl.float32)[:, None]
        keep = (n < rows)[:, None] & (m < count)[None, :]
        tl.store(y + m[None, :] * rows + n[:, None], total.to(y.dtype.element_ty), mask=keep)
