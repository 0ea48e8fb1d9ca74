"""``compress report`` and ``compress compare``: HTML, Markdown and PNG from what was measured."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

import torch
import yaml

from compress.errors import CompressError
from compress.evals import page, plots, svg, tables
from compress.evals.gather import Facts, Wanted, collect, measure_missing
from compress.evals.store import FOLDER, dense_identity, results_of
from compress.evals.text import Protocol, evaluate_text, settings_of
from compress.passes import Report
from compress.workspace import write_atomic


def report(
    folder: Path, wanted: Wanted | None, output: Path | None = None, results: Path | None = None,
    watch: Report | None = None,
) -> tuple[list[Path], list[str]]:  # fmt: skip
    """Measure what is missing and write the report of a checkpoint.

    Args:
        folder: the checkpoint.
        wanted: what to measure if it is not there; None measures nothing.
        output: folder for ``index.html``, ``report.md`` and ``pareto.png``; ``report`` in the checkpoint if None.
        results: file of measurements; the checkpoint's own if None.
        watch: called with (what, done, total).

    Returns:
        The files written, and what could not be done, one sentence each (without matplotlib, the PNG).

    Raises:
        CompressError: no checkpoint that compress wrote, or what was asked for can not be had.
    """
    target = output or folder / FOLDER
    if target.exists() and not target.is_dir():
        raise CompressError(f"{target}: is a file; give a folder with -o.")
    store = results_of(folder, results)
    collect(folder, store)  # refuses what is no checkpoint before any long work
    notes = [] if wanted is None else measure_missing(folder, wanted, store, watch or (lambda *_: None))
    facts = collect(folder, store, notes, wanted.adapter if wanted else None)
    written, missing = [target / "index.html", target / "report.md"], list(notes)
    try:
        target.mkdir(parents=True, exist_ok=True)
        write_atomic(written[0], page.page(facts))
        picture = target / "pareto.png"
        lines = page.pareto_lines(facts, facts.texts[0]) if facts.texts else []
        if lines:
            try:
                plots.pareto(lines, picture)
                written.append(picture)
            except CompressError as error:
                missing.append(str(error))
        write_atomic(written[1], markdown(facts, picture if picture in written else None))
    except OSError as error:
        raise CompressError(f"{target}: cannot be written ({error.strerror}); give another folder with -o.") from error
    return written, missing


def markdown(facts: Facts, picture: Path | None) -> str:
    """The page's tables and its recipe, for a README or a terminal."""
    parts = [f"# {page.title(facts)}", *facts.notes]
    for text in facts.texts:
        parts += ["## Quality at every width", page.protocol_words(text), tables.markdown(tables.quality(facts, text))]
    if picture is not None:
        parts.append(f"![loss added against bytes read]({picture.name})")
    if facts.tasks:
        parts += ["## Tasks", tables.markdown(tables.tasks(facts))]
    if facts.agreement or facts.robustness:
        parts += [
            "## How alike it is to the dense model",
            tables.markdown(tables.agreement(facts.agreement, facts.robustness)),
        ]
    if facts.bench:
        parts += ["## Speed and memory", f"{facts.bench['device']}; {facts.bench['backend']}", tables.markdown(tables.speed(facts.bench))]  # fmt: skip
    for item in facts.matrices:
        table = tables.Table([str(item.get("row_axis", "")), *map(str, item["columns"])])
        for name, values in zip(item["rows"], item["values"], strict=True):
            table.add("width", str(name), *("–" if value is None else f"{value:.4g}" for value in values))
        parts += [f"## {item['title']}", tables.markdown(table)]
    if facts.samples:
        parts.append("## Continuations")
    for sample in facts.samples:
        parts.append(f"{tables.label(sample['width'])}:\n\n```\n{sample['prompt']}▸{sample['text']}\n```")
    recipe = yaml.safe_dump(page.given(facts.manifest["recipe"]), sort_keys=False, allow_unicode=True)
    return "\n\n".join([*parts, "## Recipe", f"```yaml\n{recipe}```"]) + "\n"


@dataclass(frozen=True)
class Rival:
    """One checkpoint of a comparison: its name, and (width, bytes, metrics) of the common text."""

    name: str
    rows: list[tuple[str, int, Mapping[str, float]]]


