"""Compare several checkpoints, at all their numbers of bits, on one text (``compress compare``)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import CompressError
from compress.evals import plots, tables
from compress.evals.evaluate import OpenText, Protocol
from compress.evals.gather import Facts, collect
from compress.evals.page import Page, Picture, Section
from compress.evals.plots import Line, Point
from compress.evals.sections import protocol_words
from compress.evals.store import dense_identity, results_of
from compress.passes import Progress

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Comparison:
    """Hold checkpoints that were measured on the same text in the same way."""

    rivals: dict[str, list[tuple[str, int, Mapping[str, float]]]]  # checkpoint -> (bits, bytes, metrics of the text)
    text: Mapping[str, Any]  # the common text, with the rows of the first checkpoint
    dense: Mapping[str, float] | None  # the dense model's metrics, where all were made from one and it was measured

    def lines(self) -> tuple[list[Line], str]:
        """Return the lines of the Pareto plot, and the name of its upward axis."""
        lines = []
        for name, rows in self.rivals.items():
            points = []
            for bits, size, metrics in rows:
                figures = f"{tables.megabytes(size)}, perplexity {metrics['perplexity']:.4g}"
                up = plots.added(metrics["loss"], self.dense["loss"]) if self.dense else metrics["bits_per_byte"]
                word = "" if bits == "dense" else bits
                points.append(Point(size / 1e6, up, word, f"{name}, {tables.label(bits)}: {figures}"))
            lines.append(Line(name, points))
        return lines, "loss above the dense model's, %" if self.dense else "bits per byte"

    def figure(self) -> Figure:
        """Draw loss (or bits per byte) against size, one line per checkpoint."""
        return plots.pareto(*self.lines())

    def table(self) -> tables.Table:
        """Set a row per checkpoint and number of bits, smallest first, and say whether any other is both smaller and better."""
        figures = ["read", "loss, nats", "vs dense", "perplexity", "bits per byte", "best at its size"]
        table = tables.Table(["checkpoint", "bits", *figures])
        rows = [(size, name, bits, metrics) for name, mine in self.rivals.items() for bits, size, metrics in mine]
        by = "bits_per_byte"  # means the same for every tokenizer
        for size, name, bits, metrics in sorted(rows, key=lambda row: row[0]):
            beaten = any(
                other <= size and theirs[by] <= metrics[by] and (other < size or theirs[by] < metrics[by])
                for other, _, _, theirs in rows
            )
            change = f"{tables.above(metrics['loss'], self.dense['loss']):+.2f} %" if self.dense else "–"
            losses = [tables.number(metrics[key]) for key in ("loss", "perplexity", by)]
            cells = [tables.megabytes(size), losses[0], change, *losses[1:], "" if beaten else "yes"]
            table.add("width", name, bits, *cells)
        return table.without_empty()

    def page(self) -> Page:
        """Lay the comparison out as a page."""
        caption = (
            "Each line is one checkpoint, each point one of its numbers of bits; further down and to the left is better. “Best at its size”: no "
            "other point here is at most as large and at least as good."
        )
        picture = Picture("Loss against size, one line per checkpoint", self.figure, caption)
        section = Section("Quality against size", self.table(), protocol_words(self.text), [picture])
        names = ", ".join(self.rivals)
        return Page("Comparison", names, [section], notes=plots.why_not())


def compare(
    folders: Sequence[Path],
    text: str | None = None,
    protocol: Protocol | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Comparison:
    """Bring several checkpoints together on one text.

    Args:
        folders: checkpoints.
        text: measured where a checkpoint's results do not have it; None takes a text that all have in common.
        protocol: how it is cut.
        device: to measure on.
        progress: called with (what, done, total).

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
            work = OpenText(str(folder), text, protocol=protocol, device=device, progress=progress, store=store)
            work.evaluate()
            wanted = wanted or _same_text({"settings": work.settings})
        facts = collect(folder, store)
        found.append((facts, {_same_text(item): item for item in facts.texts}))
    common = [key for key in found[0][1] if all(key in texts for _, texts in found) and wanted in (None, key)]
    if not common:
        raise CompressError("compare: these were not measured on the same text in the same way; give --text FILE.")
    key = max(common, key=lambda key: sum(len(texts[key]["rows"]) for _, texts in found))
    one_origin = len({dense_identity(facts.manifest) for facts, _ in found}) == 1
    rivals, dense = {}, None
    for name, (facts, texts) in zip(_names(folders), found, strict=True):
        rows = texts[key]["rows"]
        if one_origin:
            dense = dense or rows.get(("dense", None))
        measured = [bits for bits in facts.all_bits if (bits, None) in rows]
        rivals[name] = [(bits, facts.bytes_at(bits) or 0, rows[bits, None]) for bits in measured]
    return Comparison(rivals, found[0][1][key], dense)


def _same_text(item: Mapping[str, Any]) -> str:
    settings = item["settings"]
    return json.dumps([settings["sha256"], settings["protocol"], settings["dtype"]], sort_keys=True)


def _names(folders: Sequence[Path]) -> list[str]:
    """Return the folders' names, or paths where names are the same."""
    short = [folder.resolve().name for folder in folders]
    return short if len(set(short)) == len(short) else [str(folder) for folder in folders]
