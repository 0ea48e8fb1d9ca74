"""Figures: what is drawn is what was measured, in the page's colours, and the same bytes every time."""

import re
import xml.etree.ElementTree as ElementTree

import pytest

from compress.errors import CompressError
from compress.evals import plots, tables
from compress.evals.plots import Line, Point
from compress.evals.tables import Matrix

pytest.importorskip("matplotlib")
LINES = [
    Line("ours", [Point(0.2, 50, "2", "first & <best>"), Point(2, 0.5, "4")]),
    Line("other", [Point(0.4, 5, "3")], control=True),
]


def texts(svg):
    """All words of a figure, and the titles of what can be pointed at."""
    tree = ElementTree.fromstring(svg)
    written, titles = ([e.text for e in tree.iter() if e.tag.endswith(name)] for name in ("}text", "}title"))
    return written, titles


def test_a_figure_for_a_page_has_its_colours_and_needs_nothing_else():
    svg = plots.svg(plots.pareto(LINES), "loss & size")
    written, titles = texts(svg)
    assert 'aria-label="loss &amp; size"' in svg
    assert "first & <best>" in titles
    assert {"2", "4", "ours", "other", "MB read", "0.5", "1"} <= set(written)
    assert "3" not in written  # controls are named in the legend alone
    assert not re.search(r"#[0-9a-f]{6}", svg)  # every colour is a variable of the style sheet
    assert "url(" not in svg
    assert svg == plots.svg(plots.pareto(LINES), "loss & size")


def test_a_figure_in_a_file_is_the_same_bytes_every_time(tmp_path):
    for name in ("a.svg", "b.svg"):
        plots.save(plots.pareto(LINES), tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert b"<dc:date>" not in (tmp_path / "a.svg").read_bytes()
    with pytest.raises(CompressError, match="cannot be drawn"):
        plots.save(plots.pareto(LINES), tmp_path / "a.unknown")


def shades(figure):
    return [round(float(share), 3) for share in re.findall(r"opacity: ([\d.]+)", plots.svg(figure, "shades"))]


def test_a_heat_map_shades_from_least_to_most_and_leaves_holes():
    matrix = Matrix(["a", "b"], ["0", "1"], [[1, 10], [None, 100]])
    assert shades(plots.heat_map(matrix, log=True)) == [0.06, 0.49, 0.92]  # column by column
    assert texts(plots.svg(plots.heat_map(matrix), "map"))[1] == ["a, 0: 1", "a, 1: 10", "b, 1: 100"]
    assert shades(plots.heat_map(Matrix(["a"], ["0", "1"], [[75, 100]]), limits=(0, 100))) == [0.705, 0.92]
    columns = Matrix(["a", "b"], ["x", "y"], [[1.0, 700.0], [2.0, 600.0]])
    assert shades(plots.heat_map(columns, by_column=True)) == [0.06, 0.92, 0.92, 0.06]
    assert shades(plots.heat_map(columns, by_column=True, reverse=True)) == [0.92, 0.06, 0.06, 0.92]


def test_figures_leave_narrow_cells_and_stay_for_pointing():
    wide = Matrix(["a"], [str(block) for block in range(40)], [[float(block) for block in range(40)]])
    written, titles = texts(plots.svg(plots.heat_map(wide), "wide"))
    assert len(titles) == 40
    assert "39" not in written


def test_bars_are_as_long_as_their_medians():
    figure = plots.bars([("dense", 100, 90, 110), ("4", 220, 200, 220)], "{:g}".format, base=100)
    assert [bar.get_width() for bar in figure.axes[0].patches] == [100, 220]
    assert {"dense", "4", "100", "220"} <= set(texts(plots.svg(figure, "speed"))[0])


def test_names_of_modules_become_kinds_and_blocks():
    names = {"model.layers.0.mlp.up": 1.0, "model.layers.10.mlp.up": 2.0, "model.layers.10.attn.q": 3.0, "lm_head": 4.0}
    matrix = tables.by_block(names, "{:g}".format)
    assert (matrix.rows, matrix.columns) == (["mlp.up", "attn.q"], ["0", "10"])
    assert matrix.table().rows == [["mlp.up", "1", "2"], ["attn.q", "–", "3"]]
