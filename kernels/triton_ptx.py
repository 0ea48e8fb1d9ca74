"""The kernels for NVIDIA GPUs: Triton around the assembly of :mod:`compress.kernels.ptx`.

``TEXT`` arguments are that assembly, ``IO`` its constraints. A tile is words times rows, with the rows as the fast dimension: the
compiler then gives a lane as many neighbouring rows as a tile has elements for it, four at most (see the rules in
:mod:`compress.kernels.configs`), the codes come in whole lines, the tables stay in registers, and no lane needs another's sum
until the end. Where the compiler chooses another way it is slower, never wrong: every instruction works on one element.
"""

import triton
import triton.language as tl

from compress.kernels.triton_plain import group_sizes


@triton.jit
def _tables(
    tables, table_stride, tile, n, BITS: tl.constexpr, ENTRIES: tl.constexpr, WORDS: tl.constexpr, TILES: tl.constexpr,
    RESERVE: tl.constexpr, PUT: tl.constexpr,
):  # fmt: skip
    """Load the inputs that say what codes mean: registers, or the address of each row's column in shared memory."""
    given = ()
    if BITS <= 4 and ENTRIES < 32:
        for i in tl.static_range(WORDS):
            given = given + (tl.load(tables + i * table_stride + n),)
    else:
        base = tl.inline_asm_elementwise(RESERVE, "=r,r", [table_stride], dtype=tl.int32, is_pure=False, pack=1)
        if ENTRIES == 32:  # two neighbouring codes are a byte, the first in its low half
            row = tl.arange(0, 32)[None, :]
            one = tl.arange(0, 16)[:, None] * 32 + row
            held = tables + tile * 512
            low = tl.load(held + one).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
            for two in tl.static_range(16):
                high = tl.load(held + two * 32 + row).to(tl.int16, bitcast=True).to(tl.int32) << 16
                pair = (low | high).to(tl.float32, bitcast=True)
                place = base + 4 * (two * 512 + one)
                tl.inline_asm_elementwise(PUT, "=r,r,f", [place, pair], dtype=tl.int32, is_pure=False, pack=1)
        else:
            entry = tl.arange(0, TILES * 2**BITS * 32)
            present = tile * (2**BITS * 32) + entry < table_stride * 2**BITS
            value = tl.load(tables + tile * (2**BITS * 32) + entry, mask=present, other=0.0).to(tl.float32)
            tl.inline_asm_elementwise(PUT, "=r,r,f", [base + 4 * entry, value], dtype=tl.int32, is_pure=False, pack=1)
        tl.debug_barrier()
        address = base + ((n // 32 - tile) * (2**BITS * 128) + n % 32 * 4).to(tl.int32)
        # What reads the table has no side effects, so nothing but its input keeps it behind the barrier.
        given = (
            tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [address], dtype=tl.int32, is_pure=False, pack=1),
        )
    return given


@triton.jit
def _factor(tables, table_stride, n, WORDS: tl.constexpr):
    """Load what sums of rows n over entries of 8 bits have to be multiplied by: a float16, twice in the word after theirs."""
    word = tl.load(tables + WORDS * table_stride + n)
    return (word & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _sixteen(TEXT: tl.constexpr, IO: tl.constexpr, given):
    """Run assembly with 16 words of results. (A tuple of types can be written in Triton, but not given to it in all versions.)"""
    return tl.inline_asm_elementwise(
        TEXT,
        IO,
        given,
        is_pure=True,
        pack=1,
        dtype=(
            tl.int32,
            tl.int32,
            tl.int32,
            tl.int32,
            tl.int32,
            tl.int32,
            tl.int32,
            tl.int32,
            tl.int32,
            tl.int32,
            tl.int32,
            tl.int32,
            tl.int32,
            tl.int32,
            tl.int32,
            tl.int32,
        ),
    )


@triton.jit
def _sums(TEXT: tl.constexpr, IO: tl.constexpr, given, M: tl.constexpr):
    """Run assembly with M float32 results."""
    if M == 1:
        return tl.inline_asm_elementwise(TEXT, IO, given, dtype=(tl.float32,), is_pure=True, pack=1)
    elif M == 2:
        return tl.inline_asm_elementwise(TEXT, IO, given, dtype=(tl.float32, tl.float32), is_pure=True, pack=1)
    elif M == 3:
        return tl.inline_asm_elementwise(
            TEXT, IO, given, dtype=(tl.float32, tl.float32, tl.float32), is_pure=True, pack=1
        )
    else:
        return tl.inline_asm_elementwise(
            TEXT, IO, given, dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True, pack=1
        )


@triton.jit
def gemv(
    x, codes, tables, groups, sizes, bias, y, rows, words, chunk, plane_stride, table_stride, x_stride, y_stride,
    M: tl.constexpr, BITS: tl.constexpr, ENTRIES: tl.constexpr, WORDS: tl.constexpr, STEP: tl.constexpr,
    EVEN: tl.constexpr, SPLIT: tl.constexpr, BIAS: tl.constexpr, TEXT: tl.constexpr, IO: tl.constexpr, LOAD_TEXT: tl.constexpr,
    LOAD_IO: tl.constexpr, RESERVE: tl.constexpr, PUT: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Multiply M rows of activations with 32 rows of weights, as :func:`compress.kernels.triton_plain.gemv`.

    Activations are whole words of 32, each a multiple of 16 bytes from the start of memory.
    """
    tile = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    lane = tl.arange(0, 32)
    place = tl.arange(0, STEP)
    n = tile * 32 + lane
    given = _tables(tables, table_stride, tile, n[None, :], BITS, ENTRIES, WORDS, 1, RESERVE, PUT)
    totals = ()
    for _ in tl.static_range(M):
        totals = totals + (tl.zeros([STEP, 32], tl.float32),)
    end = tl.minimum((part + 1) * chunk, words)
    first = codes + tile * words * 32 + lane[None, :]
    for start in range(part * chunk, end, STEP):
        w = start + place
        at = w if EVEN else tl.minimum(w, words - 1)
        here = ()
        for plane in tl.static_range(BITS):
            here = here + (tl.load(first + plane * plane_stride + at[:, None] * 32),)
        here = here + given
        for m in tl.static_range(M):
            here = here + _sixteen(LOAD_TEXT, LOAD_IO, (x + m * x_stride + at[:, None] * 32,))
        sums = _sums(TEXT, IO, here, M)
        if GROUPS:
            group = group_sizes(groups, n[None, :], at[:, None], words)
        new = ()
        for m in tl.static_range(M):
            more = sums[m] if EVEN else tl.where((w < end)[:, None], sums[m], 0.0)
            if GROUPS:
                more *= group
            new = new + (totals[m] + more,)
        totals = new
    for m in tl.static_range(M):
        total = tl.sum(totals[m], 0)
        if ENTRIES == 8:
            total *= _factor(tables, table_stride, n, WORDS)
        if GROUPS:
            total *= tl.load(sizes + n)
        if SPLIT == 1:
            if BIAS:
                total += tl.load(bias + n, mask=n < rows, other=0.0).to(tl.float32)
            tl.store(y + m * y_stride + n, total.to(y.dtype.element_ty), mask=n < rows)
        else:
            tl.store(y + (part * M + m).to(tl.int64) * rows + n, total, mask=n < rows)


@triton.jit
def dot(
    x, codes, tables, groups, sizes, bias, y, count, rows, words, chunk, plane_stride, table_stride, x_stride, y_stride,
    BITS: tl.constexpr, ENTRIES: tl.constexpr, WORDS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    STEP: tl.constexpr, SPLIT: tl.constexpr, BIAS: tl.constexpr, TEXT: tl.constexpr, IO: tl.constexpr,
    RESERVE: tl.constexpr, PUT: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Multiply many rows of activations by matrix instructions, as :func:`compress.kernels.triton_plain.dot`.

    The assembly works on the words of codes in the layout that the matrix instruction wants, so no weight crosses lanes.
    """
    part = tl.program_id(1)
    n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    m = tl.program_id(2).to(tl.int64) * BM + tl.arange(0, BM)
    place = tl.arange(0, STEP)
    pair = tl.arange(0, 2 * STEP)
    held = tl.minimum(n, (rows + 31) // 32 * 32 - 1)
    tile = tl.program_id(0).to(tl.int64) * (BN // 32)
    given = _tables(tables, table_stride, tile, held[:, None], BITS, ENTRIES, WORDS, BN // 32, RESERVE, PUT)
    total = tl.zeros([BN, BM], tl.float32)
    end = tl.minimum((part + 1) * chunk, words)
    first = codes + (held // 32 * words * 32 + held % 32)[:, None]
    for start in range(part * chunk, end, STEP):
        w = start + place
        at = tl.minimum(w, words - 1)[None, :]
        here = ()
        for plane in tl.static_range(BITS):
            here = here + (tl.load(first + plane * plane_stride + at * 32),)
        here = here + given
        if GROUPS:  # in 256ths, which 16 bits hold and which lead to no larger numbers
            size = (group_sizes(groups, held[:, None], at, words) / 256).to(x.dtype.element_ty)
            size = size.to(tl.int16, bitcast=True).to(tl.int32)
            here = here + (size | size << 16,)  # not negative
        found = _sixteen(TEXT, IO, here)
        k = (start + pair // 2) * 32 + pair % 2
        inside = ((start + pair // 2) < end)[:, None] & (m < count)[None, :]
        for j in tl.static_range(16):
            right = tl.load(x + m[None, :] * x_stride + (k + 2 * j)[:, None], mask=inside, other=0.0)
            low = (found[j] & 0xFFFF).to(tl.int16).to(x.dtype.element_ty, bitcast=True)
            high = (found[j] >> 16).to(tl.int16).to(x.dtype.element_ty, bitcast=True)
            left = tl.reshape(tl.join(low, high), [BN, 2 * STEP])
            total = tl.dot(left, right, total)
    if ENTRIES == 8:
        total *= _factor(tables, table_stride, held, WORDS)[:, None]
    if GROUPS:
        total *= 256 * tl.load(sizes + held)[:, None]
    keep = (n < rows)[:, None] & (m < count)[None, :]
    if SPLIT == 1:
        if BIAS:
            total += tl.load(bias + n, mask=n < rows, other=0.0).to(tl.float32)[:, None]
        tl.store(y + m[None, :] * y_stride + n[:, None], total.to(y.dtype.element_ty), mask=keep)
    else:
        tl.store(y + (part * count + m)[None, :] * rows + n[:, None], total, mask=keep)


@triton.jit
def look_up(
    codes, tables, out, first_tile, words, plane_stride, table_stride,
    BITS: tl.constexpr, WORDS: tl.constexpr, STEP: tl.constexpr, EVEN: tl.constexpr, TEXT: tl.constexpr,
    IO: tl.constexpr, RESERVE: tl.constexpr, PUT: tl.constexpr,
):  # fmt: skip
    """Look up the weights of 32 rows, [rows, 32 * words]: every lane writes whole words of columns."""
    tile = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, 32)
    w = tl.program_id(1) * STEP + tl.arange(0, STEP)
    at = (w if EVEN else tl.minimum(w, words - 1))[:, None]  # what is written twice is written the same
    n = (first_tile + tile) * 32 + lane[None, :]
    given = _tables(tables, table_stride, first_tile + tile, n, BITS, 16, WORDS, 1, RESERVE, PUT)
    first = codes + (first_tile + tile) * words * 32 + lane[None, :]
    here = ()
    for plane in tl.static_range(BITS):
        here = here + (tl.load(first + plane * plane_stride + at * 32),)
    place = out + (tile * 32 + lane[None, :]) * (words * 32) + at * 32
    tl.inline_asm_elementwise(TEXT, IO, here + given + (place,), dtype=tl.int32, is_pure=False, pack=1)
