"""The round-trip tests on several transformers releases: ``python3 tests/matrix.py [VERSION ...]``.

Each release has an environment of its own, ``.venv-matrix/<version>``, which is kept for the next run. The
version ``latest`` is what pip takes for the newest. ``upgraded`` is the newest of everything that the library and its extras
depend on, for the whole suite: its versions are printed, and which of them changed since the suite last passed there.
"""

import os
import re
import subprocess
import sys
import time
import venv
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
VERSIONS = ("5.0.0", "5.10.1", "latest")
UPGRADED = "upgraded"
PASSED = ROOT / ".venv-matrix" / "passed.txt"  # the versions with which the suite last passed
TESTS = (
    "tests/compress/test_calls.py",
    "tests/compress/test_checkpoint.py",
    "tests/compress/test_sparse_checkpoint.py",
    "tests/compress/test_streaming.py",
    "tests/kernels/test_bitplane.py",
    "tests/pruning/test_groups.py",
    "tests/pruning/test_mini_llm.py",
    "tests/quant/test_linear.py",
)
ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
PRINT_VERSION = "import importlib.metadata; print(importlib.metadata.version('transformers'))"
PRINT_VERSIONS = """
import re
from importlib.metadata import distributions, requires
wanted = {re.match(r"[\\w-]+", line)[0].lower() for line in requires("compress-llm")} - {"compress-llm"}
found = {d.name.lower().replace("_", "-"): d.version for d in distributions()}
print(*(f"{name}=={found[name]}" for name in sorted(found.keys() & wanted)), sep="\\n")
"""


class Result(NamedTuple):
    """One line of the summary; ``failed`` counts errors too."""

    version: str
    passed: int
    failed: int
    seconds: float
    status: int


def install(version: str) -> Path:
    """Make or bring up to date the environment of one release; returns its Python."""
    folder = ROOT / ".venv-matrix" / version
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        venv.create(folder, with_pip=True)
    release = "transformers" if version == "latest" else f"transformers=={version}"
    constraint = str(ROOT / "constraints-cpu.txt")
    wanted = ["--constraint", constraint, release, "pytest>=8", "--editable", f"{ROOT}[prompts]"]
    if version == UPGRADED:
        wanted = ["--upgrade-strategy", "eager", "--editable", f"{ROOT}[dev]"]
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--upgrade", *wanted], check=True)
    return python


def printed(python: Path, code: str) -> str:
    """What some code prints in an environment."""
    return subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def run_tests(version: str) -> Result:
    """Run the tests on one release; an environment that cannot be made counts as one failure."""
    started = time.perf_counter()
    try:
        python = install(version)
        found, versions = printed(python, PRINT_VERSION), printed(python, PRINT_VERSIONS)
    except subprocess.CalledProcessError as error:
        return Result(version, 0, 1, time.perf_counter() - started, error.returncode)
    print(f"\n== transformers {found} ==", flush=True)
    tests = TESTS
    if version == UPGRADED:
        tests = ("-n", "auto", "--dist", "worksteal")
        known = PASSED.read_text().splitlines() if PASSED.exists() else []
        print(*(line if line in known else f"{line}  (new)" for line in versions.splitlines()), sep="\n", flush=True)
    started = time.perf_counter()
    with subprocess.Popen(
        [python, "-m", "pytest", *tests], cwd=ROOT, env={**os.environ, **ENVIRONMENT}, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        last = ""
        for line in process.stdout:
            print(line, end="", flush=True)
            last = line if " in " in line and count(line) else last
    if version == UPGRADED and not process.returncode:
        PASSED.write_text(versions + "\n")
    counts = count(last)
    failed = counts.get("failed", 0) + counts.get("error", 0)
    return Result(found, counts.get("passed", 0), failed, time.perf_counter() - started, process.returncode)


def count(line: str) -> dict[str, int]:
    """The numbers of pytest's last line: ``2 failed, 60 passed in 31.05s``."""
    return {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|error)", line)}


def main() -> int:
    """Test every release named on the command line, or all; 1 if anything failed."""
    results = [run_tests(version) for version in sys.argv[1:] or VERSIONS]
    print(f"\n{'transformers':<14}{'passed':>8}{'failed':>8}{'seconds':>9}")
    for result in results:
        note = f"  exit status {result.status}" if result.status and not result.failed else ""
        print(f"{result.version:<14}{result.passed:>8}{result.failed:>8}{result.seconds:>9.1f}{note}")
    return int(any(result.failed or result.status for result in results))


if __name__ == "__main__":
    sys.exit(main())
