"""On a GPU: every kernel against float64, graphs, streams; a test names all that it finds wrong, not the first alone.

All of it is skipped where there is none, unless TRITON_INTERPRET=1 lets Triton's interpreter stand in: then sizes are tiny and what only a
GPU has is skipped, so that the tests themselves are known to run (``compress.evals.bench.gpu --dry-run``).
"""

import itertools

import numpy as np
import pytest
import torch

from compress.kernels import gpu
from compress.kernels.bitplane import tiled_linear, tiled_weight
from compress.kernels.configs import Problem, candidates
from compress.kernels.layout import ROUNDED, random_tiled
from compress.kernels.tune import packed_of
from compress.kernels.variants import Config
from compress.quant.descent import Descent, GpuDescent
from compress.quant.errors import matrix_errors
from compress.quant.format import Codes, pack
from compress.quant.fused import join
from compress.quant.linear import BitPlaneLinear
from compress.quant.nested import nested_output_codebooks

pytestmark = pytest.mark.skipif(not gpu.available(), reason="no GPU, or no Triton")
ON_GPU = torch.cuda.is_available()
on_gpu = pytest.mark.skipif(not ON_GPU, reason="no GPU")
DEVICE = "cuda" if ON_GPU else "cpu"
LIMIT = {torch.float16: 1e-3, torch.float32: 1e-5} | ({torch.bfloat16: 8e-3} if ON_GPU else {})
HALVES = {"fp16": torch.float16} | (
    {"bf16": torch.bfloat16} if ON_GPU else {}
)  # which the interpreter computes wrongly
# (width, seed width, whether entries are exact): every width, and every packing of the first planes
WIDTHS = [(bits, seed, True) for bits in range(1, 9) for seed in {min(bits, first) for first in (1, 2, 3, 4)}]
WIDTHS += [(ROUNDED, seed, False) for seed in (2, 3, 4)]


def sized(*sizes, most=72):
    """Sizes of a matrix, or tiny ones for the interpreter."""
    return sizes if ON_GPU else tuple(min(size, most) for size in sizes)


def counts(*rows):
    """Numbers of rows of activations, or a few for the interpreter."""
    return rows if ON_GPU else rows[:2]


def wrong(cases, error_of, limit):
    """Try all cases; returns those whose error is too large, or that cannot be computed, with what was found."""
    found = {}
    for case in cases:
        try:
            found[case] = error_of(*case) if isinstance(case, tuple) else error_of(case)
        except Exception as failed:
            found[case] = f"{type(failed).__name__}: {' '.join(str(failed).split())[:300]}"
    return {case: what for case, what in found.items() if isinstance(what, str) or not what < limit}


def error(y, x, tiled, bits, bias=None):
    """Relative error in the Frobenius norm; bfloat16 weights are rounded to it, as its matrix instructions want."""
    exact = x.double() @ tiled.dense(bits, torch.float64).T + (0 if bias is None else bias.double())
    return float((y.double() - exact).norm() / exact.norm().clamp(min=1e-2))


def activations(*shape, dtype=torch.float16):
    return torch.randn(*shape, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(0)).to(dtype)


# Every kernel


@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize(("bits", "seed", "exact"), WIDTHS)
def test_every_width_and_number_of_rows(bits, seed, exact, dtype):
    rows, columns = sized(1000, 4128)
    tiled, bias = random_tiled(rows, columns, bits, seed, DEVICE, exact=exact), activations(rows, dtype=dtype)

    def error_of(count, biased):
        x, added = activations(count, columns, dtype=dtype), bias if biased else None
        return error(tiled_linear(x, tiled, bits, added), x, tiled, bits, added)

    every = itertools.product(counts(1, 2, 3, 4, 5, 16, 17, 33, 64, 65, 100, 512, 513, 600), (True, False))
    assert not wrong(every, error_of, LIMIT[dtype])


@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (31, 33), (33, 31), (100, 4000), (65, 8200), (4096, 11008)])
def test_odd_sizes(rows, columns, bits, dtype):
    rows, columns = sized(rows, columns)

    def error_of(count, exact):
        tiled, x = (
            random_tiled(rows, columns, bits, device=DEVICE, exact=exact),
            activations(count, columns, dtype=dtype),
        )
        return error(tiled_linear(x, tiled, bits), x, tiled, bits)

    every = itertools.product(counts(1, 3, 5, 70, 513), (True, False) if bits == ROUNDED else (True,))
    assert not wrong(every, error_of, 2 * LIMIT[dtype])


