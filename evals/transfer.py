"""Soft prompts from here on models over there: ``python -m compress.evals.transfer OUT --help``.

Every prompt is put before every model (at its width) and scored on every text, in windows of one length that leave room for
the longest prompt, so that all entries are over the same tokens. Rows go to ``OUT/transfer.json`` as they come: a stopped
run continues. ``OUT/transfer-TEXT.svg`` has the heat map.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

import compress
from compress.adapters import attach_prompts, text_length
from compress.errors import CompressError
from compress.evals import experiments, plots, tables
from compress.evals.experiments import Rows
from compress.evals.perplexity import Score, Text, score
from compress.evals.tasks import Tasks, evaluate_tasks
from compress.evals.text import Protocol, documents_of, refuse_calibration_text, windows
from compress.loading import load_tokenizer
from compress.sidecars import stored_prompts

NONE = "none"


@dataclass(frozen=True)
class Place:
    """A model at a width.

    Attributes:
        label: its name in the matrix.
        folder: checkpoint or dense model.
        bits: width; None for a dense model, or all that is stored.
    """

    label: str
    folder: str
    bits: int | None = None

    @classmethod
    def parse(cls, given: str) -> Place:
        """``LABEL=DIR``, ``LABEL=DIR@BITS``; without a label the rest is one.

        Raises:
            CompressError: the width is not a number.
        """
        label, equals, rest = given.partition("=")
        folder, at, bits = (rest if equals else given).partition("@")
        if at and not bits.isdigit():
            raise CompressError(f"model {given!r}: write it as LABEL=DIR or LABEL=DIR@BITS.")
        return cls(label if equals else given, folder, int(bits) if at else None)


class Models:
    """Loads models by place; the last one stays, as neighbours often differ in their width only."""

    def __init__(self) -> None:
        self._folder: str | None = None
        self._model: PreTrainedModel | None = None

    def open(self, place: Place) -> PreTrainedModel:
        """The model of a place, at its width."""
        if self._folder != place.folder or self._model is None:
            self._folder, self._model = place.folder, compress.load(place.folder, dtype=torch.float32)
        if place.bits is not None:
            compress.set_bits(self._model, place.bits)
        return self._model

    def forget(self) -> None:
        """Load anew next time: what was loaded has been changed."""
        self._folder = self._model = None


@contextmanager
def with_prompt(model: PreTrainedModel, prompt: Path | None) -> Iterator[nn.Module]:
    """The model with a prompt, for the length of a ``with``."""
    yield model if prompt is None else attach_prompts(model, prompt)


def common_length(prompts: Mapping[str, Path | None], model: PreTrainedModel, length: int | None = None) -> int:
    """Tokens in a window that leave room for every prompt: ``length`` if it is that short, the most there is if None.

    Raises:
        CompressError: ``length`` leaves no room for one of the prompts.
    """
    rooms = [2048]
    for path in prompts.values():
        with with_prompt(model, path) as prompted:
            rooms.append(text_length(prompted) or 2048)
    if length is not None and length > min(rooms):
        raise CompressError(f"windows of {length} tokens: the longest prompt leaves room for {min(rooms)}.")
    return length or min(rooms)


def read_text(source: str, folder: str, protocol: Protocol) -> Text:
    """A text cut into windows for the model of a folder.

    Raises:
        CompressError: it is what the model was calibrated or trained on.
    """
    documents, digest = documents_of(source, protocol)
    refuse_calibration_text(folder, digest)
    return windows(documents, load_tokenizer(folder), protocol)


def fill(
    rows: Rows, models: Models, places: Sequence[Place], prompts: Mapping[str, Path | None], texts: Mapping[str, Text]
) -> None:
    """Score every prompt at every place on every text; rows that are there are kept."""
    for place in places:
        for label, path in prompts.items():
            for name, text in texts.items():
                key = {"prompt": label, "model": place.label, "text": name}
                rows.get(key, lambda place=place, path=path, text=text: measure(models, place, path, text).json())  # type: ignore[misc]


def measure(models: Models, place: Place, prompt: Path | None, text: Text) -> Score:
    """One entry."""
    with with_prompt(models.open(place), prompt) as model:
        return score(model, text)  # type: ignore[arg-type]


def fill_tasks(rows: Rows, places: Sequence[Place], prompts: Mapping[str, Path | None], tasks: Tasks) -> None:
    """The same for lm-eval tasks: each in one row of its metrics."""
    for place in places:
        for label, path in prompts.items():
            for name in tasks.names:
                key = {"prompt": label, "model": place.label, "text": name}
                rows.get(key, lambda place=place, path=path, name=name: _task(place, path, name, tasks))  # type: ignore[misc]


def _task(place: Place, prompt: Path | None, name: str, tasks: Tasks) -> dict[str, Any]:
    widths = None if place.bits is None else [place.bits]
    found = evaluate_tasks(place.folder, replace(tasks, names=(name,)), widths, prompt=prompt or False)
    row: dict[str, Any] = next(iter(found.values()))[name]
    return {**row["metrics"], "items": row["n"]}


def matrix(
    rows: Sequence[Mapping[str, Any]], prompts: Sequence[str], places: Sequence[str], text: str, value: str
) -> list[list[float | None]]:
    """Prompts down, models across; None where nothing was measured."""
    found = {(row.get("prompt"), row.get("model"), row.get("text")): row for row in rows}
    return [[found.get((prompt, place, text), {}).get(value) for place in places] for prompt in prompts]


def markdown(values: list[list[float | None]], down: Sequence[str], across: Sequence[str], corner: str) -> str:
    """The same as a table."""
    rows = [[label, *("–" if v is None else f"{v:.4g}" for v in row)] for label, row in zip(down, values, strict=True)]
    return tables.markdown(tables.Table([corner, *across], rows)) + "\n"


def main() -> None:
    """Fill the matrix of the command line."""
    given = arguments_of().parse_args()
    places = [Place.parse(item) for item in given.model]
    if not given.text and not given.tasks:
        raise CompressError("nothing to measure: give --text FILE, --tasks NAMES, or both.")
    prompts: dict[str, Path | None] = {NONE: None}
    for item in given.prompt:
        label, equals, folder = item.partition("=")
        path = Path(folder if equals else item)
        if not stored_prompts(path):
            raise CompressError(f"prompt {item!r}: {path} holds no soft prompt.")
        prompts[label] = path
    models = Models()
    length = common_length(prompts, models.open(places[0]), given.length)
    protocol = experiments.protocol_of(given, length)
    rows = Rows(given.out / "transfer.json", {"protocol": asdict(protocol)})
    texts = dict(item.partition("=")[::2] if "=" in item else (Path(item).stem, item) for item in given.text)
    prepared = {name: read_text(source, places[0].folder, protocol) for name, source in texts.items()}
    fill(rows, models, places, prompts, prepared)
    tasks = Tasks(tuple(given.tasks.split(",")) if given.tasks else (), given.include, given.limit)
    fill_tasks(rows, places, prompts, tasks)
    across = [place.label for place in places]
    for name, value in [(name, given.value) for name in prepared] + [(name, "acc") for name in tasks.names]:
        values, title = matrix(rows.rows, list(prompts), across, name, value), f"{name}: {value.replace('_', ' ')}"
        plots.heat_map(values, list(prompts), across, title, given.out / f"transfer-{name}.svg", reverse=value == "acc")
        print(markdown(values, list(prompts), across, title))
    print(json.dumps({"windows": length, "rows": str(rows.path)}))


def arguments_of() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m compress.evals.transfer", description=__doc__)
    parser.add_argument("out", type=Path, help="folder for transfer.json and the heat maps")
    parser.add_argument("--model", action="append", required=True, metavar="LABEL=DIR[@BITS]", help="where to evaluate")
    parser.add_argument(
        "--prompt", action="append", default=[], metavar="LABEL=DIR", help="adapter, or checkpoint with one"
    )
    parser.add_argument("--text", action="append", default=[], metavar="[NAME=]FILE", help="what to score; or builtin")
    parser.add_argument("--tasks", help="lm-eval tasks, as for compress eval; their accuracy is another matrix")
    parser.add_argument("--include", type=Path, help="folder of task YAML files; only folders you trust")
    experiments.protocol_arguments(parser)
    parser.add_argument("--length", type=int, help="tokens in a window; what the longest prompt leaves if absent")
    parser.add_argument("--value", default="perplexity", choices=("perplexity", "loss", "bits_per_byte"))
    return parser


if __name__ == "__main__":
    experiments.run(main)
