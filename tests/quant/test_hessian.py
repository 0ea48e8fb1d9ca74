"""Products with a metric, against plain ones; and what bfloat16 does to the errors that are reached."""

import pytest
import torch

from compress.evals.bench.matrix import correlated
from compress.quant import hessian
from compress.quant.hessian import Buffers, Follower, Hessian, leading_directions, product_dtype
from compress.quant.nested import nested_output_codebooks
from tests.quant.test_nested import plain_error, problem


def test_leading_directions_of_a_metric():
    _, metric = problem(columns=40, mixing=0.1)
    spikes = torch.randn(40, 3, generator=torch.Generator().manual_seed(1))
    metric = metric + 100 * spikes @ spikes.t()
    leading, rest = leading_directions(metric, 3)
    values, vectors = torch.linalg.eigh(metric.double())
    best = vectors[:, -3:] * values[-3:] @ vectors[:, -3:].t()
    assert torch.dist((leading @ leading.t()).double(), best) < 0.01 * best.norm()
    assert torch.allclose(rest, (metric - leading @ leading.t()).diagonal(), rtol=1e-3)


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_follower_is_a_product_with_what_has_changed(dtype, near, monkeypatch):
    monkeypatch.setattr(hessian, "product_dtype", lambda device, size: dtype)
    values, matrix = problem(rows=5, columns=100)
    metric, generator = Hessian(matrix), torch.Generator().manual_seed(3)
    before, swept = (torch.randn(2, 5, 100, generator=generator) for _ in range(2))
    gradients = [metric.times(values), metric.times(2 * values)]
    scale = float((values @ matrix).abs().max())
    assert torch.allclose(gradients[0], values @ matrix, atol=near * scale)
    follower = Follower(metric, gradients, before.to(dtype), before @ metric.leading, Buffers(values.device))
    start = torch.stack([values, 2 * values]) + before
    for first in range(0, 100, 32):
        part = slice(first, first + 32)
        seen = start + swept * (torch.arange(100) < first)
        assert torch.allclose(follower.enter(part), (seen @ matrix)[..., part], atol=2 * near * scale)
        follower.leave(part, swept[..., part])
    follower.finish()
    assert torch.allclose(torch.stack(gradients), (start + swept) @ matrix, atol=3 * near * scale)


@pytest.mark.slow
@pytest.mark.parametrize("size", [300, 1024])
def test_bfloat16_reaches_the_errors_of_float32(size, monkeypatch):
    """Inputs whose spectrum falls slowly, so that much of the metric is left to bfloat16."""
    generator = torch.Generator().manual_seed(0)
    weight, matrix = torch.randn(96, size, generator=generator), correlated(size, generator)
    errors = {}
    for dtype in (torch.float32, torch.bfloat16):
        monkeypatch.setattr(hessian, "product_dtype", lambda device, size, dtype=dtype: dtype)
        found = nested_output_codebooks(dict.fromkeys(range(3, 8), weight), matrix)
        errors[dtype] = {bits: plain_error(weight, matrix, found.dense(bits)) for bits in found.codebooks}
    for bits, error in errors[torch.bfloat16].items():
        assert error == pytest.approx(errors[torch.float32][bits], rel=0.02), bits


def test_products_are_bfloat16_where_it_pays_and_is_in_hardware(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    assert (product_dtype(cpu, 4096), product_dtype(cpu, 512)) == (torch.bfloat16, torch.float32)
    assert product_dtype(torch.device("mps"), 4096) == torch.float32
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False})
    assert product_dtype(cpu, 4096) == torch.float32
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert product_dtype(cpu, 4096) == torch.float32
