"""Zeros of a checkpoint, counted in its files block by block, and a plot of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import CompressError
from compress.hf import packed_modules
from compress.inspect import checkpoint_state
from compress.streaming import StreamedModel
from compress.structure import block_prefix, linears_of


def sparsity(folder: Path) -> dict[str, Any]:
    """Count exact zeros in the linears inside the blocks, packed ones at their parent width.

    One block is in memory at a time.

    Returns:
        ``{"zeros", "parameters", "sparsity", "blocks": {name: the same}, "linears": {name: the same}}``.

    Raises:
        CompressError: not a model folder, or an undeclared architecture.
    """
    model = StreamedModel(checkpoint_state(folder), torch.device("cpu"))
    linears: dict[str, dict[str, float]] = {}
    blocks: dict[str, dict[str, float]] = {}
    for index in range(len(model.blocks)):
        prefix = block_prefix(model.structure, index)
        with model.block(index) as module:
            matrices = _matrices(module, prefix)
            inside = {name: _counted(int((weight == 0).sum()), weight.numel()) for name, weight in matrices}
        linears |= inside
        blocks[prefix] = _total(inside)
    return {**_total(linears), "blocks": blocks, "linears": linears}


def _matrices(block: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """Every linear's weight, a packed one's only while it is looked at."""
    for name, linear in linears_of(block, prefix).items():
        yield name, linear.weight
    for name, module in packed_modules(block).items():
        yield f"{prefix}.{name}", module.dense()


def _counted(zeros: float, parameters: float) -> dict[str, float]:
    return {"zeros": zeros, "parameters": parameters, "sparsity": zeros / parameters if parameters else 0.0}


def _total(parts: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    return _counted(sum(p["zeros"] for p in parts.values()), sum(p["parameters"] for p in parts.values()))


def draw(found: Mapping[str, Any], target: Path) -> None:
    """Plot the sparsity of every block as a bar, and of its linears as points.

    Args:
        found: from :func:`sparsity`.
        target: .svg, .png, …

    Raises:
        CompressError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise CompressError("--plot needs matplotlib: pip install 'compress-llm[plots]'.") from error
    names = list(found["blocks"])
    figure = Figure(figsize=(max(5.0, 0.3 * len(names)), 3.5), layout="constrained")
    axes = figure.add_subplot()
    axes.bar(range(len(names)), [100 * block["sparsity"] for block in found["blocks"].values()], color="lightsteelblue")
    for place, block in enumerate(names):
        inside = [100 * v["sparsity"] for name, v in found["linears"].items() if name.startswith(block + ".")]
        axes.plot([place] * len(inside), inside, ".", color="black", markersize=4)
    axes.axhline(100 * found["sparsity"], color="black", linewidth=0.8, linestyle=":")
    axes.set_xlabel("block")
    axes.set_ylabel("zeros, % (bar: block; points: its linears)")
    axes.set_ylim(0, 100)
    try:
        figure.savefig(target)
    except (OSError, ValueError) as error:  # no such folder, or no such format
        raise CompressError(f"--plot {target}: cannot be drawn ({error}).") from error
