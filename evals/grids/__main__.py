"""The command line of grids: ``python -m compress.evals.grids NAME OUT``; see :mod:`compress.evals.grids.grid`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Optional

import typer

from compress.evals.grids import script
from compress.evals.grids.grid import GridRun, settle, tables_of


def main(
    grid: Annotated[str, typer.Argument(help="Name of a grid in evals/grids, or a YAML file.")],
    out: Annotated[Path, typer.Argument(help="Folder for results.jsonl and tables.md.")],
    model: Annotated[Optional[str], typer.Option(help="Dense model.")] = None,
    calibration: Annotated[Optional[str], typer.Option(help="Text file to calibrate on.")] = None,
    text: Annotated[Optional[str], typer.Option(help="Text file to measure on, or 'builtin'.")] = None,
    separator: Annotated[Optional[str], typer.Option(help="Divides both texts into documents.")] = None,
    settings: Annotated[Optional[list[str]], typer.Option("--set", help="KEY.KEY=VALUE on the grid.")] = None,
    only: Annotated[Optional[list[str]], typer.Option(help="AXIS=LABEL or row=LABEL of cells to run.")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the checkpoints.")] = False,
    target: Annotated[
        Optional[typer.FileTextWrite], typer.Option("--json", help="File for all figures, or '-'.")
    ] = None,
) -> None:
    """Run every recipe of a grid, measure what it makes, and write tables."""
    chosen = settle(grid, model, calibration, text, separator, settings or [])
    lines = GridRun(chosen, out, keep, script.progress()).lines(only or [])
    found = tables_of(chosen, lines)
    (out / "tables.md").write_text(found + "\n", encoding="utf-8")
    typer.echo(found)
    if target is not None:
        target.write(json.dumps(lines, indent=1) + "\n")


if __name__ == "__main__":
    script.run(main)
