"""Plots as inline SVG: no scripts, no outside resources, colours from the page's style sheet (light, dark, print)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

SERIES = 6
"""Number of colours; the classes ``s0`` to ``s5`` of the style sheet."""


@dataclass(frozen=True)
class Point:
    """One mark of a line: place, the word beside it, the words shown on pointing at it."""

    x: float
    y: float
    word: str = ""
    title: str = ""


@dataclass(frozen=True)
class Line:
    """Points that belong together; a control is drawn dashed and thinner."""

    name: str
    points: Sequence[Point]
    control: bool = False


@dataclass(frozen=True)
class Axis:
    """A logarithmic or linear axis from ``low`` to ``high``, with its name."""

    name: str
    low: float
    high: float
    log: bool
    form: Callable[[float], str] = "{:g}".format

    def place(self, value: float) -> float:
        """0 to 1 along the axis; values beyond it stick to its ends."""
        value = min(max(value, self.low), self.high)
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Round values within the axis."""
        ticks = _log_ticks(self.low, self.high) if self.log else []
        return ticks if len(ticks) > 1 else _even_ticks(self.low, self.high)


def axis(name: str, values: Iterable[float], log: bool, form: Callable[[float], str] = "{:g}".format) -> Axis:
    """An axis that holds all values with some room."""
    known = [value for value in values if math.isfinite(value) and (value > 0 or not log)]
    if not known:
        return Axis(name, 1.0, 10.0, log, form)
    low, high = min(known), max(known)
    if log:
        room = max((high / low) ** 0.07, 1.1)
        return Axis(name, low / room, high * room, True, form)
    room = 0.07 * (high - low) or 0.1 * abs(high) or 1.0
    return Axis(name, low - room, high + room, False, form)


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 2, 5), (1,)):
        ticks = [step * 10.0**decade for decade in decades for step in steps if low <= step * 10.0**decade <= high]
        if len(ticks) <= 8:
            break
    return ticks


def _even_ticks(low: float, high: float) -> list[float]:
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(step * power for step in (1, 2, 5, 10) if step * power >= rough)
    return [round(step * index, 12) for index in range(math.ceil(low / step), math.floor(high / step) + 1)]


def scatter(lines: Sequence[Line], x: Axis, y: Axis, describe: str, width: int = 720, height: int = 400) -> str:
    """Lines with marks, words beside the marks of the first, and a legend."""
    left, right, top, bottom = 68, 24, 18, 52
    inner, tall = width - left - right, height - top - bottom

    def at(point: Point) -> tuple[float, float]:
        return left + inner * x.place(point.x), top + tall * (1 - y.place(point.y))

    parts = [_open(width, height, describe)]
    for tick in x.ticks():
        place = left + inner * x.place(tick)
        parts.append(f'<line class="grid" x1="{place:.1f}" x2="{place:.1f}" y1="{top}" y2="{top + tall}"/>')
        parts.append(_text(place, top + tall + 18, x.form(tick), "tick middle"))
    for tick in y.ticks():
        place = top + tall * (1 - y.place(tick))
        parts.append(f'<line class="grid" x1="{left}" x2="{left + inner}" y1="{place:.1f}" y2="{place:.1f}"/>')
        parts.append(_text(left - 8, place + 4, y.form(tick), "tick end"))
    parts.append(f'<line class="axis" x1="{left}" x2="{left + inner}" y1="{top + tall}" y2="{top + tall}"/>')
    parts.append(_text(left + inner / 2, height - 10, x.name, "name middle"))
    parts.append(
        f'<text class="name middle" transform="translate(16 {top + tall / 2:.1f}) rotate(-90)">{escape(y.name)}</text>'
    )
    for order in reversed(range(len(lines))):
        parts += _line(lines[order], order, at)
    parts += _legend(lines, left + inner, top)
    return "".join(parts) + "</svg>"


def _line(line: Line, order: int, at: Callable[[Point], tuple[float, float]]) -> list[str]:
    kind = f"s{order % SERIES}" + (" control" if line.control else "")
    places = [at(point) for point in line.points]
    parts = []
    if len(places) > 1:
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
        parts.append(f'<polyline class="line {kind}" points="{path}"/>')
    for point, (a, b) in zip(line.points, places, strict=True):
        title = f"<title>{escape(point.title)}</title>" if point.title else ""
        parts.append(
            f'<circle class="mark {kind}" cx="{a:.1f}" cy="{b:.1f}" r="{3 if line.control else 4.5}">{title}</circle>'
        )
        if point.word and not line.control:
            parts.append(_text(a + 8, b - 7, point.word, f"word {kind}"))
    return parts


def _legend(lines: Sequence[Line], right: float, top: float) -> list[str]:
    if len(lines) < 2:
        return []
    parts = []
    for order, line in enumerate(lines):
        kind, place = f"s{order % SERIES}" + (" control" if line.control else ""), top + 12 + 19 * order
        parts.append(f'<line class="line {kind}" x1="{right - 26}" x2="{right - 4}" y1="{place}" y2="{place}"/>')
        parts.append(f'<circle class="mark {kind}" cx="{right - 15}" cy="{place}" r="{3 if line.control else 4}"/>')
        parts.append(_text(right - 34, place + 4, line.name, "tick end"))
    return parts


