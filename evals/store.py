"""Keep measurements: one JSON line each, in ``DIR/report/results.jsonl`` of a checkpoint.

A measurement that is there is not made again, so an interrupted evaluation continues. The manifest does not cover the file:
``verify`` is about what was written, not about what was found out later.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from compress.errors import CompressError
from compress.manifest import read_manifest
from compress.sidecars import ADAPTER_FOLDER, PEFT_WEIGHTS, PROMPTS_FOLDER, Choice, find_adapter, find_prompts
from compress.version import __version__
from compress.weights import Checkpoint, sha256_of
from compress.workspace import digest

FOLDER, FILE = "report", "results.jsonl"


@dataclass(frozen=True)
class Key:
    """Tell whether two measurements are the same."""

    kind: str  # text, task, agreement, robustness, bench, sample or another word
    name: str  # of the text, the task, …
    model: str  # digest of the model's files, :func:`identity`
    width: str  # number of bits, "4" or "3.5", or "dense"
    prompt: str | None = None  # name of the soft prompt in front, or of another unusual adapter
    settings: Mapping[str, Any] = field(default_factory=dict)  # what else changes the figures: data, protocol, dtype


def _same(row: Mapping[str, Any]) -> str:
    return json.dumps([row[part.name] for part in fields(Key)], sort_keys=True)


class Results:
    """Hold the measurements of a file of JSON lines, or of memory alone, by key; the last of equal keys counts.

    Raises:
        CompressError: a line is not one of ours. A last line without its end, as a kill leaves it, is passed over.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._rows: dict[str, dict[str, Any]] = {}
        if path is not None and path.is_file():
            text = path.read_bytes()
            for number, line in enumerate(text[: text.rfind(b"\n") + 1].splitlines(), 1):
                try:
                    row = json.loads(line)
                    self._rows[_same(row)] = row
                except (ValueError, KeyError, TypeError) as error:
                    raise CompressError(f"{path}, line {number}: is not a measurement; delete that line.") from error

    def rows(self, kind: str | None = None) -> list[dict[str, Any]]:
        """Return all measurements, or those of a kind, oldest first."""
        return [row for row in self._rows.values() if kind in (None, row["kind"])]

    def find(self, key: Key) -> dict[str, Any] | None:
        """Return the measurement with this key; None if there is none."""
        return self._rows.get(_same(asdict(key)))

    def add(self, key: Key, metrics: Mapping[str, Any], **details: Any) -> dict[str, Any]:
        """Keep a measurement, and plain data beside its metrics, in memory and as a line of the file."""
        row = {**asdict(key), "metrics": dict(metrics), **details, "compress_version": __version__}
        self._rows[_same(row)] = row
        if self.path is not None:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("a+b") as file:
                    fcntl.flock(file, fcntl.LOCK_EX)  # another process may be measuring for the same file
                    file.seek(0)
                    file.truncate(file.read().rfind(b"\n") + 1)  # a kill can leave a last line unfinished
                    file.write(json.dumps(row).encode() + b"\n")
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                raise CompressError(
                    f"{self.path}: cannot be written ({error.strerror}); say where results are to be kept with --results FILE."
                ) from error
        return row


def results_of(folder: str | Path, path: Path | None = None) -> Results:
    """Open the results of a model: the file that is named, a checkpoint's own, or memory for a dense model."""
    if path is None and read_manifest(Path(folder)) is not None:
        path = Path(folder) / FOLDER / FILE
    return Results(path)


def identity(folder: str | Path) -> str:
    """Return the digest of what a model is: of its manifest's files, of a dense folder's files, or a hub id's commit."""
    manifest = read_manifest(Path(folder))
    if manifest is not None:
        return digest(manifest["files"])
    if Path(folder).is_dir():
        return digest(Checkpoint(Path(folder)).sha256())
    if Path(folder).is_file():  # GGUF
        return digest({Path(folder).name: sha256_of(Path(folder))})
    return str(getattr(AutoConfig.from_pretrained(str(folder)), "_commit_hash", None) or folder)


def prompt_key(
    folder: str | Path, prompt: bool | str | Path, settings: Mapping[str, Any], adapter: Choice = None
) -> tuple[str | None, dict[str, Any]]:
    """Return name and settings, with digests, of a measurement with soft prompts in front, or with an adapter, for :class:`Key`.

    The checkpoint's own adapter does not show in the name: its absence does.
    """
    names, settings = [], dict(settings)
    if prompt:
        found = find_prompts(folder, prompt)
        settings["prompt"] = {str(bits or "all"): sha256_of(path / PEFT_WEIGHTS) for bits, path in found.items()}
        names.append("soft prompt" if prompt is True else f"prompt of {_owner(prompt)}")
    adapted = find_adapter(folder, adapter)
    if adapted is not None:
        settings["adapter"] = sha256_of(adapted / PEFT_WEIGHTS)
        if isinstance(adapter, str | Path):
            names.append(f"adapter of {_owner(adapter)}")
    elif find_adapter(folder):
        names.append("without adapter")
    return ", ".join(names) or None, settings


def _owner(sidecar: str | Path) -> str:
    """Name the checkpoint that a prompt's or an adapter's folder lies in, or the folder itself."""
    place = Path(sidecar)
    return place.resolve().parent.name if place.name in (PROMPTS_FOLDER, ADAPTER_FOLDER) else place.name


def dense_identity(manifest: Mapping[str, Any]) -> str:
    """Return :func:`identity` of the dense model that a checkpoint was made from."""
    return digest(manifest["model_sha256"])


def versions(packages: Sequence[str] = ("torch", "transformers")) -> dict[str, str]:
    """Return the versions of installed packages."""
    return {package: version(package) for package in packages}
