"""Share what commands have in common: the application, consoles, options, progress, JSON."""

from __future__ import annotations

import inspect
import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from compress.errors import CompressError
from compress.hub import place_of

if TYPE_CHECKING:
    from compress.evals import tables
    from compress.evals.evaluate import Protocol

app = typer.Typer(
    help="Compress Hugging Face causal LMs after training: one checkpoint, every bit-width, measured cost.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="rich",
)
out, err = Console(highlight=False), Console(stderr=True, highlight=False)


def known(name: str | None) -> str | None:
    """Return the folder of the model that ``builtin`` names; other folders and hub ids as they are given."""
    return None if name is None else place_of(name)


Folder = Annotated[
    Path,
    typer.Argument(
        help="Checkpoint folder; a dense model works too.",
        metavar="DIR",
        callback=lambda path: Path(place_of(path)),
    ),
]
BitsOption = Annotated[
    Optional[str], typer.Option(help="Numbers of bits, comma-separated: 3,4,8; 3.5 is a mean. All there are if absent.")
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
    """Refuse, before any work, a device that is not there."""
    if name != "cpu":
        from compress.source import pick_device

        pick_device(name)
    return name


DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, …", callback=_device)]


def panel(title: str, help: str, *names: str, **more: Any) -> Any:
    """Make an option that the help lists under a title."""
    return typer.Option(*names, help=help, rich_help_panel=title, **more)


_KV = "Cache of keys and values"
KVBitsOption = Annotated[
    Optional[str],
    panel(_KV, "Pack it at 2 to 8 bits; 4:2 for keys and values apart, 'recommended' as the checkpoint says."),
]
KVBitsList = Annotated[
    Optional[str],
    panel(_KV, "Measure with it packed too: 2 to 8 bits, comma-separated; 4:2 for keys and values apart."),
]
KVGroupOption = Annotated[
    Optional[str],
    panel(
        _KV,
        "Values that share a scale: 32, or 128:64 for keys and values apart, as it is if absent (fewer where heads ask for it).",
    ),
]
KVResidualOption = Annotated[Optional[int], panel(_KV, "So many of the last tokens stay whole, 128 if absent.", min=0)]
_TEXT, TASKS = "Text", "Tasks (lm-eval)"
_PROTOCOL = (
    "How a paper cuts text: 2048, llm-pruner, any-precision, any-precision-c4, any-precision-ptb, compress-then-prompt."
)
_SPECIAL = "Read special tokens that the text spells (<unk>, say) as such, not as plain text."
_TASKS = "Comma-separated: lm-eval's task names, names from --include, builtin_line, builtin_name."
_INCLUDE = "Folder of task YAML files. They may bring Python code: only folders you trust."
_RESULTS = "Keep measurements here (JSON lines); DIR/report/results.jsonl if absent."

TasksOption = Annotated[Optional[str], panel(TASKS, _TASKS)]
IncludeOption = Annotated[Optional[Path], panel(TASKS, _INCLUDE)]
ResultsOption = Annotated[Optional[Path], typer.Option("--results", help=_RESULTS)]
_Text = Annotated[Optional[str], panel(_TEXT, "Text file, or 'builtin' for held-out standard-library modules.")]
_Separator = Annotated[Optional[str], panel(_TEXT, "Divides the text into documents, each scored alone after BOS.")]
_Limit = Annotated[Optional[int], typer.Option(help="Take the first so many documents, and items of each task.", min=1)]
_Length = Annotated[Optional[int], panel(_TEXT, "Tokens in a window; the context, at most 2048, if absent.", min=2)]
_Stride = Annotated[Optional[int], panel(_TEXT, "Tokens a window advances by; half its length if absent.", min=1)]


@dataclass(frozen=True)
class TextOptions:
    """Choose the text that a command measures, and how it is cut: one option per field."""

    text: _Text = None
    preset: Annotated[Optional[str], panel(_TEXT, _PROTOCOL, "--protocol")] = None
    separator: _Separator = None
    limit: _Limit = None
    min_characters: Annotated[int, panel(_TEXT, "Pass over documents of this length or less.", min=0)] = 0
    length: _Length = None
    stride: _Stride = None
    truncate: Annotated[bool, panel(_TEXT, "Score only the first window of each document.")] = False
    special_tokens: Annotated[bool, panel(_TEXT, _SPECIAL, "--special-tokens")] = False

    def protocol(self) -> Protocol:
        """Return how the text is cut, and refuse an unknown preset."""
        from compress.evals.evaluate import protocol_of

        changes = asdict(self)
        del changes["text"]
        return protocol_of(changes.pop("preset"), **changes)


def with_text_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command one option per field of :class:`TextOptions` instead of its parameter ``text``."""
    fields = inspect.signature(TextOptions, eval_str=True).parameters
    own = inspect.signature(command, eval_str=True).parameters

    @wraps(command)
    def call(**given: Any) -> None:
        text = TextOptions(**{name: given.pop(name) for name in fields})
        command(**given, text=text)

    parameters = [one for name, wanted in own.items() for one in (fields.values() if name == "text" else [wanted])]
    parameters = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in parameters]
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {one.name: one.annotation for one in parameters}
    return call


def parse_names(text: str | None) -> tuple[str, ...]:
    """Read names from ``a, b``; none from an absent option."""
    return tuple(part.strip() for part in (text or "").split(",") if part.strip())


def refuse_unwritable(*targets: str | Path | None) -> None:
    """Refuse, before what takes long, files to be written at the end whose folder is not there."""
    for target in targets:
        if target is not None and str(target) != "-" and not Path(target).parent.is_dir():
            raise CompressError(f"{target}: cannot be written, as there is no folder {Path(target).parent}.")


def parse_bits(text: str | None) -> list[int | float] | None:
    """Read numbers of bits from ``3,4,8``; one with a point is a mean."""
    if text is None or text == "all":
        return None
    try:
        return [float(part) if "." in part else int(part) for part in text.split(",")]
    except ValueError:
        raise CompressError(f"--bits {text!r}: give one number or several, comma-separated, such as 3,3.5,8.") from None


class ProgressLines:
    """Tell of progress where nothing can be redrawn, as in a log file: a line per unit of work, with the time that is left.

    A line appears when work moves on, at most one a second, and within a long unit every ten seconds. The time left is that of
    what is being counted (the blocks of a pass, say), by the mean time of those that are done.
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
    here = Console(file=sys.stderr, highlight=False)  # also while what another library says there is kept away
    if not here.is_terminal:
        yield ProgressLines(lambda line: here.print(escape(line), soft_wrap=True))
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=here, transient=True) as progress:
        task = progress.add_task("starting", total=None)

        yield lambda what, done, all_: progress.update(task, description=escape(what), completed=done, total=all_)


def quiet_transformers() -> None:
    """Silence progress bars and advice of transformers, which would drown ours."""
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # at what peft asks it
    warnings.filterwarnings("ignore", message="Position ids are not supported")  # nor needed: prompts come first


def print_table(table: tables.Table) -> None:
    """Print a report's table."""
    drawn = Table()
    for place, head in enumerate(table.heads):
        drawn.add_column(escape(head), justify="right" if place else "left")
    for row in table.rows:
        drawn.add_row(*map(escape, row))
    out.print(drawn)


def write_json(result: Any, target: str | None) -> bool:
    """Write an object where ``--json`` says, and tell whether that is standard output, which then has nothing else."""
    text = json.dumps(result, indent=1)
    if target == "-":
        print(text)
    elif target is not None:
        try:
            Path(target).write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise CompressError(f"--json {target}: {error.strerror}.") from error
    return target == "-"
