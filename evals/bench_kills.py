"""Kill a run at random moments and compare the bytes: ``python -m compress.evals.bench_kills --kills 20``.

One undisturbed run is the reference. Then runs on new folders are killed with SIGKILL at a random moment of their
working time, some of them several times, and continued until they finish; every file is compared.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from compress.weights import sha256_of

_RECIPE = {
    "model": "builtin",
    "calibration": {"builtin": "stdlib", "samples": 8, "length": 256},
    "passes": [{"kind": "any_precision"}],
}


def start(recipe: Path, output: Path) -> subprocess.Popen[bytes]:
    """A run in a process of its own, begun to work: its workspace exists."""
    code = "import compress, sys; compress.run(sys.argv[1], sys.argv[2])"
    process = subprocess.Popen([sys.executable, "-c", code, str(recipe), str(output)])
    work = output.with_name(output.name + ".work")
    while process.poll() is None and not work.exists():
        time.sleep(0.005)
    return process


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file in a checkpoint."""
    return {path.name: sha256_of(path) for path in sorted(folder.iterdir())}


def main() -> None:
    """Kill, continue, compare; print one line per finished run and a summary."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    kills, differing, runs = 0, 0, 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = folder / "recipe.yaml"
        recipe.write_text(json.dumps(_RECIPE))
        process = start(recipe, folder / "whole")
        begun = time.perf_counter()
        process.wait()
        working = time.perf_counter() - begun
        expected = digests(folder / "whole")
        while kills < arguments.kills:
            runs += 1
            output = folder / f"run-{runs}"
            for _ in range(draw.randint(1, 4)):
                process = start(recipe, output)
                try:
                    process.wait(draw.random() * working)
                except subprocess.TimeoutExpired:
                    process.send_signal(signal.SIGKILL)
                    process.wait()
                    kills += 1
                if output.exists():
                    break
            if not output.exists():
                start(recipe, output).wait()
            found = digests(output)
            wrong = [file for file in expected.keys() | found.keys() if expected.get(file) != found.get(file)]
            differing += len(wrong)
            print(f"run {runs}: {kills} kills so far, {len(found)} files, {len(wrong)} different", flush=True)
    print(f"{kills} kills over {runs} runs of {working:.1f} s: {differing} files differ")
    sys.exit(bool(differing))


if __name__ == "__main__":
    main()
