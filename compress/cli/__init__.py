"""Run the ``compress`` command. Every error a user can put right is one line; tracebacks are for ``--traceback``."""

import os
import sys
import time

from rich.markup import escape

# Each adds its commands to the application.
from compress.cli import making, measuring, serve, serving, tuning  # noqa: F401
from compress.cli.common import app, err
from compress.errors import CompressError

MAIN_SPEAKS = 30.0
"""Seconds that other processes give the main one to say what is wrong for all; its launcher then stops them."""


def main() -> None:
    """Run the command, and turn errors into one line and an exit code."""
    show = "--traceback" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--traceback"]
    try:
        app(arguments)
    except KeyboardInterrupt:
        err.print("interrupted; run the same command again to continue.")
        sys.exit(130)
    except Exception as error:
        if show:
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        rank = os.environ.get("RANK", "0")
        if rank != "0" and not text.startswith("rank "):
            time.sleep(MAIN_SPEAKS)
            text = f"rank {rank}: {text}"
        known = isinstance(error, CompressError)
        note = "" if known else f"unexpected {type(error).__name__} (add --traceback to see where): "
        err.print(f"[bold red]error:[/] {escape(note + text)}", soft_wrap=True)
        sys.exit(1)
