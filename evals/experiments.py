"""What tables of experiments share: rows that are kept as they come, the command line's model and texts."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from compress.errors import CompressError
from compress.evals.evaluate import Protocol
from compress.workspace import write_atomic


class Rows:
    """Results in a JSON file that grows row by row; one that is there already is not made again.

    Args:
        path: of the file, whose folder is made.
        about: what all rows have in common, kept beside the file as ``settings.json``.

    Raises:
        CompressError: the rows that are there were made with other settings, or the file is damaged.
    """

    def __init__(self, path: Path, about: Mapping[str, Any] | None = None) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self.rows: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
        except ValueError as error:
            raise CompressError(f"{path}: is not JSON ({error}); delete it to begin again.") from error
        if about is not None:
            self._keep_to(path.with_name("settings.json"), json.loads(json.dumps(about)))

    @staticmethod
    def _keep_to(path: Path, about: dict[str, Any]) -> None:
        known = json.loads(path.read_text()) if path.exists() else about
        for name in known.keys() | about.keys():
            if known.get(name) != about.get(name):
                raise CompressError(
                    f"{path.parent}: has rows made with {name} {known.get(name)!r}, not {about.get(name)!r}; choose another folder."
                )
        write_atomic(path, json.dumps(about, indent=1) + "\n")

    def get(self, key: Mapping[str, Any], make: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """The row of a key."""
        for row in self.rows:
            if all(row.get(name) == value for name, value in key.items()):
                return row
        self.rows.append({**key, **make()})
        write_atomic(self.path, json.dumps(self.rows, indent=1) + "\n")
        return self.rows[-1]


def listed(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """An option's type: comma-separated values."""
    return lambda text: [kind(part) for part in text.split(",")]


def protocol_arguments(parser: argparse.ArgumentParser) -> None:
    """How texts are cut."""
    parser.add_argument("--separator", help="divides texts into documents")
    parser.add_argument("--limit", type=int, help="measure on the first so many documents")
    parser.add_argument("--min-characters", type=int, default=0, help="pass over documents of this length or less")
    parser.add_argument("--stride", type=int, help="tokens a window advances by; half its length if absent")
    parser.add_argument("--truncate", action="store_true", help="score only the first window of each document")


def arguments_of(name: str, about: str | None, samples: int, length: int) -> argparse.ArgumentParser:
    """The command line of a table: where to, one model, a text to calibrate on and one to measure on.

    Args:
        name: of the module.
        about: its own words.
        samples: default number of calibration samples.
        length: default tokens in one.
    """
    parser = argparse.ArgumentParser(prog=f"python -m compress.evals.{name}", description=about)
    parser.add_argument("out", type=Path, help="folder for rows.json and tables")
    parser.add_argument("--model", default="builtin", help="dense model (default: builtin)")
    parser.add_argument("--calibration", help="text file to calibrate on; built-in modules if absent")
    parser.add_argument("--text", default="builtin", help="text to measure on; 'builtin' for held-out modules")
    parser.add_argument("--samples", type=int, default=samples, help="calibration samples")
    parser.add_argument("--length", type=int, default=length, help="tokens per calibration sample")
    parser.add_argument("--min-calibration-characters", type=int, default=0)
    protocol_arguments(parser)
    return parser


def calibration_of(given: argparse.Namespace) -> dict[str, Any]:
    """A recipe's ``calibration`` from the command line."""
    source: dict[str, Any] = {"text": given.calibration} if given.calibration else {"builtin": "stdlib"}
    if given.calibration:
        source |= {"separator": given.separator, "min_characters": given.min_calibration_characters}
    return {**source, "samples": given.samples, "length": given.length}


def protocol_of(given: argparse.Namespace, length: int | None = None) -> Protocol:
    """How the text is cut, from the command line."""
    return Protocol(given.separator, given.limit, given.min_characters, length, given.stride, given.truncate)


def rows_of(given: argparse.Namespace) -> Rows:
    """The rows of the command line's folder, for its model and texts."""
    about = {"model": given.model, "text": given.text, "calibration": calibration_of(given)}
    return Rows(given.out / "rows.json", {**about, "protocol": asdict(protocol_of(given))})


def value_of(given: argparse.Namespace) -> str:
    """The measure that the command line's text is told in."""
    return "bits_per_byte" if given.text == "builtin" else "perplexity"


def run(main: Callable[[], None]) -> None:
    """Call a script's ``main``: transformers is quiet, an error of the user's is one line."""
    from compress.cli.common import quiet_transformers

    quiet_transformers()
    try:
        main()
    except CompressError as error:
        raise SystemExit(f"error: {error}") from error
