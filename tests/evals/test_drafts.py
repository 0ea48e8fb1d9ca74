"""Drafts are measured beside plain decoding and prompt look-up; nothing here asserts how fast anything is."""

import pytest

import compress
from compress.errors import CompressError
from compress.evals import drafts, tables


@pytest.fixture
def model(compressed):
    return compress.load(compressed)


def test_every_draft_beside_none_and_look_up(model, compressed, text_file, monkeypatch):
    monkeypatch.setattr(drafts, "_PROMPT", 8)
    found = drafts.draft_speed(model, drafts.beginnings(str(compressed), str(text_file), 2), [3, 4], tokens=6)
    assert list(found) == ["plain", "prompt look-up", "3", "4"]
    assert all(figures["same_text"] for figures in found.values())
    assert found["plain"]["versus_plain"]["median"] == 1
    for bits in ("3", "4"):
        figures = found[bits]
        assert 0 <= figures["accepted"] <= 1
        assert figures["break_even"] == figures["cost"] + figures["check"]
    table = tables.draft_speed(found)
    assert [row[0] for row in table.rows] == ["plain", "prompt look-up", "3 bits", "4 bits"]


def test_a_text_too_short_to_continue(compressed, tmp_path):
    (tmp_path / "short.txt").write_text("the quick brown")
    with pytest.raises(CompressError, match="no document of 48 tokens"):
        drafts.beginnings(str(compressed), str(tmp_path / "short.txt"), 2)
