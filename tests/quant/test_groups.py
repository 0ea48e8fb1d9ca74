"""Packed modules whose rows have a size for every 64 columns, against the weights written out."""

import pytest
import torch

from compress.kernels import gpu
from compress.quant.embedding import BitPlaneEmbedding, BitPlaneHead
from compress.quant.format import Codes, pack_smaller
from compress.quant.fused import join
from compress.quant.linear import BitPlaneLinear
from compress.quant.shared import Shared

SEED, PARENT = 2, 6


def stored(rows, columns):
    """The record and tensors of a matrix, and the weights that it stands for at every number of bits, in float64."""
    generator = torch.Generator().manual_seed(rows)

    def random(*size):
        return torch.randn(*size, generator=generator).half().float()

    groups = torch.randint(1, 256, (rows, -(-columns // 64)), generator=generator).byte()
    basis = {bits: random(1, 2**bits) for bits in range(SEED, PARENT + 1)}
    shared = Shared(
        random(columns).abs() + 0.5,
        random(rows, 1).abs() + 0.5,
        None,
        basis,
        groups=groups,
    )
    codes = torch.randint(0, 2**PARENT, (rows, columns), dtype=torch.uint8, generator=generator)
    tables = {bits: shared.codebook(bits) for bits in range(SEED, PARENT + 1)}
    shape, tensors, _ = pack_smaller(Codes(codes, tables, shared=shared).as_stored())
    held = {name: tensor.double() for name, tensor in tensors.items() if tensor.is_floating_point()}
    weights = {}
    for bits in range(SEED, PARENT + 1):
        entries = held[f"basis_{bits}"][0][(codes >> (PARENT - bits)).long()]
        sizes = torch.stack([groups[:, k // 64] for k in range(columns)], 1).double() / 255
        weights[bits] = held["columns"] * held["rows"] * sizes * entries
    return shape, dict(tensors), weights


def linear(rows=33, columns=576, bias=False):
    shape, tensors, weights = stored(rows, columns)
    module = BitPlaneLinear(shape, bias)
    module.hold(shape, tensors)
    return module, weights


def assert_is_product(y, x, weight, epsilon):
    exact, scale = x.double() @ weight.T, x.double().abs() @ weight.abs().T
    assert ((y.double() - exact).abs() <= epsilon * scale).all()


@pytest.mark.parametrize(("rows", "columns"), [(5, 64), (33, 576), (7, 100)])
@pytest.mark.parametrize("keep", [None, True])
def test_a_linear_layer_at_every_number_of_bits(rows, columns, keep):
    module, weights = linear(rows, columns)
    module.keep_dense = keep
    for bits, weight in weights.items():
        module.bits = bits
        assert ((module.dense() - weight).abs() <= 2.0**-21 * weight.abs()).all()
        for count in (1, 5, 40):
            x = torch.randn(count, columns, generator=torch.Generator().manual_seed(0))
            assert_is_product(module(x), x, weight, 2.0**-20)
            assert_is_product(module(x.bfloat16()), x.bfloat16(), weight, 2.0**-6)


@pytest.mark.slow
def test_the_gradient_and_torch_compile():
    module, weights = linear()
    module.bits = 4
    x = torch.randn(3, 576, generator=torch.Generator().manual_seed(0)).requires_grad_()
    upstream = torch.randn(3, 33, generator=torch.Generator().manual_seed(1))
    module(x).backward(upstream)
    assert_is_product(x.grad, upstream, weights[4].T, 2.0**-19)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x.detach()), module(x.detach()), rtol=1e-4, atol=1e-4)


def test_the_int8_mode_costs_about_a_hundredth():
    module, weights = linear(columns=1536)
    module.exact = False
    for bits in (2, 4, 6):
        module.bits = bits
        x = torch.randn(2, 1536, generator=torch.Generator().manual_seed(0))
        exact = x.double() @ weights[bits].T
        assert 1e-5 * exact.norm() < (module(x) - exact).norm() < 0.015 * exact.norm()


def test_another_tensor_of_groups_is_seen_between_calls():
    module, _ = linear()
    x = torch.randn(1, 576, generator=torch.Generator().manual_seed(0))
    before = module(x)
    module.register_buffer("groups", torch.full_like(module.group_sizes, 255))
    assert not torch.allclose(module(x), before, rtol=0.1)


def test_the_layout_of_the_gpu_kernels_and_back(monkeypatch):
    """Every tensor comes back bit for bit; products of the layout, by its reference, are those of the planes."""
    (one, weights), (other, _) = linear(64), linear(64)
    before = {name: tensor.clone() for name, tensor in one.state_dict().items()}
    x = torch.randn(3, 576, generator=torch.Generator().manual_seed(0))
    with monkeypatch.context() as patch:
        patch.setattr(gpu, "serves", lambda device: True)
        one.tile()
        other.tile()
    assert one.is_tiled
    assert "groups" not in dict(one.named_buffers())  # they are there once
    assert one.tiled().registers.keys() == {2, 3, 4}  # so that the kernels with assembly serve these bits
    assert join({"it.q": one, "it.k": other}, [["q", "k"]]) == 1
    for bits, weight in weights.items():
        one.bits = other.bits = bits
        assert torch.allclose(one.dense().double(), weight, rtol=1e-5, atol=1e-7)
        for found in (one(x), other(x)):
            assert torch.allclose(found.double(), x.double() @ weight.T, rtol=1e-4, atol=1e-2)
    after = one.state_dict()
    assert after.keys() == before.keys()
    one.untile()
    for state in (after, one.state_dict()):
        assert all(
            torch.equal(state[name], before[name]) and state[name].dtype == before[name].dtype for name in before
        )


def test_an_embedding_and_its_tied_head():
    shape, tensors, weights = stored(50, 100)
    module = BitPlaneEmbedding(shape)
    module.hold(shape, tensors)
    head = BitPlaneHead(module)
    tokens = torch.tensor([[49, 0, 3], [3, 3, 7]])
    for bits, weight in weights.items():
        module.bits = bits
        assert torch.allclose(module(tokens).double(), weight[tokens], rtol=1e-6, atol=0)
        x = torch.randn(2, 100, generator=torch.Generator().manual_seed(0))
        assert_is_product(head(x), x, weight, 2.0**-20)
