"""Rules of the house that nothing else would notice."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MOUNTED = ("pruning", "quant", "prompts", "kernels", "evals")


def test_kernels_has_no_init():
    """A regular package of that name in the working directory would shadow Hugging Face's own ``kernels``."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("name", MOUNTED)
def test_sibling_folders_are_mounted_by_relative_links(name):
    link = ROOT / "compress" / name
    assert link.is_symlink()
    assert os.readlink(link) == f"../{name}"


def test_transformers_imports_beside_hugging_faces_kernels_package(tmp_path):
    """Its package, a regular one, is found first even when Python starts in the repository's root."""
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("MARK = 'theirs'\n")
    code = (
        "import kernels, transformers, compress, compress.kernels.bitplane as ours; print(kernels.MARK, ours.backend())"
    )
    path = f"{ROOT}{os.pathsep}{tmp_path}"  # the root comes first, as with python -m pytest
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith(("theirs torch", "theirs c"))


def test_files_stay_readable():
    names = subprocess.run(
        ["git", "ls-files", "*.py", "*.c", "*.h"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split()
    long = {name: count for name in names if (count := len((ROOT / name).read_text().splitlines())) > 500}
    assert not long


def test_importing_the_library_is_light():
    """Kernels and loading work where pydantic, typer, datasets, numba and lm-eval are absent."""
    code = (
        "import sys\n"
        "for name in ('pydantic', 'typer', 'datasets', 'numba', 'lm_eval', 'peft'): sys.modules[name] = None\n"
        "import compress, compress.kernels.bitplane, compress.quant.linear\n"
    )
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