@pytest.mark.parametrize("count", [1, 3, 70, 520])
def test_any_strides(count):
    rows, columns = sized(100, 4096)
    tiled, wide = random_tiled(rows, columns, 3, device=DEVICE), activations(count, 2 * columns)
    for x in (
        activations(columns, count).t(),
        activations(count, columns + 1)[:, 1:],
        wide[:, ::2],
        wide[:, columns:],
        activations(1, columns).expand(count, columns),
        activations(count, 1, columns),
    ):
        y = tiled_linear(x, tiled, 3).view(count, rows)
        assert error(y, x.reshape(count, columns), tiled, 3) < 1e-3, x.stride()
    assert tiled_linear(activations(0, columns), tiled, 3).shape == (0, rows)


@pytest.mark.parametrize("kind", HALVES)
@pytest.mark.parametrize("count", [1, 2, 4, 8, 17, 64, 256])
@pytest.mark.parametrize("bits", range(2, 9))
def test_every_configuration_computes_the_same_every_time(bits, count, kind):
    """What ``compress tune`` chooses from; one that this GPU has no room for says so."""
    rows, columns = sized(500, 4096)
    tiled = random_tiled(rows, columns, bits, device=DEVICE)
    place = gpu.device_of(torch.cuda.current_device() if ON_GPU else -1)
    x = activations(count, columns, dtype=HALVES[kind])

    def error_of(config):
        try:
            first = gpu.multiply(x, packed_of(tiled, bits), None, config)
        except Exception as failed:
            if "out of resource" in str(failed).lower():
                return 0.0
            raise
        assert torch.equal(first, gpu.multiply(x, packed_of(tiled, bits), None, config)), "another result"
        return error(first, x, tiled, bits)

    problem = Problem(rows, columns, bits, count, kind, place.assembly, place.capability)
    assert not wrong(candidates(problem), error_of, LIMIT[HALVES[kind]])


@pytest.mark.parametrize("head", [2, 3, 4])
@pytest.mark.parametrize("kind", HALVES)
def test_pairs_and_registers_hold_the_same_weights(head, kind):
    rows, columns = sized(1000, 4096)
    tiled, x = random_tiled(rows, columns, 4, head, DEVICE), activations(1, columns, dtype=HALVES[kind])

    def error_of(warps, pairs):
        y = gpu.multiply(x, packed_of(tiled, 4), None, Config(warps, warps, pairs=pairs))
        return error(y, x, tiled, 4)

    assert not wrong(itertools.product((4, 8, 16), (False, True)), error_of, LIMIT[HALVES[kind]])


@on_gpu
def test_a_large_matrix_and_every_one_of_its_rows():
    """Gate and up of Llama-2-70B: no offset overflows, and no row is left out."""
    tiled = random_tiled(57344, 8192, 8, 4, "cuda")
    for bits in (4, 8):
        for count in (1, 16, 100):
            x = activations(count, 8192)
            y, each = tiled_linear(x, tiled, bits), slice(57344 - 64, None)
            exact = x.double() @ tiled.dense(bits, torch.float16)[each].double().T
            assert float((y[:, each].double() - exact).norm() / exact.norm()) < 1e-3
            assert bool((y != 0).any(0).all())


@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize(("bits", "seed", "exact"), WIDTHS)
def test_looked_up_weights(bits, seed, exact, dtype):
    tiled = random_tiled(*sized(100, 330), bits, seed, DEVICE, exact=exact)
    found, wanted = tiled_weight(tiled, bits, dtype), tiled.dense(bits, torch.float64).to(dtype)
    assert torch.allclose(found, wanted, rtol=1e-3 if not exact else 0, atol=0)


# Around a kernel


@on_gpu
@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("count", [1, 16, 128])
def test_a_graph_replays_it_and_nothing_but_the_output_is_allocated(count, bits):
    tiled = random_tiled(1024, 4096, bits, device="cuda")
    x = activations(count, 4096)
    expected = tiled_linear(x, tiled, bits)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    tiled_linear(x, tiled, bits)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before + 1
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = tiled_linear(x, tiled, bits)
    x.mul_(2)
    graph.replay()
    assert torch.allclose(y, 2 * expected, rtol=1e-2, atol=1e-2)


