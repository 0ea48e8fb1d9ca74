"""Commands that bring measurements together."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.markup import escape

from compress.cli.common import (
    AdapterFlag,
    BitsOption,
    DeviceOption,
    Folder,
    app,
    err,
    out,
    parse_names,
    parse_widths,
    print_table,
    progress_bar,
    quiet_transformers,
    refuse_unwritable,
)
from compress.cli.options import IncludeOption, ResultsOption, TasksOption, TextOptions, with_text_options
from compress.errors import CompressError

_CONTROLS = "Make and measure stages and controls too: runs of their own."
_SAMPLES = "Continue this text at every width; may be repeated."
_Samples = Annotated[Optional[list[str]], typer.Option("--sample", help=_SAMPLES)]


@app.command()
@with_text_options
def report(
    folder: Folder,
    text: TextOptions,
    output: Annotated[Optional[Path], typer.Option("--output", "-o", help="Folder; DIR/report if absent.")] = None,
    run: Annotated[bool, typer.Option("--run/--no-run", help="Measure what is missing, or only lay out.")] = True,
    tasks: TasksOption = None,
    include: IncludeOption = None,
    bits: BitsOption = None,
    controls: Annotated[bool, typer.Option("--controls", help=_CONTROLS)] = False,
    benchmark: Annotated[bool, typer.Option("--bench/--no-bench", help="Measure speed and memory.")] = True,
    samples: _Samples = None,
    device: DeviceOption = "cpu",
    adapter: AdapterFlag = None,
    kept: ResultsOption = None,
) -> None:
    """Write one page (HTML, Markdown, PNG): what was done, size, speed and quality of every width, controls, errors, samples.

    Measures what is missing and keeps it in DIR/report/results.jsonl; stopped, the same command continues.
    """
    from compress.evals.gather import Wanted
    from compress.evals.report import report as write
    from compress.evals.speed import Load
    from compress.evals.tasks import Tasks

    quiet_transformers()
    chosen = Tasks(parse_names(tasks), include, text.limit) if tasks else None
    load = Load(rounds=5, loads=3) if benchmark else None
    prompts = tuple(samples or ())
    wanted = Wanted(text.text, text.protocol(), chosen, parse_widths(bits), controls, load, prompts, device, adapter)
    with progress_bar() as progress:
        written, notes = write(folder, wanted if run else None, output, kept, progress)
    for path in written:
        out.print(escape(str(path)), soft_wrap=True)
    for note in notes:
        err.print(f"note: {escape(note)}", soft_wrap=True)


@app.command()
@with_text_options
def compare(
    folders: Annotated[list[Path], typer.Argument(help="Checkpoints.", metavar="DIR...")],
    text: TextOptions,
    output: Annotated[Optional[Path], typer.Option("--output", "-o", help="File: .html, .png, .svg or .pdf.")] = None,
    device: DeviceOption = "cpu",
) -> None:
    """Put several checkpoints, at all their widths, into one table and one Pareto plot."""
    from compress.evals import compare as comparing
    from compress.evals import plots
    from compress.evals.page import html
    from compress.workspace import write_atomic

    if len(folders) < 2:
        raise CompressError("compare: give two checkpoints or more.")
    if output is not None and output.suffix not in (".html", ".png", ".svg", ".pdf"):
        raise CompressError(f"-o {output}: give a name that ends in .html, .png, .svg or .pdf.")
    refuse_unwritable(output)
    quiet_transformers()
    with progress_bar() as progress:
        found = comparing.compare(folders, text.text, text.protocol(), device, progress)
    if output is not None:
        try:
            if output.suffix == ".html":
                write_atomic(output, html(found.page()))
            else:
                plots.save(found.figure(), output)
        except OSError as error:
            raise CompressError(f"-o {output}: {error.strerror}.") from error
    print_table(found.table())
