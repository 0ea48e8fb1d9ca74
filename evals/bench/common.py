"""What the benchmarks share: the JSON option, printing a table, and times taken in turn."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Optional

import torch
import typer
from rich.console import Console
from rich.table import Table

from compress.evals.timing import spread

JsonOption = Annotated[Optional[Path], typer.Option("--json", help="Also write the figures to this file.")]
Times = dict[str, list[float]]
console = Console(width=None if sys.stdout.isatty() else 140)


def show(title: str, heads: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table; the first column is text, the others are figures."""
    table = Table(title=title, title_justify="left")
    for place, head in enumerate(heads):
        table.add_column(head, justify="right" if place else "left")
    for row in rows:
        table.add_row(*map(str, row))
    console.print(table)


def write(figures: Any, target: Path | None) -> None:
    """Write the figures as JSON, if a file is given."""
    if target is not None:
        target.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def seconds(work: Callable[[], object]) -> float:
    """Return how long one call takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def take_turns(candidates: Mapping[str, Callable[[], object]], rounds: int, repeat: int = 1) -> Times:
    """Return every candidate's seconds per call (of processor time on one thread) by round, after one that is not counted."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    times: Times = {name: [] for name in candidates}
    for counted in range(-1, rounds):
        for name, call in candidates.items():
            begun = clock()
            for _ in range(repeat):
                call()
            if counted >= 0:
                times[name].append((clock() - begun) / repeat)
    return times


def quartiles(values: Sequence[float]) -> str:
    """Return median and quartiles as text."""
    found = spread(values)
    return f"{found['median']:.3g} ({found['low']:.3g} to {found['high']:.3g})"
