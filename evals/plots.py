"""Pictures by matplotlib: size against loss, matrices, sparsity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from compress.errors import CompressError
from compress.evals.svg import Line

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS = ("#1f5fa8", "#b4532a", "#4f7a3a", "#7a4b94", "#8a6d1c", "#2f7f80")


def new_figure(width: float, height: float, what: str) -> Figure:
    """An empty figure of a size in inches.

    Raises:
        CompressError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise CompressError(f"{what} needs matplotlib: pip install 'compress-llm[plots]'.") from error
    return Figure(figsize=(width, height), layout="constrained", dpi=160)


def save(figure: Figure, target: Path) -> None:
    """Write a figure in the format of its name.

    Raises:
        CompressError: there is no such folder or format.
    """
    try:
        figure.savefig(target, metadata={"Date": None} if target.suffix == ".svg" else None)
    except (OSError, ValueError) as error:
        raise CompressError(f"{target}: cannot be drawn ({error}).") from error


def pareto(
    lines: Sequence[Line], target: Path, name: str = "loss above the dense model's, %", dense: float | None = None
) -> None:
    """Bytes across, loss up, both logarithmic.

    Args:
        lines: one per checkpoint or method, controls dashed.
        target: .png, .svg or .pdf.
        name: of the upward axis.
        dense: MB of the dense model, drawn as a line.
    """
    figure = new_figure(7.2, 4.2, target.name)
    axes = figure.add_subplot()
    for order, line in enumerate(lines):
        style = {"linestyle": "--", "linewidth": 1.0, "markersize": 3} if line.control else {"markersize": 5}
        xs, ys = [point.x for point in line.points], [point.y for point in line.points]
        axes.plot(xs, ys, marker="o", color=_COLOURS[order % len(_COLOURS)], label=line.name, **style)
        for point in () if line.control else line.points:
            axes.annotate(point.word, (point.x, point.y), textcoords="offset points", xytext=(5, 5), fontsize=8)
    if dense is not None:
        axes.axvline(dense, color="black", linewidth=0.8, linestyle=":", label="size of the dense model")
    axes.set(xscale="log", yscale="log", xlabel="MB read", ylabel=name)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.tick_params(which="both", labelsize=8)
    axes.grid(which="both", alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if len(lines) > 1:
        axes.legend(frameon=False, fontsize=8)
    save(figure, target)


def heat_map(
    values: list[list[float | None]], down: Sequence[str], across: Sequence[str], title: str, file: Path,
    reverse: bool = False,
) -> None:  # fmt: skip
    """Draw how prompts transfer; colours tell each column's better and worse, as models differ more than prompts do.

    Args:
        values: [rows][columns]; None where nothing was measured.
        down: labels of the rows.
        across: labels of the columns.
        title: above it.
        file: SVG or PNG.
        reverse: more is better.
    """
    table = torch.tensor([[float("nan") if v is None else v for v in row] for row in values])
    low = table.nan_to_num(float("inf")).amin(0)
    high = table.nan_to_num(float("-inf")).amax(0)
    figure = new_figure(1.6 + 1.1 * len(across), 1.2 + 0.5 * len(down), "a heat map")
    axes = figure.subplots()
    shade = ((table - low) / (high - low).clamp_min(1e-9)).numpy()
    axes.imshow(shade, cmap="RdYlGn" if reverse else "RdYlGn_r", vmin=-0.6, vmax=1.6, aspect="auto")
    axes.set_xticks(range(len(across)), across, rotation=20, ha="right")
    axes.set_yticks(range(len(down)), down)
    axes.set(xlabel="evaluated at", ylabel="prompt learned at", title=title)
    for y, row in enumerate(values):
        for x, entry in enumerate(row):
            axes.text(x, y, "–" if entry is None else f"{entry:.4g}", ha="center", va="center", fontsize=9)
    save(figure, file)


def sparsity(found: Mapping[str, Any], target: Path) -> None:
    """Plot the sparsity of every block as a bar, and of its linears as points.

    Args:
        found: from :func:`compress.inspect.sparsity`.
        target: .svg, .png, …
    """
    names = list(found["blocks"])
    figure = new_figure(max(5.0, 0.3 * len(names)), 3.5, "--plot")
    axes = figure.add_subplot()
    axes.bar(range(len(names)), [100 * block["sparsity"] for block in found["blocks"].values()], color="lightsteelblue")
    for place, block in enumerate(names):
        inside = [100 * v["sparsity"] for name, v in found["linears"].items() if name.startswith(block + ".")]
        axes.plot([place] * len(inside), inside, ".", color="black", markersize=4)
    axes.axhline(100 * found["sparsity"], color="black", linewidth=0.8, linestyle=":")
    axes.set(xlabel="block", ylabel="zeros, % (bar: block; points: its linears)", ylim=(0, 100))
    save(figure, target)
