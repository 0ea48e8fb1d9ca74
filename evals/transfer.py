"""Measure soft prompts from here on models over there: ``python -m compress.evals.transfer OUT --help``.

Windows have one length that leaves room for the longest prompt, so that all entries are over the same tokens. ``OUT/results.jsonl``
keeps what is measured; ``OUT/transfer.json`` has all rows, which ``compress report`` shows, ``OUT/transfer-TEXT.svg`` the heat map.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from transformers.utils import logging

import compress
from compress.errors import CompressError
from compress.evals import plots, tables
from compress.evals.evaluate import Protocol, evaluate_text, window_length
from compress.evals.store import Results
from compress.evals.tasks import Tasks, evaluate_tasks
from compress.sidecars import stored_prompts
from compress.workspace import write_atomic

NONE = "none"
Prompts = Mapping[str, Optional[Path]]  # label -> adapter, or a checkpoint with one; None for no prompt


@dataclass(frozen=True)
class Place:
    """A model at a number of bits: its label in the matrix, its folder, and the bits; None for a dense model."""

    label: str
    folder: str
    bits: int | None = None

    @classmethod
    def parse(cls, given: str) -> Place:
        """Read ``LABEL=DIR`` or ``LABEL=DIR@BITS``; without a label the rest is one."""
        label, equals, rest = given.partition("=")
        folder, at, bits = (rest if equals else given).partition("@")
        if at and not bits.isdigit():
            raise CompressError(f"model {given!r}: write it as LABEL=DIR or LABEL=DIR@BITS.")
        return cls(label if equals else given, folder, int(bits) if at else None)


def common_length(prompts: Prompts, folder: str, length: int | None = None) -> int:
    """Return the tokens of a window that leave room for every prompt: ``length``, or the most there is."""
    room = min(window_length(compress.load(folder, prompt=path or False)) for path in prompts.values())
    if length is not None and length > room:
        raise CompressError(f"windows of {length} tokens: the longest prompt leaves room for {room}.")
    return length or room


def transfer(
    places: Sequence[Place],
    prompts: Prompts,
    texts: Mapping[str, str],
    tasks: Tasks,
    protocol: Protocol,
    store: Results,
) -> list[dict[str, Any]]:
    """Score every prompt at every place on texts (name -> file) and tasks: rows of ``prompt``, ``model``, ``text`` and metrics."""
    rows = []
    for folder in dict.fromkeys(place.folder for place in places):
        here = [place for place in places if place.folder == folder]
        bits = sorted({place.bits for place in here if place.bits is not None})
        for prompt, path in prompts.items():
            options: dict[str, Any] = {"bits": bits, "prompt": path or False, "store": store}
            scores = {
                name: evaluate_text(folder, source, protocol=protocol, **options)["bits"]
                for name, source in texts.items()
            }
            answers = evaluate_tasks(folder, tasks, **options) if tasks.names else {}
            for name in tasks.names:
                scores[name] = {at: {**row[name]["metrics"], "items": row[name]["n"]} for at, row in answers.items()}
            for place in here:
                for name, found in scores.items():
                    metrics = found.get(str(place.bits)) or next(iter(found.values()))
                    rows.append({"prompt": prompt, "model": place.label, "text": name, **metrics})
    return rows


def main(
    out: Annotated[Path, typer.Argument(help="Folder for results, transfer.json and the heat maps.")],
    model: Annotated[list[str], typer.Option(metavar="LABEL=DIR[@BITS]", help="Where to evaluate.")],
    prompt: Annotated[
        Optional[list[str]], typer.Option(metavar="LABEL=DIR", help="Adapter, or checkpoint with one.")
    ] = None,
    text: Annotated[Optional[list[str]], typer.Option(metavar="[NAME=]FILE", help="What to score; or builtin.")] = None,
    tasks: Annotated[
        str, typer.Option(help="lm-eval tasks, as for compress eval; their accuracy is another matrix.")
    ] = "",
    include: Annotated[Optional[Path], typer.Option(help="Folder of task YAML files; only folders you trust.")] = None,
    separator: Annotated[Optional[str], typer.Option(help="Divides texts into documents.")] = None,
    limit: Annotated[Optional[int], typer.Option(help="Measure on the first so many documents or items.")] = None,
    min_characters: Annotated[int, typer.Option(help="Pass over documents of this length or less.")] = 0,
    stride: Annotated[
        Optional[int], typer.Option(help="Tokens a window advances by; half its length if absent.")
    ] = None,
    truncate: Annotated[bool, typer.Option("--truncate", help="Score only the first window of each document.")] = False,
    length: Annotated[
        Optional[int], typer.Option(help="Tokens in a window; what the longest prompt leaves if absent.")
    ] = None,
    value: Annotated[str, typer.Option(help="perplexity, loss or bits_per_byte.")] = "perplexity",
) -> None:
    """Put every prompt before every model, and draw what each is worth there."""
    if not text and not tasks:
        raise CompressError("nothing to measure: give --text FILE, --tasks NAMES, or both.")
    places = [Place.parse(item) for item in model]
    prompts: dict[str, Path | None] = {NONE: None}
    for item in prompt or []:
        label, equals, folder = item.partition("=")
        prompts[label] = Path(folder if equals else item)
        if not stored_prompts(folder if equals else item):
            raise CompressError(f"prompt {item!r}: {folder or item} holds no soft prompt.")
    sources = dict(item.partition("=")[::2] if "=" in item else (Path(item).stem, item) for item in text or [])
    protocol = Protocol(separator, limit, min_characters, None, stride, truncate)
    protocol = replace(protocol, length=common_length(prompts, places[0].folder, length))
    wanted = Tasks(tuple(tasks.split(",")) if tasks else (), include, limit)
    rows = transfer(places, prompts, sources, wanted, protocol, Results(out / "results.jsonl"))
    write_atomic(out / "transfer.json", json.dumps(rows, indent=1) + "\n")
    labels = [place.label for place in places]
    for name, measure in [(name, value) for name in sources] + [(name, "acc") for name in wanted.names]:
        matrix = tables.transfer(rows, list(prompts), labels, name, measure)
        title = f"{name}: {measure.replace('_', ' ')}"
        heat_map = plots.heat_map(matrix, title, by_column=True, reverse=measure == "acc")
        plots.save(heat_map, out / f"transfer-{name}.svg")
        typer.echo(tables.markdown(matrix.table()))


if __name__ == "__main__":
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        typer.run(main)
    except CompressError as error:
        raise SystemExit(f"error: {error}") from error
