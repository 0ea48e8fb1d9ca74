"""Plots by hand: where things are placed, and that odd values break nothing."""

import math
import re
import xml.etree.ElementTree as ElementTree

import pytest

from compress.evals.svg import Axis, Line, Point, axis, bars, heat_map, scatter


def test_places_on_an_axis():
    assert Axis("", 1, 100, True).place(10) == pytest.approx(0.5)
    assert Axis("", 0, 4, False).place(1) == 0.25
    assert Axis("", 1, 100, True).place(0.001) == 0  # beyond the end is at the end
    found = axis("", [0, -1, 10, 1000, math.inf], log=True)
    assert 0 < found.low < 10
    assert found.high > 1000


@pytest.mark.parametrize(
    ("low", "high", "log", "ticks"),
    [
        (0.9, 110, True, [1, 2, 5, 10, 20, 50, 100]),
        (0.24, 0.36, True, [0.25, 0.3, 0.35]),  # too narrow for decades
        (1e-5, 1e3, True, [1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1, 10, 100, 1000]),
        (0, 1, False, [0, 0.2, 0.4, 0.6, 0.8, 1]),
    ],
)
def test_ticks_are_round_and_few(low, high, log, ticks):
    assert Axis("", low, high, log).ticks() == pytest.approx(ticks)


def test_marks_and_words_are_where_the_values_are():
    lines = [
        Line("ours", [Point(1, 1, "a", "first & <best>"), Point(10, 10, "b")]),
        Line("other", [Point(2, 5)], control=True),
    ]
    picture = scatter(lines, Axis("x", 1, 10, True), Axis("y", 0, 10, False), "a plot")
    tree = ElementTree.fromstring(picture)
    marks = [e for e in tree.iter() if e.tag.endswith("circle") and "control" not in e.get("class")]
    xs = sorted({float(mark.get("cx")) for mark in marks[:-1]})
    assert (xs[0], xs[-1]) == (68.0, 696.0)
    assert "first &amp; &lt;best&gt;" in picture
    assert len(re.findall(">other<", picture)) == 1  # in the legend


def test_a_heat_map_shades_from_least_to_most_and_leaves_holes():
    picture = heat_map([[1, 10], [None, 100]], ["a", "b"], ["c", "d"], "a map", log=True)
    ElementTree.fromstring(picture)
    shades = [float(shade) for shade in re.findall(r"fill-opacity:([\d.]+)", picture)]
    assert shades == pytest.approx([0.06, 0.49, 0.92], abs=0.01)
    assert heat_map([[5]], ["a"], ["b"], "one").count("<rect") == 1
    fixed = heat_map([[75, 100]], ["a"], ["b", "c"], "share", limits=(0, 100))
    assert float(re.findall(r"fill-opacity:([\d.]+)", fixed)[0]) == pytest.approx(0.06 + 0.86 * 0.75, abs=0.01)


def test_bars_reach_as_far_as_their_medians():
    picture = bars([("dense", 100, 90, 110), ("4", 220, 200, 220)], "speed", "{:g}".format, base=100)
    ElementTree.fromstring(picture)
    widths = [float(width) for width in re.findall(r'class="bar [^"]*" x="70" y="[\d.]+" width="([\d.]+)"', picture)]
    assert widths[1] / widths[0] == pytest.approx(2.2, abs=0.01)