def compare(
    folders: Sequence[Path], text: str | None = None, protocol: Protocol | None = None, device: str = "cpu",
    watch: Report | None = None,
) -> tuple[list[Rival], Mapping[str, Any], Mapping[str, float] | None]:  # fmt: skip
    """Bring several checkpoints together on one text.

    Args:
        folders: checkpoints.
        text: measured where a checkpoint's results do not have it; None takes a text that all have in common.
        protocol: how it is cut.
        device: to measure on.
        watch: called with (what, done, total).

    Returns:
        The rivals; the common ``{"name", "settings", "rows"}`` of the first; the dense model's metrics, where all were made
        from one and it was measured.

    Raises:
        CompressError: nothing was measured on the same text in the same way, or a folder twice.
    """
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise CompressError("compare: the same folder is there twice.")
    found: list[tuple[Facts, dict[str, dict[str, Any]]]] = []
    wanted = None
    for folder in folders:
        store = results_of(folder)
        if text is not None:
            measured = evaluate_text(str(folder), text, protocol=protocol, device=device, report=watch, store=store)
            cut = replace(protocol or Protocol(), length=measured["protocol"]["length"])
            settings = settings_of(measured["text"]["sha256"], cut, torch.float32)
            wanted = wanted or _same_text({"settings": settings})
        facts = collect(folder, store)
        found.append((facts, {_same_text(item): item for item in facts.texts}))
    common = [key for key in found[0][1] if all(key in texts for _, texts in found) and wanted in (None, key)]
    if not common:
        raise CompressError("compare: these were not measured on the same text in the same way; give --text FILE.")
    key = max(common, key=lambda key: sum(len(texts[key]["rows"]) for _, texts in found))
    names = _names(folders)
    origins = {dense_identity(facts.manifest) for facts, _ in found}
    rivals, dense = [], None
    for name, (facts, texts) in zip(names, found, strict=True):
        rows = texts[key]["rows"]
        if len(origins) == 1:
            dense = dense or rows.get(("dense", None))
        widths = [width for width in facts.widths if (width, None) in rows]
        rivals.append(Rival(name, [(width, facts.bytes_at(width) or 0, rows[width, None]) for width in widths]))
    return rivals, found[0][1][key], dense


def _same_text(item: Mapping[str, Any]) -> str:
    settings = item["settings"]
    return json.dumps([settings["sha256"], settings["protocol"], settings["dtype"]], sort_keys=True)


def _names(folders: Sequence[Path]) -> list[str]:
    """Folder names, or paths where those are the same."""
    short = [folder.resolve().name for folder in folders]
    return short if len(set(short)) == len(short) else [str(folder) for folder in folders]


def comparison_lines(rivals: Sequence[Rival], dense: Mapping[str, float] | None) -> tuple[list[svg.Line], str]:
    """Lines of the Pareto plot, and the name of its upward axis."""
    lines = []
    for rival in rivals:
        points = [
            svg.Point(
                size / 1e6,
                100 * page.added(metrics["loss"], dense["loss"]) if dense else metrics["bits_per_byte"],
                "" if width == "dense" else width,
                f"{rival.name}, {tables.label(width)}: {tables.megabytes(size)}, perplexity {metrics['perplexity']:.4g}",
            )
            for width, size, metrics in rival.rows
        ]
        lines.append(svg.Line(rival.name, points))
    return lines, "loss above the dense model's, %" if dense else "bits per byte"


def comparison_table(rivals: Sequence[Rival], dense: Mapping[str, float] | None) -> tables.Table:
    """One row per checkpoint and width, smallest first, and whether any other is both smaller and better."""
    table = tables.Table(
        ["checkpoint", "bits", "read", "loss, nats", "vs dense", "perplexity", "bits per byte", "best at its size"]
    )
    rows = sorted(((size, rival.name, width, metrics) for rival in rivals for width, size, metrics in rival.rows), key=lambda row: row[0])  # fmt: skip
    by = "bits_per_byte"  # means the same for every tokenizer
    for size, name, width, metrics in rows:
        beaten = any(
            other <= size and theirs[by] <= metrics[by] and (other < size or theirs[by] < metrics[by])
            for other, _, _, theirs in rows
        )
        above = f"{100 * (metrics['loss'] / dense['loss'] - 1):+.2f} %" if dense else "–"
        table.add(
            "width", name, width, tables.megabytes(size), tables.number(metrics["loss"]), above,
            tables.number(metrics["perplexity"]), tables.number(metrics["bits_per_byte"]), "" if beaten else "yes",
        )  # fmt: skip
    return table.without_empty()


def comparison_page(rivals: Sequence[Rival], text: Mapping[str, Any], dense: Mapping[str, float] | None) -> str:
    """The comparison as one HTML page."""
    lines, name = comparison_lines(rivals, dense)
    names = ", ".join(rival.name for rival in rivals)
    caption = (
        "Each line is one checkpoint, each point one of its widths; further down and to the left is better. “Best at its size”: no other "
        "point here is at most as large and at least as good."
    )
    body = (
        f'<header><p class="kicker">Comparison</p><h1>{escape(names)}</h1></header>'
        + page.section(
            "Quality against size", f'<p class="note">{page.protocol_words(text)}</p>',
            page.figure(page.pareto(lines, name), caption), page.html_table(comparison_table(rivals, dense)),
        )
    )  # fmt: skip
    return page.document(f"{names} · compress compare", body)
