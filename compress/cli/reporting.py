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
    IncludeOption,
    LengthOption,
    LimitOption,
    MinimumOption,
    ProtocolOption,
    ResultsOption,
    SeparatorOption,
    TasksOption,
    TextOption,
    TruncateOption,
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
from compress.errors import CompressError


@app.command()
def report(
    folder: Folder,
    output: Annotated[
        Optional[Path], typer.Option("--output", "-o", help="Folder to write to; DIR/report if absent.")
    ] = None,
    run: Annotated[bool, typer.Option("--run/--no-run", help="Measure what is missing, or only lay out.")] = True,
    text: TextOption = None,
    protocol: ProtocolOption = None,
    separator: SeparatorOption = None,
    limit: LimitOption = None,
    min_characters: MinimumOption = 0,
    length: LengthOption = None,
    truncate: TruncateOption = False,
    tasks: TasksOption = None,
    include: IncludeOption = None,
    bits: BitsOption = None,
    controls: Annotated[
        bool, typer.Option("--controls", help="Make and measure stages and controls too: runs of their own.")
    ] = False,
    benchmark: Annotated[bool, typer.Option("--bench/--no-bench", help="Measure speed and memory.")] = True,
    samples: Annotated[
        Optional[list[str]], typer.Option("--sample", help="Continue this text at every width; may be repeated.")
    ] = None,
    device: DeviceOption = "cpu",
    adapter: AdapterFlag = None,
    kept: ResultsOption = None,
) -> None:
    """Write one page (HTML, Markdown, PNG): what was done, size, speed and quality of every width, controls, errors, samples.

    Measures what is missing and keeps it in DIR/report/results.jsonl; stopped, the same command continues.
    """
    from compress.evals.bench import Load
    from compress.evals.gather import Wanted
    from compress.evals.report import report as write
    from compress.evals.tasks import Tasks
    from compress.evals.text import protocol_of

    quiet_transformers()
    cut = protocol_of(
        protocol, separator=separator, limit=limit, min_characters=min_characters, length=length, truncate=truncate
    )
    chosen = Tasks(parse_names(tasks), include, limit) if tasks else None
    load = Load(rounds=5, loads=3) if benchmark else None
    wanted = Wanted(text, cut, chosen, parse_widths(bits), controls, load, tuple(samples or ()), device, adapter)
    with progress_bar() as watch:
        written, notes = write(folder, wanted if run else None, output, kept, watch)
    for path in written:
        out.print(escape(str(path)), soft_wrap=True)
    for note in notes:
        err.print(f"note: {escape(note)}", soft_wrap=True)


@app.command()
def compare(
    folders: Annotated[list[Path], typer.Argument(help="Checkpoints.", metavar="DIR...")],
    text: TextOption = None,
    protocol: ProtocolOption = None,
    separator: SeparatorOption = None,
    limit: LimitOption = None,
    min_characters: MinimumOption = 0,
    length: LengthOption = None,
    truncate: TruncateOption = False,
    output: Annotated[
        Optional[Path], typer.Option("--output", "-o", help="Write .html, or a plot as .png, .svg, .pdf.")
    ] = None,
    device: DeviceOption = "cpu",
) -> None:
    """Put several checkpoints, at all their widths, into one table and one Pareto plot."""
    from compress.evals import plots
    from compress.evals import report as reports
    from compress.evals.text import protocol_of
    from compress.workspace import write_atomic

    if len(folders) < 2:
        raise CompressError("compare: give two checkpoints or more.")
    if output is not None and output.suffix not in (".html", ".png", ".svg", ".pdf"):
        raise CompressError(f"-o {output}: give a name that ends in .html, .png, .svg or .pdf.")
    refuse_unwritable(output)
    quiet_transformers()
    cut = protocol_of(
        protocol, separator=separator, limit=limit, min_characters=min_characters, length=length, truncate=truncate
    )
    with progress_bar() as watch:
        rivals, common, dense = reports.compare(folders, text, cut, device, watch)
    if output is not None:
        try:
            if output.suffix == ".html":
                write_atomic(output, reports.comparison_page(rivals, common, dense))
            else:
                lines, name = reports.comparison_lines(rivals, dense)
                plots.pareto(lines, output, name)
        except OSError as error:
            raise CompressError(f"-o {output}: {error.strerror}.") from error
    print_table(reports.comparison_table(rivals, dense))
