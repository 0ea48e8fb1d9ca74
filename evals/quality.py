"""Any-precision beside its controls at every width: ``python -m compress.evals.quality --help``.

Everything goes through the ordinary path: recipes are run, checkpoints written, loaded and measured. The
sensitivities are computed once; all recipes share a workspace.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from compress import pipeline
from compress.evals import experiments, plots
from compress.evals.evaluate import Protocol, evaluate_text
from compress.evals.plots import Line, Point
from compress.inspect import inspect
from compress.passes import Report
from compress.source import model_folder

CONTROLS = ("kmeans", "rtn")


def compare(
    model: str, calibration: Mapping[str, Any], text: str, folder: Path, protocol: Protocol | None = None,
    seeds: Sequence[int] = (3,), control_widths: Sequence[int] = (3, 4, 5, 6, 7, 8), tuned: bool = False,
    report: Report | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Compress one model by several quantisers and measure each on the same text.

    Args:
        model: dense model.
        calibration: the recipe's ``calibration``.
        text: what to measure on; see :func:`compress.evals.evaluate.evaluate_text`.
        folder: checkpoints are written under it; those already there are measured again, not made again.
        protocol: how the text is cut.
        seeds: seed widths of the any-precision checkpoints, each measured at all its widths up to 8.
        control_widths: widths of the non-nested k-means and round-to-nearest controls, the weight objective among them.
        tuned: measure any-precision with ``tune_tables`` after it too.
        report: called with (what, done, total).

    Returns:
        One row per (method, width): ``method, bits, model_bytes, loss, perplexity, bits_per_byte, tokens, bytes``;
        ``model_bytes`` are those of the tensors that loading at the width reads.
    """
    recipes: dict[str, list[dict[str, Any]]] = {}
    for seed in seeds:
        ours = {"kind": "any_precision", "seed_bits": seed}
        recipes[f"any-precision, seed {seed}"] = [ours]
        if tuned:
            recipes[f"the same, tuned, seed {seed}"] = [ours, {"kind": "tune_tables"}]
        if control_widths:
            recipes[f"weight objective, seed {seed}"] = [{**ours, "objective": "weight"}]
    recipes |= {f"{kind} {bits}": [{"kind": kind, "bits": bits}] for kind in CONTROLS for bits in control_widths}
    rows: list[dict[str, Any]] = []
    for label, _, found in measured(recipes, model, calibration, text, folder, protocol, report):
        kind = label.split()[0]
        rows += [{"method": kind if kind in CONTROLS else label, **row} for row in found]
    return rows


def measured(
    recipes: Mapping[str, Sequence[Mapping[str, Any]]], model: str, calibration: Mapping[str, Any], text: str,
    folder: Path, protocol: Protocol | None = None, report: Report | None = None,
) -> Iterator[tuple[str, Path, list[dict[str, Any]]]]:  # fmt: skip
    """The dense model and what recipes make of it, measured one after another at every width.

    Args:
        recipes: label -> passes.
        model: dense model.
        calibration: the recipes' ``calibration``.
        text: what to measure on.
        folder: checkpoints are written under it; those already there are measured again, not made again.
        protocol: how the text is cut.
        report: called with (what, done, total).

    Yields:
        Label, folder, and a row per width: ``bits``, ``model_bytes`` (of the tensors that loading at the width reads) and the
        score.
    """
    for label, passes in {"dense": [], **recipes}.items():
        target = folder / label.replace(", ", "-").replace(" ", "-").replace("%", "")
        if label == "dense":
            target = model_folder(model)
        elif not (target / "config.json").exists():
            recipe = {"model": model, "calibration": dict(calibration), "passes": passes}
            pipeline.run(recipe, target, workspace=folder / "work", report=report)

        def measuring(width: str, done: int, total: int, label: str = label) -> None:
            if report is not None:
                report(f"measuring {label} at {width}", done, total)

        found = evaluate_text(str(target), text, protocol=protocol, report=measuring)["bits"]
        looked = inspect(target)
        sizes = looked["bytes_at_bits"] or {"dense": looked["bytes"]}
        yield label, target, [{"bits": bits, "model_bytes": sizes[bits], **score} for bits, score in found.items()]


def as_table(rows: Sequence[Mapping[str, Any]], value: str = "loss") -> Table:
    """Methods across, widths down; the dense model's figure is in the title."""
    dense = next(row for row in rows if row["method"] == "dense")
    methods = [method for method in dict.fromkeys(row["method"] for row in rows) if method != "dense"]
    table = Table(title=f"{value.replace('_', ' ')}; dense: {dense[value]:.4f} at {dense['model_bytes'] / 1e6:.2f} MB")
    for column in ("bits", "MB", *methods):
        table.add_column(column, justify="right")
    for bits in sorted({row["bits"] for row in rows} - {"dense"}, reverse=True):
        cells = {row["method"]: row for row in rows if row["bits"] == bits}
        first = next(iter(cells.values()))
        figures = [f"{cells[method][value]:.4f}" if method in cells else "" for method in methods]
        table.add_row(bits, f"{first['model_bytes'] / 1e6:.2f}", *figures)
    return table


def lines_of(rows: Sequence[Mapping[str, Any]]) -> list[Line]:
    """Loss above the dense model's against bytes read, one line per method."""
    dense = next(row for row in rows if row["method"] == "dense")
    points: dict[str, list[Point]] = {}
    for row in sorted(rows, key=lambda row: row["bits"]):
        share = plots.added(row["loss"], dense["loss"])
        points.setdefault(row["method"], []).append(Point(row["model_bytes"] / 1e6, share, row["bits"]))
    del points["dense"]
    return [Line(method, found, method in CONTROLS) for method, found in points.items()]


def main() -> None:
    """Measure any-precision beside the weight objective, non-nested k-means, round-to-nearest and the dense model."""
    from compress.cli.common import progress_bar, write_json

    parser = experiments.arguments_of("quality", __doc__, 100, 512)
    parser.add_argument("--seeds", type=experiments.listed(int), default=(3, 2), help="seed widths of any-precision")
    parser.add_argument("--tuned", action="store_true", help="measure any-precision with tuned tables too")
    parser.add_argument("--json", help="write the rows here")
    parser.add_argument("--plot", type=Path, help="draw added loss against size here (.svg, .png)")
    given = parser.parse_args()
    calibration, protocol = experiments.calibration_of(given), experiments.protocol_of(given)
    controls = range(min(given.seeds), 9)
    with progress_bar() as report:
        rows = compare(
            given.model, calibration, given.text, given.out, protocol, given.seeds, controls, given.tuned, report
        )
    console = Console()
    for value in ("loss", "perplexity", "bits_per_byte"):
        console.print(as_table(rows, value))
    write_json(rows, given.json)
    if given.plot:
        dense = next(row for row in rows if row["method"] == "dense")
        plots.save(plots.pareto(lines_of(rows), dense=dense["model_bytes"] / 1e6), given.plot)


if __name__ == "__main__":
    experiments.run(main)
