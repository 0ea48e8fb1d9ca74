"""Runs in a process with TRITON_INTERPRET=1: products of tokens sorted by expert against float64, and a mixture against its experts one by one."""

import sys

import torch

import compress
from compress.experts import Experts
from compress.kernels import gpu
from compress.kernels.experts import multiply, sort_by_expert
from compress.kernels.layout import ROWS, random_tiled
from compress.quant.fused import ExpertStack, behind_each_other

LIMIT = {torch.float32: 2e-6, torch.float16: 1e-3}


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def worst(rows, columns, bits, seed, index, dtype=torch.float32, groups=False, biased=False):
    """The largest error, relative to the sum of the magnitudes of the products, of rows that belong to an expert; others must be 0."""
    parts = [random_tiled(rows, columns, bits, seed, seed=place, groups=groups) for place in range(3)]
    joined = behind_each_other(parts)
    joined.rows = ROWS * joined.codes.shape[1]
    given, x = sort_by_expert(index, 3), draw(index.numel(), columns).to(dtype)
    bias = draw(3, rows).to(dtype) if biased else None
    y = multiply(x, given, joined, rows, bits, bias)
    assert y.dtype == dtype and y.shape == (index.numel(), rows)
    chosen = index.flatten()[given.order]
    assert torch.equal(chosen, index.flatten().sort().values) and not y[chosen >= 3].any()
    error = 0.0
    for place, part in enumerate(parts):
        mine = x[chosen == place].double()
        more = torch.zeros(rows, dtype=torch.float64) if bias is None else bias[place].double()
        weight = part.dense(bits, torch.float64)
        scale = mine.abs() @ weight.abs().T + more.abs()
        errors = (y[chosen == place].double() - mine @ weight.T - more).abs() / scale
        error = max([error, *errors.flatten().tolist()])
    return error


assert gpu.interpreting()
uneven = torch.tensor([[0, 2]] * 20 + [[2, 3]] + [[4, 2]])  # 20, 0 and 22 tokens; two choices are no expert's
for bits, seed in [(1, 1), (2, 2), (3, 3), (4, 4), (6, 2), (8, 4)]:
    for dtype in LIMIT:
        assert worst(37, 70, bits, seed, uneven, dtype, biased=bits > 3) < LIMIT[dtype], (bits, seed, dtype)
assert worst(64, 33, 3, 3, torch.tensor([[1]])) < 2e-6
assert worst(33, 64, 3, 3, torch.tensor([[3], [5]])) == 0
assert worst(40, 72, 4, 3, torch.arange(51).view(17, 3) % 3) < 2e-6
print("sorted rows, every width: ok")

for bits, seed, columns in [(3, 3, 70), (4, 4, 330), (8, 4, 192)]:
    assert worst(37, columns, bits, seed, uneven, groups=True) < 2e-6, bits
print("groups of columns: ok")

for folder in sys.argv[1:]:
    for bits in (3, 4):
        model = compress.load(folder, bits=bits, dtype=torch.float32)
        tokens = torch.arange(5, 29)[None]
        with torch.no_grad():
            together = model(tokens).logits
        mixtures = [module for module in model.modules() if isinstance(module, Experts)]
        linears = [mixture.expert(0).get_submodule(name) for mixture in mixtures for name in mixture.matrices]
        assert linears and all(isinstance(linear._group, ExpertStack) for linear in linears)
        for mixture in mixtures:
            mixture._in_one_launch = lambda *_: None
        with torch.no_grad():
            alone = model(tokens).logits
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
        assert {name: t.shape for name, t in model.state_dict().items()}
print("a model's experts together and one by one: ok")
