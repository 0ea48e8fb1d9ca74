"""Keep finished work on disk, so that a killed run continues where it was.

A unit (one pass on one block, or one step of a statistic) is one safetensors file, written beside its final name and moved
there when complete. It lies in a folder named by a digest of everything its content depends on (settings, model, data, all that
was done before): a unit that exists is right, and two recipes that share a beginning share it.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from compress.errors import CompressError
from compress.ranks import ALONE, Ranks
from compress.weights import read_tensors

Record = dict[str, Any]


def digest(*parts: Any) -> str:
    """Return the hex digest of JSON-serialisable parts."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


@contextmanager
def _atomic(path: Path) -> Iterator[Path]:
    """Give a place for a file, which is moved to its own, complete and on the disk, at the end of the ``with``."""
    partial = path.with_name(path.name + ".partial")
    yield partial
    with partial.open("rb") as handle:
        os.fsync(handle.fileno())
    partial.replace(path)


def write_atomic(path: Path, text: str) -> None:
    """Write a text file so that it is there whole or not at all."""
    with _atomic(path) as partial:
        partial.write_text(text, encoding="utf-8")


def save_atomic(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file so that it is there whole or not at all."""
    with _atomic(path) as partial:
        partial.touch()
        mode = partial.stat().st_mode  # the user's umask; safetensors would leave the file to its owner alone
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata=metadata)
        partial.chmod(mode)


@dataclass(frozen=True)
class Stage:
    """Keep the units of one pass or statistic; ``key`` is the digest of all they depend on.

    The main one of ``ranks`` writes, while the others, who call the same methods, wait.
    """

    folder: Path
    key: str
    ranks: Ranks = ALONE

    def path(self, unit: str) -> Path:
        """Return the place of a unit's file."""
        return self.folder / f"{unit}.safetensors"

    def record(self, unit: str) -> Record | None:
        """Read the record of a finished unit; return None where it is not finished or its file is damaged."""
        try:
            with safe_open(self.path(unit), framework="pt") as handle:
                return json.loads(handle.metadata()["record"])  # type: ignore[no-any-return]
        except (FileNotFoundError, SafetensorError, TypeError, KeyError, ValueError):
            return None

    def load(self, unit: str, samples: Collection[int] | None = None) -> dict[str, Tensor]:
        """Read the tensors of a finished unit; or only those of some samples, whose places end their names."""
        with safe_open(self.path(unit), framework="pt") as handle:
            names = list(handle.keys())
        own = [name for name in names if samples is None or int(name.rpartition("-")[2]) in samples]
        return read_tensors(self.path(unit), own)

    def save(self, unit: str, tensors: Mapping[str, Tensor], record: Record | None = None) -> None:
        """Finish a unit. Its record must not hold times: equal work gives equal bytes."""
        if self.ranks.main:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_atomic(self.path(unit), tensors, {"record": json.dumps(record or {}, sort_keys=True)})
        self.ranks.wait()

    def save_joined(self, unit: str, tensors: Mapping[str, Tensor]) -> None:
        """Finish a unit of what every process has of it."""
        self.save(unit, self.ranks.joined(tensors))

    def discard(self, unit: str) -> None:
        """Forget a unit that later ones have made superfluous."""
        if self.ranks.main:
            self.path(unit).unlink(missing_ok=True)


class Workspace:
    """Keep stages in a folder, used by one process at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def stage(self, label: str, *parts: Any) -> Stage:
        """Return the stage whose units depend on ``parts`` (JSON-serialisable)."""
        key = digest(label, *parts)
        return Stage(self.folder / f"{label}-{key[:16]}", key)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the workspace against other processes for the length of a ``with``; one without a unit is removed then."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise CompressError(
                    f"{self.folder}: another run is working there; wait for it, or choose another --workspace."
                ) from None
            try:
                yield
            finally:
                if self.folder.is_dir() and all(path.name.startswith("lock") for path in self.folder.iterdir()):
                    self.remove()

    def remove(self) -> None:
        """Delete it with all its units."""
        shutil.rmtree(self.folder, ignore_errors=True)
