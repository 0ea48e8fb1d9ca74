"""``pip install .`` gives a package that works far from the clone."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def install(tmp_path_factory):
    """Install a clone into a folder, once with a compiler and once with one that fails; returns the folder."""
    made = {}
    quick = tmp_path_factory.mktemp("compiler") / "cc"  # that does not optimise, which takes most of the time
    quick.write_text('#!/bin/sh\nexec cc "$@" -O0\n')
    quick.chmod(0o700)

    def make(compiler=None):
        if compiler not in made:
            place = tmp_path_factory.mktemp("wheel")
            subprocess.run(["git", "clone", "--quiet", ROOT, place / "source"], check=True)
            tuning = place / "source" / "kernels" / "tuning"  # as compress tune would leave one
            tuning.mkdir(exist_ok=True)
            (tuning / "a-gpu.json").write_text('{"configs": {}}')
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
            environment = {**os.environ, "CC": compiler or str(quick)}
            command = [*pip, "--target", place / "installed", place / "source"]
            subprocess.run(command, check=True, capture_output=True, env=environment)
            made[compiler] = place / "installed"
        return made[compiler]

    return make


def python(code, installed, folder):
    """Run code in a process that finds the installed package; returns what it printed."""
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    command = [sys.executable, "-c", code]
    process = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.mark.parametrize(
    ("compiler", "expected"),
    [
        pytest.param(None, "c: ", marks=pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")),
        ("false", "torch: reference look-up, because the C library was not built"),
    ],
    ids=["compiler", "failing compiler"],
)
def test_the_backend_depends_on_the_compiler_and_the_installation_does_not(install, tmp_path, compiler, expected):
    installed = install(compiler)
    code = "import compress; assert 'installed' in compress.__file__; print(compress.backend())"
    assert python(code, installed, tmp_path).startswith(expected)
    tags = next(installed.glob("*.dist-info/WHEEL")).read_text()
    assert (installed / "compress_command.py").is_file()  # where the compress command begins
    assert "Tag: py3-none-" in tags  # nothing in it depends on the version of Python
    evals = installed / "compress" / "evals"
    assert (evals / "report.py").exists()
    assert not [name for name in ("experiments", "grids") if (evals / name).exists()]  # they are for a clone
    assert (installed / "compress" / "kernels" / "tuning" / "a-gpu.json").is_file()


def test_the_wheel_works_outside_the_clone(install, tmp_path):
    code = (
        "import compress, compress.kernels.bitplane, compress.passes, compress.pipeline\n"
        "assert 'installed' in compress.__file__, compress.__file__\n"
        "assert {'any_precision', 'prune', 'tune_tables'} < set(compress.passes.kinds()), compress.passes.kinds()\n"
        "passes = [{'kind': 'rtn'}]\n"
        "folder = compress.run({'model': 'builtin', 'passes': passes}, 'small')\n"
        "print(compress.get_bits(compress.load(folder)))\n"
    )
    assert python(code, install(), tmp_path).strip() == "4"
