"""On a GPU: every kernel against float64, graphs, streams. All of it is skipped where there is none."""

import pytest
import torch

from compress.kernels import gpu
from compress.kernels.configs import Problem, candidates
from compress.kernels.layout import random_tiled
from compress.kernels.tune import packed_of

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or gpu.missing() is not None, reason="no GPU, or no Triton"
)
LIMIT = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 1e-5}


def error(y, x, tiled, bits, bias=None):
    """Relative error in the Frobenius norm; bfloat16 weights are rounded to it, as its matrix instructions want."""
    exact = x.double() @ tiled.dense(bits, torch.float64).T + (0 if bias is None else bias.double())
    return float((y.double() - exact).norm() / exact.norm())


def activations(*shape, dtype=torch.float16):
    return torch.randn(*shape, device="cuda", generator=torch.Generator("cuda").manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize(("bits", "seed"), [(2, 2), (3, 3), (4, 3), (4, 4), (5, 3), (6, 2), (7, 4), (8, 4)])
def test_every_width_and_number_of_rows(bits, seed, dtype):
    tiled = random_tiled(1000, 1056, bits, seed, "cuda")
    bias = activations(1000, dtype=dtype)
    for count in (1, 2, 3, 4, 16, 33, 100, 600):
        x = activations(count, 1056, dtype=dtype)
        assert error(gpu.linear(x, tiled, bits, bias), x, tiled, bits, bias) < LIMIT[dtype], count


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (31, 33), (100, 4000), (4096, 11008)])
def test_odd_sizes_and_strides(rows, columns):
    tiled = random_tiled(rows, columns, 3, device="cuda")
    for count in (1, 5, 70):
        for x in (activations(count, columns), activations(columns, count).t(), activations(count, columns + 1)[:, 1:]):
            assert error(gpu.linear(x, tiled, 3), x, tiled, 3) < 2e-3


@pytest.mark.parametrize("count", [1, 2, 4, 8, 64, 256])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_every_configuration_computes_the_same_every_time(bits, count):
    tiled = random_tiled(512, 4096, bits, device="cuda")
    x = activations(count, 4096)
    for config in candidates(Problem(512, 4096, bits, count, "fp16")):
        if config.stages > 1 and config.bm > 64:
            continue  # more shared memory than every GPU has
        first = gpu.multiply(x, packed_of(tiled, bits), None, config)
        assert error(first, x, tiled, bits) < 1e-3, config
        assert torch.equal(first, gpu.multiply(x, packed_of(tiled, bits), None, config)), config


@pytest.mark.parametrize("count", [1, 16, 128])
def test_a_graph_replays_it_and_nothing_but_the_output_is_allocated(count):
    tiled = random_tiled(1024, 4096, 3, device="cuda")
    x = activations(count, 4096)
    expected = gpu.linear(x, tiled, 3)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    gpu.linear(x, tiled, 3)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before + 1
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = gpu.linear(x, tiled, 3)
    x.mul_(2)
    graph.replay()
    assert torch.allclose(y, 2 * expected, rtol=1e-2, atol=1e-2)


def test_it_runs_on_the_current_stream():
    tiled = random_tiled(512, 4096, 3, device="cuda")
    x = torch.zeros(1, 4096, device="cuda").half()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        x.fill_(1)
        y = gpu.linear(x, tiled, 3)
    stream.synchronize()
    assert error(y, torch.ones_like(x), tiled, 3) < 1e-3


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_the_device_of_the_tensors_is_used():
    tiled = random_tiled(512, 4096, 3, device="cuda:1")
    x = torch.ones(1, 4096, device="cuda:1").half()
    y = gpu.linear(x, tiled, 3)
    assert y.device == x.device
    assert error(y, x, tiled, 3) < 1e-3


def test_the_gradient_reaches_the_input():
    tiled = random_tiled(96, 160, 4, device="cuda")
    x = activations(5, 160, dtype=torch.float32).requires_grad_()
    gpu.linear(x, tiled, 4).sum().backward()
    assert torch.allclose(x.grad, tiled.dense(4, torch.float32).sum(0).expand(5, -1), atol=1e-4)
