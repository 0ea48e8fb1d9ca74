"""Several checkpoints in one table and one plot, on text that all were measured on."""

import shutil

import pytest

import compress
from compress.errors import CompressError
from compress.evals.compare import compare
from compress.evals.evaluate import Protocol
from compress.evals.page import html
from compress.evals.store import results_of
from compress.evals.suite import Suite, evaluate_all

TEXT = "the fox sleeps and the lazy dog jumps over the quick brown fox. " * 5


@pytest.fixture(scope="module")
def two(compressed, tiny_llama, tmp_path_factory):
    place = tmp_path_factory.mktemp("compare")
    text = place / "held_out.txt"
    text.write_text(TEXT)
    first = shutil.copytree(compressed, place / "nested")
    second = compress.run({"model": str(tiny_llama), "passes": [{"kind": "rtn", "bits": 3}]}, place / "rounded")
    return first, second, str(text)


def test_nothing_in_common_is_said(two):
    first, second, _ = two
    with pytest.raises(CompressError, match="not measured on the same text in the same way; give --text"):
        compare([first, second])
    with pytest.raises(CompressError, match="the same folder is there twice"):
        compare([first, first])


def test_the_table_says_which_are_best_at_their_size(two):
    first, second, text = two
    found = compare([first, second], text)
    assert found.dense is None  # no dense model was asked for
    assert list(found.rivals) == ["nested", "rounded"]
    table = found.table()
    assert sorted((row[0], row[1]) for row in table.rows) == [*(("nested", w) for w in "3456"), ("rounded", "3")]
    losses = {(row[0], row[1]): float(row[3]) for row in table.rows}
    best = {(row[0], row[1]): row[-1] for row in table.rows}
    assert losses["nested", "3"] < losses["rounded", "3"]
    assert best["nested", "3"] == "yes"
    assert "<title>rounded, 3 bits: " in html(found.page())
    assert compare([first, second]) == found  # what was measured is there the next time


def test_protocols_are_not_mixed(two):
    first, second, text = two
    compare([first, second], text, Protocol(length=32))
    lengths = {row["settings"]["protocol"]["length"] for row in results_of(first).rows("text")}
    assert lengths == {32, 64}
    again = compare([first, second], text, Protocol(length=32))
    assert again.text["settings"]["protocol"]["length"] == 32


@pytest.mark.slow
def test_checkpoints_of_different_models_are_compared_by_bits_per_byte(two, make_model, tmp_path):
    """One model's loss above its own dense one says nothing about another's."""
    first, _, text = two
    other = compress.run({"model": str(make_model("opt")), "passes": [{"kind": "rtn", "bits": 4}]}, tmp_path / "opt")
    for folder in (first, other):
        evaluate_all(str(folder), Suite(text, dense=True))
    found = compare([first, other], text)
    assert found.dense is None
    lines, name = found.lines()
    assert name == "bits per byte"
    assert lines[1].points[0].y == found.rivals["opt"][0][2]["bits_per_byte"]