def heat_map(
    values: Sequence[Sequence[float | None]], rows: Sequence[str], columns: Sequence[str], describe: str,
    log: bool = False, form: Callable[[float], str] = "{:.2g}".format, axes: tuple[str, str] = ("", ""),
    limits: tuple[float, float] | None = None,
) -> str:  # fmt: skip
    """A matrix as shades of one colour, darker is more; figures are in the cells where there is room.

    Args:
        values: [rows][columns]; None leaves a cell empty.
        rows: their names.
        columns: their names.
        describe: what it shows, for those who can not see it.
        log: shade by the logarithm.
        form: of a figure.
        axes: names of what goes down and across.
        limits: of the shades; the least and the largest value if None.
    """
    known = [value for row in values for value in row if value is not None and (value > 0 or not log)]
    scale = axis("", [*known, *(limits or ())], log) if known else Axis("", 0, 1, False)
    low, high = limits or ((min(known), max(known)) if known else (0.0, 1.0))
    left = 14 + 7 * max(map(len, rows), default=0) + (16 if axes[0] else 0)
    cell = max(14.0, min(64.0, (720 - left) / max(1, len(columns))))
    tall = 24.0
    written = cell >= 34
    width, height = int(left + cell * len(columns) + 8), int(tall * len(rows) + 40 + (18 if axes[1] else 0))
    parts = [_open(width, height, describe)]
    for r, row in enumerate(values):
        parts.append(_text(left - 8, tall * r + 20, rows[r], "tick end"))
        for c, value in enumerate(row):
            if value is None:
                continue
            span = scale.place(high) - scale.place(low) if known else 1.0
            shade = (scale.place(value) - scale.place(low)) / span if span else 0.5
            title = f"{rows[r]}, {columns[c]}: {form(value)}"
            parts.append(
                f'<rect class="cell" x="{left + cell * c:.1f}" y="{tall * r + 4:.1f}" width="{cell - 1.5:.1f}" height="{tall - 1.5}" '
                f'style="fill-opacity:{0.06 + 0.86 * shade:.3f}"><title>{escape(title)}</title></rect>'
            )
            if written:
                tone = "figure on" if shade > 0.55 else "figure"
                parts.append(_text(left + cell * (c + 0.5), tall * r + 20, form(value), f"{tone} middle"))
    every = max(1, math.ceil(26 / cell)) if not any(len(name) > 3 for name in columns) else 1
    for c in range(0, len(columns), every):
        parts.append(_text(left + cell * (c + 0.5), tall * len(rows) + 22, columns[c], "tick middle"))
    if axes[1]:
        parts.append(_text(left + cell * len(columns) / 2, tall * len(rows) + 42, axes[1], "name middle"))
    if axes[0]:
        parts.append(
            f'<text class="name middle" transform="translate(12 {tall * len(rows) / 2:.0f}) rotate(-90)">{escape(axes[0])}</text>'
        )
    return "".join(parts) + "</svg>"


def bars(rows: Sequence[tuple[str, float, float, float]], describe: str, form: Callable[[float], str], base: float | None = None) -> str:  # fmt: skip
    """Horizontal bars with a whisker from the lower to the upper quartile.

    Args:
        rows: (name, median, low, high).
        describe: what it shows.
        form: of a figure.
        base: drawn as a line across, such as the dense model's.
    """
    width, tall, left = 720, 26, 70
    inner: float = width - left - 120
    most = max([high for _, _, _, high in rows] + [base or 0.0]) or 1.0
    parts = [_open(width, tall * len(rows) + 8, describe)]
    for place, (name, middle, low, high) in enumerate(rows):
        y, end = tall * place + 4, left + inner * middle / most
        kind = "s0" if name != "dense" else "plain"
        parts.append(_text(left - 10, y + 14, name, "tick end"))
        parts.append(
            f'<rect class="bar {kind}" x="{left}" y="{y}" width="{max(1.0, end - left):.1f}" height="{tall - 8}"/>'
        )
        start, stop = (left + inner * value / most for value in (low, high))
        parts.append(
            f'<line class="whisker" x1="{start:.1f}" x2="{stop:.1f}" y1="{y + tall / 2 - 4}" y2="{y + tall / 2 - 4}"/>'
        )
        parts.append(_text(max(end, stop) + 8, y + 14, form(middle), "tick"))
    if base is not None:
        across = left + inner * base / most
        parts.append(f'<line class="base" x1="{across:.1f}" x2="{across:.1f}" y1="0" y2="{tall * len(rows) + 4}"/>')
    return "".join(parts) + "</svg>"


def _open(width: int, height: int, describe: str) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" style="max-width:{width}px" role="img" aria-label="{escape(describe)}" '
        'xmlns="http://www.w3.org/2000/svg">'
    )


def _text(x: float, y: float, text: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'