@on_gpu
def test_it_runs_on_the_current_stream():
    tiled = random_tiled(512, 4096, 3, device="cuda")
    x = torch.zeros(1, 4096, device="cuda").half()
    tiled_linear(x, tiled, 3)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        x.fill_(1)
        y = tiled_linear(x, tiled, 3)
    stream.synchronize()
    assert error(y, torch.ones_like(x), tiled, 3) < 1e-3


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_the_device_of_the_tensors_is_used():
    tiled = random_tiled(512, 4096, 3, device="cuda:1")
    x = torch.ones(1, 4096, device="cuda:1").half()
    y = tiled_linear(x, tiled, 3)
    assert y.device == x.device
    assert error(y, x, tiled, 3) < 1e-3
    with pytest.raises(ValueError, match="activations are on cuda:0, and the packed layer is on cuda:1"):
        tiled_linear(x.to("cuda:0"), tiled, 3)


@on_gpu
def test_activations_elsewhere_are_refused():
    tiled = random_tiled(64, 64, 3, device="cuda")
    with pytest.raises(ValueError, match="activations are on cpu, and the packed layer is on cuda:0"):
        tiled_linear(torch.zeros(1, 64), tiled, 3)


@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("count", [1, 5, 70])
def test_the_gradient_reaches_the_input(count, exact, dtype):
    rows, columns = sized(96, 160)
    tiled = random_tiled(rows, columns, 4, device=DEVICE, exact=exact)
    x = activations(count, columns, dtype=dtype).requires_grad_()
    upstream = activations(count, rows, dtype=dtype)
    tiled_linear(x, tiled, 4).backward(upstream)
    wanted = upstream.double() @ tiled.dense(4, torch.float64)
    assert float((x.grad.double() - wanted).norm() / wanted.norm()) < LIMIT[dtype]


@on_gpu
@pytest.mark.parametrize("count", [1, 16])
def test_inductor_compiles_it_without_a_break(count):
    tiled, x = random_tiled(1024, 4096, 4, device="cuda"), activations(count, 4096)

    def step(x):
        return torch.nn.functional.silu(tiled_linear(2 * x, tiled, 4))

    with torch.no_grad():
        found = torch.compile(step, fullgraph=True, mode="reduce-overhead")(x)
        assert torch.allclose(found, step(x), rtol=1e-2, atol=1e-2)
    torch.compiler.reset()


# Layers of a model


def layers(names, rows=96, columns=4096):
    """Packed linears of 3 to 6 bits on the GPU."""
    made = {}
    for seed, name in enumerate(names):
        generator = torch.Generator().manual_seed(seed)
        codes = torch.randint(0, 64, (rows, columns), dtype=torch.uint8, generator=generator)
        shape, tensors = pack(codes, {bits: torch.randn(rows, 2**bits, generator=generator) for bits in range(3, 7)})
        layer = BitPlaneLinear(shape, bias=False)
        layer.load_state_dict(tensors)
        made[f"block.{name}"] = layer.cuda()
    return made


def alike(found, wanted):
    """But for the order of the sums, which depends on how many rows are launched together."""
    return all(torch.allclose(a, b, rtol=5e-3, atol=0.2) for a, b in zip(found, wanted, strict=True))


def run(modules, x, bits):
    for module in modules.values():
        module.bits = bits
    with torch.no_grad():
        return [module(x) for module in modules.values()]


@on_gpu
@pytest.mark.parametrize("count", [1, 16])
@pytest.mark.parametrize("exact", [True, False])
def test_layers_launched_together_and_the_width_changed_under_captured_graphs(count, exact):
    names, x = ["q", "k", "v"], activations(count, 4096)
    alone, together = layers(names), layers(names)
    for module in (*alone.values(), *together.values()):
        assert module.is_tiled
        module.exact = exact
    assert join(together, [names]) == 1
    places = [buffer.data_ptr() for module in together.values() for buffer in module.buffers()]
    graphs = {}
    for bits in (3, 4, 6):
        assert alike(run(together, x, bits), run(alone, x, bits))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            graphs[bits] = graph, run(together, x, bits)
    x.copy_(activations(count, 4096).flip(0).roll(7, 1))
    for bits in (6, 3, 4, 3):  # whatever width is in use, a graph replays its own
        for module in together.values():
            module.bits = 5
        graphs[bits][0].replay()
        torch.cuda.synchronize()
        assert alike(graphs[bits][1], run(alone, x, bits)), bits
    assert [buffer.data_ptr() for module in together.values() for buffer in module.buffers()] == places


