"""llama.cpp's own benchmark beside ours; a stand-in for it says what it was asked for."""

import json
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from compress.errors import CompressError
from compress.evals import speed, tables
from compress.evals.llama_cpp import LlamaCpp
from compress.evals.speed import _weights

_TOOL = """#!{python}
import json, sys, time
given = dict(zip(sys.argv[2::2], sys.argv[3::2]))  # --no-warmup comes first
prompt, tokens, behind = (int(given[name]) for name in ("-p", "-n", "-d"))
open({log!r}, "a").write(json.dumps(given) + "\\n")
while time.process_time() < 0.1 + 0.003 * (prompt + behind) + 0.01 * tokens:
    pass
weights = int(open(given["-m"]).read())
print(json.dumps([{{"model_n_params": weights, "avg_ns": 1e6 * (prompt + 2 * tokens)}}]))
"""


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """Put a stand-in for llama-bench on PATH; return the file that it logs its options to."""
    log = tmp_path / "log"
    script = tmp_path / "bin" / "llama-bench"
    script.parent.mkdir()
    script.write_text(_TOOL.format(python=sys.executable, log=str(log)))
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(script.parent))
    return log


@pytest.fixture
def gguf(tmp_path, tiny_llama):
    """Write what the stand-in takes for a file of the tiny Llama: its number of weights."""
    file = tmp_path / "tiny-Q4_0.gguf"
    file.write_text(str(_weights(str(tiny_llama))))
    return file


def test_weights_that_are_tied_are_counted_once(make_model):
    folder = make_model("llama", tie_word_embeddings=True)
    assert _weights(str(folder)) == AutoModelForCausalLM.from_pretrained(folder).num_parameters()


def asked(log):
    return [json.loads(line) for line in log.read_text().splitlines()]


def test_processor_time_on_one_thread_is_a_difference_of_runs(tool, gguf):
    peer = LlamaCpp(gguf, threads=1)
    first, decode = peer.times(20, 6)
    assert first > 0 and decode > 0
    assert [(one["-p"], one["-n"], one["-d"]) for one in asked(tool)] == [
        ("0", "1", "0"),
        ("0", "1", "20"),
        ("0", "7", "20"),
    ]
    assert all(one["-t"] == "1" and one["-ngl"] == "0" for one in asked(tool))


def test_on_more_threads_the_tool_has_the_clock(tool, gguf):
    assert LlamaCpp(gguf, threads=2).times(20, 6) == (20e-3, 2e-3)
    assert [(one["-p"], one["-n"], one["-d"]) for one in asked(tool)] == [("20", "0", "0"), ("0", "6", "20")]


@pytest.mark.slow
def test_bench_takes_it_into_its_turns(command, compressed, tool, gguf, tmp_path, monkeypatch):
    monkeypatch.setattr(
        speed,
        "_fresh_loads",
        lambda places, *_: {one: {"load_seconds": [1.0], "resident_bytes": [1e6]} for one in places},
    )
    target, sizes = tmp_path / "found.json", ("--prompt-tokens", "9", "--tokens", "3", "--rounds", "2", "--bits", "3")
    threads = torch.get_num_threads()
    code, _, error = command("bench", compressed, "--gguf", gguf, *sizes, "--threads", "1", "--json", target)
    torch.set_num_threads(threads)
    assert code == 0, error
    found = json.loads(target.read_text())
    assert list(found["widths"]) == ["dense", "3"]
    ((name, figures),) = found["llama_cpp"].items()
    assert name == "llama.cpp tiny-Q4_0"
    assert figures["disk_bytes"] == gguf.stat().st_size
    assert figures["decode_versus_dense"].keys() == {"median", "low", "high"}
    assert len(asked(tool)) == 1 + 3 * 3  # once to see what the file is, then a round more than is counted
    assert tables.speed(found).rows[-1][0] == "llama.cpp tiny-Q4_0"


def test_what_cannot_be_compared_is_refused_before_any_work(command, compressed, tool, gguf, tmp_path, monkeypatch):
    other = tmp_path / "other.gguf"
    other.write_text("1000000")
    assert "other.gguf: has 1,000,000 weights, the model" in command("bench", compressed, "--gguf", other)[2]
    assert "there is no such file" in command("bench", compressed, "--gguf", tmp_path / "none.gguf")[2]
    other.write_text("no number")
    assert "llama-bench failed on" in command("bench", compressed, "--gguf", other)[2]
    same = tmp_path / "folder" / gguf.name
    same.parent.mkdir()
    same.write_text(gguf.read_text())
    assert "two files have the same name" in command("bench", compressed, "--gguf", gguf, "--gguf", same)[2]
    monkeypatch.setenv("PATH", "")
    with pytest.raises(CompressError, match=r"llama-bench of llama\.cpp is not on PATH"):
        LlamaCpp(gguf, 1)
