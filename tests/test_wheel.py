"""``pip install .`` gives a package that works far from the clone."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def install(tmp_path, **environment):
    """Install a clone into a folder; returns the environment in which Python finds it."""
    source = tmp_path / "source"
    subprocess.run(["git", "clone", "--quiet", ROOT, source], check=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    command = [*pip, "--target", tmp_path / "installed", source]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, **environment})
    return {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}


@pytest.mark.parametrize(
    ("compiler", "expected"),
    [
        pytest.param({}, "c: ", marks=pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")),
        ({"CC": "false"}, "torch: reference look-up, because the C library was not built"),
    ],
    ids=["compiler", "failing compiler"],
)
def test_the_backend_depends_on_the_compiler_and_the_installation_does_not(tmp_path, compiler, expected):
    environment = install(tmp_path, **compiler)
    code = "import compress; assert 'installed' in compress.__file__; print(compress.backend())"
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith(expected)
    tags = next((tmp_path / "installed").glob("*.dist-info/WHEEL")).read_text()
    assert (tmp_path / "installed" / "compress_command.py").is_file()  # where the compress command begins
    assert "Tag: py3-none-" in tags  # nothing in it depends on the version of Python
    evals = tmp_path / "installed" / "compress" / "evals"
    assert (evals / "report.py").exists()
    assert not [name for name in ("experiments", "grids") if (evals / name).exists()]  # they are for a clone


def test_the_wheel_works_outside_the_clone(tmp_path):
    environment = install(tmp_path)
    code = (
        "import compress, compress.kernels.bitplane, compress.passes, compress.pipeline\n"
        "assert 'installed' in compress.__file__, compress.__file__\n"
        "assert {'any_precision', 'prune', 'tune_tables'} < set(compress.passes.kinds()), compress.passes.kinds()\n"
        "passes = [{'kind': 'rtn'}]\n"
        "folder = compress.run({'model': 'builtin', 'passes': passes}, 'small')\n"
        "print(compress.get_bits(compress.load(folder)))\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.strip() == "4"
