"""Speed and optimality of the row quantiser beside flash1dkmeans: `python -m compress.evals.bench_quantiser`.

One thread, after warm-up, on random rows of 4096 weights. Errors are relative to the exact optimum, found by an
independent O(k n^2) dynamic programme in numpy on the first few rows. flash1d is flash1dkmeans, with Any-Precision's
settings: for a seed its public function, for 3->8 its compiled kernels with one sort per row.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from compress.quant.kmeans import kmeans_codebook, nested_codebooks

Matrix = NDArray[np.float32]
Result = dict[str, float | str]

COLUMNS = 4096
REPEATS = 5
EXACT_ROWS = 4
PARENT_BITS = 8


def sample_rows(rows: int) -> dict[str, tuple[Matrix, Matrix]]:
    """Name -> (weight, sensitivity), both float32 [rows, 4096]."""
    rng = np.random.default_rng(0)
    shape = (rows, COLUMNS)
    normal, student = rng.standard_normal(shape), rng.standard_t(3, shape)
    chi_squared, heavy = rng.standard_normal(shape) ** 2, rng.lognormal(0.0, 2.0, shape)
    pairs = {"Gaussian": (normal, chi_squared), "Student-t": (student, chi_squared), "heavy F": (normal, heavy)}
    return {name: (w.astype(np.float32), f.astype(np.float32)) for name, (w, f) in pairs.items()}


def exact_errors(x: NDArray[Any], w: NDArray[Any], cells: int) -> NDArray[np.float64]:
    """Least weighted squared error of 1..cells cells over one row, every position a candidate border: float64 [cells].

    Weighted k-means in one dimension by dynamic programming (Wang and Song 2011, Ckmeans.1d.dp, equation 1).
    """
    order = np.argsort(x)
    x, w = x[order].astype(np.float64), w[order].astype(np.float64)
    d = x - np.average(x, weights=w)
    sums = np.concatenate([np.zeros((3, 1)), np.cumsum([w, w * d, w * d * d], axis=1)], axis=1)
    best = np.full((cells, x.size + 1), np.inf)
    for i in range(1, x.size + 1):
        s0, s1, s2 = sums[:, i, None] - sums[:, :i]
        cost = s2 - s1 * s1 / np.maximum(s0, np.finfo(np.float64).tiny)
        best[0, i] = cost[0]
        best[1:, i] = (best[:-1, :i] + cost).min(axis=1)
    optimum: NDArray[np.float64] = best[:, -1]
    return optimum


def milliseconds_per_row(function: Callable[[], object], rows: int) -> tuple[float, float]:
    """(median, minimum) over the repeats, after one call that compiles and warms up."""
    function()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        function()
        times.append((time.perf_counter() - start) * 1e3 / rows)
    return statistics.median(times), min(times)


def our_errors(weight: Matrix, sensitivity: Matrix, bits: int) -> NDArray[np.float64]:
    """Weighted squared error of each row at the seed, by the library."""
    seed = kmeans_codebook(weight, sensitivity, bits)
    error = weight.astype(np.float64) - seed.dense(bits).numpy()
    errors: NDArray[np.float64] = (sensitivity * error**2).sum(1)
    return errors


def flash_seed(flash: Any, x: Matrix, w: Matrix, bits: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """(centroids, labels) of one row with Any-Precision's settings: 50 Lloyd steps at most."""
    centroids, labels = flash.kmeans_1d(x, 2**bits, max_iter=50, sample_weights=w, random_state=0)
    return centroids, labels


def flash_errors(flash: Any, weight: Matrix, sensitivity: Matrix, bits: int) -> NDArray[np.float64]:
    """Per row, around the weighted means of its cells, so that only the cells are judged."""
    errors = []
    for x, w in zip(weight.astype(np.float64), sensitivity.astype(np.float64), strict=True):
        labels = flash_seed(flash, x, w, bits)[1]
        mass, moment, square = (np.bincount(labels, v, 2**bits) for v in (w, w * x, w * x * x))
        errors.append(float((square - moment**2 / np.maximum(mass, np.finfo(np.float64).tiny)).sum()))
    return np.array(errors)


def compile_flash_upscaling(flash: Any) -> Callable[..., NDArray[Any]]:
    """Border splitting around flash1dkmeans' compiled 2-means, compiled itself as Any-Precision does."""
    from numba import njit

    two_means = flash.numba_kmeans_1d_two_cluster

    def upscale(
        x: NDArray[Any], mass: NDArray[Any], moment: NDArray[Any], borders: NDArray[Any], levels: int
    ) -> NDArray[Any]:
        for _ in range(levels):
            finer = np.zeros(2 * len(borders) - 1, borders.dtype)
            for c in range(len(borders) - 1):
                start, stop = borders[c], borders[c + 1]
                finer[2 * c + 1] = two_means(x, mass, moment, start, stop)[1][1] if stop - start >= 2 else stop
                finer[2 * c + 2] = stop
            borders = finer
        return borders

    compiled: Callable[..., NDArray[Any]] = njit(upscale)
    return compiled


