"""Packed keys and values against KIVI as its paper writes it, and attention over them against float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.kernels.kv import Grid, States, attend, codes_of, join, pack, unpack


def states(*shape, seed=0):
    """Random states with one loud channel, as keys have."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    x[..., 1] = x[..., 1] * 8 + 20
    return x


def kivi(x, bits, group, along):
    """Algorithm 1 of KIVI on one head [T, D], a group at a time: z = min X, s = (max X - min X) / (2**B - 1)."""
    out = x.clone()
    rows, columns = (group, 1) if along == "channel" else (1, group)
    for t in range(0, x.shape[0], rows):
        for d in range(0, x.shape[1], columns):
            part = x[t : t + rows, d : d + columns]
            zero = part.min().half().float()
            span = (part.max() - zero).half().float()
            scale = span / (2**bits - 1)
            code = ((part - zero) / scale).round() if scale > 0 else torch.zeros_like(part)
            out[t : t + rows, d : d + columns] = code.clamp(0, 2**bits - 1) * scale + zero
    return out


@pytest.mark.parametrize("along", ["channel", "token"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_control_is_kivi_as_its_paper_writes_it(bits, along):
    x = states(2, 3, 16, 24)
    x[0, 0, :8, 2] = 1.5  # a group of one value
    found = unpack(pack(x, Grid(bits, 8, along, nested=False)))
    wanted = torch.stack([torch.stack([kivi(head, bits, 8, along) for head in row]) for row in x])
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    bits=st.integers(1, 8),
    group=st.sampled_from([1, 2, 4, 12]),
    along=st.sampled_from(["channel", "token"]),
    shape=st.tuples(st.integers(1, 2), st.integers(1, 3), st.sampled_from([12, 24]), st.sampled_from([12, 24, 36])),
    size=st.sampled_from([1e-6, 1.0, 1e3]),
)
def test_a_value_comes_back_within_half_a_cell(bits, group, along, shape, size):
    x = states(*shape) * size
    grid = Grid(bits, group, along)
    packed = pack(x, grid)
    _, step = packed.affine()
    room = step.unsqueeze(grid.axis) * 0.5 + 2e-3 * x.abs().amax()  # and what float16 takes from low and span
    assert (grid.grouped(unpack(packed) - x).abs() <= room).all()
    assert unpack(packed).shape == x.shape
    assert packed.planes[0].shape == (*shape[:3], -(-shape[3] // 8))


@pytest.mark.parametrize("along", ["channel", "token"])
def test_leading_planes_are_what_fewer_bits_pack(along):
    x = states(2, 2, 32, 16)
    most = pack(x, Grid(8, 8, along))
    for bits in range(1, 8):
        fewer = pack(x, Grid(bits, 8, along))
        for one, other in zip(most.at_bits(bits).tensors(), fewer.tensors(), strict=True):
            assert torch.equal(one, other)
        assert torch.equal(unpack(most.at_bits(bits)), unpack(fewer))
        assert torch.equal(codes_of(fewer), codes_of(most) >> (8 - bits))


def test_no_value_is_too_large_for_what_a_group_stores():
    x = torch.tensor([[[[1e6, -1e6, 3e38, 0.0]]]])
    assert torch.isfinite(unpack(pack(x, Grid(4, 4, "token")))).all()


def reference(query, keys, values, mask, scale):
    """Attention in float64, heads of keys repeated."""
    keys, values = (x.double().repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (keys, values))
    products = query.double() @ keys.mT * scale
    if mask is not None:
        products = products.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else products + mask
    return products.softmax(-1).nan_to_num(0.0) @ values


@pytest.mark.parametrize("queries", [1, 5, 40])
@pytest.mark.parametrize("masked", [None, "bool", "float"])
@pytest.mark.parametrize(("repeats", "tokens", "whole"), [(1, 16, 3), (3, 1040, 0), (2, 512, 130)])
def test_attention_by_chunks_is_attention(queries, masked, repeats, tokens, whole):
    keys, values = states(2, 2, tokens, 16), states(2, 2, tokens, 24, seed=1)
    new_keys, new_values = states(2, 2, whole, 16, seed=2), states(2, 2, whole, 24, seed=3)
    first = whole // 3
    held = States(
        pack(keys, Grid(4, 16, "channel")),
        pack(values, Grid(2, 8, "token")),
        new_keys.split([first, whole - first], 2),
        new_values.split([first, whole - first], 2),
    )
    query = states(2, 2 * repeats, queries, 16, seed=4)
    mask = None
    if masked:
        mask = torch.rand(2, 1, queries, tokens + whole, generator=torch.Generator().manual_seed(5)) < 0.7
        mask[0, :, 0] = False  # a query that sees nothing
        mask[1, :, :, :600] = False  # a chunk that nobody sees
        mask = mask if masked == "bool" else torch.where(mask, 0.0, -torch.inf)
    found = attend(query, held, mask, 0.3)
    torch.testing.assert_close(found, reference(query, *held.dense(), mask, 0.3).float(), rtol=2e-4, atol=2e-4)


def test_stretches_join():
    x = states(1, 2, 32, 16)
    for along in ("channel", "token"):
        whole = pack(x, Grid(3, 8, along))
        joined = join([pack(x[:, :, :8], whole.grid), pack(x[:, :, 8:], whole.grid)])
        assert torch.equal(unpack(joined), unpack(whole))
        assert torch.equal(unpack(whole.part(8, 24)), unpack(whole)[:, :, 8:24])
