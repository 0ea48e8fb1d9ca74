"""Packed keys and values against KIVI as its paper writes it, and attention over them against float64."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from compress.kernels import gpu
from compress.kernels.cpu import ISAS, library
from compress.kernels.kv import Grid, States, attend, codes_of, join, pack, rotate, scale_for, unpack
from compress.kernels.kv_cpu import attend_packed, attention
from compress.kernels.kv_mean import Mean, mean_for, turn


def states(*shape, seed=0):
    """Random states with one loud channel, as keys have."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    x[..., 1] = x[..., 1] * 8 + 20
    return x


def frequencies(channels):
    """Of rotary embeddings, for the pairs of so many channels."""
    return 10_000.0 ** -(torch.arange(0, channels, 2, dtype=torch.float64) / channels)


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
    size=st.sampled_from([1e-6, 1.0, 5e2]),
    centred=st.booleans(),
)
def test_a_value_comes_back_within_half_a_cell(bits, group, along, shape, size, centred):
    x = states(*shape) * size
    grid = Grid(bits, group, along, centred=centred)
    packed = pack(x, grid)
    _, step = packed.affine()
    room = step.unsqueeze(grid.axis) * 0.5 + 2e-3 * x.abs().amax()  # and what float16 takes from low and span
    assert (grid.grouped(unpack(packed) - x).abs() <= room).all()
    assert unpack(packed).shape == x.shape
    assert packed.planes[0].shape == (*shape[:3], -(-shape[3] // 8))


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("along", ["channel", "token"])
def test_leading_planes_are_what_fewer_bits_pack(along, centred):
    x = states(2, 2, 32, 16)
    most = pack(x, Grid(8, 8, along, centred=centred))
    for bits in range(1, 8):
        fewer = pack(x, Grid(bits, 8, along, centred=centred))
        for one, other in zip(most.at_bits(bits).tensors(), fewer.tensors(), strict=True):
            assert torch.equal(one, other)
        assert torch.equal(unpack(most.at_bits(bits)), unpack(fewer))
        assert torch.equal(codes_of(fewer), codes_of(most) >> (8 - bits))


@pytest.mark.parametrize("centred", [False, True])
def test_no_value_is_too_large_for_what_a_group_stores(centred):
    x = torch.tensor([[[[1e6, -1e6, 3e38, 0.0]]]])
    assert torch.isfinite(unpack(pack(x, Grid(4, 4, "token", centred=centred)))).all()


def test_the_ends_of_a_group_come_back_at_four_bits_and_shrink_little_at_two():
    x = states(1, 2, 64, 16)
    span = x.amax(2) - x.amin(2)
    for bits, least in ((4, 0.0), (2, 0.09)):
        found = unpack(pack(x, Grid(bits, 64, "channel")))
        for end in (lambda states: states.amax(2), lambda states: -states.amin(2)):
            torch.testing.assert_close((end(x) - end(found)) / span, torch.full_like(span, least), rtol=0, atol=0.011)


def test_the_byte_of_a_span_is_the_next_of_its_kind():
    """Four bits of precision: the span is at most an eighth larger, and never smaller but for the rounding of float16."""
    x = torch.logspace(-2, 3, 500)[:, None, None, None] * torch.tensor([1.0, -0.5])
    _, step = pack(x, Grid(1, 2, "token", centred=True)).affine()
    ratio = step.flatten() * 2 / (2 * x.abs().amax(-1).flatten())
    assert ((ratio > 0.999) & (ratio < 1.126)).all()
    packed = pack(torch.zeros(1, 1, 1, 4), Grid(2, 4, "token", centred=True))
    assert packed.low is None
    assert not unpack(packed).any()


def test_scaled_keys_disturb_products_least():
    """Loud queries on channels where keys are quiet: a tenth of the error; factors that nothing was seen for are finite."""
    keys, queries = states(1, 2, 128, 32), torch.randn(1, 2, 50, 32)
    keys[..., 8:16] *= 0.1
    queries[..., 8:16] *= 10
    scale = scale_for(keys, queries.square().sum(2, keepdim=True))
    errors = []
    for own in (None, scale):
        found = unpack(pack(keys, Grid(2, 128, "channel", rotated=True), own))
        errors.append(float((queries @ (found - keys).mT).square().mean()))
    assert errors[1] < 0.1 * errors[0]
    power, variance = queries.square().sum(2, keepdim=True), keys.var(2, correction=0, keepdim=True)
    wanted = power**0.25 / variance**0.15
    torch.testing.assert_close(scale / scale[..., :1], wanted / wanted[..., :1])
    assert torch.isfinite(scale_for(torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 1, 8))).all()


def test_turned_channels_are_those_of_a_llama():
    x, places = states(1, 2, 300, 16), torch.arange(40, 340)
    angles = torch.cat([places[:, None] * frequencies(16)] * 2, -1)[None].float()
    wanted, _ = apply_rotary_pos_emb(x, x, angles.cos(), angles.sin())
    torch.testing.assert_close(turn(x, places, frequencies(16)), wanted, rtol=1e-3, atol=1e-3)
    few = turn(x, places, frequencies(12))
    assert torch.equal(few[..., 12:], x[..., 12:])


def test_products_with_the_mean_need_no_mean_for_each_token():
    mean = Mean(states(2, 3, 1, 20), frequencies(16), 1000)
    queries = torch.randn(2, 3, 5, 20, generator=torch.Generator().manual_seed(1))
    for tokens in (1, 128, 300):
        torch.testing.assert_close(mean.products(queries, tokens), queries @ mean.at(tokens).mT, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(mean.behind(30).at(70), mean.at(100)[:, :, 30:])


def rounded(keys, mean):
    return unpack(pack(keys, Grid(2, 128, "channel", rotated=True), None, mean))


def test_keys_that_share_a_mean_before_they_are_turned_lose_less():
    """A mean of ten deviations: about a hundredth of the error, also of tokens that it was not found on."""
    noise, places = torch.randn(1, 2, 512, 32, generator=torch.Generator().manual_seed(0)), torch.arange(4, 516)
    keys = turn(torch.full((1, 2, 1, 32), 10.0), places, frequencies(32)) + noise
    mean = mean_for(keys[:, :, :128], frequencies(32), 4, None)
    errors = [float((rounded(keys, own) - keys).square().mean()) for own in (None, mean)]
    assert errors[1] < 0.05 * errors[0]
    torch.testing.assert_close(mean.key, torch.full((1, 2, 1, 32), 10.0), rtol=0, atol=0.5)


def test_keys_that_are_not_turned_lose_no_more_for_it():
    keys = states(1, 2, 1024, 32)  # a constant in a channel, which groups hold as their smallest value
    mean = mean_for(keys[:, :, :128], frequencies(32), 4, torch.ones(1, 2, 1, 32))
    errors = [float((rounded(keys, own) - keys).square().mean()) for own in (None, mean)]
    assert errors[1] < 1.05 * errors[0]


def reference(query, keys, values, mask, scale):
    """Attention in float64, heads of keys repeated."""
    keys, values = (x.double().repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (keys, values))
    products = query.double() @ keys.mT * scale
    if mask is not None:
        products = products.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else products + mask
    return products.softmax(-1).nan_to_num(0.0) @ values


def held_of(repeats, tokens, whole, bits=(4, 2), channels=(16, 24), nested=True):
    """Packed keys and values between whole ones, rotated where heads repeat."""
    keys, values = states(2, 2, tokens, channels[0]), states(2, 2, tokens, channels[1], seed=1)
    new_keys, new_values = states(2, 2, whole, channels[0], seed=2), states(2, 2, whole, channels[1], seed=3)
    first = whole // 3
    scale = scale_for(keys[:, :, :16], None) if repeats > 1 else None
    mean = Mean(states(2, 2, 1, channels[0], seed=4), frequencies(channels[0] - 4), 7) if repeats > 1 else None
    return States(
        pack(keys, Grid(bits[0], 16, "channel", nested, rotated=repeats == 2), scale, mean),
        pack(values, Grid(bits[1], channels[1] // 2, "token", nested, rotated=repeats > 1, centred=nested)),
        new_keys.split([first, whole - first], 2),
        new_values.split([first, whole - first], 2),
    )


def mask_of(kind, queries, tokens):
    """A mask with a query that sees nothing and a stretch of tokens that nobody sees."""
    if kind is None:
        return None
    mask = torch.rand(2, 1, queries, tokens, generator=torch.Generator().manual_seed(5)) < 0.7
    mask[0, :, 0] = False
    mask[1, :, :, :600] = False
    return mask if kind == "bool" else torch.where(mask, 0.0, -torch.inf)


SHAPES = [(1, 16, 3), (3, 1040, 0), (2, 512, 130)]


@pytest.mark.parametrize("queries", [1, 5, 40])
@pytest.mark.parametrize("masked", [None, "bool", "float"])
@pytest.mark.parametrize(("repeats", "tokens", "whole"), SHAPES)
def test_attention_by_chunks_is_attention(queries, masked, repeats, tokens, whole):
    held, query = held_of(repeats, tokens, whole), states(2, 2 * repeats, queries, 16, seed=4)
    mask = mask_of(masked, queries, tokens + whole)
    found = attend(query, held, mask, 0.3)
    torch.testing.assert_close(found, reference(query, *held.dense(), mask, 0.3).float(), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("isa", range(3))
@pytest.mark.parametrize("masked", [None, "bool", "float"])
@pytest.mark.parametrize(("repeats", "tokens", "whole"), SHAPES)
def test_attention_in_c_is_attention(isa, masked, repeats, tokens, whole):
    skip_without(isa)
    held, query = held_of(repeats, tokens, whole), states(2, 2 * repeats, 3, 16, seed=4)
    query = query.transpose(1, 2).contiguous().transpose(1, 2)  # as models hand it over
    mask = mask_of(masked, 3, tokens + whole)
    found = attend_packed(query, held, mask, 0.3, isa)
    torch.testing.assert_close(found, reference(query, *held.dense(), mask, 0.3).float(), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("isa", range(3))
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(
    ("channels", "nested"), [((4, 12), True), ((80, 64), True), ((64, 200), False), ((36, 8), True)]
)
def test_every_width_and_head_in_c(isa, bits, channels, nested):
    skip_without(isa)
    held = held_of(3, 48, 5, (bits, 9 - bits), channels, nested)
    query = states(2, 6, 1, channels[0], seed=4).bfloat16()
    found = attend_packed(query, held, None, 0.1, isa)
    wanted = reference(query, *held.dense(), None, 0.1)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), wanted, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(attention(query, held, None, 0.1).double(), wanted, rtol=1e-2, atol=1e-2)
    many = states(2, 6, 40, channels[0], seed=5)
    found = attention(many, held, None, 0.1)
    torch.testing.assert_close(found.double(), reference(many, *held.dense(), None, 0.1), rtol=1e-3, atol=1e-3)


def skip_without(isa):
    found = library()
    if isinstance(found, str) or found.isa < isa:
        pytest.skip(f"no {ISAS[isa]} here")


def test_stretches_join():
    x = states(1, 2, 32, 16)
    for along in ("channel", "token"):
        whole = pack(x, Grid(3, 8, along))
        joined = join([pack(x[:, :, :8], whole.grid), pack(x[:, :, 8:], whole.grid)])
        assert torch.equal(unpack(joined), unpack(whole))
        assert torch.equal(unpack(whole.part(8, 24)), unpack(whole)[:, :, 8:24])


@pytest.mark.parametrize("channels", [1, 12, 64, 80])
def test_rotating_twice_is_nothing_and_products_stay(channels):
    x, y = states(2, 1, 3, 96)[..., :channels].double(), states(2, 1, 3, 96, seed=1)[..., :channels].double()
    torch.testing.assert_close(rotate(rotate(x)), x)
    torch.testing.assert_close(rotate(x) @ rotate(y).mT, x @ y.mT)


def test_a_loud_channel_costs_less_when_it_is_rotated():
    x = torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    x[..., 5] *= 20
    error = [(unpack(pack(x, Grid(3, 32, "token", rotated=way))) - x).square().mean() for way in (True, False)]
    assert error[0] < error[1] / 2


@pytest.mark.slow
@pytest.mark.skipif(gpu.missing() is not None, reason=f"{gpu.missing()}")
def test_attention_in_triton_is_attention(interpret):
    assert interpret("interpreted_kv.py").count(": ok") == 3


@pytest.mark.slow
@pytest.mark.skipif(gpu.missing() is not None, reason=f"{gpu.missing()}")
def test_attention_in_triton_compiles_for_gpus(tmp_path, run_script):
    printed = run_script("static_kv.py", TRITON_CACHE_DIR=str(tmp_path))
    found = [json.loads(line) for line in printed.splitlines()]
    assert {row["target"] for row in found} == {"sm_80", "sm_90", "gfx942"}
    assert all(row["code"] and row["shared"] <= 48 << 10 for row in found)
