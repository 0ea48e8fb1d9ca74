"""How long the output objective takes: ``python -m compress.evals.bench_output [--size 4096]``.

One square matrix with correlated inputs from 3 to 8 bits, a single width of 4 bits, and beside them the sweep that GPTQ is (rounding every column
to a 4-bit grid and updating the columns after it), on the same matrix and metric.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from compress.pruning.scores import factorise
from compress.pruning.sparsegpt import Rule, sweep
from compress.quant.kmeans import nested_codebooks
from compress.quant.nested import nested_output_codebooks


def seconds(work: Callable[[], object]) -> float:
    """Time of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def correlated(size: int, generator: torch.Generator) -> Tensor:
    """A metric as of a trained model's inputs: a falling spectrum, inputs of unequal sizes, a few of them very large."""
    x = torch.randn(2 * size, size, generator=generator) * torch.arange(1, size + 1) ** -0.6
    scale = torch.randn(size, generator=generator).mul(0.7).exp()
    scale[:3] *= 30
    x = x @ torch.randn(size, size, generator=generator) * scale
    metric = x.t() @ x / len(x)
    return metric + 1e-3 * metric.diagonal().mean() * torch.eye(size)


def main() -> None:
    """Time and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    size, generator = arguments.size, torch.Generator().manual_seed(0)
    weight = torch.randn(size, size, generator=generator)
    metric = correlated(size, generator)
    nested_output_codebooks(dict.fromkeys(range(3, 9), weight[:2]), metric)  # compile before the clock runs
    weight, metric = weight.to(arguments.device), metric.to(arguments.device)
    step = (weight.amax(1) - weight.amin(1)) / 15

    def rounded(column: Tensor) -> Tensor:
        return (column / step).round() * step

    def output(low: int, high: int) -> object:
        widths = range(low, high + 1)
        return nested_output_codebooks(dict.fromkeys(widths, weight), metric).codes.cpu()

    factor = factorise(2 * metric, 0.01, "matrix")
    gptq = seconds(lambda: sweep(weight, factor, Rule(0, "matrix"), rounded).weight.cpu())
    table = Table(
        "work",
        "seconds",
        "× the sweep",
        title=f"{size} x {size}, {arguments.device}, {torch.get_num_threads()} threads",
    )
    for name, took in (
        ("GPTQ sweep", gptq),
        ("weight objective, 3 to 8 bits", seconds(lambda: nested_codebooks(weight.cpu().numpy(), None, 3, 8))),
        ("output objective, 4 bits", seconds(lambda: output(4, 4))),
        ("output objective, 3 to 8 bits", seconds(lambda: output(3, 8))),
    ):
        table.add_row(name, f"{took:.2f}", f"{took / gptq:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
