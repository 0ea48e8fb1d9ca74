"""Servers for tests: processes that have imported what takes seconds, and run code in copies of themselves."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent / "kernels"
LOOP = """
import json, os, sys, traceback
for line in sys.stdin:
    code, arguments, said = json.loads(line)
    child = os.fork()
    if not child:
        for descriptor, name in enumerate(said, start=1):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
        sys.argv, failed = ["-c", *arguments], 0
        try:
            exec(code, {"__name__": "__main__"})
        except BaseException:
            traceback.print_exc()
            failed = 1
        sys.stdout.flush()
        os._exit(failed)
    print(os.waitpid(child, 0)[1], flush=True)
"""


@contextmanager
def server(folders, imports, **environment):
    """A function that runs code in a process of its own that has imported some modules: whether it failed, stdout, stderr."""
    pipe = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(
        [sys.executable, "-c", f"import {imports}{LOOP}"], env={**os.environ, **environment}, **pipe
    ) as process:

        def run(code, *arguments):
            said = [folders.mktemp("server") / name for name in ("stdout", "stderr")]
            print(json.dumps([code, [*map(str, arguments)], [*map(str, said)]]), file=process.stdin, flush=True)
            return process.stdout.readline() != "0\n", *(file.read_text() for file in said)

        yield run


@pytest.fixture(scope="session")
def interpret(tmp_path_factory):
    """Run a script of ``kernels`` in Triton's interpreter, which Triton decides on when it is imported; returns what it printed."""
    imports = "compress.evals.kernels_bench, compress.kernels.kv_gpu, compress.loading, compress.quant.nested"
    with server(tmp_path_factory, imports, TRITON_INTERPRET="1") as run:

        def script(name, *arguments):
            code = f"import runpy\nrunpy.run_path({str(SCRIPTS / name)!r}, run_name='__main__')"
            failed, stdout, stderr = run(code, *arguments)
            assert not failed, stdout + stderr
            return stdout

        yield script


@pytest.fixture(scope="session")
def plain_python(tmp_path_factory):
    """Run code in a process that has transformers and not this library; what it printed or, with ``fails=True``, complained of."""
    with server(tmp_path_factory, "torch, transformers.modeling_utils, transformers.models.auto.modeling_auto") as run:

        def execute(code, *arguments, fails=False):
            failed, stdout, stderr = run(code, *arguments)
            assert failed == fails, stdout + stderr
            return stderr if fails else stdout

        yield execute
