"""Lets tests of this folder import what lies beside them, and run it."""

import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
sys.path.append(str(FOLDER))


@pytest.fixture
def run_script(run_code):
    """Run a script of this folder in a process of its own, without the interpreter; returns what it printed."""

    def run(script, *arguments, **environment):
        code = f"import runpy\nrunpy.run_path({str(FOLDER / script)!r}, run_name='__main__')"
        return run_code(code, *arguments, TRITON_DEFAULT_FP_FUSION="1", **environment)

    return run
