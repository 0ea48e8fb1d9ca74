"""The packed linear operator against the same product in float64, its gradient, and what torch.compile needs."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from compress.kernels import bitplane, cpu
from compress.kernels.bitplane import dense_weight, matmul, packed_linear, reference_weight
from compress.kernels.packing import pack_planes

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def layer(bits=4, rows=5, columns=33, table=torch.float16):
    """Random planes and codebook, and the weight they stand for, looked up here."""
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator)
    codebook = torch.randn(rows, 2**bits, generator=generator).to(table)
    weight = torch.stack([codebook[row][codes[row]] for row in range(rows)])
    return list(pack_planes(codes.to(torch.uint8), bits)), codebook, weight


def activations(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def product(x, planes, codebook, columns, bias=None):
    """The operator on a matrix as it is stored."""
    return packed_linear(x, [codebook, *planes], bias, None, codebook.shape[0], columns, len(planes), 0)


def assert_is_product(y, x, weight):
    """Equal to x @ weight.T up to rounding weights and result to the dtype, and adding in float32."""
    assert y.dtype == x.dtype
    exact = x.double() @ weight.double().T
    scale = x.double().abs() @ weight.double().abs().T
    assert y.shape == exact.shape
    assert ((y.double() - exact).abs() <= 2 * torch.finfo(x.dtype).eps * scale).all()


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("table", [torch.float16, torch.float32])
def test_every_width_multiplies_by_the_looked_up_weight(bits, table):
    planes, codebook, weight = layer(bits, table=table)
    x = activations(3, 33)
    assert torch.equal(dense_weight(planes, codebook, 33, table), weight)
    assert_is_product(product(x, planes, codebook, 33), x, weight)


@pytest.mark.parametrize("columns", [1, 31, 33, 500])
@pytest.mark.parametrize("rows", [1, 7])
def test_odd_sizes(rows, columns):
    planes, codebook, weight = layer(3, rows, columns)
    x = activations(2, columns)
    assert_is_product(product(x, planes, codebook, columns), x, weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [(), (3,), (2, 5)])
@pytest.mark.parametrize("table", [torch.float16, torch.float32])
def test_the_result_has_the_batch_shape_and_dtype_of_the_input(batch, dtype, table):
    planes, codebook, weight = layer(table=table)
    x = activations(*batch, 33, dtype=dtype)
    assert_is_product(product(x, planes, codebook, 33), x, weight)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_input_may_have_any_strides(dtype):
    planes, codebook, weight = layer()
    for x in (activations(33, 4, dtype=dtype).t(), activations(3, 66, dtype=dtype)[:, ::2]):
        assert not x.is_contiguous()
        assert_is_product(product(x, planes, codebook, 33), x, weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [(), (3,), (2, 5)])
def test_a_kept_dense_weight_gives_the_same_product(batch, dtype):
    planes, codebook, weight = layer()
    x = activations(*batch, 33, dtype=dtype)
    dense = dense_weight(planes, codebook, 33, dtype)
    assert_is_product(matmul(x, dense.t()), x, weight)
    assert_is_product(product(x, planes, codebook, 33), x, weight)


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_the_c_library_the_reference_serves(monkeypatch, dtype):
    monkeypatch.setattr(cpu, "built", lambda: False)
    planes, codebook, weight = layer()
    x = activations(2, 5, 33, dtype=dtype)
    dense = dense_weight(planes, codebook, 33, dtype)
    kept = matmul(x, dense.t())
    assert torch.equal(product(x, planes, codebook, 33), kept)
    assert_is_product(kept, x, weight)


def test_looking_up_a_few_rows_at_a_time_changes_no_bit(monkeypatch):
    planes, codebook, weight = layer(rows=7)
    monkeypatch.setattr(bitplane, "_WEIGHTS_AT_ONCE", 2 * 33)  # two rows of 33 weights, so chunks of 2, 2, 2 and 1
    assert torch.equal(reference_weight(planes, codebook, 33, torch.float16), weight)


@pytest.mark.parametrize("keep", [False, True], ids=["looked_up", "dense_kept"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_input_gets_the_gradient_of_the_dense_layer(keep, dtype):
    planes, codebook, weight = layer()
    dense = dense_weight(planes, codebook, 33, dtype)
    x = activations(2, 5, 33, dtype=dtype).requires_grad_()
    upstream = activations(2, 5, 5, dtype=dtype)
    y = matmul(x, dense.t()) if keep else product(x, planes, codebook, 33)
    y.backward(upstream)
    assert_is_product(x.grad, upstream, weight.T)


def test_planes_and_codebook_get_no_gradient():
    planes, codebook, _ = layer()
    codebook.requires_grad_()
    x = activations(3, 33).requires_grad_()
    product(x, planes, codebook, 33).sum().backward()
    assert x.grad is not None
    assert codebook.grad is None
    assert all(plane.grad is None for plane in planes)


@pytest.mark.slow
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_torch_accepts_the_operator(biased, trained):
    planes, codebook, _ = layer()
    x, bias = activations(2, 5, 33).requires_grad_(trained), activations(5) if biased else None
    arguments = (x, [codebook, *planes], bias, None, 5, 33, 4, 0)
    results = torch.library.opcheck(torch.ops.compress.packed_linear.default, arguments)
    assert set(results.values()) == {"SUCCESS"}
    assert not biased or torch.equal(packed_linear(*arguments), product(x, planes, codebook, 33) + bias)


@pytest.mark.parametrize("batch", [(), (3,), (2, 5)])
def test_fake_tensors_give_the_shape_without_computing(batch):
    planes, codebook, _ = layer()
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(plane) for plane in planes]
        x = torch.empty(*batch, 33, dtype=torch.bfloat16)
        y = product(x, fakes, mode.from_tensor(codebook), 33)
    assert y.shape == (*batch, 5)
    assert y.dtype == torch.bfloat16
