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
    from compress.evals.evaluate import Protocol


def panel(title: str, help: str, *names: str, **more: Any) -> Any:
    """Make an option that the help lists under a title."""
    return typer.Option(*names, help=help, rich_help_panel=title, **more)


_TEXT, TASKS = "Text", "Tasks (lm-eval)"
_PROTOCOL = (
    "How a paper cuts text: 2048, llm-pruner, any-precision, any-precision-c4, any-precision-ptb, compress-then-prompt."
)
_TASKS = "Comma-separated: lm-eval's task names, names from --include, builtin_line, builtin_name."
_INCLUDE = "Folder of task YAML files. They may bring Python code: only folders you trust."
_RESULTS = "Keep measurements here (JSON lines); DIR/report/results.jsonl if absent."

TasksOption = Annotated[Optional[str], panel(TASKS, _TASKS)]
IncludeOption = Annotated[Optional[Path], panel(TASKS, _INCLUDE)]
ResultsOption = Annotated[Optional[Path], typer.Option("--results", help=_RESULTS)]
_Text = Annotated[Optional[str], panel(_TEXT, "Text file, or 'builtin' for held-out standard-library modules.")]
_Separator = Annotated[
    Optional[str], panel(_TEXT, "Divides the text into documents, each scored alone with BOS in front.")
]
_Limit = Annotated[Optional[int], typer.Option(help="Take the first so many documents, and items of each task.", min=1)]
_Minimum = Annotated[int, panel(_TEXT, "Pass over documents of this length or less.", min=0)]
_Length = Annotated[Optional[int], panel(_TEXT, "Tokens in a window; the context, at most 2048, if absent.", min=2)]
_Stride = Annotated[Optional[int], panel(_TEXT, "Tokens a window advances by; half its length if absent.", min=1)]


@dataclass(frozen=True)
class TextOptions:
    """Which text a command measures, and how it is cut: one option per field."""

    text: _Text = None
    preset: Annotated[Optional[str], panel(_TEXT, _PROTOCOL, "--protocol")] = None
    separator: _Separator = None
    limit: _Limit = None
    min_characters: _Minimum = 0
    length: _Length = None
    stride: _Stride = None
    truncate: Annotated[bool, panel(_TEXT, "Score only the first window of each document.")] = False

    def protocol(self) -> Protocol:
        """Return how the text is cut.

        Raises:
            CompressError: there is no such preset.
        """
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
