"""Kill a run at random moments and compare the bytes."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from compress.evals.bench.common import JsonOption, write
from compress.weights import sha256_of

_RECIPE = {
    "model": "builtin",
    "calibration": {"builtin": "stdlib", "samples": 8, "length": 256},
    "passes": [{"kind": "any_precision"}],
}
_RUN = "import compress, sys; compress.run(sys.argv[1], sys.argv[2])"


def start(recipe: Path, output: Path) -> subprocess.Popen[bytes]:
    """Start a run in a process of its own, and return once its workspace exists."""
    process = subprocess.Popen([sys.executable, "-c", _RUN, str(recipe), str(output)])
    work = output.with_name(output.name + ".work")
    while process.poll() is None and not work.exists():
        time.sleep(0.005)
    return process


def kill_once(process: subprocess.Popen[bytes], after: float) -> bool:
    """Kill a process after so many seconds; return False if it has ended by itself."""
    try:
        process.wait(after)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return True
    return False


def digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file in a checkpoint."""
    return {path.name: sha256_of(path) for path in sorted(folder.iterdir())}


def main(
    least: Annotated[int, typer.Option("--kills", help="How many, at least.")] = 20,
    seed: int = 0,
    json_file: JsonOption = None,
) -> None:
    """Kill runs at random moments, some several times, continue them, and compare every file with an undisturbed run's."""
    draw = random.Random(seed)
    kills = 0
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = folder / "recipe.yaml"
        recipe.write_text(json.dumps(_RECIPE))
        process = start(recipe, folder / "whole")
        begun = time.perf_counter()
        process.wait()
        working = time.perf_counter() - begun
        expected = digests(folder / "whole")
        while kills < least:
            output = folder / f"run-{len(runs)}"
            for _ in range(draw.randint(1, 4)):
                kills += kill_once(start(recipe, output), draw.random() * working)
                if output.exists():
                    break
            if not output.exists():
                start(recipe, output).wait()
            found = digests(output)
            wrong = [file for file in expected.keys() | found.keys() if expected.get(file) != found.get(file)]
            runs.append({"kills": kills, "files": len(found), "different": wrong})
            print(f"run {len(runs)}: {kills} kills so far, {len(found)} files, {len(wrong)} different", flush=True)
    differing = sum(len(run["different"]) for run in runs)
    print(f"{kills} kills over {len(runs)} runs of {working:.1f} s: {differing} files differ")
    write(runs, json_file)
    raise typer.Exit(int(differing > 0))