def flash_nested(flash: Any, upscale: Callable[..., NDArray[Any]], x: Matrix, w: Matrix, seed_bits: int) -> None:
    """One row from seed to parent the way Any-Precision calls flash1dkmeans: sort and sum once, split the borders."""
    order = np.argsort(x)
    x = x[order]
    w64, x64 = w[order].astype(np.float64), x.astype(np.float64)
    mass, moment, square = np.cumsum(w64), np.cumsum(w64 * x64), np.cumsum(w64 * x64 * x64)
    seed = flash.numba_kmeans_1d_k_cluster(x, 2**seed_bits, 50, mass, moment, square, 0, x.size, 0)[1]
    borders = upscale(x, mass, moment, seed, PARENT_BITS - seed_bits)
    labels = np.empty(x.size, np.uint8)
    labels[order] = np.repeat(np.arange(2**PARENT_BITS), np.diff(borders))


def load_flash() -> Any | None:
    """The flash1dkmeans module, if it is installed."""
    try:
        import flash1dkmeans
    except ImportError:
        return None
    return flash1dkmeans


def measure(name: str, weight: Matrix, sensitivity: Matrix, flash: Any | None) -> list[Result]:
    """Times over all rows; errors above the optimum (per cent) over the first few."""
    rows = len(weight)
    few = slice(0, min(EXACT_ROWS, rows))
    exact = np.array([exact_errors(x, w, 16) for x, w in zip(weight[few], sensitivity[few], strict=True)])
    pairs = list(zip(weight, sensitivity, strict=True))
    results: list[Result] = []

    def add(method: str, task: str, function: Callable[[], object]) -> Result:
        median, least = milliseconds_per_row(function, rows)
        result: Result = {"data": name, "method": method, "task": task, "rows": rows}
        results.append(result | {"median_ms": median, "min_ms": least})
        return results[-1]

    def add_seed(method: str, bits: int, function: Callable[[], object], errors: NDArray[np.float64]) -> None:
        above = 100.0 * (errors / exact[:, 2**bits - 1] - 1.0)
        result = add(method, f"seed {bits}", function)
        result["above_optimum_mean_percent"] = float(above.mean())
        result["above_optimum_worst_percent"] = float(above.max())

    def run_flash(function: Callable[..., object], *arguments: Any) -> Callable[[], object]:
        return lambda: [function(flash, *arguments[:-1], x, w, arguments[-1]) for x, w in pairs]

    add("ours", "3->8", partial(nested_codebooks, weight, sensitivity, 3, PARENT_BITS))
    if flash is not None:
        add("flash1d", "3->8", run_flash(flash_nested, compile_flash_upscaling(flash), 3))
    for bits in (3, 4):
        run = partial(kmeans_codebook, weight, sensitivity, bits)
        add_seed("ours", bits, run, our_errors(weight[few], sensitivity[few], bits))
        if flash is not None:
            errors = flash_errors(flash, weight[few], sensitivity[few], bits)
            add_seed("flash1d", bits, run_flash(flash_seed, bits), errors)
    return results


def show(results: list[Result], console: Console) -> None:
    """Print the figures as a table."""
    table = Table(title=f"ms per row of {COLUMNS}, one thread; error above the exact optimum")
    for column in ("data", "task", "method", "median", "min", "mean error", "worst error"):
        table.add_column(column, justify="left" if column in ("data", "task", "method") else "right")
    for r in results:
        mean, worst = r.get("above_optimum_mean_percent"), r.get("above_optimum_worst_percent")
        errors = ("", "") if mean is None else (f"+{mean:.3f} %", f"+{worst:.3f} %")
        table.add_row(
            str(r["data"]), str(r["task"]), str(r["method"]), f"{r['median_ms']:.3f}", f"{r['min_ms']:.3f}", *errors
        )
    console.print(table)


def main() -> None:
    """Measure and print; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=256, help="rows to time per kind of data")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    console = Console()
    flash = load_flash()
    if flash is None:
        console.print("flash1dkmeans is not installed (pip install flash1dkmeans): no comparison.")
    results = [
        result
        for name, (weight, f) in sample_rows(arguments.rows).items()
        for result in measure(name, weight, f, flash)
    ]
    show(results, console)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
