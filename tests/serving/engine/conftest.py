"""Engines of a real vLLM. Nothing here is collected where it is not installed: ``make test-serve`` installs it."""

import gc
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

if find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # engines of the tests are in this process; servers set their own
sys.path.append(str(Path(__file__).parent))


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Make a checkpoint when it is first asked for, by the name of its passes or of its model's type."""
    root, made = tmp_path_factory.mktemp("checkpoints"), {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = root / name.replace(" ", "-")
            # In another process: vLLM's CPU worker looks at every object of every module, and fails at numba's library.
            code = "import sys, engine_helpers; engine_helpers.make(*sys.argv[1:])"
            command = [sys.executable, "-c", code, name, str(made[name])]
            subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)})
        return made[name]

    return make


@pytest.fixture
def engine():
    """Give a function that makes an engine in this process; it ends with the test."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    made = []

    def make(folder: Path, **options):
        usual = {"dtype": "float32", "enforce_eager": True, "max_model_len": 256, "skip_tokenizer_init": True}
        made.append(LLM(str(folder), **{**usual, **options}))
        return made[-1]

    yield make
    for llm in made:
        llm.llm_engine.engine_core.shutdown()
    made.clear()
    gc.collect()
    cleanup_dist_env_and_memory()