@on_gpu
def test_stored_tensors_come_back_from_the_gpu_bit_for_bit():
    layer = layers(["q"])["block.q"]
    stored = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer.exact = False
    assert all(torch.equal(tensor, stored[name]) for name, tensor in layer.state_dict().items())
    back = layer.cpu()
    assert not back.is_tiled
    assert all(torch.equal(tensor.cpu(), stored[name].cpu()) for name, tensor in back.state_dict().items())


# The search for codebooks


def searched(device, rows, columns):
    """Codes of 3 bits and more by the output objective, and the relative error of the outputs at each."""
    generator = torch.Generator().manual_seed(1)
    weight, inputs = (torch.randn(count, columns, generator=generator) for count in (rows, 3 * columns))
    inputs = inputs @ (torch.eye(columns) + torch.randn(columns, columns, generator=generator) / columns**0.5)
    hessian = (inputs.t() @ inputs / len(inputs)).to(device)
    found = nested_output_codebooks(dict.fromkeys(range(3, 8 if ON_GPU else 5), weight.to(device)), hessian)
    found = Codes(found.codes, found.codebooks, hessian)
    errors = matrix_errors(weight, found, None, torch.device(device))
    return found.codes.cpu(), {bits: errors[bits]["output"] for bits in errors}


def test_codes_found_on_a_gpu_are_as_good_as_those_found_on_a_cpu():
    """Sums are in another order, so near-ties fall either way; what is reached is the same. And the same bits every time."""
    sizes = (300, 700) if ON_GPU else (2, 20)
    (codes, reached), (others, wanted) = searched(DEVICE, *sizes), searched("cpu", *sizes)
    assert codes.shape == others.shape
    assert not wrong(wanted, lambda bits: abs(reached[bits] / wanted[bits] - 1), 0.02)
    assert torch.equal(searched(DEVICE, *sizes)[0], codes)


@on_gpu
@pytest.mark.parametrize(("fewest", "parent", "kept"), [(2, 6, 0), (3, 6, 0), (4, 6, 3), (7, 7, 6), (8, 8, 7)])
def test_the_column_loop_chooses_what_the_one_for_cpus_does(fewest, parent, kept):
    generator = torch.Generator().manual_seed(0)
    codebooks = {
        bits: torch.randn(1000, 2**bits, generator=generator).sort(1).values for bits in range(fewest, parent + 1)
    }
    codes = torch.randint(0, 2**parent, (1000, 100), generator=generator)
    fixed, gradient = torch.rand(1000, 100, generator=generator) < 0.2, torch.randn(len(codebooks), 1000, 100)
    inputs = torch.randn(400, 100, generator=generator)
    hessian, share = inputs.t() @ inputs / 400, np.array([2.0**bits for bits in codebooks], np.float32)
    wanted, slopes, sizes = codes.clone(), gradient.clone(), torch.rand(1000, 100, generator=generator) + 0.1
    loop = Descent({bits: codebook.numpy() for bits, codebook in codebooks.items()}, share, kept)
    loop(wanted.numpy(), fixed.numpy(), sizes.numpy(), slopes.numpy(), hessian.numpy())
    found, moved = codes.cuda(), gradient.cuda()
    there = {bits: codebook.cuda() for bits, codebook in codebooks.items()}
    GpuDescent(there, share, kept)(found, fixed.cuda(), sizes.cuda(), moved, hessian.cuda())
    same = (found.cpu() == wanted).all(1)
    assert float((~same).float().mean()) < 0.02  # a near-tie that falls the other way changes what follows in its row
    assert torch.allclose(moved.cpu()[:, same], slopes[:, same], rtol=1e-4, atol=1e-4)
