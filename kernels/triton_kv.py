"""Attention of few queries to packed keys and values in Triton: a stretch of tokens per program, brought together afterwards."""

import triton
import triton.language as tl


@triton.jit
def _states(p0, p1, p2, p3, p4, p5, p6, p7, low, span, head, tokens, t, d, channels, group,
            BITS: tl.constexpr, ALONG_TOKENS: tl.constexpr, NESTED: tl.constexpr, CENTRED: tl.constexpr):  # fmt: skip
    """Look up tokens t and channels d of a head, both below their ends: float32 [tokens, channels]."""
    place = (head * tokens + t)[:, None].to(tl.int64) * ((channels + 7) // 8) + (d // 8)[None, :]
    bit = (d % 8)[None, :]
    code = (tl.load(p0 + place).to(tl.int32) >> bit) & 1
    if BITS > 1:
        code = code * 2 + ((tl.load(p1 + place).to(tl.int32) >> bit) & 1)
    if BITS > 2:
        code = code * 2 + ((tl.load(p2 + place).to(tl.int32) >> bit) & 1)
    if BITS > 3:
        code = code * 2 + ((tl.load(p3 + place).to(tl.int32) >> bit) & 1)
    if BITS > 4:
        code = code * 2 + ((tl.load(p4 + place).to(tl.int32) >> bit) & 1)
    if BITS > 5:
        code = code * 2 + ((tl.load(p5 + place).to(tl.int32) >> bit) & 1)
    if BITS > 6:
        code = code * 2 + ((tl.load(p6 + place).to(tl.int32) >> bit) & 1)
    if BITS > 7:
        code = code * 2 + ((tl.load(p7 + place).to(tl.int32) >> bit) & 1)
    if ALONG_TOKENS:
        own = (head * (tokens // group) + t // group)[:, None].to(tl.int64) * channels + d[None, :]
    else:
        own = (head * tokens + t)[:, None].to(tl.int64) * (channels // group) + (d // group)[None, :]
    if CENTRED:
        step = (tl.load(span + own).to(tl.int16) << 7).to(tl.float16, bitcast=True).to(tl.float32)
        first = step * -0.5
    else:
        first, step = tl.load(low + own).to(tl.float32), tl.load(span + own).to(tl.float32)
    if NESTED:
        step = step / (1 << BITS)
        first += step / 2
    else:
        step = step / ((1 << BITS) - 1)
    return first + step * code.to(tl.float32)


@triton.jit
def attend(
    query, k0, k1, k2, k3, k4, k5, k6, k7, key_low, key_span, v0, v1, v2, v3, v4, v5, v6, v7, value_low, value_span,
    mask, largest, total, mixed, rows, tokens, chunk, key_channels, value_channels, key_group, value_group,
    KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr, KEY_ALONG: tl.constexpr, VALUE_ALONG: tl.constexpr,
    NESTED: tl.constexpr, KEY_CENTRED: tl.constexpr, VALUE_CENTRED: tl.constexpr, MASKED: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Attend by ``rows`` queries of one head, float32 [heads, rows, D], to a chunk of its tokens.

    Writes what :func:`compress.kernels.kv.attend` carries from chunk to chunk: the largest product and the sum of weights, [heads, parts,
    rows], and the values added up, [heads, parts, rows, D]. ``mask`` is float32 [heads, rows, tokens] and is added.
    """
    head, part = tl.program_id(0), tl.program_id(1)
    r, d, e = tl.arange(0, ROWS), tl.arange(0, KEYS), tl.arange(0, VALUES)
    here = (r < rows)[:, None] & (d < key_channels)[None, :]
    asked = tl.load(query + (head * rows + r)[:, None] * key_channels + d[None, :], mask=here, other=0.0)
    held, taken = tl.minimum(d, key_channels - 1), tl.minimum(e, value_channels - 1)
    most, weight_sum = tl.full([ROWS], -1e38, tl.float32), tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, VALUES], tl.float32)
    end = tl.minimum((part + 1) * chunk, tokens)
    for start in range(part * chunk, end, BLOCK):
        t = start + tl.arange(0, BLOCK)
        inside, t = t < end, tl.minimum(t, tokens - 1)
        keys = _states(k0, k1, k2, k3, k4, k5, k6, k7, key_low, key_span, head, tokens, t, held, key_channels, key_group,
                       KEY_BITS, KEY_ALONG, NESTED, KEY_CENTRED)  # fmt: skip
        products = tl.dot(asked, tl.trans(keys), input_precision="ieee")
        if MASKED:
            place = (head * rows + tl.minimum(r, rows - 1))[:, None].to(tl.int64) * tokens + t[None, :]
            products += tl.load(mask + place)
        products = tl.where(inside[None, :], products, -float("inf"))
        now = tl.maximum(most, tl.max(products, 1))
        weights, kept = tl.exp(products - now[:, None]), tl.exp(most - now)
        values = _states(v0, v1, v2, v3, v4, v5, v6, v7, value_low, value_span, head, tokens, t, taken, value_channels,
                         value_group, VALUE_BITS, VALUE_ALONG, NESTED, VALUE_CENTRED)  # fmt: skip
        weight_sum = weight_sum * kept + tl.sum(weights, 1)
        sums = sums * kept[:, None] + tl.dot(weights, values, input_precision="ieee")
        most = now
    own = (head * tl.num_programs(1) + part) * rows + r
    tl.store(largest + own, most, mask=r < rows)
    tl.store(total + own, weight_sum, mask=r < rows)
    inner = (r < rows)[:, None] & (e < value_channels)[None, :]
    tl.store(mixed + own[:, None].to(tl.int64) * value_channels + e[None, :], sums, mask=inner)
