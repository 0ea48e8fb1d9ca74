"""Any-precision beside its controls at every width: ``python -m compress.evals.quality --help``.

Everything goes through the ordinary path: recipes are run, checkpoints written, loaded and measured. The
sensitivities are computed once; all recipes share a workspace.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from rich.console import Console
from rich.table import Table

from compress import pipeline
from compress.errors import CompressError
from compress.evals.text import Protocol, evaluate_text
from compress.inspect import inspect
from compress.passes import Report
from compress.weights import Checkpoint

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
        text: what to measure on; see :func:`compress.evals.text.evaluate_text`.
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
    rows = _rows("dense", str(pipeline.model_folder(model)), text, protocol, report)
    for label, passes in recipes.items():
        target = folder / label.replace(", ", "-").replace(" ", "-")
        if not (target / "config.json").exists():
            recipe = {"model": model, "calibration": dict(calibration), "passes": passes}
            pipeline.run(recipe, target, workspace=folder / "work", report=report)
        kind = passes[0]["kind"]
        method = label if kind == "any_precision" else kind
        rows += _rows(method, str(target), text, protocol, report)
    return rows


def _rows(
    method: str, folder: str, text: str, protocol: Protocol | None, report: Report | None
) -> list[dict[str, Any]]:
    def measuring(width: str, done: int, total: int) -> None:
        if report is not None:
            report(f"measuring {method} at {width}", done, total)

    found = evaluate_text(folder, text, protocol=protocol, report=measuring)["bits"]
    if method == "dense":
        sizes = {"dense": sum(item.nbytes for item in Checkpoint(Path(folder)).info().values())}
    else:
        sizes = inspect(Path(folder))["bytes_at_bits"]
    return [{"method": method, "bits": width, "model_bytes": sizes[width], **score} for width, score in found.items()]


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


def draw(rows: Sequence[Mapping[str, Any]], target: Path) -> None:
    """Plot the loss above the dense model's against bytes read, one line per method.

    Raises:
        CompressError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise CompressError("--plot needs matplotlib: pip install 'compress-llm[plots]'.") from error
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    dense = next(row for row in rows if row["method"] == "dense")
    methods = [method for method in dict.fromkeys(row["method"] for row in rows) if method != "dense"]
    for method in methods:
        points = sorted(
            (row["model_bytes"] / 1e6, row["loss"] / dense["loss"] - 1, row["bits"])
            for row in rows
            if row["method"] == method
        )
        axes.plot(
            [x for x, _, _ in points], [100 * max(y, 1e-5) for _, y, _ in points], "o-", markersize=4, label=method
        )
        for x, y, bits in points if method == methods[0] else []:
            place = (x, 100 * max(y, 1e-5))
            axes.annotate(f"{bits} bit", place, textcoords="offset points", xytext=(5, 4), fontsize=8)
    axes.axvline(
        dense["model_bytes"] / 1e6, color="black", linewidth=0.8, linestyle=":", label="size of the dense model"
    )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.set_xlabel("MB of tensors read at the width")
    axes.set_ylabel("loss above the dense model's, % (0.001 = none)")
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False)
    figure.savefig(target)


def main(
    folder: Annotated[Path, typer.Argument(help="Where checkpoints are kept.")],
    model: Annotated[str, typer.Option(help="Dense model.")] = "builtin",
    calibration: Annotated[
        Optional[Path], typer.Option(help="Text file to calibrate on; built-in modules if absent.")
    ] = None,
    text: Annotated[str, typer.Option(help="Text to measure on; 'builtin' for held-out modules.")] = "builtin",
    separator: Annotated[Optional[str], typer.Option(help="Divides both texts into documents.")] = None,
    samples: int = 100,
    min_calibration_characters: int = 0,
    limit: Optional[int] = None,
    min_characters: int = 0,
    truncate: bool = False,
    seeds: Annotated[str, typer.Option(help="Seed widths of any-precision.")] = "3,2",
    tuned: Annotated[bool, typer.Option(help="Measure any-precision with tuned tables too.")] = False,
    target: Annotated[Optional[Path], typer.Option("--json", help="Write the rows here.")] = None,
    plot: Annotated[Optional[Path], typer.Option(help="Draw added loss against size here (.svg, .png).")] = None,
) -> None:
    """Measure any-precision beside the weight objective, non-nested k-means, round-to-nearest and the dense model."""
    from compress.cli.common import progress_bar, quiet_transformers

    quiet_transformers()
    source: dict[str, Any] = {"text": str(calibration)} if calibration else {"builtin": "stdlib"}
    if calibration:
        source |= {"separator": separator, "min_characters": min_calibration_characters}
    widths = [int(part) for part in seeds.split(",")]
    protocol = Protocol(separator, limit, min_characters, truncate=truncate)
    with progress_bar() as report:
        rows = compare(
            model, {**source, "samples": samples}, text, folder, protocol, widths, range(min(widths), 9), tuned, report
        )
    console = Console()
    for value in ("loss", "perplexity", "bits_per_byte"):
        console.print(as_table(rows, value))
    if target:
        target.write_text(json.dumps(rows, indent=1) + "\n")
    if plot:
        draw(rows, plot)


if __name__ == "__main__":
    try:
        typer.run(main)
    except CompressError as error:
        raise SystemExit(f"error: {error}") from error
