"""Define the error for everything a user can put right, and the help that goes with a misspelt name."""

import difflib
from collections.abc import Iterable
from pathlib import Path


class CompressError(Exception):
    """Say in one clear sentence what is wrong, where, which rule it breaks, what to do."""


def refuse_existing(output: Path) -> None:
    """Refuse to write a checkpoint where there is anything but an empty folder."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CompressError(f"output {output}: exists already and is not an empty folder; choose another or remove it.")


def first_line(error: Exception) -> str:
    """Return the first line of another library's message, or its type where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``Did you mean 'x'?`` for the nearest known name, else the list of what there is."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(names)}."
