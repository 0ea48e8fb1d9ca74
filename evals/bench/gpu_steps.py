"""The steps of :mod:`compress.evals.bench.gpu`, each for a process of its own; a step records every figure as soon as it has it.

They import what a bare machine with a GPU has: torch, Triton, transformers, numba, pytest; no pydantic.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress.evals.bench.gpu import RECORDS
from compress.evals.decoder import Decoder, PackedLinear, Shape, dense
from compress.kernels import gpu, tune
from compress.kernels.bitplane import tiled_weight
from compress.kernels.configs import Problem, by_warps, candidates, file_name
from compress.kernels.layout import Tiled, random_tiled
from compress.kernels.timing import Timer, copies, graph_time, memory_rate
from compress.kernels.variants import Config, Kind

Record = Callable[..., None]  # takes the figures by their names
Sizes = tuple[tuple[int, int], ...]  # N x K
KINDS: tuple[Kind, ...] = ("fp16", "bf16")
TESTS = Path(__file__).resolve().parents[2] / "tests" / "kernels" / "test_cuda.py"
OTHER_SEEDS = " or ".join(f"{bits}-{seed}-True" for bits in range(3, 9) for seed in (1, 2))
"""Packings that recipes choose only if told to: planes that begin with 1 or 2 bits and go on."""
FIRST = f"not bfloat16 and not bf16 and not float32 and not every_configuration and not ({OTHER_SEEDS})"
"""Which tests are worth most: float16 by the rule's configurations. Compiling takes most of the time, and these are a few dozen kernels."""
GROUPS_7B = ((12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008))
"""N x K of what shares its inputs in a block of Llama-2-7B, which has 32: query, key and value; output; gate and up; down."""


@dataclass(frozen=True)
class Scale:
    """Say how large everything is: as on a GPU, or as in a dry run."""

    device: str = "cuda"
    timer: Timer = graph_time
    quick: Timer = lambda calls: graph_time(calls, 3)  # where hundreds of configurations are compared
    read: int = 1 << 28  # integers
    products: Sizes = ((4096, 4096), (14336, 4096), (28672, 8192))
    prefill: Sizes = ((14336, 4096),)
    rows: tuple[int, ...] = (1, 16, 64, 128, 256, 512, 1024, 2048, 4096)
    decoder: Shape = field(default_factory=Shape)
    compiler: str = "inductor"
    matrices: Sizes = (*((4096, 4096),) * 4, (14336, 4096), *GROUPS_7B)
    searched: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8)  # bits
    prompt: int = 8  # tokens
    new_tokens: int = 32
    generated: tuple[int, ...] = (3, 4)  # bits, and all that there are
    tuned: Sizes = ((14336, 4096), (28672, 4096), (4096, 14336), (6144, 4096), (4096, 4096))  # of Llama-3.1-8B
    tuned_bits: tuple[int, ...] = (4, 3, 2, 8)
    tuned_rows: tuple[int, ...] = (1, 16)
    workers: int = 12
    tests: str = "test"  # which, as pytest's -k has it


def _once(calls: Sequence[Callable[[], object]]) -> float:
    """Run calls once, and make up a microsecond for each."""
    for call in calls:
        call()
    return 1e-6


