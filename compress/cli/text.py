"""Options of the commands that measure: which text and how it is cut, which tasks, where results are kept."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

if TYPE_CHECKING:
    from compress.evals.text import Protocol

_TEXT, TASKS = "Text", "Tasks (lm-eval)"

TasksOption = Annotated[
    Optional[str],
    typer.Option(
        help="Comma-separated: lm-eval's task names, names from --include, builtin_line, builtin_name.",
        rich_help_panel=TASKS,
    ),
]
IncludeOption = Annotated[
    Optional[Path],
    typer.Option(
        help="Folder of task YAML files. They may bring Python code: only folders you trust.", rich_help_panel=TASKS
    ),
]
ResultsOption = Annotated[
    Optional[Path],
    typer.Option("--results", help="Keep measurements here (JSON lines); DIR/report/results.jsonl if absent."),
]


@dataclass(frozen=True)
class TextOptions:
    """Which text a command measures, and how it is cut: one option per field."""

    text: Annotated[
        Optional[str],
        typer.Option(help="Text file, or 'builtin' for held-out standard-library modules.", rich_help_panel=_TEXT),
    ] = None
    preset: Annotated[
        Optional[str],
        typer.Option(
            "--protocol",
            help="How a paper cuts text: 2048, llm-pruner, any-precision, any-precision-c4, any-precision-ptb, compress-then-prompt.",
            rich_help_panel=_TEXT,
        ),
    ] = None
    separator: Annotated[
        Optional[str],
        typer.Option(
            help="Divides the text into documents, each scored alone with BOS in front.", rich_help_panel=_TEXT
        ),
    ] = None
    limit: Annotated[
        Optional[int], typer.Option(help="Take the first so many documents, and items of each task.", min=1)
    ] = None
    min_characters: Annotated[
        int, typer.Option(help="Pass over documents of this length or less.", min=0, rich_help_panel=_TEXT)
    ] = 0
    length: Annotated[
        Optional[int],
        typer.Option(help="Tokens in a window; the context, at most 2048, if absent.", min=2, rich_help_panel=_TEXT),
    ] = None
    stride: Annotated[
        Optional[int],
        typer.Option(help="Tokens a window advances by; half its length if absent.", min=1, rich_help_panel=_TEXT),
    ] = None
    truncate: Annotated[
        bool, typer.Option(help="Score only the first window of each document.", rich_help_panel=_TEXT)
    ] = False

    def protocol(self) -> Protocol:
        """Return how the text is cut.

        Raises:
            CompressError: there is no such preset.
        """
        from compress.evals.text import protocol_of

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
