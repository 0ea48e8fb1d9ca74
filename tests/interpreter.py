"""Triton's interpreter for tests: a server that has imported the library."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent / "kernels"
SERVER = """
import json, os, runpy, sys, traceback
import compress.evals.kernels_bench, compress.kernels.kv_gpu, compress.loading, compress.quant.nested
for line in sys.stdin:
    script, arguments, said = json.loads(line)
    child = os.fork()
    if not child:
        for descriptor in (1, 2):
            os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
        sys.argv, code = [script, *arguments], 0
        try:
            runpy.run_path(script, run_name="__main__")
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        os._exit(code)
    print(os.waitpid(child, 0)[1], flush=True)
"""
"""Runs scripts, each in a process of its own that begins with the library imported."""


@pytest.fixture(scope="session")
def interpret(tmp_path_factory):
    """Run a script of ``kernels`` in Triton's interpreter, which Triton decides on when it is imported; returns what it printed."""
    pipe = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(
        [sys.executable, "-c", SERVER], text=True, env={**os.environ, "TRITON_INTERPRET": "1"}, **pipe
    ) as server:

        def run(script, *arguments):
            said = tmp_path_factory.mktemp("interpreter") / "said"
            print(
                json.dumps([str(SCRIPTS / script), list(map(str, arguments)), str(said)]), file=server.stdin, flush=True
            )
            assert server.stdout.readline() == "0\n", said.read_text()
            return said.read_text()

        yield run
