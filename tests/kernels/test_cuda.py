"""On a GPU: every kernel against float64, graphs, streams. All of it is skipped where there is none."""

import pytest
import torch

from compress.kernels import gpu
from compress.kernels.configs import Problem, candidates
from compress.kernels.layout import ROUNDED, random_tiled
from compress.kernels.tune import packed_of
from compress.kernels.variants import Config
from compress.quant.format import pack
from compress.quant.fused import join
from compress.quant.linear import BitPlaneLinear

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or gpu.missing() is not None, reason="no GPU, or no Triton"
)
LIMIT = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 1e-5}
HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}
# (width, seed width, whether entries are exact): every width, and every packing of the first planes
WIDTHS = [(bits, seed, True) for bits in range(1, 9) for seed in {min(bits, first) for first in (1, 2, 3, 4)}]
WIDTHS += [(ROUNDED, seed, False) for seed in (2, 3, 4)]


def error(y, x, tiled, bits, bias=None):
    """Relative error in the Frobenius norm; bfloat16 weights are rounded to it, as its matrix instructions want."""
    exact = x.double() @ tiled.dense(bits, torch.float64).T + (0 if bias is None else bias.double())
    return float((y.double() - exact).norm() / exact.norm().clamp(min=1e-2))


def activations(*shape, dtype=torch.float16):
    return torch.randn(*shape, device="cuda", generator=torch.Generator("cuda").manual_seed(0)).to(dtype)


# Every kernel


@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize(("bits", "seed", "exact"), WIDTHS)
def test_every_width_and_number_of_rows(bits, seed, exact, dtype):
    tiled = random_tiled(1000, 4128, bits, seed, "cuda", exact=exact)
    bias = activations(1000, dtype=dtype)
    for count in (1, 2, 3, 4, 5, 16, 17, 33, 64, 65, 100, 512, 513, 600):
        x = activations(count, 4128, dtype=dtype)
        assert error(gpu.linear(x, tiled, bits, bias), x, tiled, bits, bias) < LIMIT[dtype], (count, "with a bias")
        assert error(gpu.linear(x, tiled, bits), x, tiled, bits) < LIMIT[dtype], count


@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (31, 33), (33, 31), (100, 4000), (65, 8200), (4096, 11008)])
def test_odd_sizes(rows, columns, bits, dtype):
    for exact in (True, False) if bits == ROUNDED else (True,):
        tiled = random_tiled(rows, columns, bits, device="cuda", exact=exact)
        for count in (1, 3, 5, 70, 513):
            x = activations(count, columns, dtype=dtype)
            assert error(gpu.linear(x, tiled, bits), x, tiled, bits) < 2 * LIMIT[dtype], (count, exact)


@pytest.mark.parametrize("count", [1, 3, 70, 520])
def test_any_strides(count):
    tiled, wide = random_tiled(100, 4096, 3, device="cuda"), activations(count, 8192)
    for x in (
        activations(4096, count).t(),
        activations(count, 4097)[:, 1:],
        wide[:, ::2],
        wide[:, 4096:],
        activations(1, 4096).expand(count, 4096),
        activations(count, 1, 4096),
    ):
        y = gpu.linear(x, tiled, 3).view(count, 100)
        assert error(y, x.reshape(count, 4096), tiled, 3) < 1e-3, x.stride()
    assert gpu.linear(activations(0, 4096), tiled, 3).shape == (0, 100)


@pytest.mark.parametrize("kind", HALVES)
@pytest.mark.parametrize("count", [1, 2, 4, 8, 17, 64, 256])
@pytest.mark.parametrize("bits", range(2, 9))
def test_every_configuration_computes_the_same_every_time(bits, count, kind):
    """What ``compress tune`` chooses from; one that this GPU has no room for says so."""
    tiled, place = random_tiled(500, 4096, bits, device="cuda"), gpu.device_of(torch.cuda.current_device())
    x = activations(count, 4096, dtype=HALVES[kind])
    problem = Problem(500, 4096, bits, count, kind, place.assembly, place.capability)
    for config in candidates(problem):
        try:
            first = gpu.multiply(x, packed_of(tiled, bits), None, config)
        except Exception as failed:
            if "out of resource" not in str(failed).lower():
                raise AssertionError(config) from failed
            continue
        assert error(first, x, tiled, bits) < LIMIT[HALVES[kind]], config
        assert torch.equal(first, gpu.multiply(x, packed_of(tiled, bits), None, config)), config


