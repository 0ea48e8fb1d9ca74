"""Rules of the house that nothing else would notice."""

import ast
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MOUNTED = ("pruning", "quant", "prompts", "kernels", "evals")

MAY_IMPORT = {
    "kernels": set(),
    "core": {"kernels", "quant.records", "quant.format", "quant.linear", "quant.embedding", "quant.fused"},
    "quant": {"core", "kernels"},
    "pruning": {"core", "quant"},
    "prompts": {"core", "quant"},
    "evals": {"core", "kernels", "quant", "pruning", "prompts"},
    "vllm": {"core", "kernels", "quant"},
    "demo": {"core", "evals"},
    "cli": {"core", "kernels", "quant", "pruning", "prompts", "evals", "vllm", "demo"},
}
"""The table of CONTRIBUTING.md: folder -> folders, or single modules of them. ``core`` is compress/ without cli/, demo/ and vllm/."""
WAITING: set[tuple[str, str]] = set()
"""Arrows of today that are being turned."""

BUDGETS = {
    "compress": (10980, 11.2),
    "compress/cli": (1540, 9.4),
    "compress/demo": (90, 11.9),
    "compress/vllm": (1140, 11.7),
    "quant": (5450, 12.5),
    "pruning": (3440, 11.8),
    "prompts": (520, 9.6),
    "kernels": (3420, 13.7),
    "evals": (4360, 11.6),
    "evals/bench": (2330, 11.4),
    "evals/experiments": (490, 12.3),
    "evals/grids": (470, 13.1),
    "in the wheel": (30880, 11.7),
    "without tests": (34320, 11.65),
}
"""Folder -> most lines, most tokens per line of code (so that packing lines does not count); ``python tests/sizes.py`` prints them.

A change that needs more raises its folder's number, and says why; the last two are the whole library's.
"""
MOST_SKIPS = 30  # ``# fmt: skip`` without tests


def test_kernels_has_no_init():
    """A regular package of that name in the working directory would shadow Hugging Face's own ``kernels``."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("name", MOUNTED)
def test_sibling_folders_are_mounted_by_relative_links(name):
    link = ROOT / "compress" / name
    assert link.is_symlink()
    assert os.readlink(link) == f"../{name}"


@pytest.mark.slow
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


def modules() -> dict[str, Path]:
    """Name every module as it is imported: the mounted folders under ``compress``."""
    names = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    found = {}
    for path in map(Path, names):
        if path.parts[0] in (*MOUNTED, "compress") and (ROOT / path).is_file():
            parts = (
                path.with_suffix("").parts if path.parts[0] == "compress" else ("compress", *path.with_suffix("").parts)
            )
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


def imported(path: Path, known: dict[str, Path]) -> Iterator[tuple[str, bool]]:
    """Find the modules of ours that a file imports, and whether it does so at its top (for type checkers alone, too)."""
    tree = ast.parse((ROOT / path).read_text())
    inner = {id(node) for part in ast.walk(tree) if isinstance(part, ast.FunctionDef) for node in ast.walk(part)}
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in known else node.module for name in inside]
        yield from ((name, id(node) not in inner) for name in names if name.partition(".")[0] == "compress")


def room(module: str) -> str:
    """Name the folder of CONTRIBUTING.md's table that a module is in."""
    part = module.split(".")[1] if "." in module else ""
    return part if part in MAY_IMPORT else "core"


@pytest.mark.slow
@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_a_folder_imports_what_it_may(folder):
    """At the top and within functions alike."""
    known, allowed = modules(), MAY_IMPORT[folder] | {folder}
    wrong = [
        (module, target)
        for module, path in known.items()
        if room(module) == folder
        for target, _ in imported(path, known)
        if not {room(target), target.removeprefix("compress.")} & allowed
    ]
    if wrong and {(folder, room(target)) for _, target in wrong} <= WAITING:
        pytest.xfail(f"being turned: {wrong}")
    assert not wrong


