"""The script for the first minutes on a GPU, where there is none; nothing here says how fast anything is."""

import json
import subprocess
import sys
from importlib.metadata import version

import pytest
import typer

from compress.evals.bench import gpu, gpu_steps
from compress.kernels import gpu as kernels


def test_every_step_has_its_function_and_fits_the_time():
    assert [step.name for step in gpu.STEPS] == list(gpu_steps.STEPS)
    assert sum(step.seconds for step in gpu.STEPS[:5]) < 540  # the rest takes what they leave


@pytest.mark.slow
def test_it_needs_nothing_that_a_machine_with_a_gpu_may_lack():
    code = (
        "import sys\n"
        "for name in ('pydantic', 'datasets', 'lm_eval', 'peft'): sys.modules[name] = None\n"
        "import compress.evals.bench.gpu_steps, compress.quant.nested, compress.quant.errors, compress.quant.kmeans\n"
        "import compress.loading, compress.quant.format"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


@pytest.mark.slow
def test_a_step_that_takes_too_long_is_stopped_and_one_that_fails_says_why(tmp_path):
    assert gpu._run("correct", 0.1, tmp_path, None, True) == "stopped after 0 s"
    ended = gpu._run("no such step", 300, tmp_path, None, True)
    assert ended.startswith("failed after ")
    assert ended.endswith("KeyError: 'no such step'")


def test_figures_of_a_run_that_was_cut_are_in_the_tables(tmp_path):
    measured = {"step": "gemv", "kind": "fp16", "way": "rule", "of_bandwidth": 0.6}
    lines = [
        {"step": "correct", "gpu": "A GPU", "torch": "2", "triton": "3"},
        {"step": "correct", "test": "a", "outcome": "passed", "why": ""},
        {"step": "correct", "test": "b[3]", "outcome": "failed", "why": "first\n{(1, True): 0.5}"},
        measured | {"bits": 4, "speedup": 2.0},
        measured | {"bits": 4, "speedup": 3.0},
        measured | {"bits": 3, "speedup": 3.0},
    ]
    (tmp_path / gpu.RECORDS).write_text("\n".join(map(json.dumps, lines)) + '\n{"step": "ge')
    gpu._write(tmp_path, gpu.STEPS, {"correct": "done in 9 s", "gemv": "stopped after 9 s"}, False)
    page = (tmp_path / gpu.PAGE).read_text()
    assert page.startswith("# A GPU, torch 2, triton 3\n")
    assert "1 passed, 1 failed\n\n* `b[3]`\n\n      first\n      {(1, True): 0.5}\n" in page
    assert "| one row, 4 bits, × cuBLAS bfloat16 | ≥ 2.5 | 2 to 3 | 1 of 2 |" in page
    assert "| decode step, 4 bits, × bfloat16 | ≥ 2.2 | not measured | 0 of 0 |" in page
    assert "| fp16 | rule | 0.6 | 3 | 3 |" in page
    assert "decode: not yet" in page
    figures = json.loads((tmp_path / gpu.FIGURES).read_text())
    assert figures["records"] == lines
    assert not figures["dry_run"]


@pytest.fixture
def start(monkeypatch, capsys):
    """Run the script in this process, its steps in theirs: (exit code, what it printed)."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")

    def run(**options):
        with pytest.raises(typer.Exit) as ended:
            gpu.main(**options)
        return ended.value.exit_code, capsys.readouterr().out

    return run


def test_without_time_nothing_is_begun_and_all_is_said(start, tmp_path):
    code, said = start(seconds=0, only="gemv,tuning", output=tmp_path)
    assert code == 1
    assert said.count("not begun: no time left") == 4  # as it goes, and in the tables
    with pytest.raises(typer.BadParameter, match="the steps are correct, tokens, gemv,"):
        start(only="gemm", output=tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(
    kernels.missing() is not None or version("triton").startswith("3.6"),
    reason=kernels.missing() or "the interpreter of Triton 3.6 does not work with NumPy 2.4",
)
def test_a_dry_run_goes_through_every_step(start, compressed, tmp_path, interpret, monkeypatch):
    """One in a process that begins with nothing, as on a GPU; the others need not import everything again."""
    from_nothing = gpu._run

    def run(name, allowed, output, model, dry_run):
        if name == "tuning":
            return from_nothing(name, allowed, output, model, dry_run)
        interpret("gpu_step.py", name, output, model, "dry")
        return "done"

    monkeypatch.setattr(gpu, "_run", run)
    code, said = start(dry_run=True, model=str(compressed), output=tmp_path)
    assert code == 0, said + (tmp_path / gpu.LOG).read_text()
    figures = json.loads((tmp_path / gpu.FIGURES).read_text())
    assert figures["dry_run"]
    assert set(figures["ended"]) == set(gpu_steps.STEPS)
    by_step = {name: [r for r in figures["records"] if r["step"] == name] for name in gpu_steps.STEPS}
    assert all(found[-1].get("done") for found in by_step.values())
    for name, least in (("correct", 10), ("others", 5)):
        outcomes = [record["outcome"] for record in by_step[name] if "outcome" in record]
        assert outcomes.count("passed") >= least
        assert "failed" not in outcomes
    assert all(record["equal"] for record in by_step["tokens"] if "equal" in record)
    errors = [record["error"] for name in ("gemv", "prefill") for record in by_step[name] if "error" in record]
    assert len(errors) >= 20
    assert max(errors) < 0.01
    assert {record["bits"] for record in by_step["decode"] if "bits" in record} == {2, 3, 4, 8, 16}
    assert json.loads((tmp_path / "interpreter.json").read_text())["configs"]
    assert "times are made up" in said
    assert all(what in said for what in gpu.NOT_DRY)
