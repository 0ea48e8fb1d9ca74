"""The benchmarks' command line, and what they measure by; nothing here asserts how fast anything is."""

import json
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from compress.evals.bench import common, memory
from compress.evals.bench import run as whole_run
from compress.evals.bench.__main__ import app
from compress.evals.fresh import in_fresh_process
from compress.evals.random_llama import llama, write_llama

linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of a process")


def run(*arguments):
    """Run one benchmark; returns what it printed."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_help_lists_every_benchmark_by_its_name():
    files = {path.stem for path in Path(common.__file__).parent.glob("*.py")}
    names = files - {"__init__", "__main__", "common", "gpu_steps"}
    assert {command.name for command in app.registered_commands} == names
    assert all(name in run("--help") for name in names)


def test_no_benchmark_needs_the_command_line_of_the_library():
    assert not any("compress.cli" in path.read_text() for path in Path(common.__file__).parent.glob("*.py"))


def test_candidates_take_turns_and_the_first_round_is_not_counted():
    calls = []
    candidates = {name: lambda name=name: calls.append(name) for name in "ab"}
    assert {name: len(times) for name, times in common.take_turns(candidates, 2).items()} == {"a": 2, "b": 2}
    assert calls == ["a", "b"] * 3


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(("sparse", "--rows", 16), id="sparse"),
        pytest.param(("matrix", "--size", 64), id="matrix"),
        pytest.param(("quantiser", "--rows", 1, "--rounds", 2), id="quantiser", marks=pytest.mark.slow),
    ],
)
def test_a_small_run_prints_a_table_and_writes_its_figures(arguments, tmp_path):
    assert "┃" in run(*arguments, "--json", tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    rows = list(found["seconds"].values()) if "seconds" in found else found
    assert len(rows) >= 5


def test_a_stopwatch_divides_the_time_among_stages(monkeypatch):
    monkeypatch.setattr(
        whole_run, "STAGES", {"evals/test_bench.py:outer": "outer", "evals/test_bench.py:inner": "inner"}
    )

    def spin(seconds):
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass

    def inner():
        spin(0.04)

    def outer():
        spin(0.02)
        inner()

    watch = whole_run.Stopwatch()
    watch.run(lambda: (outer(), spin(0.01)))
    assert watch.seconds.keys() == {"outer", "inner", "everything else"}
    assert watch.seconds["inner"] > watch.seconds["outer"] > 0


@linux
@pytest.mark.slow
def test_stages_of_a_whole_run_add_up_to_its_time(tmp_path):
    settings = ("--set", "calibration.samples=2", "--set", "calibration.length=32", "--set", "passes.0.parent_bits=3")
    printed = run("run", "--blocks", 1, "--foresee", *settings, "--json", tmp_path / "found.json")
    (found,) = json.loads((tmp_path / "found.json").read_text()).values()
    assert sum(found["stages"].values()) == pytest.approx(found["processor_seconds"], rel=0.02)
    assert "by 1 of 1 passes" in " ".join(printed.split())
    assert all(stage in printed for stage in ("gradients", "codebook search", "moments", "inputs of linears"))


@linux
@pytest.mark.slow
def test_peaks_of_a_kind_of_pass_stand_beside_the_plan(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "PASSES", {"mini_llm": {"magnitude (L2)": {"score": "magnitude"}}})
    run("memory", "mini_llm", "--hidden", 256, "--blocks", 2, "--json", tmp_path / "found.json")
    pruned, forward = json.loads((tmp_path / "found.json").read_text())
    assert pruned["what"] == "magnitude (L2)"
    assert min(pruned["peak"], pruned["planned"], forward["peak"]) > pruned["float32"]


@linux
@pytest.mark.slow
def test_training_a_prompt_is_measured_in_a_fresh_process(tmp_path):
    dense = write_llama(tmp_path / "dense", llama(128, 1))
    found = in_fresh_process(memory.PROMPT, [str(dense), None])
    assert found["peak"] > found["loaded"] > found["imports"]
