"""What the commands share: the application, consoles, options, progress, JSON."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
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

_TEXT, _TASKS = "Text", "Tasks (lm-eval)"
TextOption = Annotated[
    Optional[str],
    typer.Option(help="Text file, or 'builtin' for held-out standard-library modules.", rich_help_panel=_TEXT),
]
ProtocolOption = Annotated[
    Optional[str],
    typer.Option(
        help="How a paper cuts text: 2048, llm-pruner, any-precision, any-precision-c4, any-precision-ptb, compress-then-prompt.",
        rich_help_panel=_TEXT,
    ),
]
SeparatorOption = Annotated[
    Optional[str],
    typer.Option(help="Divides the text into documents, each scored alone with BOS in front.", rich_help_panel=_TEXT),
]
LimitOption = Annotated[
    Optional[int], typer.Option(help="Take the first so many documents, and items of each task.", min=1)
]
MinimumOption = Annotated[
    int, typer.Option(help="Pass over documents of this length or less.", min=0, rich_help_panel=_TEXT)
]
LengthOption = Annotated[
    Optional[int],
    typer.Option(help="Tokens in a window; the context, at most 2048, if absent.", min=2, rich_help_panel=_TEXT),
]
TruncateOption = Annotated[
    bool, typer.Option(help="Score only the first window of each document.", rich_help_panel=_TEXT)
]
TasksOption = Annotated[
    Optional[str],
    typer.Option(
        help="Comma-separated: lm-eval's task names, names from --include, builtin_line, builtin_name.",
        rich_help_panel=_TASKS,
    ),
]
IncludeOption = Annotated[
    Optional[Path],
    typer.Option(
        help="Folder of task YAML files. They may bring Python code: only folders you trust.", rich_help_panel=_TASKS
    ),
]
ResultsOption = Annotated[
    Optional[Path],
    typer.Option("--results", help="Keep measurements here (JSON lines); DIR/report/results.jsonl if absent."),
]
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
    from compress.pipeline import pick_device

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


@contextmanager
def progress_bar() -> Iterator[Any]:
    """A report function for (what, done, total), drawn on standard error."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
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
