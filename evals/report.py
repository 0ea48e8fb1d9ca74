"""Write HTML, Markdown and PNG from what was measured (``compress report``)."""

from __future__ import annotations

from pathlib import Path

from compress.card import add_measured
from compress.errors import CompressError
from compress.evals import plots, tables
from compress.evals.gather import Wanted, collect, measure_missing
from compress.evals.page import html, markdown
from compress.evals.sections import QUALITY, report_page
from compress.evals.store import FOLDER, results_of
from compress.passes import Progress
from compress.workspace import write_atomic


def report(
    folder: Path,
    wanted: Wanted | None,
    output: Path | None = None,
    results: Path | None = None,
    progress: Progress | None = None,
) -> tuple[list[Path], list[str]]:
    """Measure what is missing and write the report of a checkpoint; its own report's quality goes into its model card too.

    Args:
        folder: the checkpoint.
        wanted: what to measure if it is not there; None measures nothing.
        output: folder for ``index.html``, ``report.md`` and ``pareto.png``; ``report`` in the checkpoint if None.
        results: file of measurements; the checkpoint's own if None.
        progress: called with (what, done, total).

    Returns:
        The files written, and what could not be done, one sentence each (without matplotlib, the figures).

    Raises:
        CompressError: no checkpoint that compress wrote, or what was asked for can not be had.
    """
    target = output or folder / FOLDER
    if target.exists() and not target.is_dir():
        raise CompressError(f"{target}: is a file; give a folder with -o.")
    store = results_of(folder, results)
    collect(folder, store)  # refuses what is no checkpoint before any long work
    notes = [] if wanted is None else measure_missing(folder, wanted, store, progress)
    page = report_page(collect(folder, store, notes, wanted.adapter if wanted else None))
    without = plots.why_not()
    files = [picture for section in page.sections for picture in section.pictures if picture.file and not without]
    written = [target / "index.html", target / "report.md", *(target / picture.file for picture in files)]
    try:
        target.mkdir(parents=True, exist_ok=True)
        write_atomic(written[0], html(page))
        write_atomic(written[1], markdown(page, [picture.file for picture in files]))
        for picture in files:
            plots.save(picture.draw(), target / picture.file)
        quality = [section for section in page.sections if section.title.startswith(QUALITY) and section.table]
        if output is None and quality:
            parts = [f"{tables.markdown(section.table)}\n\n{section.note}" for section in quality if section.table]
            add_measured(folder, "\n\n".join(parts))
    except OSError as error:
        raise CompressError(f"{target}: cannot be written ({error.strerror}); give another folder with -o.") from error
    return written, [*notes, *without]
