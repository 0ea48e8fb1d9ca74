"""The C library: every instruction set, width and mode against float64, hostile tables, and memory it must not touch."""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from compress.kernels import cpu
from compress.kernels.bitplane import backend
from compress.kernels.packing import pack_planes

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "kernels" / "c").glob("*.c"))
COMPILER = shutil.which(os.environ.get("CC", "cc"))

needs_library = pytest.mark.skipif(isinstance(cpu.library(), str), reason=str(cpu.library()))
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C compiler")


@pytest.fixture(params=range(len(cpu.ISAS)), ids=cpu.ISAS)
def isa(request):
    found = cpu.library()
    if isinstance(found, str):
        pytest.skip(found)
    if request.param > found.isa:
        pytest.skip(f"this processor has no {cpu.ISAS[request.param]}")
    return request.param


def layer(bits, rows, columns, table=torch.float32, entries=None):
    """Random planes and codebook, and the weight they stand for."""
    generator = torch.Generator().manual_seed(bits * rows + columns)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator)
    codebook = torch.randn(rows, 2**bits, generator=generator) if entries is None else entries(rows, 2**bits)
    codebook = codebook.to(table)
    return list(pack_planes(codes.to(torch.uint8), bits)), codebook, codebook.gather(1, codes)


def activations(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def assert_is_product(y, x, weight, epsilon=2.0**-22):
    exact = x.double() @ weight.double().T
    scale = x.double().abs() @ weight.double().abs().T
    assert y.shape == exact.shape
    assert ((y.double() - exact).abs() <= epsilon * scale + 1e-43).all()


# Against float64


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("table", [torch.float16, torch.float32])
def test_every_width_multiplies_by_the_looked_up_weight(isa, bits, table):
    planes, codebook, weight = layer(bits, 19, 700, table)
    x = activations(3, 700)
    assert_is_product(cpu.Prepared(planes, codebook, 700, isa=isa)(x), x, weight)


@pytest.mark.parametrize("columns", [1, 31, 33, 255, 256, 257, 511, 512, 513, 4100, 9000])
@pytest.mark.parametrize("rows", [1, 17, 49])
def test_odd_sizes(isa, rows, columns):
    for bits in (2, 3, 5, 7):
        planes, codebook, weight = layer(bits, rows, columns)
        x = activations(2, columns)
        assert_is_product(cpu.Prepared(planes, codebook, columns, isa=isa)(x), x, weight)


@pytest.mark.parametrize("batch", [*range(1, 19), 40])
def test_any_number_of_rows(isa, batch):
    for bits in (2, 4, 6, 8):
        planes, codebook, weight = layer(bits, 21, 530)
        x = activations(batch, 530)
        assert_is_product(cpu.Prepared(planes, codebook, 530, isa=isa)(x), x, weight)


def test_no_rows_at_all(isa):
    planes, codebook, _ = layer(4, 5, 64)
    for int8 in (False, True):
        assert cpu.Prepared(planes, codebook, 64, int8, isa)(torch.empty(2, 0, 64)).shape == (2, 0, 5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch", [2, 20])
def test_half_precision_inputs(isa, dtype, batch):
    planes, codebook, weight = layer(4, 9, 300, torch.float16)
    x = activations(batch, 300).to(dtype)
    y = cpu.Prepared(planes, codebook, 300, isa=isa)(x)
    assert y.dtype == dtype
    assert_is_product(y, x, weight, 2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_number_of_threads_changes_no_bit(isa, threads):
    planes, codebook, weight = layer(3, 1100, 1000)
    x, before = activations(2, 1000), torch.get_num_threads()
    prepared = cpu.Prepared(planes, codebook, 1000, isa=isa)
    assert prepared.products(2) >= cpu.WORTH_A_TEAM
    try:
        torch.set_num_threads(1)
        alone = prepared(x)
        torch.set_num_threads(threads)
        assert torch.equal(prepared(x), alone)
    finally:
        torch.set_num_threads(before)
    assert_is_product(alone, x, weight)


def test_planes_with_rows_apart_and_inputs_of_any_strides(isa):
    planes, codebook, weight = layer(3, 6, 100)
    spread = [torch.stack([plane, plane], 1)[:, 0] for plane in planes]  # rows twice as far apart
    mixed = [spread[0], *planes[1:]]
    x = activations(100, 4).t()
    for some in (spread, mixed):
        assert_is_product(cpu.Prepared(some, codebook, 100, isa=isa)(x), x, weight)


# Hostile tables


def huge_range(rows, entries):
    """From the least normal float32 to 1e30, both signs."""
    exponents = torch.linspace(-37, 30, entries).expand(rows, entries)
    return 10.0**exponents * torch.where(torch.arange(entries) % 2 == 0, 1, -1)


TABLES = {
    "huge range": huge_range,
    "all equal": lambda rows, entries: torch.full((rows, entries), 0.7),
    "zeros": torch.zeros,
    "subnormal": lambda rows, entries: torch.arange(entries).expand(rows, entries) * 1e-41,
    "one far out": lambda rows, entries: torch.eye(entries)[:1].expand(rows, entries) * 1e6,
}


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_hostile_tables(isa, name, bits):
    planes, codebook, weight = layer(bits, 9, 300, entries=TABLES[name])
    x = activations(2, 300)
    assert_is_product(cpu.Prepared(planes, codebook, 300, isa=isa)(x), x, weight)
    rounded = cpu.Prepared(planes, codebook, 300, int8=True, isa=isa)(x).double()
    span = (codebook.amax(1) - codebook.amin(1)).double() / 254
    bound = (x.abs().amax() / 254 * weight.double().abs().sum(1) + span * x.abs().sum(1, keepdim=True)) * 1.01
    assert ((rounded - x.double() @ weight.double().T).abs() <= bound + 1e-5).all()


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("table", [torch.float16, torch.float32, torch.bfloat16])
def test_looking_up_copies_every_bit(isa, bits, table):
    planes, _, _ = layer(bits, 5, 77)
    whole = torch.int16 if table.itemsize == 2 else torch.int32
    limits = torch.iinfo(whole)
    words = torch.randint(limits.min, limits.max, (5, 2**bits), generator=torch.Generator().manual_seed(0), dtype=whole)
    codes = cpu.look_up(planes, torch.arange(2**bits).float().expand(5, -1), 77, isa).long()
    assert torch.equal(cpu.look_up(planes, words.view(table), 77, isa).view(whole), words.gather(1, codes))


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("int8", [False, True])
def test_what_is_not_finite_does_not_vanish(isa, value, int8):
    planes, codebook, _ = layer(4, 5, 100)
    x = activations(2, 100)
    x[0, 70] = value
    y = cpu.Prepared(planes, codebook, 100, int8, isa)(x)
    assert not y[0].isfinite().any()
    assert y[1].isfinite().all()


# The int8 mode


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("batch", [1, 5, 16])
def test_rounding_costs_about_a_hundredth(isa, bits, batch):
    planes, codebook, weight = layer(bits, 64, 1000, torch.float16)
    x = activations(batch, 1000)
    exact = x.double() @ weight.double().T
    y = cpu.Prepared(planes, codebook, 1000, int8=True, isa=isa)(x)
    assert (y - exact).norm() < 0.015 * exact.norm()
    assert not torch.equal(y, cpu.Prepared(planes, codebook, 1000, isa=isa)(x))


def test_products_of_whole_numbers_are_exact_in_the_int8_mode(isa):
    """With activations and entries that eight bits hold, nothing is rounded but the table's own scale."""
    planes, codebook, weight = layer(7, 33, 640, entries=lambda rows, n: torch.arange(n).expand(rows, n) * 2.0 - 127)
    x = 127.0 * torch.randint(-1, 2, (3, 640), generator=torch.Generator().manual_seed(0))  # every group's scale is 1
    y = cpu.Prepared(planes, codebook, 640, int8=True, isa=isa)(x)
    torch.testing.assert_close(y, x @ weight.T, rtol=1e-4, atol=1.0)


# Refusals and memory


@needs_library
def test_what_does_not_belong_together_is_refused():
    planes, codebook, _ = layer(4, 5, 64)
    for wrong in ((planes[:3], codebook, 64), (planes, codebook[:4], 64), (planes, codebook, 65)):
        with pytest.raises(ValueError, match="packed"):
            cpu.Prepared(*wrong)
    with pytest.raises(ValueError, match="an input of 63 values for a layer of 64"):
        cpu.Prepared(planes, codebook, 64)(torch.zeros(1, 63))


@needs_library
def test_kernels_that_the_processor_lacks_are_refused():
    planes, codebook, _ = layer(4, 5, 64)
    with pytest.raises(RuntimeError, match="cannot run"):
        cpu.Prepared(planes, codebook, 64, isa=len(cpu.ISAS))(torch.zeros(1, 64))


@needs_library
def test_a_layer_is_served_from_the_tensors_it_was_given():
    planes, codebook, _ = layer(4, 5, 64)
    prepared = cpu.Prepared(planes, codebook, 64)
    assert [plane.data_ptr() for plane in prepared.planes] == [plane.data_ptr() for plane in planes]
    assert prepared.codebook.data_ptr() == codebook.data_ptr()


def build(folder, *options):
    """Compile every source that has no object in a folder yet, each in a process of its own, then link them all; returns the first step that failed."""
    sources = [Path(__file__).with_name("check_cpu.c"), *SOURCES]
    objects = [folder / f"{source.stem}.o" for source in sources]

    def compiler(*arguments):
        command = [COMPILER, "-std=c11", f"-I{ROOT / 'kernels' / 'c'}", *options, *arguments]
        return subprocess.run(list(map(str, command)), capture_output=True, text=True)

    with ThreadPoolExecutor() as pool:
        missing = [(source, made) for source, made in zip(sources, objects, strict=True) if not made.exists()]
        steps = list(pool.map(lambda one: compiler("-c", one[0], "-o", one[1]), missing))
    steps.append(compiler(*objects, "-lm", "-o", folder / "check"))
    return next((step for step in steps if step.returncode), steps[-1])


@pytest.mark.slow
@needs_compiler
def test_no_buffer_is_left_by_reading_or_writing_and_sanitizers_find_nothing(tmp_path):
    """Buffers end at pages that may not be touched; then, but for the files with vectors, which take a minute to compile so, by sanitizers."""

    def products():
        process = subprocess.run([tmp_path / "check"], capture_output=True, text=True)
        assert process.returncode == 0, process.stdout + process.stderr
        return int(process.stdout)

    compiled = build(tmp_path, "-O0", "-Wall", "-Wextra", "-Werror")
    assert compiled.returncode == 0, compiled.stderr
    found = products()
    assert found > 10_000
    for made in tmp_path.glob("*.o"):
        if made.stem not in ("avx2", "avx512"):
            made.unlink()
    compiled = build(tmp_path, "-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    if compiled.returncode:
        pytest.skip(f"the compiler has no sanitizers: {compiled.stderr.splitlines()[0]}")
    assert products() == found


def test_the_backend_says_what_serves_and_why(monkeypatch):
    found = cpu.library()
    if not isinstance(found, str):
        assert backend().startswith(f"c: {cpu.ISAS[found.isa]} kernels")
    monkeypatch.setattr(cpu, "library", lambda: "the C library was not built: no compiler")
    assert backend().startswith("torch: reference look-up, because the C library was not built: no compiler")


def test_parameters_are_served_without_gradients():
    table = torch.nn.Parameter(torch.ones(4, 8))
    assert not cpu.serves(table)
    with torch.no_grad():
        assert cpu.serves(table)
    assert cpu.serves(torch.nn.Parameter(table.detach(), requires_grad=False))


@pytest.mark.parametrize("isa", range(cpu.library().isa + 1) if cpu.built() else ())
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 5, 8])
def test_a_row_is_the_same_in_any_company(bits, int8, isa):
    """Drafts that are checked several at once must be judged as one at a time."""
    generator = torch.Generator().manual_seed(0)
    for columns in (64, 576, 5000):
        planes = [
            torch.randint(-(2**31), 2**31 - 1, (20, -(-columns // 32)), generator=generator).int() for _ in range(bits)
        ]
        prepared = cpu.Prepared(planes, torch.randn(20, 1 << bits, generator=generator), columns, int8, isa)
        x = torch.randn(16, columns, generator=generator)
        alone = torch.cat([prepared(row) for row in x.split(1)])
        for count in (2, 3, 4, 7, 16):
            assert torch.equal(prepared(x[:count]), alone[:count])


def test_factors_and_bias_belong_to_the_product():
    generator = torch.Generator().manual_seed(0)
    planes = [torch.randint(-(2**31), 2**31 - 1, (30, 19), generator=generator).int() for _ in range(3)]
    codebook, x = torch.randn(1, 8, generator=generator), torch.randn(20, 600, generator=generator)
    inputs, factors, bias = (torch.randn(size, generator=generator) for size in (600, 30, 30))
    prepared = cpu.Prepared(planes, codebook, 600, inputs=inputs, factors=factors, bias=bias)
    wanted = (x.double() * inputs) @ cpu.look_up(planes, codebook, 600).double().t() * factors + bias
    for count in (1, 5, 20):
        assert torch.allclose(prepared(x[:count]).double(), wanted[:count], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("kind", ["rows", "shared", "groups"])
def test_many_rows_meet_weights_that_were_rounded_once(isa, bits, kind):
    """Weights looked up for torch's product are the codebook's times all factors, in float32, then in the activations' type."""
    generator = torch.Generator().manual_seed(0)
    planes = [torch.randint(-(2**31), 2**31 - 1, (75, 19), generator=generator).int() for _ in range(bits)]
    codebook = torch.randn(75 if kind == "rows" else 1, 2**bits, generator=generator)
    inputs, factors = torch.randn(600, generator=generator), torch.randn(75, generator=generator)
    groups = torch.randint(0, 256, (75, 10), generator=generator).to(torch.uint8) if kind == "groups" else None
    prepared = cpu.Prepared(planes, codebook, 600, isa=isa, inputs=inputs, factors=factors, groups=groups)
    sizes = factors[:, None] * (1.0 if groups is None else (groups.float() / 255).repeat_interleave(64, 1)[:, :600])
    weight = cpu.look_up(planes, codebook, 600) * sizes * inputs
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.eye(600, dtype=dtype)  # so that the product is the weight
        assert torch.equal(prepared(x), weight.to(dtype).t())


@pytest.mark.parametrize("int8", [False, True])
def test_a_server_looks_weights_up_for_fewer_rows(int8):
    """Where sums need not be those of one row; in float32, and for few rows, nothing changes."""
    generator = torch.Generator().manual_seed(0)
    planes = [torch.randint(-(2**31), 2**31 - 1, (64, 18), generator=generator).int() for _ in range(4)]
    codebook = torch.randn(1, 16, generator=generator)
    one, other = (cpu.Prepared(planes, codebook, 576, int8, same_sums=same) for same in (True, False))
    weight = cpu.look_up(planes, codebook, 576)
    for count, dtype in ((1, torch.bfloat16), (6, torch.bfloat16), (16, torch.float32)):
        x = torch.randn(count, 576, generator=generator).to(dtype)
        assert torch.equal(one(x), other(x))
    x = torch.randn(16, 576, generator=generator).bfloat16()
    assert_is_product(other(x), x, weight, 2.0**-7 if cpu.library().isa == 2 else 2.0**-4)
