"""Runs in a process with TRITON_INTERPRET=1: the plain kernels through the operator, against float64, on any sizes.

The interpreter computes bfloat16 wrongly and says nothing, so bfloat16 activations are not tried here: those kernels are compiled
(test_static.py), and their assembly runs in the emulator (test_ptx.py).
"""

import torch

from compress.kernels import configs, gpu
from compress.kernels.bitplane import tiled_linear, tiled_weight
from compress.kernels.layout import random_tiled
from compress.kernels.tune import packed_of
from compress.kernels.variants import Config


def worst(tiled, bits, x, bias=None, config=None):
    """The largest error, relative to the sum of the magnitudes of the products."""
    packed = packed_of(tiled, bits)
    flat = x.reshape(-1, tiled.columns)
    if config is None:
        y = tiled_linear(x, tiled, bits, bias).reshape(-1, tiled.rows)
    else:
        y = gpu.multiply(flat, packed, bias, config)
    assert y.dtype == x.dtype
    weight = tiled.dense(bits, torch.float64)
    exact = flat.double() @ weight.T + (0 if bias is None else bias.double())
    scale = flat.double().abs() @ weight.abs().T + (0 if bias is None else bias.double().abs())
    return float(((y.double() - exact).abs() / scale).max())


def activations(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


LIMIT = {torch.float32: 2e-6, torch.float16: 1e-3}

assert gpu.interpreting()
assert "plain kernels" in gpu.describe()
for bits, seed in [(1, 1), (2, 2), (3, 3), (4, 2), (4, 4), (5, 3), (6, 2), (7, 3), (8, 4)]:  # all widths, all heads
    tiled = random_tiled(37, 70, bits, seed)
    for count, dtype in ((1, torch.float16), (3, torch.float32), (9, torch.float16)):
        error = worst(tiled, bits, activations(count, 70, dtype=dtype), activations(37, dtype=dtype))
        assert error < LIMIT[dtype], (bits, seed, count, dtype, error)
print("every width, one row and several, with a bias: ok")

nested = random_tiled(64, 64, 6, 3)
for bits in nested.tables:
    assert worst(nested, bits, activations(2, 64)) < 2e-6
print("every width of one layout: ok")

for rows, columns, count in [(1, 1, 1), (31, 33, 2), (65, 500, 4), (96, 32, 70)]:
    tiled = random_tiled(rows, columns, 3)
    assert worst(tiled, 3, activations(count, columns, dtype=torch.float16)) < 1e-3
print("odd sizes: ok")

tiled = random_tiled(40, 72, 4)
for x in (
    activations(72, 3).t(),
    activations(3, 144)[:, ::2],
    activations(3, 73)[:, 1:],
    activations(1, 72).expand(3, 72),
):
    assert worst(tiled, 4, x) < 2e-6
assert tiled_linear(activations(0, 72), tiled, 4).shape == (0, 40)
assert worst(tiled, 4, activations(2, 3, 72)) < 2e-6
print("any strides and batch shapes: ok")

tiled = random_tiled(40, 300, 3)
for count in (2, 20):  # a split sum is the same every time
    x, bias = activations(count, 300, dtype=torch.float16), activations(40, dtype=torch.float16)
    for split in (2, 4):
        config = Config(4, 2, split, 16, 32, 1)
        assert worst(tiled, 3, x, bias, config) < 1e-3
rule, gpu.choose_config = (
    gpu.choose_config,
    lambda *_: Config(4, 2, 2),
)  # through the operator: the result lies in a larger tensor
x = activations(2, 300).requires_grad_()
y = tiled_linear(x, tiled, 3)
y.sum().backward()
assert torch.allclose(x.grad, tiled.dense(3, torch.float32).sum(0).expand(2, -1), atol=1e-4)
compiled = torch.compile(lambda x: 2 * tiled_linear(x, tiled, 3), fullgraph=True, backend="aot_eager")
assert torch.equal(compiled(x), 2 * y)
gpu.choose_config = rule
print("sums split between programs: ok")

exact, tiled = (random_tiled(40, 72, 4, 3, exact=exact) for exact in (True, False))
assert worst(tiled, 4, activations(3, 72)) < 2e-6  # against the rounded entries
x = activations(3, 72)
found, stored = tiled_linear(x, tiled, 4), tiled_linear(x, exact, 4)
assert 1e-4 < float((found - stored).norm() / stored.norm()) < 1e-2
assert torch.equal(tiled_linear(x, tiled, 3), tiled_linear(x, exact, 3))
assert torch.equal(tiled_weight(tiled, 4, torch.float32), tiled.dense(4, torch.float32))
print("entries of 8 bits: ok")

configs.TILE_ROWS, gpu.LOOKED_UP_BYTES = 8, 32 * 96 * 4  # a tile at a time
tiled = random_tiled(70, 90, 5, 3)
assert worst(tiled, 5, activations(9, 90), activations(70)) < 2e-6
weight = tiled_weight(tiled, 5, torch.float32)
assert torch.equal(weight, tiled.dense(5, torch.float32))
x = activations(3, 90).requires_grad_()
upstream = activations(3, 70)
tiled_linear(x, tiled, 5).backward(upstream)
assert torch.allclose(x.grad, upstream @ weight, atol=1e-5)
print("looked-up weights, and the gradient: ok")

configs.TILE_ROWS, gpu.LOOKED_UP_BYTES = 512, 256 << 20
for bits, seed, columns in [(1, 1, 70), (2, 2, 64), (4, 3, 330), (6, 4, 100), (8, 4, 192)]:
    tiled = random_tiled(37, columns, bits, seed, groups=True)
    for count, dtype in ((1, torch.float16), (3, torch.float32), (9, torch.float16)):
        error = worst(tiled, bits, activations(count, columns, dtype=dtype), activations(37, dtype=dtype))
        assert error < LIMIT[dtype], (bits, seed, count, dtype, error)
    assert torch.allclose(tiled_weight(tiled, bits, torch.float32), tiled.dense(bits, torch.float32), rtol=1e-6)
assert worst(tiled, 8, activations(2, 192), config=Config(4, 1, 2)) < 2e-6  # each half of a group by another program
print("groups of columns: ok")
