"""Run functions as command lines of a clone: a quiet transformers, errors in one line."""

from __future__ import annotations

import time
from collections.abc import Callable

import typer

from compress.errors import CompressError
from compress.passes import Progress


def run(main: Callable[..., None]) -> None:
    """Run a function as a command, its parameters as arguments and options; end with one line on a user's mistake."""
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        typer.run(main)
    except CompressError as error:
        raise SystemExit(f"error: {error}") from error


def progress() -> Progress:
    """Return a progress function that prints a line on standard error every ten seconds."""
    last = 0.0

    def tell(what: str, done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() >= last + 10:
            last = time.monotonic()
            typer.echo(f"[{done}/{total}] {what}", err=True)

    return tell
