"""Time the row quantiser beside flash1dkmeans, and compare what both reach."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from compress.evals.bench.common import JsonOption, console, quartiles, show, take_turns, write
from compress.quant.kmeans import nested_codebooks

Matrix = NDArray[np.float32]
COLUMNS = 4096


def sample_rows(rows: int) -> dict[str, tuple[Matrix, Matrix]]:
    """Return weights and sensitivities, both float32 [rows, 4096], by the name of their distributions."""
    rng = np.random.default_rng(0)
    shape = (rows, COLUMNS)
    normal, student = rng.standard_normal(shape), rng.standard_t(3, shape)
    chi_squared, heavy = rng.standard_normal(shape) ** 2, rng.lognormal(0.0, 2.0, shape)
    pairs = {"Gaussian": (normal, chi_squared), "Student-t": (student, chi_squared), "heavy F": (normal, heavy)}
    return {name: (w.astype(np.float32), f.astype(np.float32)) for name, (w, f) in pairs.items()}


def flash_cells(weight: Matrix, sensitivity: Matrix, bits: int) -> list[NDArray[Any]]:
    """Return every row's cells by flash1dkmeans with Any-Precision's settings: 50 Lloyd steps at most."""
    import flash1dkmeans

    return [
        flash1dkmeans.kmeans_1d(x, 2**bits, max_iter=50, sample_weights=w, random_state=0)[1]
        for x, w in zip(weight, sensitivity, strict=True)
    ]


def errors(weight: Matrix, sensitivity: Matrix, cells: NDArray[Any] | list[NDArray[Any]]) -> NDArray[np.float64]:
    """Return every row's weighted squared error around the weighted means of its cells, so that only the cells are judged."""
    found = []
    for x, w, places in zip(weight.astype(np.float64), sensitivity.astype(np.float64), cells, strict=True):
        mass, moment, square = (np.bincount(places, v) for v in (w, w * x, w * x * x))
        found.append(float((square - moment**2 / np.maximum(mass, np.finfo(np.float64).tiny)).sum()))
    return np.array(found)


def main(
    rows: Annotated[int, typer.Option(help="Rows to time per kind of data.")] = 256,
    rounds: int = 5,
    json_file: JsonOption = None,
) -> None:
    """Time the row quantiser beside flash1dkmeans, on random rows of 4096 weights, one thread.

    How far the seed's error is from the exact optimum is held by tests/quant/test_kmeans.py; here flash1dkmeans' error stands
    beside ours.
    """
    flash = find_spec("flash1dkmeans") is not None
    if not flash:
        console.print("flash1dkmeans is not installed (pip install flash1dkmeans): no comparison.")
    found: list[dict[str, Any]] = []
    lines = []
    for name, (weight, f) in sample_rows(rows).items():
        tasks: dict[str, Callable[[], object]] = {"3 to 8 bits": partial(nested_codebooks, weight, f, 3, 8)}
        above: dict[str, NDArray[np.float64]] = {}
        for bits in (3, 4):
            tasks[f"seed of {bits} bits"] = partial(nested_codebooks, weight, f, bits, bits)
            if flash:
                theirs = f"flash1dkmeans, {bits} bits"
                tasks[theirs] = partial(flash_cells, weight, f, bits)
                ours = errors(weight, f, nested_codebooks(weight, f, bits, bits).codes.numpy())
                above[theirs] = errors(weight, f, flash_cells(weight, f, bits)) / ours - 1
        for task, times in take_turns(tasks, rounds).items():
            row: dict[str, Any] = {"data": name, "task": task, "rows": rows}
            row["milliseconds"] = [1e3 * value / rows for value in times]
            if task in above:
                row |= {"mean_above_ours": float(above[task].mean()), "worst_above_ours": float(above[task].max())}
            found.append(row)
            error = [f"{row[key]:+.2%}" if key in row else "" for key in ("mean_above_ours", "worst_above_ours")]
            lines.append((name, task, quartiles(row["milliseconds"]), *error))
    heads = ["data", "task", "ms", "mean error", "worst error"]
    show(f"ms per row of {COLUMNS} (quartiles), and error above ours", heads, lines)
    write(found, json_file)
