"""Time what is done to one matrix: the sweeps of pruning and quantising, and the objectives of any-precision."""

from __future__ import annotations

from typing import Annotated

import torch
import typer
from torch import Tensor

from compress.evals.bench.common import JsonOption, seconds, show, write
from compress.pruning.allocation import Budget
from compress.pruning.mrp import curve, grid, search
from compress.pruning.scores import factorise, removal
from compress.pruning.sparsegpt import Rule, sweep
from compress.quant.kmeans import nested_codebooks
from compress.quant.nested import nested_output_codebooks

GPTQ = "GPTQ sweep, 4 bits"


def correlated(size: int, generator: torch.Generator) -> Tensor:
    """Return a Hessian as of a trained model's inputs: a falling spectrum, inputs of unequal sizes, a few of them very large."""
    x = torch.randn(2 * size, size, generator=generator) * torch.arange(1, size + 1) ** -0.6
    scale = torch.randn(size, generator=generator).mul(0.7).exp()
    scale[:3] *= 30
    x = x @ torch.randn(size, size, generator=generator) * scale
    hessian = x.t() @ x / len(x)
    return hessian + 1e-3 * hessian.diagonal().mean() * torch.eye(size)


def search_curves(blocks: int) -> None:
    """Search MRP's curves of a model of so many blocks, with the default step and spread."""
    points = grid(0.0, 0.99, 0.01)
    curves = [[0.9 + 0.09 * index / blocks - 0.1 * point for point in points] for index in range(blocks)]
    search(Budget([200_000_000] * blocks, 0.7, 0.55, 0.85), points, [curves], 0.01)


def main(
    size: int = 4096, device: Annotated[str, typer.Option(help="cpu, cuda, …")] = "cpu", json_file: JsonOption = None
) -> None:
    """Time what is done to one square matrix with correlated inputs.

    Pruning: factorising the Hessian, the sweep of SparseGPT at 50 %, MRP's curve, and its search over the curves of 32
    blocks. Quantising: any-precision's objectives, beside the sweep that GPTQ is (rounding every column to a 4-bit grid and
    updating the columns after it).
    """
    generator = torch.Generator().manual_seed(0)
    weight, hessian = torch.randn(size, size, generator=generator), correlated(size, generator)
    nested_output_codebooks(dict.fromkeys(range(3, 9), weight[:2]), hessian)  # compile before the clock runs
    weight, hessian = weight.to(device), hessian.to(device)
    step = (weight.amax(1) - weight.amin(1)) / 15
    factor = factorise(2 * hessian, 0.01, "matrix")
    points = grid(0.0, 0.99, 0.01)
    losses = {"matrix": removal(weight, factor.diagonal)}

    def rounded(column: Tensor) -> Tensor:
        return (column / step).round() * step

    def output(low: int, high: int) -> Tensor:
        return nested_output_codebooks(dict.fromkeys(range(low, high + 1), weight), hessian).codes.cpu()

    work = {
        "factorise the Hessian": lambda: factorise(2 * hessian, 0.01, "matrix").diagonal.cpu(),
        "SparseGPT sweep, 50 %": lambda: sweep(weight, factor, Rule(size * size // 2)).weight.cpu(),
        "MRP's curve": lambda: curve(losses, {"matrix": "columns"}, points, 5.0, "survivors"),
        "MRP's search, 32 blocks": lambda: search_curves(32),
        GPTQ: lambda: sweep(weight, factor, Rule(0, "matrix"), rounded).weight.cpu(),
        "weight objective, 3 to 8 bits": lambda: nested_codebooks(weight.cpu().numpy(), None, 3, 8),
        "output objective, 4 bits": lambda: output(4, 4),
        "output objective, 3 to 8 bits": lambda: output(3, 8),
    }
    took = {name: seconds(call) for name, call in work.items()}
    show(
        f"{size} x {size}, {device}, {torch.get_num_threads()} threads",
        ["work", "seconds", "× the GPTQ sweep"],
        [(name, f"{time:.3f}", f"{time / took[GPTQ]:.2f}") for name, time in took.items()],
    )
    write({"size": size, "device": device, "threads": torch.get_num_threads(), "seconds": took}, json_file)
