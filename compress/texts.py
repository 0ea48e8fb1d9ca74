"""Read the built-in text: source files of Python's standard library, as found on the running machine.

Three disjoint lists of modules: the model was trained on :func:`training_files`, passes calibrate on ``CALIBRATION``, and every
figure is measured on ``HELDOUT``. The tests of a held-out or calibration module are left out of the training list too.
"""

import hashlib
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from compress.errors import CompressError

SEPARATOR = "<|endoftext|>"

HELDOUT = ("configparser", "fractions", "heapq", "sched", "shelve", "textwrap")
CALIBRATION = ("argparse", "bisect", "queue", "statistics", "tempfile", "zipapp")
_SKIPPED = {"site-packages", "dist-packages", "encodings", "pydoc_data", "turtledemo", "ensurepip", "__pycache__"}
# Of the test suite only these letters: enough of its style, without drowning the library's own.
_TEST_FILES = tuple(f"test_{letter}*.py" for letter in "abcdefghi")


def stdlib() -> Path:
    """Return the folder of the running interpreter's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def read_modules(names: Sequence[str]) -> dict[str, str]:
    """Read top-level modules of the standard library."""
    try:
        return {name: (stdlib() / f"{name}.py").read_text(encoding="utf-8") for name in names}
    except OSError as error:
        raise CompressError(f"{error.filename}: cannot be read; the built-in text needs Python's sources.") from error


def training_files() -> list[Path]:
    """List every source file of the standard library that is neither held out nor for calibration."""
    root = stdlib()
    reserved = {*HELDOUT, *CALIBRATION}
    library = [
        path
        for path in root.rglob("*.py")
        if not _SKIPPED & set(path.relative_to(root).parts)
        and not {"test", "tests", "idle_test"} & set(path.relative_to(root).parts[:-1])
    ]
    tests = [path for pattern in _TEST_FILES for path in (root / "test").glob(pattern)]
    return sorted(path for path in (*library, *tests) if path.stem.removeprefix("test_") not in reserved)


def fingerprint(texts: dict[str, str]) -> dict[str, str]:
    """Return the SHA-256 of each text, for the record of what was trained on or measured."""
    return {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
