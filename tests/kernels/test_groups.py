"""Weights whose rows have a size for every 64 columns: each path against a plain sum in float64."""

import pytest
import torch

from compress.kernels import cpu
from compress.kernels.bitplane import dense_weight, packed_linear, packed_weight
from compress.kernels.packing import pack_planes

SIZES = [(5, 64), (33, 576), (16, 1536), (7, 100), (3, 4160)]
ISAS = range(cpu.library().isa + 1) if cpu.built() else ()


def matrix(bits, rows, columns):
    """Planes, a codebook for all rows, sizes of groups, and the weight they stand for in float64."""
    generator = torch.Generator().manual_seed(bits * rows + columns)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator)
    codebook = torch.randn(1, 2**bits, generator=generator)
    groups = torch.randint(1, 256, (rows, -(-columns // 64)), generator=generator).to(torch.uint8)
    weight = torch.empty(rows, columns, dtype=torch.float64)
    for k in range(columns):
        weight[:, k] = codebook[0].double()[codes[:, k]] * groups[:, k // 64] / 255
    return list(pack_planes(codes.to(torch.uint8), bits)), codebook, groups, weight


def activations(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def assert_is_product(y, x, weight, epsilon=2.0**-21):
    exact, scale = x.double() @ weight.T, x.double().abs() @ weight.abs().T
    assert y.shape == exact.shape
    assert ((y.double() - exact).abs() <= epsilon * scale).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", range(1, 9))
def test_products_with_groups(isa, bits):
    for rows, columns in SIZES:
        planes, codebook, groups, weight = matrix(bits, rows, columns)
        x = activations(17, columns)
        prepared = cpu.Prepared(planes, codebook, columns, isa=isa, groups=groups)
        whole = prepared(x[:16])
        for count in (1, 2, 3, 4, 5, 16, 17):
            assert_is_product(prepared(x[:count]), x[:count], weight)
            assert count > 16 or torch.equal(prepared(x[:count]), whole[:count])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", range(1, 9))
def test_products_with_groups_in_the_int8_mode(isa, bits):
    """Within what rounding activations, 64 of them at a time, and entries costs at most."""
    for rows, columns in SIZES:
        planes, codebook, groups, weight = matrix(bits, rows, columns)
        x = activations(16, columns)
        prepared = cpu.Prepared(planes, codebook, columns, int8=True, isa=isa, groups=groups)
        step = float(codebook.max() - codebook.min()) / 254
        sizes = (groups.double() / 255).repeat_interleave(64, 1)[:, :columns]
        entry = step / 2 * (x.double().abs() @ sizes.T)
        bound = 1.02 * (entry + x.abs().amax(1, keepdim=True).double() / 254 * (weight.abs() + step / 2 * sizes).sum(1))
        whole = prepared(x)
        assert ((whole - x.double() @ weight.T).abs() <= bound).all()
        for count in (1, 2, 3, 4, 7):
            assert torch.equal(prepared(x[:count]), whole[:count])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [1, 2, 4, 5, 8])
def test_whole_numbers_are_exact_in_the_int8_mode(isa, bits):
    """A group that counts for another, or an offset that is left out, is off by far more than rounding."""
    planes, _, groups, _ = matrix(bits, 33, 600)
    codebook = torch.linspace(-100, 154, 2**bits).round()[None]  # in steps of one
    weight = cpu.look_up(planes, codebook, 600).double() * groups.double().repeat_interleave(64, 1)[:, :600]
    x = 127.0 * torch.randint(-1, 2, (5, 600), generator=torch.Generator().manual_seed(0))
    x[:, ::5] = 127.0  # every group has it, so every scale is 1
    y = cpu.Prepared(planes, codebook, 600, int8=True, isa=isa, groups=groups, factors=torch.full((33,), 255.0))(x)
    exact = x.double() @ weight.T
    assert ((y - exact).abs() <= 2e-6 * (x.double().abs() @ weight.abs().T) * 128).all()
    assert ((y - exact).norm() / exact.norm()) < 1e-4


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("value", [0.0, 0.7, -1e-3])
def test_a_codebook_of_one_value_in_the_int8_mode(isa, value):
    planes, _, groups, _ = matrix(3, 9, 130)
    codebook, x = torch.full((1, 8), value), activations(2, 130)
    y = cpu.Prepared(planes, codebook, 130, int8=True, isa=isa, groups=groups)(x)
    weight = value * (groups.double() / 255).repeat_interleave(64, 1)[:, :130]
    assert ((y - x.double() @ weight.T).abs() <= 0.01 * weight.abs().sum(1) + 1e-30).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("int8", [False, True])
def test_what_is_not_finite_does_not_vanish(isa, int8):
    planes, codebook, groups, _ = matrix(4, 5, 200)
    x = activations(2, 200)
    x[0, 170] = float("nan")
    y = cpu.Prepared(planes, codebook, 200, int8, isa, groups=groups)(x)
    assert not y[0].isfinite().any()
    assert y[1].isfinite().all()


@pytest.mark.parametrize("built", [True, False], ids=["c", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_operators_take_groups(monkeypatch, built, dtype):
    monkeypatch.setattr(cpu, "built", lambda: built)
    bound = {torch.float32: 2.0**-21, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}[dtype]
    for bits, (rows, columns) in zip((1, 2, 4, 6, 8), SIZES, strict=True):
        planes, codebook, groups, weight = matrix(bits, rows, columns)
        facts = rows, columns, bits, 0
        for count in (1, 3, 40):
            x = activations(2, count, columns).to(dtype).requires_grad_()
            y = packed_linear(x, [codebook, *planes], None, groups, *facts)
            assert y.dtype == dtype
            assert_is_product(y, x, weight, bound)
            upstream = activations(2, count, rows).to(dtype)
            y.backward(upstream)
            assert_is_product(x.grad, upstream, weight.T, bound)
        places = torch.tensor([rows - 1, 0, rows - 1])
        found = dense_weight(planes, codebook, columns, dtype, places, groups)
        assert torch.equal(found, packed_weight([codebook, *planes], groups, *facts, dtype)[places])
        assert ((found - weight[places]).abs() <= bound * weight[places].abs()).all()


def test_512_rows_of_activations():
    planes, codebook, groups, weight = matrix(4, 33, 576)
    x, factors = activations(512, 576), torch.linspace(0.5, 2, 33)
    y = cpu.Prepared(planes, codebook, 576, factors=factors, groups=groups)(x)
    assert_is_product(y, x, weight * factors[:, None].double(), 2.0**-20)


@pytest.mark.slow
def test_torch_accepts_the_operators_with_groups():
    planes, codebook, groups, _ = matrix(4, 5, 100)
    tensors, facts = [codebook, *planes], (5, 100, 4, 0)
    x = activations(2, 100).requires_grad_()
    linear, weight = torch.ops.compress.packed_linear.default, torch.ops.compress.packed_weight.default
    assert set(torch.library.opcheck(linear, (x, tensors, None, groups, *facts)).values()) == {"SUCCESS"}
    assert set(torch.library.opcheck(weight, (tensors, groups, *facts, torch.float32)).values()) == {"SUCCESS"}


@pytest.mark.skipif(not cpu.built(), reason="no C library")
def test_groups_of_another_matrix_are_refused():
    planes, codebook, groups, _ = matrix(4, 5, 100)
    for wrong in (groups[:, :1], groups[:4], groups.int()):
        with pytest.raises(ValueError, match="are not those of 5 x 100"):
            cpu.Prepared(planes, codebook, 100, groups=wrong)