@pytest.mark.slow
def test_no_modules_import_each_other_in_a_circle():
    """Not even for type checkers: what two modules share belongs below both."""
    known = modules()
    graph = {module: {target for target, top in imported(path, known) if top} for module, path in known.items()}
    circle: list[str] = []
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        circle = error.args[1]
    assert not circle, " imports ".join(reversed(circle))


sizes = runpy.run_path(str(ROOT / "tests" / "sizes.py"))
MEASURED = sizes["measure"]()
NOT_IN_THE_WHEEL = (
    "tests",
    "other",
    "evals/bench",
    "evals/experiments",
    "evals/grids",
    "in the wheel",
    "without tests",
)
MEASURED["without tests"] = sum((size for name, size in MEASURED.items() if name != "tests"), sizes["Size"]())
MEASURED["in the wheel"] = sum(
    (size for name, size in MEASURED.items() if name not in NOT_IN_THE_WHEEL), sizes["Size"]()
)


@pytest.mark.parametrize("folder", BUDGETS)
def test_a_folder_keeps_to_its_budget(folder):
    lines, density = BUDGETS[folder]
    assert MEASURED[folder].lines <= lines
    assert MEASURED[folder].density <= density


def test_lines_are_broken_by_the_formatter():
    assert MEASURED["without tests"].skips <= MOST_SKIPS


def test_size_counts_neither_comments_nor_docstrings():
    source = (
        '"""What it is."""\n\n# why\nx = [\n    1,  # fmt: skip\n]\n\n\ndef f():\n    """Give one."""\n    return "1"\n'
    )
    size = sizes["size_of"](source)
    assert (size.lines, size.code, size.tokens, size.skips) == (11, 5, 13, 1)


def asserts(node: ast.AST, helpers: set[str]) -> bool:
    """Whether a function checks something: by a statement, by pytest, or by one that does."""
    return any(
        isinstance(part, ast.Assert)
        or (isinstance(part, ast.Attribute) and part.attr in helpers)
        or (isinstance(part, ast.Name) and part.id in helpers)
        for part in ast.walk(node)
    )


@pytest.mark.slow
def test_every_test_asserts_something():
    """Among helpers count those that assert themselves, wherever in tests/ they are defined, and fixtures that are used by name."""
    trees = {path: ast.parse(path.read_text()) for path in (ROOT / "tests").rglob("*.py")}
    functions = [
        (path, node) for path, tree in trees.items() for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)
    ]
    helpers = {"raises", "warns", "fail", "assert_close", "assert_allclose"}
    helpers |= {
        node.name for _, node in functions if node.name.startswith(("assert_", "check")) and asserts(node, helpers)
    }
    tests = [(path, node) for path, node in functions if node.name.startswith("test_")]
    assert len(tests) > 600
    assert not [f"{path.name}::{node.name}" for path, node in tests if not asserts(node, helpers)]


@pytest.mark.slow
def test_a_command_that_loads_a_model_teaches_transformers_too(fresh_python):
    """Where the command begins, ``import compress`` alone does not; whatever loads a model does."""
    code = (
        "import sys, compress_command, compress\n"
        "assert 'transformers' not in sys.modules\n"
        "compress.load\n"
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING\n"
        "print(AUTO_QUANTIZER_MAPPING['compress'].__module__)"
    )
    assert fresh_python(code).strip() == "compress.hf"


@pytest.mark.slow
def test_importing_the_library_is_light_and_teaches_transformers_its_format(fresh_python):
    """Kernels and loading work where pydantic, typer, datasets, numba and lm-eval are absent."""
    code = (
        "import sys\n"
        "for name in ('pydantic', 'typer', 'datasets', 'numba', 'lm_eval', 'peft'): sys.modules[name] = None\n"
        "import compress, compress.kernels.bitplane, compress.quant.linear\n"
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING\n"
        "print(AUTO_QUANTIZER_MAPPING['compress'].__module__)"
    )
    assert fresh_python(code).strip() == "compress.hf"