@pytest.mark.parametrize("head", [2, 3, 4])
@pytest.mark.parametrize("kind", HALVES)
def test_pairs_and_registers_hold_the_same_weights(head, kind):
    tiled, x = random_tiled(1000, 4096, 4, head, "cuda"), activations(1, 4096, dtype=HALVES[kind])
    for warps in (4, 8, 16):
        for pairs in (False, True):
            y = gpu.multiply(x, packed_of(tiled, 4), None, Config(warps, warps, pairs=pairs))
            assert error(y, x, tiled, 4) < LIMIT[HALVES[kind]], (warps, pairs)


def test_a_large_matrix_and_every_one_of_its_rows():
    """Gate and up of Llama-2-70B: no offset overflows, and no row is left out."""
    tiled = random_tiled(57344, 8192, 8, 4, "cuda")
    for bits in (4, 8):
        for count in (1, 16, 100):
            x = activations(count, 8192)
            y, each = gpu.linear(x, tiled, bits), slice(57344 - 64, None)
            exact = x.double() @ tiled.dense(bits, torch.float16)[each].double().T
            assert float((y[:, each].double() - exact).norm() / exact.norm()) < 1e-3
            assert bool((y != 0).any(0).all())


@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize(("bits", "seed", "exact"), WIDTHS)
def test_looked_up_weights(bits, seed, exact, dtype):
    tiled = random_tiled(100, 330, bits, seed, "cuda", exact=exact)
    found, wanted = gpu.weight(tiled, bits, dtype), tiled.dense(bits, torch.float64).to(dtype)
    assert torch.allclose(found, wanted, rtol=1e-3 if not exact else 0, atol=0)


# Around a kernel


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("count", [1, 16, 128])
def test_a_graph_replays_it_and_nothing_but_the_output_is_allocated(count, bits):
    tiled = random_tiled(1024, 4096, bits, device="cuda")
    x = activations(count, 4096)
    expected = gpu.linear(x, tiled, bits)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    gpu.linear(x, tiled, bits)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before + 1
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = gpu.linear(x, tiled, bits)
    x.mul_(2)
    graph.replay()
    assert torch.allclose(y, 2 * expected, rtol=1e-2, atol=1e-2)


def test_it_runs_on_the_current_stream():
    tiled = random_tiled(512, 4096, 3, device="cuda")
    x = torch.zeros(1, 4096, device="cuda").half()
    gpu.linear(x, tiled, 3)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
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
    with pytest.raises(ValueError, match="activations are on cuda:0, and the packed layer is on cuda:1"):
        gpu.linear(x.to("cuda:0"), tiled, 3)


def test_activations_elsewhere_are_refused():
    tiled = random_tiled(64, 64, 3, device="cuda")
    with pytest.raises(ValueError, match="activations are on cpu, and the packed layer is on cuda:0"):
        gpu.linear(torch.zeros(1, 64), tiled, 3)


@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("count", [1, 5, 70])
def test_the_gradient_reaches_the_input(count, exact, dtype):
    tiled = random_tiled(96, 160, 4, device="cuda", exact=exact)
    x = activations(count, 160, dtype=dtype).requires_grad_()
    upstream = activations(count, 96, dtype=dtype)
    gpu.linear(x, tiled, 4).backward(upstream)
    wanted = upstream.double() @ tiled.dense(4, torch.float64)
    assert float((x.grad.double() - wanted).norm() / wanted.norm()) < LIMIT[dtype]


@pytest.mark.parametrize("count", [1, 16])
def test_inductor_compiles_it_without_a_break(count):
    tiled, x = random_tiled(1024, 4096, 4, device="cuda"), activations(count, 4096)

    def step(x):
        return torch.nn.functional.silu(gpu.linear(2 * x, tiled, 4))

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


def test_stored_tensors_come_back_from_the_gpu_bit_for_bit():
    layer = layers(["q"])["block.q"]
    stored = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer.exact = False
    assert all(torch.equal(tensor, stored[name]) for name, tensor in layer.state_dict().items())
    back = layer.cpu()
    assert not back.is_tiled
    assert all(torch.equal(tensor.cpu(), stored[name].cpu()) for name, tensor in back.state_dict().items())
