"""What the commands share: the application, consoles, options, progress, JSON."""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from compress.errors import CompressError

if TYPE_CHECKING:
    from compress.evals import tables

app = typer.Typer(
    help="Compress Hugging Face causal LMs after training: one checkpoint, every bit-width, measured cost.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="rich",
)
out, err = Console(highlight=False), Console(stderr=True, highlight=False)

Folder = Annotated[Path, typer.Argument(help="Checkpoint folder; a dense model works too.", metavar="DIR")]
BitsOption = Annotated[
    Optional[str], typer.Option(help="Widths, comma-separated: 3,4,8; 3.5 is a mean width. All there are if absent.")
]
JsonOption = Annotated[Optional[str], typer.Option("--json", help="Write one JSON object to this file, or '-'.")]
PromptFlag = Annotated[bool, typer.Option("--prompt", help="Put the checkpoint's own soft prompt before the text.")]
PromptFrom = Annotated[
    Optional[Path],
    typer.Option(help="The same with the soft prompt of this folder, of another checkpoint say.", metavar="DIR"),
]
AdapterFlag = Annotated[
    Optional[bool],
    typer.Option(
        "--adapter/--no-adapter",
        help="Use the low-rank adapter in DIR/adapter, or leave it off; used where there is one if absent.",
        show_default=False,
    ),
]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def _device(name: str) -> str:
    """Refuse a device that is not there before any work."""
    if name != "cpu":
        from compress.source import pick_device

        pick_device(name)
    return name


DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, …", callback=_device)]


def parse_names(text: str | None) -> tuple[str, ...]:
    """``a, b`` to names; none for an absent option."""
    return tuple(part.strip() for part in (text or "").split(",") if part.strip())


def refuse_unwritable(*targets: str | Path | None) -> None:
    """Refuse files to be written at the end whose folder is not there, before what takes long.

    Raises:
        CompressError: the first of them.
    """
    for target in targets:
        if target is not None and str(target) != "-" and not Path(target).parent.is_dir():
            raise CompressError(f"{target}: cannot be written, as there is no folder {Path(target).parent}.")


def parse_widths(text: str | None) -> list[int | float] | None:
    """``3,4,8`` to numbers; one with a point is a mean width.

    Raises:
        CompressError: something else.
    """
    if text is None or text == "all":
        return None
    try:
        return [float(part) if "." in part else int(part) for part in text.split(",")]
    except ValueError:
        raise CompressError(
            f"--bits {text!r}: give one width or several, comma-separated, for example 3,3.5,8."
        ) from None


class ProgressLines:
    """Progress where nothing can be redrawn, as in a log file: a line per unit of work, with the time that is left.

    A line appears when work moves on, at most one a second, and within a long unit every ten seconds. The time left is that of
    what is being counted (the blocks of a pass, say), by the mean time of those that are done.

    Args:
        write: takes a line.
        clock: seconds.
    """

    def __init__(self, write: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._write, self._clock = write, clock
        self._what, self._said = "", -math.inf
        self._start = self._first = self._done = self._total = 0.0

    def __call__(self, what: str, done: int, total: int) -> None:
        """Take note that ``done`` of ``total`` are finished and ``what`` is going on."""
        now = self._clock()
        if total != self._total or done < self._done:
            self._start, self._first = now, done
        self._done, self._total = done, total
        if now - self._said < (1 if what != self._what else 10):
            return
        self._what, self._said = what, now
        left = ""
        if done > self._first:
            left = f", about {duration((now - self._start) / (done - self._first) * (total - done))} left"
        self._write(f"{what} ({done} of {total}{left})")


def duration(seconds: float) -> str:
    """Write seconds as people say them: ``40 s``, ``12 min``, ``3 h 05 min``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02} min"


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """Give a function for (what, done, total), shown on standard error: a bar on a terminal, lines elsewhere."""
    if not err.is_terminal:
        yield ProgressLines(lambda line: err.print(escape(line), soft_wrap=True))
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True) as progress:
        task = progress.add_task("starting", total=None)

        def report(what: str, done: int, total: int) -> None:
            progress.update(task, description=escape(what), completed=done, total=total)

        yield report


def quiet_transformers() -> None:
    """Its own progress bars and advice would drown ours."""
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # at what peft asks it
    warnings.filterwarnings("ignore", message="Position ids are not supported")  # nor needed: prompts come first


def print_table(table: tables.Table) -> None:
    """A report's table on the terminal."""
    drawn = Table()
    for place, head in enumerate(table.heads):
        drawn.add_column(escape(head), justify="right" if place else "left")
    for row in table.rows:
        drawn.add_row(*map(escape, row))
    out.print(drawn)


def write_json(result: Any, target: str | None) -> bool:
    """Write an object where ``--json`` says; False if it says nothing."""
    if target is None:
        return False
    text = json.dumps(result, indent=1)
    if target == "-":
        print(text)
    else:
        try:
            Path(target).write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise CompressError(f"--json {target}: {error.strerror}.") from error
    return True
