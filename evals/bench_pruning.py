"""Speed and memory of pruning: ``python -m compress.evals.bench_pruning`` (Linux).

The SparseGPT sweep of one matrix, MRP's search over tabulated curves of a deep model, and the peak memory of a run at two
depths, in a process of its own, beside the plan.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from compress.cli.common import write_json
from compress.evals.bench_memory import CALIBRATION, beside_plan, memory_table, random_model
from compress.evals.experiments import listed
from compress.pruning.allocation import Budget
from compress.pruning.mrp import curve, grid, search
from compress.pruning.scores import factorise, removal
from compress.pruning.sparsegpt import Rule, sweep


def bench_sweep(size: int) -> dict[str, float]:
    """Seconds of factorisation and sweep of a ``size`` x ``size`` matrix at 50 %."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(size, size, generator=generator)
    x = torch.randn(2 * size, size, generator=generator)
    hessian = x.t() @ x / size
    started = time.perf_counter()
    factor = factorise(hessian, 0.01, "matrix")
    factorised = time.perf_counter()
    sweep(weight, factor, Rule(size * size // 2))
    swept = time.perf_counter()
    curve({"matrix": removal(weight, factor.diagonal)}, {"matrix": "columns"}, grid(0.0, 0.99, 0.01), 5.0, "survivors")
    curved = time.perf_counter()
    return {"factorise": factorised - started, "sweep": swept - factorised, "curve": curved - swept}


def bench_search(blocks: int, repeats: int = 5) -> float:
    """Seconds of MRP's search over the curves of a model, with the default step and width, median of a few."""
    points = grid(0.0, 0.99, 0.01)
    curves = [[0.9 + 0.09 * index / blocks - 0.1 * point for point in points] for index in range(blocks)]
    budget = Budget([200_000_000] * blocks, 0.7, 0.55, 0.85)
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        search(budget, points, [curves], 0.01)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m compress.evals.bench_pruning", description=__doc__)
    parser.add_argument("--size", type=int, default=4096, help="of the matrix")
    parser.add_argument("--hidden", type=int, default=512, help="of the random models whose memory is measured")
    parser.add_argument("--depths", type=listed(int), default=(8, 24), help="blocks of those")
    parser.add_argument("--scores", type=listed(str), default=("wanda", "sparsegpt"))
    parser.add_argument("--json", help="also write the figures to this file")
    given = parser.parse_args()
    found: dict[str, Any] = {"threads": torch.get_num_threads(), "size": given.size, **bench_sweep(given.size)}
    found["search_32_blocks"] = bench_search(32)
    console = Console()
    console.print(
        f"{given.size} x {given.size}, {found['threads']} threads: factorise {found['factorise']:.1f} s, sweep "
        f"{found['sweep']:.1f} s, curve {found['curve']:.1f} s; search over 32 blocks: {found['search_32_blocks']:.3f} s"
    )
    found["memory"] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for depth in given.depths:
            random_model(folder / str(depth), given.hidden, depth)
            for score in given.scores:
                step = {"kind": "prune", "score": score, "allocation": "mrp", "sparsity": 0.5}
                recipe = {"model": str(folder / str(depth)), "calibration": CALIBRATION, "passes": [step]}
                row = {"score": score, "blocks": depth, **beside_plan(recipe, folder / "pruned")}
                found["memory"].append(row)
                shutil.rmtree(folder / "pruned")
    console.print(memory_table(found["memory"], "score", "blocks"))
    write_json(found, given.json)


if __name__ == "__main__":
    main()
