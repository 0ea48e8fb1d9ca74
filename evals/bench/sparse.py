"""Measure the bits per weight on disk of pruned matrices, in the dense and in the sparse form."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import load_file, save_file
from torch import Tensor

from compress.evals.bench.common import JsonOption, seconds, show, write
from compress.quant.format import expand, pack, pack_smaller
from compress.quant.kmeans import nested_codebooks
from compress.quant.records import SparseShape
from compress.weights import read_header

SEED_BITS = 3
PARENTS = (3, 4, 8)
SPARSITIES = (0.0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9)


def pruned_matrix(rows: int, columns: int, sparsity: float) -> Tensor:
    """Return a float32 [rows, columns] matrix without its smallest weights."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    order = weight.abs().view(-1).argsort()
    weight.view(-1)[order[: round(sparsity * weight.numel())]] = 0
    return weight


def entropy(share: float) -> float:
    """Return the bits per weight of a random mask."""
    return -sum(p * math.log2(p) for p in (share, 1 - share) if p)


def bytes_on_disk(tensors: Mapping[str, Tensor], file: Path) -> int:
    """Return the bytes of tensor data in a file that is written for it."""
    save_file(dict(tensors), file)
    return sum(item.nbytes for item in read_header(file).values())


def measure(rows: int, columns: int, sparsity: float, parent: int, file: Path) -> dict[str, Any]:
    """Return bits per weight, and the seconds it takes to choose the form and to read the file and rebuild the dense form."""
    weight = pruned_matrix(rows, columns, sparsity)
    nested = nested_codebooks(weight.numpy(), None, SEED_BITS, parent, True, torch.get_num_threads())
    _, dense = pack(nested.codes, nested.codebooks)
    chosen: list[Any] = []
    choosing = seconds(lambda: chosen.extend(pack_smaller(nested)))
    shape, stored, note = chosen
    share = 8 / weight.numel()  # bits per weight
    codebooks = share * sum(tensor.nbytes for name, tensor in dense.items() if name.startswith("codebook_"))
    result = {
        "shape": f"{rows} x {columns}",
        "sparsity": sparsity,
        "bits": parent,
        "dense": share * bytes_on_disk(dense, file),
        "sparse": share * note["bytes"]["sparse"] if note else None,
        "chosen": note["form"] if note else "dense",
        "bound": (1 - sparsity) * parent + entropy(sparsity) + codebooks,
        "codebooks": codebooks,
        "choose_seconds": choosing,
    }
    if isinstance(shape, SparseShape):
        assert bytes_on_disk(stored, file) == note["bytes"]["sparse"]
        result["rebuild_seconds"] = seconds(lambda: expand("matrix", shape, load_file(file)))
    return result


def main(
    rows: Annotated[int, typer.Option(help="Rows of the matrix with 4096 columns.")] = 4096,
    json_file: JsonOption = None,
) -> None:
    """Measure the bits per weight on disk of pruned matrices, codebooks included.

    Random Gaussian weights, the smallest of each matrix set to zero, are packed by any-precision at a seed of 3 bits and written to
    safetensors files, whose tensor data is counted. The bound is what the planes of the survivors, the entropy of a random
    mask and the codebooks take together; "chosen" is the form that the writer keeps.
    """
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "matrix.safetensors"
        results = [
            measure(*shape, sparsity, parent, file)
            for shape in ((rows, 4096), (500, 500))
            for parent in PARENTS
            for sparsity in SPARSITIES
        ]
    keys = ("dense", "sparse", "bound", "chosen", "choose_seconds", "rebuild_seconds")
    table = []
    for found in results:
        cells = [found.get(key, "") for key in keys]
        figures = [f"{cell:.3f}" if isinstance(cell, float) else cell or "" for cell in cells]
        table.append((found["shape"], f"{found['sparsity']:.0%}", found["bits"], *figures))
    heads = ["matrix", "sparsity", "bits", "dense", "sparse", "bound", "chosen", "choose, s", "read and rebuild, s"]
    show("bits per weight on disk, codebooks included", heads, table)
    write(results, json_file)
