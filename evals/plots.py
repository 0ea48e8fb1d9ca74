"""Draw with matplotlib: loss against size, heat maps, bars. As SVG text for a page, or as a file."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from html import escape
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from compress.errors import CompressError
from compress.evals.tables import Matrix

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

_ABSENT = "drawing needs matplotlib: pip install 'compress-llm[plots]'."
_FLOOR = 1e-5  # added loss, as a share, below which a point sits on the lower edge of the plot
_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}  # equal figures are equal bytes
_TOOLTIP = "tooltip:"  # an artist with such an id becomes a group with a title, shown on pointing at it


class Point(NamedTuple):
    """Hold a mark of a line: its place, the word beside it, and the words shown on pointing at it in a page."""

    x: float
    y: float
    word: str = ""
    tooltip: str = ""


class Line(NamedTuple):
    """Hold points that belong together; a control is drawn dashed and thinner."""

    name: str
    points: Sequence[Point]
    control: bool = False


@contextmanager
def _style(**more: Any) -> Iterator[None]:
    """Have figures drawn in our style; works as a decorator too."""
    try:
        import matplotlib.figure
    except ImportError as error:
        raise CompressError(_ABSENT) from error
    look = str(files("compress.evals") / "plots.mplstyle")
    style: dict[Any, Any] = {**matplotlib.rc_params_from_file(look, use_default_template=False), **more}
    with matplotlib.rc_context(style):
        yield


def why_not() -> list[str]:
    """Return a sentence on why there are no figures; none where matplotlib is installed."""
    return [] if find_spec("matplotlib") else [f"There are no figures: {_ABSENT}"]


@_style()
def save(figure: Figure, target: Path) -> None:
    """Write a figure in the format that the file's name ends in."""
    try:
        figure.savefig(target, metadata=_METADATA if target.suffix == ".svg" else None)
    except (OSError, ValueError) as error:
        raise CompressError(f"{target}: cannot be drawn ({error}).") from error


@cache
def _colours() -> dict[str, str]:
    """Return name -> colour of the page's style sheet on light paper."""
    light, _, _ = (files("compress.evals") / "page.css").read_text(encoding="utf-8").partition("@media")
    return dict(re.findall(r"--(\w+): (#\w{6});", light))


def svg(figure: Figure, label: str) -> str:
    """Return a figure as an SVG element for a page, in the colours of ``page.css``; no two of a page may have one label."""
    for artist in figure.findobj():
        artist.set_clip_on(False)  # ids of clipping paths would be the page's
    text = io.StringIO()
    with _style(**{"svg.fonttype": "none", "svg.hashsalt": label}):
        figure.savefig(text, format="svg", metadata=_METADATA, transparent=True)
    drawn = text.getvalue()[text.getvalue().index("<svg") :]
    drawn = re.sub(r"<defs>\s*<style.*?</defs>", "", drawn, flags=re.DOTALL)  # it would style the page
    drawn = re.sub(rf'<g id="{_TOOLTIP}([^"]*)">', r"<g><title>\1</title>", drawn)
    drawn = re.sub(r'<g id="[^"]*">', "<g>", drawn)  # the same in every figure
    drawn = drawn.replace(' xmlns:xlink="http://www.w3.org/1999/xlink"', "").replace("xlink:href", "href")
    drawn = drawn.replace("'DejaVu Sans'", "var(--sans)")
    for name, colour in _colours().items():
        drawn = drawn.replace(colour, f"var(--{name})")
    return drawn.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    """Make an empty figure of a size in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    return figure, figure.add_subplot()


def added(loss: float, dense: float) -> float:
    """Return a loss above the dense model's in % of that, at least what a logarithmic axis begins at."""
    return 100 * max(loss / dense - 1, _FLOOR)


@_style()
def pareto(lines: Sequence[Line], name: str = "loss above the dense model's, %") -> Figure:
    """Draw size in MB across and loss up, both logarithmic, with a line for each checkpoint or method."""
    figure, axes = _axes(7.4, 4.2)
    axes.set(xscale="log", yscale="log", xlabel="MB read", ylabel=name)
    axes.margins(0.07)
    for order, line in enumerate(lines):
        colour, level = f"C{order}", 4 - line.control
        wide, size, style = (1.0, 4, (0, (4, 3))) if line.control else (1.7, 6, "-")
        xs, ys = [point.x for point in line.points], [point.y for point in line.points]
        axes.plot(xs, ys, color=colour, label=line.name, linewidth=wide, linestyle=style, zorder=level)
        for x, y, word, tooltip in line.points:
            axes.plot(x, y, "o", color=colour, markersize=size, zorder=level + 0.1, gid=_TOOLTIP + tooltip)
            if not line.control:
                shown: dict[str, Any] = {"color": colour, "weight": "bold", "zorder": 6}
                axes.annotate(word, (x, y), (6, 5), "data", "offset points", **shown)
    axes.grid()
    _log_ticks(axes.xaxis, axes.get_xlim())
    _log_ticks(axes.yaxis, axes.get_ylim())
    if len(lines) > 1:
        axes.legend()
    return figure


