"""The command line of the benchmarks: one command each, which measures, prints tables, and writes ``--json``."""

from __future__ import annotations

import sys

import typer

from compress.errors import CompressError
from compress.evals.bench import (
    cpu,
    gpu,
    int8,
    kills,
    kv,
    load,
    matrix,
    memory,
    mixture,
    needle,
    peers,
    quantiser,
    run,
    sparse,
)

app = typer.Typer(
    help="Measure parts of this library. What a user's own model does is measured by `compress bench`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for module in (cpu, gpu, int8, kills, kv, load, matrix, memory, mixture, needle, peers, quantiser, run, sparse):
    app.command(module.__name__.rpartition(".")[2])(module.main)

if __name__ == "__main__":
    try:
        app(prog_name="python -m compress.evals.bench")
    except CompressError as error:
        sys.exit(f"error: {error}")
