"""Measure the kernels on a GPU: ``compress bench-kernels``.

`products`: one layer, by rows of activations and number of bits, against cuBLAS in float16 and the time the memory needs for the
bytes. Calls are captured in a CUDA graph over enough copies of the weights that none is in the cache when its turn comes.
`decode`: tokens per second of a whole decode step with random weights. Figures of others are those they published.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from itertools import groupby
from operator import itemgetter
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from compress.evals.decoder import Decoder, PackedLinear, Shape, dense
from compress.kernels import gpu
from compress.kernels.bitplane import tiled_weight
from compress.kernels.layout import random_tiled
from compress.kernels.timing import Timer, bandwidth, copies
from compress.kernels.tune import packed_of
from compress.passes import Progress

SHAPES = {
    "Llama-2-7B": [(4096, 4096), (11008, 4096), (4096, 11008), (12288, 4096), (22016, 4096)],
    "Llama-3.1-8B": [(4096, 4096), (14336, 4096), (4096, 14336), (6144, 4096), (28672, 4096)],
    "Llama-2-70B": [(8192, 8192), (28672, 8192), (8192, 28672), (10240, 8192), (57344, 8192)],
}
"""N x K of every matrix of a block; the last two of each are query, key and value together, and gate and up together."""
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
FORMATS = (  # a seed of 2 or of 4 and more is packed together; entries have 16 bits or, at 4 bits, also 8
    *((bits, bits, 16) for bits in (2, 3)),
    *((4, seed, kept) for seed in (3, 4) for kept in (16, 8)),
    *((bits, 4, 16) for bits in range(5, 9)),
)
PUBLISHED = {
    "what": "tokens/s, Llama-3.1-8B, batch 1, H100, compiled (AnyBCQ, arXiv 2510.10467v2, table 8)",
    "float16": {"16": 168},
    "Any-Precision LLM": {"2": 298, "3": 273, "4": 232},
    "AnyBCQ": {"2": 325, "3": 291, "4": 260},
}


@dataclass(frozen=True)
class Plan:
    """Say what is measured: layers of (N, K), rows of activations, (bits, seed bits, bits of table entries), a decoder."""

    shapes: Sequence[tuple[int, int]] = tuple(dict.fromkeys(shape for group in SHAPES.values() for shape in group))
    rows: Sequence[int] = ROWS
    formats: Sequence[tuple[int, int, int]] = FORMATS
    decode: Shape | None = field(default_factory=Shape)
    device: str = "cuda"


def _error(y: Tensor, x: Tensor, weight: Tensor) -> float:
    """Return the relative error of a product in the Frobenius norm, against float64."""
    exact = x.double() @ weight.double().T
    return float((y.double() - exact).norm() / exact.norm())


def _dense_times(shape: tuple[int, int], plan: Plan, timer: Timer) -> dict[int, float]:
    """Measure the seconds of cuBLAS in float16, by rows of activations."""
    rows, columns = shape
    weights = [torch.randn(rows, columns, device=plan.device).half() for _ in range(copies(2 * rows * columns))]
    inputs = {count: torch.randn(count, columns, device=plan.device).half() for count in plan.rows}
    return {count: timer([partial(nn.functional.linear, x, w) for w in weights]) for count, x in inputs.items()}


def products(plan: Plan, timer: Timer, rate: float, progress: Progress) -> list[dict[str, Any]]:
    """Measure products: one entry per shape, number of bits and number of rows."""
    found: list[dict[str, Any]] = []
    for done, (rows, columns) in enumerate(plan.shapes):
        progress(f"{rows} x {columns}", done, len(plan.shapes))
        reference = _dense_times((rows, columns), plan, timer)
        for bits, seed, kept in plan.formats:
            sets = copies(rows * columns * bits // 8)
            layers = [random_tiled(rows, columns, bits, seed, plan.device, i, kept == 16) for i in range(sets)]
            matrices = [packed_of(layer, bits) for layer in layers]
            weight = tiled_weight(layers[0], bits, torch.float32)
            for count in plan.rows:
                x = torch.randn(count, columns, device=plan.device).half()
                seconds = timer([partial(gpu.multiply, x, matrix, None) for matrix in matrices])
                taken = rows * columns * bits / 8 + 2.0 * rows * (1 << bits) + 2 * count * (rows + columns)
                found.append(
                    {
                        "rows": rows,
                        "columns": columns,
                        "bits": bits,
                        "seed_bits": seed,
                        "entries": kept,
                        "count": count,
                        "seconds": seconds,
                        "cublas_seconds": reference[count],
                        "speedup": reference[count] / seconds,
                        "roofline": taken / rate / seconds,
                        "error": _error(gpu.multiply(x, matrices[0], None), x, weight),
                    }
                )
            del layers, matrices, weight
        _free()
    return found


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _decode_seconds(shape: Shape, bits: int | None, seed: int, exact: bool, device: str, timer: Timer) -> float:
    """Measure the seconds of one step at a number of bits; of float16 if there is none."""

    def project(rows: int, columns: int) -> nn.Module:
        if bits is None:
            return dense(rows, columns, torch.float16, device)
        return PackedLinear(rows, columns, bits, seed, exact, device)

    model = Decoder(shape, project, torch.float16, device)
    step = torch.compile(model, fullgraph=True, backend="inductor" if device == "cuda" else "eager")
    token, place = torch.zeros(1, dtype=torch.long, device=device), torch.full((1,), shape.length // 2, device=device)
    with torch.no_grad():
        return timer([partial(step, token, place)])


def decode(plan: Plan, timer: Timer, progress: Progress) -> list[dict[str, Any]]:
    """Measure tokens per second of a whole decode step, in float16 and at every number of bits."""
    assert plan.decode is not None
    found: list[dict[str, Any]] = []
    choices: list[tuple[int | None, int, int]] = [(None, 0, 16), *plan.formats]
    for done, (bits, seed, kept) in enumerate(choices):
        progress("decode, float16" if bits is None else f"decode, {bits} bits", done, len(choices))
        seconds = _decode_seconds(plan.decode, bits, seed, kept == 16, plan.device, timer)
        found.append({"bits": bits or 16, "seed_bits": seed, "entries": kept, "tokens_per_second": 1 / seconds})
        torch.compiler.reset()
        _free()
    base = found[0]["tokens_per_second"]
    return [entry | {"speedup": entry["tokens_per_second"] / base} for entry in found]


def run(plan: Plan, timer: Timer, progress: Progress = lambda *_: None) -> dict[str, Any]:
    """Measure all of a plan, as ``--json`` writes it; ``error`` is against float64 of the same looked-up weights."""
    rate, source = bandwidth(timer)
    index = torch.cuda.current_device() if plan.device == "cuda" else -1
    return {
        "gpu": gpu.device_of(index).name,
        "torch": torch.__version__,
        "triton": version("triton"),
        "bytes_per_second": rate,
        "bandwidth_from": source,
        "products": products(plan, timer, rate, progress),
        "decode_shape": None if plan.decode is None else asdict(plan.decode),
        "decode": [] if plan.decode is None else decode(plan, timer, progress),
        "published": PUBLISHED,
    }


def _name(entry: dict[str, Any]) -> str:
    if entry["bits"] == 16:
        return "float16"
    return f"{entry['bits']}, seed {entry['seed_bits']}" + (", 8-bit entries" if entry["entries"] == 8 else "")


def show(result: dict[str, Any], console: Console) -> None:
    """Print the tables."""
    console.print(
        f"{result['gpu']}, torch {result['torch']}, triton {result['triton']}; memory {result['bytes_per_second'] / 1e9:.0f} GB/s "
        f"({result['bandwidth_from']}). Weights rotate out of the cache, calls replay from a CUDA graph."
    )
    for (rows, columns), measured in groupby(result["products"], itemgetter("rows", "columns")):
        entries = list(measured)
        counts = sorted({entry["count"] for entry in entries})
        title = f"{rows} x {columns}: × cuBLAS float16 (% of the memory's speed), by rows"
        table = Table("bits", *map(str, counts), title=title)
        for name, group in groupby(entries, _name):
            table.add_row(name, *(f"{entry['speedup']:.2f} ({100 * entry['roofline']:.0f})" for entry in group))
        console.print(table)
    if result["products"]:
        worst = max(entry["error"] for entry in result["products"])
        console.print(f"largest relative error against float64: {worst:.2e}")
    if result["decode"]:
        console.print(_decode_table(result))


def _decode_table(result: dict[str, Any]) -> Table:
    published = result["published"]
    others = [name for name in published if name != "what"]
    heads = "bits", "tokens/s", "× float16", *(f"{name}, published" for name in others)
    table = Table(*heads, title="decode step, batch 1")
    for entry in result["decode"]:
        figures = [str(published[name].get(str(entry["bits"]), "")) for name in others]
        table.add_row(_name(entry), f"{entry['tokens_per_second']:.1f}", f"{entry['speedup']:.2f}", *figures)
    table.caption = f"published: {published['what']}"
    return table
