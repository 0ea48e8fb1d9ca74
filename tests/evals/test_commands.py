"""eval, bench, report and compare through the command line."""

import json
import shutil
import sys

import pytest

from compress import cli
from compress.evals import bench as bench_module


@pytest.fixture
def command(monkeypatch, capsys):
    """Run a command in this process: (exit code, standard output, standard error)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["compress", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def checkpoint(compressed, tmp_path):
    return shutil.copytree(compressed, tmp_path / "model")


@pytest.fixture
def held_out(tmp_path):
    path = tmp_path / "held_out.txt"
    path.write_text("the fox sleeps and the lazy dog jumps over the quick brown fox. " * 5)
    return path


@pytest.mark.parametrize("verb", ["eval", "bench", "report", "compare"])
def test_every_verb_has_help(command, verb):
    code, text, _ = command(verb, "--help")
    assert code == 0
    assert f"compress {verb}" in text


def test_text_tasks_and_more_in_one_call(command, checkpoint, held_out, task_folder, tmp_path):
    pytest.importorskip("lm_eval")
    code, text, error = command(
        "eval", checkpoint, "--text", held_out, "--tasks", "animals", "--include", task_folder, "--bits", "3,4", "--dense",
        "--agreement", "--robustness", "--json", tmp_path / "all.json", "--table", tmp_path / "t.csv", "--output", tmp_path / "lm",
    )  # fmt: skip
    assert (code, error) == (0, "")
    assert "acc_norm" in text
    result = json.loads((tmp_path / "all.json").read_text())
    assert set(result["bits"]) == set(result["tasks"]) == set(result["agreement"]) == {"3", "4", "dense"}
    assert result["tasks"]["3"]["animals"].keys() >= {"acc", "acc_norm", "ece"}
    assert sorted(path.name for path in (tmp_path / "lm").iterdir()) == [
        "results_3bit.json", "results_4bit.json", "results_dense.json",
    ]  # fmt: skip
    kept = (checkpoint / "report" / "results.jsonl").read_text()
    assert command("eval", checkpoint, "--text", held_out, "--bits", "3")[0] == 0
    assert (checkpoint / "report" / "results.jsonl").read_text() == kept


def test_results_can_be_kept_elsewhere(command, checkpoint, held_out, tmp_path):
    assert command("eval", checkpoint, "--text", held_out, "--bits", "3", "--results", tmp_path / "r.jsonl")[0] == 0
    assert not (checkpoint / "report").exists()
    assert len((tmp_path / "r.jsonl").read_text().splitlines()) == 1


def test_bench_report_and_compare(command, checkpoint, compressed, held_out, tmp_path, monkeypatch):
    def loads(places, *_):
        return {name: {"load_seconds": [0.5], "resident_bytes": [1e6]} for name in places}

    monkeypatch.setattr(bench_module, "_fresh_loads", loads)
    code, text, _ = command(
        "bench", checkpoint, "--bits", "3", "--prompt-tokens", "8", "--tokens", "2", "--rounds", "2"
    )
    assert code == 0
    assert "dense" in text
    code, text, error = command(
        "report", checkpoint, "--text", held_out, "--no-bench", "--sample", "the dog", "--bits", "3,6"
    )
    assert (code, error) == (0, "")
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "{model}"], "give --text FILE, --tasks NAMES, or both"),
        (["eval", "{model}", "--tasks", "x", "--agreement"], "give --text FILE too"),
        (["eval", "{model}", "--text", "builtin", "--prompt"], "holds no soft prompt"),
        (["eval", "{model}", "--text", "builtin", "--prompt", "--agreement"], "measured without a soft prompt"),
        (["eval", "{model}", "--text", "builtin", "--protocol", "2049"], "Did you mean '2048'?"),
        (["eval", "{model}", "--text", "builtin", "--protocol", "2048"], "the context holds 64; give --length"),
        (["eval", "{dense}", "--text", "builtin", "--dense"], "give --reference"),
        (["bench", "{model}", "--bits", "9", "--prompt-tokens", "8"], "width 9 is not available"),
        (["bench", "{model}", "--prompt-tokens", "99"], "the context holds 64; lower --prompt-tokens"),
        (["bench", "{model}", "--dtype", "int8"], "give float32, bfloat16 or float16"),
        (["bench", "nowhere"], "not a model folder or hub id"),
        (["report", "{dense}"], "has no compression.json"),
        (["compare", "{model}"], "give two checkpoints or more"),
        (["compare", "{model}", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_end_in_one_clear_line(command, compressed, tiny_llama, arguments, message):
    code, _, text = command(*(argument.format(model=compressed, dense=tiny_llama) for argument in arguments))
    assert code == 1
    assert message in text
    assert text.startswith("error: ")
    assert "unexpected" not in text
    assert text.count("\n") == 1