REAL = Scale()
DRY = Scale(
    device="cpu",
    timer=_once,
    quick=_once,
    read=1 << 10,
    products=((40, 64),),
    prefill=((40, 64),),
    rows=(1, 16, 70),
    decoder=Shape(hidden=64, intermediate=96, layers=1, heads=4, key_heads=2, vocabulary=50, length=8),
    compiler="eager",
    matrices=((2, 8), *((rows // 4096, columns // 1024) for rows, columns in GROUPS_7B)),
    tuned=((40, 64),),
    tuned_bits=(3,),
    tuned_rows=(1,),
    searched=(2, 3),
    prompt=2,
    new_tokens=1,
    generated=(),
    workers=1,
    tests="3-3 or 3-1-fp16 or strides or pairs or gradient or codes_found",
)


@dataclass(frozen=True)
class Run:
    """Give a step what it needs."""

    scale: Scale
    record: Record
    folder: Path  # for files
    model: str | None  # a packed checkpoint of 3 bits and more

    def attempt(self, work: Callable[[], dict[str, float]], **sizes: Any) -> dict[str, float]:
        """Record what is measured at some sizes, or why it cannot be; return it."""
        try:
            found = work()
        except Exception as error:  # whatever it is, the other figures are worth having
            self.record(**sizes, failed=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
            return {}
        self.record(**sizes, **found)
        return found

    @property
    def device(self) -> gpu.Device:
        """Describe the GPU, or what stands in for it."""
        return gpu.device_of(torch.cuda.current_device() if self.scale.device == "cuda" else -1)


class _Outcomes:
    """Record the outcome of every test as it ends (a plugin of pytest's)."""

    def __init__(self, record: Record) -> None:
        self.record = record

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Record a test that has run, or could not."""
        if report.when == "call" or not report.passed:
            why = "" if report.passed else str(report.longreprtext)[-2000:]
            self.record(test=report.nodeid.rpartition("::")[2], outcome=report.outcome, why=why)


def _test(run: Run, which: str) -> None:
    """Run tests of tests/kernels/test_cuda.py side by side, as compiling takes most of their time, and record all outcomes."""
    import pytest

    at_once = min(run.scale.workers, os.cpu_count() or 1)
    spread = ["-n", str(at_once), "--dist", "worksteal"] if at_once > 1 and find_spec("xdist") else []
    chosen = ["-k", f"({which}) and ({run.scale.tests})"]
    pytest.main([str(TESTS), "-q", "-p", "no:cacheprovider", *chosen, *spread], plugins=[_Outcomes(run.record)])


def correct(run: Run) -> None:
    """Test every kernel at every number of bits against float64, with float16 activations."""
    _test(run, FIRST)


def others(run: Run) -> None:
    """Test the same with bfloat16 and float32, and every configuration there is to choose from."""
    _test(run, f"not ({FIRST})")


def tokens(run: Run) -> None:
    """Compare what a packed checkpoint generates with the CPU's tokens, greedily, in float32 and float16."""
    import compress

    scale, record, model = run.scale, run.record, run.model
    if model is None:
        record(skipped="no checkpoint: give --model FOLDER")
        return
    prompt = torch.arange(5, 5 + scale.prompt)[None]
    count = scale.new_tokens
    length = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
    for dtype in (torch.float32, torch.float16):
        here = compress.load(model, device_map=scale.device, dtype=dtype)
        reference = compress.load(model, device_map="cpu", dtype=torch.float32)
        for bits in (*scale.generated, compress.get_bits(reference)):
            found = []
            for loaded in (here, reference):
                compress.set_bits(loaded, bits)
                given = prompt.to(loaded.device)
                new: Tensor = loaded.generate(given, attention_mask=torch.ones_like(given), pad_token_id=0, **length)  # type: ignore[operator]
                found.append(new[0, prompt.shape[1] :].cpu())
            alike = int((found[0] == found[1]).long().cumprod(0).sum())
            record(dtype=str(dtype), bits=bits, tokens=count, alike_from_the_start=alike, equal=alike == count)


def _dense_seconds(rows: int, columns: int, counts: Sequence[int], kind: Kind, scale: Scale) -> dict[int, float]:
    """Measure cuBLAS by rows of activations, the weights out of the cache."""
    dtype = tune.DTYPES[kind]
    sets = copies(2 * rows * columns) if scale.device == "cuda" else 2
    weights = [torch.randn(rows, columns, device=scale.device).to(dtype) for _ in range(sets)]
    inputs = {count: torch.randn(count, columns, device=scale.device).to(dtype) for count in counts}
    return {count: scale.timer([partial(nn.functional.linear, x, w) for w in weights]) for count, x in inputs.items()}


def _layers(rows: int, columns: int, bits: int, scale: Scale) -> list[Tiled]:
    """Make random packed matrices, enough of them to be out of the cache; planes from 4 bits on begin with nibbles."""
    sets = copies(rows * columns * bits // 8) if scale.device == "cuda" else 2
    return [random_tiled(rows, columns, bits, min(bits, 4), scale.device, seed=i) for i in range(sets)]


def _measured(
    layers: list[Tiled], x: Tensor, config: Config | None, scale: Scale, base: float = 0.0, least: float = 0.0
) -> dict[str, float]:
    """Measure one product: its seconds, and its relative error against float64.

    Beside them stands how much faster it is than ``base`` seconds, and the share that ``least`` seconds, the memory's, are of its own.
    """
    bits = max(layers[0].tables)
    matrices = [tune.packed_of(layer, bits) for layer in layers]
    seconds = scale.timer([partial(gpu.multiply, x, matrix, None, config) for matrix in matrices])
    exact = x.double() @ tiled_weight(layers[0], bits, torch.float32).double().T
    y = gpu.multiply(x, matrices[0], None, config)
    found = {"seconds": seconds, "error": float((y.double() - exact).norm() / exact.norm())}
    found |= {"speedup": base / seconds} if base else {}
    return found | ({"of_bandwidth": least / seconds} if least else {})


def _ways(problem: Problem, processors: int) -> dict[str, Config | None]:
    """Name the ways to look weights up: the rule's, and at 4 bits also in pairs and in registers."""
    if problem.bits != 4:
        return {"rule": None}
    pairs, registers = (by_warps(problem, processors, pairs) for pairs in (True, False))
    return {"rule": None, "pairs": pairs, "registers": registers}


def gemv(run: Run) -> None:
    """Measure one row of activations against cuBLAS in float16 and bfloat16, and against the measured speed of the memory."""
    scale, record = run.scale, run.record
    rate = memory_rate(scale.timer, scale.read, scale.device)
    record(bytes_per_second=rate)
    for rows, columns in scale.products:
        base = {kind: _dense_seconds(rows, columns, [1], kind, scale)[1] for kind in KINDS}
        record(rows=rows, columns=columns, cublas_fp16=base["fp16"], cublas_bf16=base["bf16"])
        for bits, kind in itertools.product((4, 3, 8, 2), KINDS):
            layers = _layers(rows, columns, bits, scale)
            x = torch.randn(1, columns, device=scale.device).to(tune.DTYPES[kind])
            taken = rows * columns * bits / 8 + 2.0 * rows * (1 << bits) + 2 * (rows + columns)

            ways = _ways(Problem(rows, columns, bits, 1, kind), run.device.processors)
            for way, config in ways.items():
                sizes = {"rows": rows, "columns": columns, "bits": bits, "kind": kind, "way": way}
                run.attempt(partial(_measured, layers, x, config, scale, base["bf16"], taken / rate), **sizes)


def prefill(run: Run) -> None:
    """Measure many rows of activations against cuBLAS in bfloat16."""
    scale = run.scale
    for rows, columns in scale.prefill:
        base = _dense_seconds(rows, columns, scale.rows, "bf16", scale)
        for bits in (4, 3, 8):
            layers = _layers(rows, columns, bits, scale)
            for count in scale.rows:
                x = torch.randn(count, columns, device=scale.device).half()
                run.attempt(
                    partial(_measured, layers, x, None, scale, base[count]),
                    **{"rows": rows, "columns": columns, "bits": bits, "count": count},
                )


def _decoded(scale: Scale, bits: int, dtype: torch.dtype, compiler: str | None) -> dict[str, float]:
    """Measure one decode step, at a number of bits or for 16 with dense weights."""
    project: Callable[[int, int], nn.Module]
    if bits == 16:
        project = partial(dense, dtype=dtype, device=scale.device)
    else:
        project = partial(PackedLinear, bits=bits, seed_bits=min(bits, 4), exact=True, device=scale.device)
    model = Decoder(scale.decoder, project, dtype, scale.device)
    for layer in model.layers if compiler else ():  # one by one: they are alike, so only the first is compiled
        layer.compile(fullgraph=True, backend=compiler)
    token = torch.zeros(1, dtype=torch.long, device=scale.device)
    place = torch.full((1,), scale.decoder.length // 2, device=scale.device)
    try:
        with torch.no_grad():
            return {"tokens_per_second": 1 / scale.timer([partial(model, token, place)])}
    finally:
        torch.compiler.reset()


def decode(run: Run) -> None:
    """Measure the decode step of a Llama-3.1-8B-shaped model with random weights, batch 1, from a CUDA graph."""
    base: dict[str, float] = {}
    for bits, dtype in [(16, torch.bfloat16), *((bits, torch.float16) for bits in (4, 3, 8, 2, 16))]:
        for compiler in (run.scale.compiler, None):  # not compiled where that fails: slower, both ways

            def step(bits: int = bits, dtype: torch.dtype = dtype, compiler: str | None = compiler) -> dict[str, float]:
                found = _decoded(run.scale, bits, dtype, compiler)
                if dtype == torch.bfloat16:
                    base[str(compiler)] = found["tokens_per_second"]
                dense_rate = base.get(str(compiler))
                return found | ({"speedup": found["tokens_per_second"] / dense_rate} if dense_rate else {})

            if run.attempt(step, bits=bits, dtype=str(dtype), compiler=str(compiler)):
                break


def _hessian(columns: int, device: str) -> Tensor:
    """Make the mean of ``x x^T`` over random inputs with a few large directions, as activations have: float32 [K, K]."""
    generator = torch.Generator(device).manual_seed(columns)
    scales = torch.linspace(3, -1, columns, device=device).exp()
    x = torch.randn(2 * columns, columns, device=device, generator=generator) * scales
    x += 0.5 * x.roll(1, 1)
    hessian = x.t() @ x / len(x)
    hessian.diagonal().add_(1e-3 * hessian.diagonal().mean())
    return hessian


def _timed(work: Callable[[], Any], device: str) -> tuple[float, Any]:
    """Return the seconds of one call, all of its launches included, and what it returns."""

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    wait()
    begun = time.perf_counter()
    found = work()
    wait()
    return time.perf_counter() - begun, found


def quantiser(run: Run) -> None:
    """Measure ``any_precision``'s search for codes of 2 to 8 bits, and what is done around it for every matrix."""
    from compress.quant.errors import matrix_errors
    from compress.quant.format import Codes, pack
    from compress.quant.kmeans import nested_codebooks
    from compress.quant.nested import TOGETHER, nested_output_codebooks

    device, searched = run.scale.device, run.scale.searched
    seconds: dict[tuple[int, int], float] = {}
    for number, (rows, columns) in enumerate([run.scale.matrices[0], *run.scale.matrices]):
        weight, hessian = 0.02 * torch.randn(rows, columns, device=device), _hessian(columns, device)
        search, found = _timed(partial(nested_output_codebooks, dict.fromkeys(searched, weight), hessian), device)
        held, ones = weight.cpu().numpy(), hessian.diagonal().expand(rows, -1).contiguous().cpu().numpy()
        given = held, ones, searched[0], min(searched[-1], TOGETHER), False, torch.get_num_threads()
        start, _ = _timed(partial(nested_codebooks, *given), device)
        codes = Codes(found.codes, found.codebooks, hessian)
        judging, errors = _timed(partial(matrix_errors, weight, codes, None, torch.device(device)), device)
        there = found.codes.cpu(), {bits: codebook.cpu() for bits, codebook in found.codebooks.items()}
        packing, _ = _timed(partial(pack, *there), device)
        seconds[rows, columns] = search + judging + packing
        times = {"search": search, "of_which_start": start, "errors": judging, "packing": packing}
        reached = {f"output_error_{bits}": errors[str(bits)]["output"] for bits in searched}
        run.record(rows=rows, columns=columns, compiling=not number, **times, **reached)
    total = 32 * sum(seconds[size] for size in run.scale.matrices[-len(GROUPS_7B) :])
    run.record(seconds_for_7b=total, without="the passes over the calibration text")


def _launch_once(problem: Problem, config: Config, device: str) -> bool:
    """Compile one configuration into Triton's cache by running it; tell whether it runs."""
    x = torch.randn(problem.count, problem.columns, device=device).to(tune.DTYPES[problem.kind])
    tiled = random_tiled(problem.rows, problem.columns, problem.bits, device=device)
    try:
        gpu.multiply(x, tune.packed_of(tiled, problem.bits), None, config)
    except Exception:  # the tuner meets it again, and says so
        return False
    return True


def tuning(run: Run) -> None:
    """Tune for the layers of Llama-3.1-8B on this GPU, and write the tuning file after every problem."""
    scale, device, kind = run.scale, run.device, KINDS[0]
    problems = [
        Problem(rows, columns, bits, count, kind, device.assembly, device.capability)
        for count in scale.tuned_rows
        for rows, columns in scale.tuned
        for bits in scale.tuned_bits
    ]
    every = [(problem, config, scale.device) for problem in problems for config in candidates(problem)]
    with ProcessPoolExecutor(min(scale.workers, os.cpu_count() or 1), get_context("spawn")) as pool:
        ran = sum(pool.map(_launch_once, *zip(*every, strict=True)))
    run.record(configurations=len(every), ran=ran)
    versions = {"gpu": device.name, "triton": version("triton"), "torch": torch.__version__}
    for problem in problems:
        measured = tune.measure(problem, scale.device, scale.quick)
        best = min(measured, key=lambda config: measured[config])
        path = run.folder / file_name(device.name)
        tune.write(versions | {"configs": {problem.key: asdict(best)}}, path)
        layers = _layers(problem.rows, problem.columns, problem.bits, scale)
        x = torch.randn(problem.count, problem.columns, device=scale.device).half()
        rule, tuned = (_measured(layers, x, one, scale)["seconds"] for one in (None, best))
        run.record(problem=problem.key, rule=rule, tuned=tuned, gain=rule / tuned, best=str(best))


STEPS = {step.__name__: step for step in (correct, tokens, gemv, decode, quantiser, prefill, tuning, others)}


def main(name: str, folder: str, model: str, scale: str) -> None:
    """Run one step, ``real`` or ``dry``, with a model or ``-``; its figures go to the file of all steps as lines of JSON."""
    begun = time.perf_counter()

    def record(**figures: Any) -> None:
        line = json.dumps({"step": name, "at": round(time.perf_counter() - begun, 1), **figures})
        with (Path(folder) / RECORDS).open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    run = Run(REAL if scale == "real" else DRY, record, Path(folder), None if model == "-" else model)
    record(gpu=run.device.name, torch=torch.__version__, triton=version("triton"))
    STEPS[name](run)
    record(done=True)
