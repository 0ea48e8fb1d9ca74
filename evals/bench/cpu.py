"""Time products with packed weights on a CPU beside torch's own."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Optional

import torch
import typer
from torch import Tensor, nn

import compress
from compress.evals.bench.common import JsonOption, Times, console, quartiles, show, take_turns, write
from compress.kernels import cpu

Calls = dict[str, Callable[[], object]]
SHAPES = (
    (4096, 4096),
    (14336, 4096),
    (192, 192),
    (500, 192),
    (192, 500),
)  # N x K: of Llama-3.1-8B and the built-in model
BATCHES = (1, 2, 4, 8, 16, 17, 32, 128)
TORCH_BITS = {"torch float32": 32, "torch bfloat16": 16, "aten int4pack": 4}


def ratio(times: Times, name: str, base: str) -> str:
    """Return how much faster a candidate is than another: the median over the rounds."""
    if base not in times:
        return ""
    return f"{statistics.median(b / a for a, b in zip(times[name], times[base], strict=True)):.2f}"


def random_layer(bits: int, rows: int, columns: int) -> tuple[list[Tensor], Tensor]:
    """Return random planes and a float16 codebook."""
    planes = torch.randint(-(2**31), 2**31 - 1, (bits, rows, -(-columns // 32)), dtype=torch.int32)
    return list(planes.unbind(0)), torch.randn(rows, 2**bits).half()


def torch_products(x: Tensor, rows: int, columns: int) -> Calls:
    """Return what torch offers for a layer: float32, bfloat16, and where the sizes allow it uniform 4 bits in groups of 128."""
    full, half, activations = torch.randn(rows, columns), torch.randn(rows, columns).bfloat16(), x.bfloat16()
    found: Calls = {
        "torch float32": lambda: nn.functional.linear(x, full),
        "torch bfloat16": lambda: nn.functional.linear(activations, half),
    }
    if columns % 128 == 0 and rows % 64 == 0:
        codes = torch.randint(0, 16, (rows, columns), dtype=torch.int32)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        scales = torch.randn(columns // 128, rows, 2).bfloat16()
        product = torch.ops.aten._weight_int4pack_mm_for_cpu
        found["aten int4pack"] = lambda: product(activations, packed, 128, scales)
    return found


def our_products(x: Tensor, rows: int, columns: int, isas: list[int], bits: int) -> Calls:
    """Return the products of the C library, by instruction set and mode; all read the same planes."""
    planes, codebook = random_layer(bits, rows, columns)
    found: Calls = {}
    for isa, mode in itertools.product(isas, ("exact", "int8")):
        prepared = cpu.Prepared(planes, codebook, columns, mode == "int8", isa)
        found[f"{cpu.ISAS[isa]} {mode} {bits}"] = partial(prepared, x)
    return found


def one_row(rows: int, columns: int, all_bits: list[int], rounds: int) -> Times:
    """Time one row of activations, print the table and return the seconds."""
    found = cpu.library()
    isas = [found.isa, *({1} & set(range(found.isa)))] if isinstance(found, cpu.Library) else []
    memory = torch.randint(0, 9, (1 << 24,))  # 128 MiB
    x, small = torch.randn(1, columns), rows * columns < 1 << 20
    candidates = torch_products(x, rows, columns)
    for bits in all_bits:
        candidates |= our_products(x, rows, columns, isas, bits)
    if not small:
        candidates["memory read"] = memory.sum
    times = take_turns(candidates, rounds, repeat=50 if small else 1)
    read = 0.0 if small else memory.nbytes / statistics.median(times.pop("memory read")) / 1e9
    lines = []
    for name, taken in times.items():
        rate = rows * columns / statistics.median(taken) / 1e9
        moved = rate * (TORCH_BITS.get(name) or int(name[-1])) / 8
        figures = quartiles([1e6 * value for value in taken]), f"{rate:.1f}", f"{moved:.1f}"
        ratios = [ratio(times, name, base) for base in ("torch float32", "aten int4pack")]
        lines.append((name, *figures, f"{moved / read:.0%}" if read else "", *ratios))
    title = f"{rows} x {columns}, {torch.get_num_threads()} thread(s)"
    title += f", memory read {read:.1f} GB/s" if read else ""
    show(title, ["what", "µs", "Gweights/s", "GB/s", "of memory", "x float32", "x int4pack"], lines)
    return times


def several_rows(rounds: int) -> dict[int, Times]:
    """Time several rows of activations at 4 bits, print the table and return the seconds by their number."""
    rows, columns = SHAPES[0]
    planes, codebook = random_layer(4, rows, columns)
    weight = torch.randn(rows, columns)
    found: dict[int, Times] = {}
    for count in BATCHES:
        x = torch.randn(count, columns)
        calls: Calls = {"torch": partial(nn.functional.linear, x, weight)}
        for mode in ("exact", "int8"):
            calls[mode] = partial(cpu.Prepared(planes, codebook, columns, mode == "int8"), x)
        found[count] = take_turns(calls, rounds)
    lines = []
    for count, times in found.items():
        milliseconds = [quartiles([1e3 * value for value in times[mode]]) for mode in ("exact", "int8")]
        lines.append((count, *milliseconds, *(ratio(times, mode, "torch") for mode in ("exact", "int8"))))
    heads = ["rows", "exact, ms", "int8, ms", "x float32, exact", "x float32, int8"]
    show(f"{rows} x {columns} at 4 bits, {torch.get_num_threads()} thread(s)", heads, lines)
    return found


def main(
    threads: Annotated[Optional[int], typer.Option(help="On one, processor time is counted.")] = None,
    rounds: int = 21,
    bits: Annotated[list[int], typer.Option(help="Again for more.")] = [2, 3, 4, 5, 6, 7, 8],  # noqa: B006
    json_file: JsonOption = None,
) -> None:
    """Time products with packed weights on a CPU beside torch's own.

    All candidates take their turn in every round, so that a busy machine is busy for all of them; figures are medians with
    the quartiles. The weights of one candidate are long out of the cache when its turn comes again. First one row of
    activations, by instruction set, mode and bits, with the memory's speed in the same rounds; then several rows at 4 bits. A whole
    model's tokens per second are measured by `compress bench --random llama-1b`.
    """
    torch.set_num_threads(threads or torch.get_num_threads())
    torch.manual_seed(0)
    console.print(compress.backend())
    found: dict[str, Any] = {"backend": compress.backend(), "threads": torch.get_num_threads()}
    found["one_row"] = {f"{rows} x {columns}": one_row(rows, columns, bits, rounds) for rows, columns in SHAPES}
    found["several_rows"] = several_rows(rounds)
    write(found, json_file)
