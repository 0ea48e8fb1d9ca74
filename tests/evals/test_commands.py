"""eval, bench, report and compare through the command line."""

import json
import re
import shutil
from dataclasses import fields

import pytest
from typer.main import get_command

from compress.cli import app
from compress.cli.common import TextOptions
from compress.evals import speed


def complaints(error):
    """Lines of standard error that do not say how far the work is."""
    return [line for line in error.splitlines() if not re.fullmatch(r".* \(\d+ of \d+(, about .* left)?\)", line)]


@pytest.fixture
def checkpoint(compressed, tmp_path):
    return shutil.copytree(compressed, tmp_path / "model")


@pytest.fixture
def held_out(tmp_path):
    path = tmp_path / "held_out.txt"
    path.write_text("the fox sleeps and the lazy dog jumps over the quick brown fox. " * 5)
    return path


def test_commands_that_measure_text_agree_on_how_it_is_cut():
    """The options that TextOptions has a field for are those of all three, and become a protocol."""
    names = {field.name for field in fields(TextOptions)}
    for command in ("eval", "report", "compare"):
        assert names <= {parameter.name for parameter in get_command(app).commands[command].params}
    cut = TextOptions(preset="llm-pruner", limit=3).protocol()
    assert (cut.length, cut.limit, cut.disjoint) == (128, 3, True)


@pytest.mark.slow
def test_text_tasks_and_more_in_one_call(command, checkpoint, held_out, task_folder, tmp_path):
    pytest.importorskip("lm_eval")
    code, text, error = command(
        "eval",
        checkpoint,
        "--text",
        held_out,
        "--tasks",
        "animals",
        "--include",
        task_folder,
        "--bits",
        "3,4",
        "--dense",
        "--agreement",
        "--robustness",
        "--json",
        tmp_path / "all.json",
        "--table",
        tmp_path / "t.csv",
        "--output",
        tmp_path / "lm",
    )
    assert (code, complaints(error)) == (0, [])
    assert "acc_norm" in text
    result = json.loads((tmp_path / "all.json").read_text())
    assert set(result["bits"]) == set(result["tasks"]) == set(result["agreement"]) == {"3", "4", "dense"}
    assert result["tasks"]["3"]["animals"].keys() >= {"acc", "acc_norm", "ece"}
    assert sorted(path.name for path in (tmp_path / "lm").iterdir()) == [
        "results_3bit.json",
        "results_4bit.json",
        "results_dense.json",
    ]
    kept = (checkpoint / "report" / "results.jsonl").read_text()
    assert command("eval", checkpoint, "--text", held_out, "--bits", "3")[0] == 0
    assert (checkpoint / "report" / "results.jsonl").read_text() == kept


def test_results_can_be_kept_elsewhere(command, checkpoint, held_out, tmp_path):
    assert command("eval", checkpoint, "--text", held_out, "--bits", "3", "--results", tmp_path / "r.jsonl")[0] == 0
    assert not (checkpoint / "report").exists()
    assert len((tmp_path / "r.jsonl").read_text().splitlines()) == 1


@pytest.mark.slow
def test_bench_report_and_compare(command, checkpoint, compressed, held_out, tmp_path, monkeypatch):
    def loads(places, *_):
        return {name: {"load_seconds": [0.5], "resident_bytes": [1e6]} for name in places}

    monkeypatch.setattr(speed, "_fresh_loads", loads)
    code, text, _ = command(
        "bench", checkpoint, "--bits", "3", "--prompt-tokens", "8", "--tokens", "2", "--rounds", "2"
    )
    assert code == 0
    assert "dense" in text
    code, text, error = command(
        "report", checkpoint, "--text", held_out, "--no-bench", "--sample", "the dog", "--bits", "3,6"
    )
    assert (code, complaints(error)) == (0, [])
    assert [line.rpartition("/")[2] for line in text.splitlines()] == ["index.html", "report.md", "pareto.png"]
    other = shutil.copytree(compressed, tmp_path / "other")
    arguments = ("compare", checkpoint, other, "--text", held_out)
    code, text, _ = command(*arguments, "-o", tmp_path / "two.html")
    assert code == 0
    assert "other" in text
    assert "<svg" in (tmp_path / "two.html").read_text()
    assert command(*arguments, "-o", tmp_path / "two.png")[0] == 0
    assert (tmp_path / "two.png").read_bytes().startswith(b"\x89PNG")
    assert "ends in .html, .png, .svg or .pdf" in command(*arguments, "-o", tmp_path / "two.txt")[2]
