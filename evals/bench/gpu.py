"""The first minutes on a GPU: prove, measure and tune, the most valuable first, and stop in time.

Every step is a process of its own, so that a kernel that reads what is not its own, or never ends, takes nothing else with it. Figures are on the
disk as soon as they are known; ``gpu.json`` and ``gpu.md`` are written again after every step.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

RECORDS, LOG, FIGURES, PAGE = "gpu-records.jsonl", "gpu.log", "gpu.json", "gpu.md"
LEAST = 15  # seconds that a step must have to be begun


@dataclass(frozen=True)
class Step:
    """Name a step of :mod:`compress.evals.bench.gpu_steps`, what it may take, and what it is for."""

    name: str
    seconds: int
    title: str


STEPS = (
    Step("correct", 60, "Every kernel against float64, float16 activations"),
    Step("tokens", 40, "Tokens of a packed checkpoint against the CPU's"),
    Step("gemv", 90, "One row against cuBLAS"),
    Step("decode", 110, "Decode step of Llama-3.1-8B's shapes, batch 1"),
    Step("quantiser", 70, "Search for nested codes"),
    Step("prefill", 60, "Many rows against cuBLAS in bfloat16"),
    Step("tuning", 120, "Tuning"),
    Step("others", 300, "Every kernel against float64, others and every configuration"),
)


@dataclass(frozen=True)
class Target:
    """Say what a figure of some records of a step should be at least, or at most."""

    what: str
    step: str
    of: dict[str, Any]
    figure: str
    least: float = 0.0
    most: float = float("inf")


_RULE = {"kind": "fp16", "way": "rule"}
TARGETS = (
    Target("one row, 3 bits, × cuBLAS bfloat16", "gemv", _RULE | {"bits": 3}, "speedup", 3.5),
    Target("one row, 4 bits, × cuBLAS bfloat16", "gemv", _RULE | {"bits": 4}, "speedup", 2.5),
    Target("one row, 8 bits, × cuBLAS bfloat16", "gemv", _RULE | {"bits": 8}, "speedup", 1.5),
    Target("one row, 4 bits, share of the bandwidth", "gemv", _RULE | {"bits": 4}, "of_bandwidth", 0.55),
    Target("decode step, 4 bits, × bfloat16", "decode", {"bits": 4}, "speedup", 2.2),
    Target("512 rows, × cuBLAS bfloat16", "prefill", {"count": 512}, "speedup", 0.9),
    Target("quantiser, seconds for 7B", "quantiser", {}, "seconds_for_7b", most=900),
)
"""For an H100 or H200."""

NOT_DRY = (
    "the assembly of kernels/ptx.py (tests/kernels/emulator.py runs it instead)",
    "CUDA graphs, streams, a second GPU and what is allocated: the tests marked on_gpu in tests/kernels/test_cuda.py",
    "the clock of kernels/timing.py and the size of the cache, by which weights are kept out of it",
    "bfloat16 activations, which Triton's interpreter computes wrongly, and inductor",
    "several processes that compile side by side",
)
"""What a dry run leaves out, as only a GPU has it."""
_NOTE = [
    "**A dry run: all times are made up.** Not run, as only a GPU has it:",
    "",
    *(f"* {what}" for what in NOT_DRY),
    "",
]


def main(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the figures.")] = Path("runs/gpu"),
    model: Annotated[Optional[str], typer.Option(help="Packed checkpoint of 3 bits and more, for 'tokens'.")] = None,
    only: Annotated[str, typer.Option(help="Steps, comma-separated; all if absent.")] = "",
    seconds: Annotated[int, typer.Option(help="Stop after so many.")] = 540,
    dry_run: Annotated[bool, typer.Option(help="On a CPU, tiny, in Triton's interpreter; times are made up.")] = False,
) -> None:
    """Prove the GPU kernels, measure them, the quantiser and a decode step, and tune for this GPU, within nine minutes."""
    wanted = [step for step in STEPS if not only or step.name in only.split(",")]
    if len(wanted) < len(set(filter(None, only.split(",")))):
        raise typer.BadParameter(f"--only {only!r}: the steps are {', '.join(step.name for step in STEPS)}.")
    output.mkdir(parents=True, exist_ok=True)
    for name in (RECORDS, LOG, FIGURES, PAGE):
        (output / name).unlink(missing_ok=True)
    end, ended = time.monotonic() + seconds, dict[str, str]()
    for step in wanted:
        left = end - time.monotonic()
        allowed = float("inf") if dry_run else min(step.seconds, left)
        if allowed < LEAST:
            ended[step.name] = "not begun: no time left"
        else:
            print(f"{step.name}, {step.title}", flush=True)
            ended[step.name] = _run(step.name, allowed, output, model, dry_run)
        _write(output, wanted, ended, dry_run)
        print(f"  {ended[step.name]}", flush=True)
    print((output / PAGE).read_text(encoding="utf-8"))
    failed = any(record.get("outcome") == "failed" or "failed" in record for record in records(output))
    raise typer.Exit(int(failed or not all(how.startswith("done") for how in ended.values())))


def _run(name: str, allowed: float, output: Path, model: str | None, dry_run: bool) -> str:
    """Run one step in a process of its own; say how it ended."""
    # Only one step needs transformers, which takes seconds to import: see compress/__init__.py
    script = "import sys, compress_command; from compress.evals.bench.gpu_steps import main; main(*sys.argv[1:])"
    scale = "dry" if dry_run else "real"
    command = [sys.executable, "-c", script, name, str(output), model or "-", scale]
    environment = os.environ | ({"TRITON_INTERPRET": "1"} if dry_run else {})
    begun = time.monotonic()
    with (output / LOG).open("a", encoding="utf-8") as log:
        log.write(f"== {name}\n")
        log.flush()
        child = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        try:
            code = child.wait(None if allowed == float("inf") else allowed)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)  # its workers too
            child.wait()
            return f"stopped after {allowed:.0f} s"
    taken = f"{time.monotonic() - begun:.0f} s"
    if code:
        last = (output / LOG).read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1]
        return f"failed after {taken}: {last}"
    return f"done in {taken}"


def records(output: Path) -> list[dict[str, Any]]:
    """Read what the steps have recorded so far; a line that was cut off is left out."""
    found, path = [], output / RECORDS
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def _write(output: Path, steps: Iterable[Step], ended: dict[str, str], dry_run: bool) -> None:
    """Write all figures as JSON, and as tables."""
    found = records(output)
    figures = {"dry_run": dry_run, "ended": ended, "records": found}
    (output / FIGURES).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    machine = next((f"{r['gpu']}, torch {r['torch']}, triton {r['triton']}" for r in found if "gpu" in r), "?")
    lines = [f"# {machine}", "", *(_NOTE if dry_run else [])]
    lines += _table(("target", "wanted", "found", "met"), _targets([] if dry_run else found))
    for step in steps:
        own = [r for r in found if r["step"] == step.name and not r.keys() & {"gpu", "done"}]
        lines += [f"## {step.title}", "", f"{step.name}: {ended.get(step.name, 'not yet')}", ""]
        if any("outcome" in record for record in own):
            lines += _outcomes(own)
        else:
            for keys, group in groupby(own, lambda record: [key for key in record if key not in ("step", "at")]):
                lines += _table(keys, ([record[key] for key in keys] for record in group))
    (output / PAGE).write_text("\n".join(lines), encoding="utf-8")


def _targets(found: list[dict[str, Any]]) -> Iterator[list[object]]:
    """Give a row for every target: what is wanted, the range of what was found, and how often it is met."""
    for target in TARGETS:
        own = [r for r in found if r["step"] == target.step and target.of.items() <= r.items()]
        values = [r[target.figure] for r in own if target.figure in r]
        wanted = f"≥ {target.least:g}" if target.least else f"≤ {target.most:g}"
        met = sum(target.least <= value <= target.most for value in values)
        span = f"{min(values):.3g} to {max(values):.3g}" if values else "not measured"
        yield [target.what, wanted, span, f"{met} of {len(values)}"]


def _outcomes(tests: list[dict[str, Any]]) -> list[str]:
    """Count tests by their outcome, and list those that failed."""
    counts = Counter(record["outcome"] for record in tests)
    lines = [", ".join(f"{number} {outcome}" for outcome, number in counts.items()) or "none has run", ""]
    for record in tests:
        if record["outcome"] == "failed":
            lines += [f"* `{record['test']}`", "", *(f"      {line}" for line in record["why"].splitlines()[-8:]), ""]
    return lines


def _table(heads: Sequence[str], rows: Iterable[Iterable[object]]) -> list[str]:
    """Write a table in Markdown."""
    body = [[f"{value:.4g}" if isinstance(value, float) else str(value) for value in row] for row in rows]
    return [*("| " + " | ".join(line) + " |" for line in (list(heads), ["---"] * len(heads), *body)), ""]


if __name__ == "__main__":
    typer.run(main)
