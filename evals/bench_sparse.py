"""Bits per weight on disk of pruned matrices in both forms: ``python -m compress.evals.bench_sparse``.

Random Gaussian weights, the smallest of each matrix set to zero, packed by any-precision with ``keep_zeros`` at a
seed of 3 bits and written to safetensors files, whose tensor data is counted, tables included. The bound is what the
planes of the survivors, the entropy of a random mask and the tables take together. ``chosen`` is the form that the writer
keeps; times are for choosing (both forms made) and for reading the file and rebuilding the dense form.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor

from compress.quant.format import SparseShape, expand, pack, pack_smaller
from compress.quant.kmeans import nested_codebooks
from compress.weights import read_header

SEED_BITS = 3
PARENTS = (3, 4, 8)
SPARSITIES = (0.0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9)


def pruned_matrix(rows: int, columns: int, sparsity: float) -> Tensor:
    """float32 [rows, columns] without its smallest weights."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    order = weight.abs().view(-1).argsort()
    weight.view(-1)[order[: round(sparsity * weight.numel())]] = 0
    return weight


def entropy(share: float) -> float:
    """Bits per weight of a random mask."""
    return -sum(p * math.log2(p) for p in (share, 1 - share) if p)


def bytes_on_disk(tensors: Mapping[str, Tensor], file: Path) -> int:
    """Bytes of tensor data in a file that is written for it."""
    save_file(dict(tensors), file)
    return sum(item.nbytes for item in read_header(file).values())


def measure(rows: int, columns: int, sparsity: float, parent: int, file: Path) -> dict[str, Any]:
    """One line of the table."""
    weight = pruned_matrix(rows, columns, sparsity)
    nested = nested_codebooks(weight.numpy(), None, SEED_BITS, parent, True, torch.get_num_threads())
    _, dense = pack(nested.codes, nested.codebooks)
    started = time.perf_counter()
    shape, stored, note = pack_smaller(nested)
    chosen = time.perf_counter() - started
    share = 8 / weight.numel()  # bits per weight
    tables = share * sum(t.nbytes for name, t in dense.items() if name.startswith("codebook_"))
    result = {
        "shape": f"{rows} x {columns}", "sparsity": sparsity, "bits": parent,
        "dense": share * bytes_on_disk(dense, file),
        "sparse": share * note["bytes"]["sparse"] if note else None,
        "chosen": note["form"] if note else "dense",
        "bound": (1 - sparsity) * parent + entropy(sparsity) + tables,
        "tables": tables,
        "choose_seconds": chosen,
    }  # fmt: skip
    if isinstance(shape, SparseShape):
        assert bytes_on_disk(stored, file) == note["bytes"]["sparse"]  # type: ignore[index]
        started = time.perf_counter()
        expand("matrix", shape, load_file(file))
        result["rebuild_seconds"] = time.perf_counter() - started
    return result


def show(results: list[dict[str, Any]], console: Console) -> None:
    """Print the figures as a table."""
    table = Table(title="bits per weight on disk, tables included")
    for column in (
        "matrix",
        "sparsity",
        "bits",
        "dense",
        "sparse",
        "bound",
        "chosen",
        "choose, s",
        "read and rebuild, s",
    ):
        table.add_column(column, justify="right")
    for r in results:
        times = [f"{r[key]:.3f}" if key in r else "" for key in ("choose_seconds", "rebuild_seconds")]
        sparse = "" if r["sparse"] is None else f"{r['sparse']:.3f}"
        sizes = (f"{r['dense']:.3f}", sparse, f"{r['bound']:.3f}", r["chosen"])
        table.add_row(r["shape"], f"{r['sparsity']:.0%}", str(r["bits"]), *sizes, *times)
    console.print(table)


def main() -> None:
    """Measure and print; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=4096, help="rows of the matrix with 4096 columns")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "matrix.safetensors"
        results = [
            measure(rows, columns, sparsity, parent, file)
            for rows, columns in ((arguments.rows, 4096), (500, 500))
            for parent in PARENTS
            for sparsity in SPARSITIES
        ]
    show(results, Console(width=110))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
