"""``pip install .`` gives a package that works far from the clone."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_wheel_works_outside_the_clone(tmp_path):
    source = tmp_path / "source"
    subprocess.run(["git", "clone", "--quiet", ROOT, source], check=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", tmp_path / "installed", source], check=True, capture_output=True)
    code = (
        "import compress, compress.kernels.bitplane, compress.passes, compress.pipeline\n"
        "assert 'installed' in compress.__file__, compress.__file__\n"
        "assert compress.passes.kinds() == ['any_precision', 'kmeans', 'rtn'], compress.passes.kinds()\n"
        "passes = [{'kind': 'rtn'}]\n"
        "folder = compress.run({'model': 'builtin', 'passes': passes}, 'small')\n"
        "print(compress.get_bits(compress.load(folder)))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.strip() == "4"
