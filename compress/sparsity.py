"""Zeros of a checkpoint, counted in its files block by block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

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