def _log_ticks(axis: Axis, limits: tuple[float, float]) -> None:
    """Put few round figures at a logarithmic axis, however long it is."""
    from matplotlib import ticker

    decades = math.log10(limits[1] / limits[0])
    steps = (1, 2, 5) if decades < 2.7 else (1,)
    axis.set_major_locator(ticker.LogLocator(subs=steps, numticks=9) if decades > 0.8 else ticker.MaxNLocator(5))
    axis.set_minor_locator(ticker.NullLocator())
    axis.set_major_formatter("{x:g}")


@_style()
def heat_map(
    matrix: Matrix,
    title: str = "",
    log: bool = False,
    limits: tuple[float, float] | None = None,
    by_column: bool = False,
    reverse: bool = False,
) -> Figure:
    """Draw a matrix as shades of one colour, darker is more, with its figures where there is room for them.

    The lightest and the darkest shade are at ``limits``, or at the least and the largest figure (of every column where
    ``by_column`` shades each on its own); ``log`` shades by the logarithm, and ``reverse`` makes darker less.
    """
    cell = min(0.8, max(0.16, 6.2 / max(1, len(matrix.columns))))  # inches
    longest = 0.075 * max(map(len, matrix.columns), default=0)
    every = math.ceil(1.3 * longest / cell) if all(name.isdigit() for name in matrix.columns) else 1
    turn: dict[str, Any] = {"rotation": 20, "ha": "right"} if every == 1 and longest > cell else {}
    names = 0.3 + 0.07 * max(map(len, matrix.rows), default=0)
    height = 0.27 * len(matrix.rows) + 0.35 + 0.2 * bool(matrix.across) + 0.25 * bool(title) + 0.4 * bool(turn)
    figure, axes = _axes(names + cell * len(matrix.columns), height)
    whole = limits or _span([value for row in matrix.values for value in row], log)
    for x, column in enumerate(matrix.columns):
        values = [row[x] for row in matrix.values]
        span = _span(values, log) if by_column else whole
        for y, value in enumerate(values):
            if value is not None:
                tooltip = f"{matrix.rows[y]}, {column}: {matrix.form(value)}"
                _cell(axes, x, y, abs(reverse - _shade(value, span, log)), tooltip, cell >= 0.38)
    places = range(0, len(matrix.columns), every)
    axes.set_xticks([place + 0.5 for place in places], [matrix.columns[place] for place in places], **turn)
    axes.set_yticks([place + 0.5 for place in range(len(matrix.rows))], matrix.rows)
    axes.set(xlim=(0, len(matrix.columns)), ylim=(len(matrix.rows), 0))
    axes.set(ylabel=matrix.down, xlabel=matrix.across, title=title)
    axes.spines[:].set_visible(False)
    return figure


def _span(values: Sequence[float | None], log: bool) -> tuple[float, float]:
    """Return the least and the largest of the figures that a scale can show."""
    known = [value for value in values if value is not None and math.isfinite(value) and (value > 0 or not log)]
    return min(known, default=1.0), max(known, default=1.0)


def _shade(value: float, span: tuple[float, float], log: bool) -> float:
    """Place a figure between the ends of a span, 0 to 1."""
    low, high, place = map(math.log, (*span, max(span[0], value))) if log else (*span, value)
    return min(1.0, max(0.0, (place - low) / (high - low))) if high > low else 0.5


def _cell(axes: Axes, x: int, y: int, shade: float, tooltip: str, written: bool) -> None:
    """Draw one figure of a heat map."""
    from matplotlib.patches import Rectangle

    opacity = 0.06 + 0.86 * shade
    box = Rectangle((x + 0.02, y + 0.04), 0.96, 0.92, facecolor="C0", alpha=opacity, gid=_TOOLTIP + tooltip)
    axes.add_patch(box)
    if written:
        colour = _colours()["on" if shade > 0.55 else "ink"]
        axes.text(x + 0.5, y + 0.52, tooltip.rpartition(" ")[2], color=colour, size=7.5, ha="center", va="center")


@_style()
def bars(rows: Sequence[tuple[str, float, float, float]], form: Callable[[float], str], base: float | None) -> Figure:
    """Draw horizontal bars of (name, median, low, high), with whiskers from low to high and a line at ``base``."""
    figure, axes = _axes(7.4, 0.3 + 0.26 * len(rows))
    ink, soft = _colours()["ink"], _colours()["soft"]
    for place, (name, median, low, high) in enumerate(rows):
        axes.barh(name, median, height=0.68, color=soft if name == "dense" else "C0", alpha=0.85)
        axes.plot((low, high), (place, place), color=ink, linewidth=1.2)
        axes.annotate(form(median), (max(high, median), place), (7, 0), "data", "offset points", va="center")
    if base is not None:
        axes.axvline(base, color=ink, linewidth=0.9, linestyle=(0, (2, 3)))
    axes.set_xticks([])
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.spines[["bottom", "left"]].set_visible(False)
    return figure
