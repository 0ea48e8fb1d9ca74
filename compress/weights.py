"""Read tensors of a Hugging Face folder by name, one at a time; torch is imported for tensors, and not for headers."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from safetensors import SafetensorError, safe_open

from compress.errors import CompressError

if TYPE_CHECKING:
    from torch import Tensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# By safetensors' name: torch's, and the bytes of one number.
_DTYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "F8_E8M0": ("float8_e8m0fnu", 1),
    "BOOL": ("bool", 1),
}


@dataclass(frozen=True)
class TensorInfo:
    """Hold what a file's header says of a stored tensor: ``dtype`` by its name in torch, ``itemsize`` in bytes."""

    shape: tuple[int, ...]
    dtype: str
    itemsize: int
    file: Path

    @property
    def nbytes(self) -> int:
        """Return the bytes of its data on disk."""
        return math.prod(self.shape) * self.itemsize


class TensorSource(Protocol):
    """Offer named tensors that can be looked at before they are read."""

    def info(self) -> Mapping[str, TensorInfo]:
        """Describe every tensor there is, by name."""

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Copy some tensors to the CPU."""


def refuse_elsewhere(path: Path, names: Iterable[str]) -> None:
    """Refuse a file of a checkpoint that names files outside its folder."""
    for name in names:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise CompressError(f"{path}: names {name!r}, which is not in its folder; do not trust this checkpoint.")


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Describe what a safetensors file holds, without reading its data; refuse one that is damaged."""
    try:
        with safe_open(file, framework="np") as handle:
            slices = ((name, handle.get_slice(name)) for name in handle.keys())  # noqa: SIM118
            return {n: TensorInfo(tuple(part.get_shape()), *_DTYPES[part.get_dtype()], file) for n, part in slices}
    except KeyError as error:
        raise CompressError(f"{file}: holds a tensor of dtype {error}, which is not supported.") from error
    except (SafetensorError, OSError) as error:
        raise CompressError(f"{file}: not a readable safetensors file ({error}); fetch or write it again.") from error


def read_tensors(file: Path, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Copy tensors out of one file (all of them by default), so that nothing stays mapped."""
    with safe_open(file, framework="pt") as handle:
        wanted = handle.keys() if names is None else names
        return {name: handle.get_tensor(name).clone() for name in wanted}


def shard_files(folder: Path, index_name: str = INDEX) -> list[Path]:
    """List the safetensors files of a model folder, and refuse a folder without, or with some missing."""
    index = folder / index_name
    if index_name == INDEX and (folder / SINGLE).is_file():  # transformers takes it before an index, too
        return [folder / SINGLE]
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            refuse_elsewhere(index, names)
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise CompressError(f"{index}: not a safetensors index ({error}).") from error
        if not names:
            raise CompressError(f"{index}: names no file; fetch or write the model again.")
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise CompressError(f"{folder}: {index.name} names {missing[0]}, which is not there; fetch it again.")
        return [folder / name for name in names]
    if any(folder.glob("pytorch_model*.bin")):
        raise CompressError(
            f"{folder}: has pickled weights only (pytorch_model.bin), which can run code when opened; load it once "
            "with transformers and save_pretrained it to get safetensors."
        )
    raise CompressError(f"{folder}: no model.safetensors and no {index_name}; is this a Hugging Face model folder?")


class Checkpoint:
    """Read tensors of a model folder; ``names`` has those they are to bear -> those they may have in files, likeliest first."""

    def __init__(self, folder: Path, names: Mapping[str, Sequence[str]] | None = None, index_name: str = INDEX) -> None:
        self.folder, self.files = folder, shard_files(folder, index_name)
        stored = _headers(self.files)
        options = {name: (name,) for name in stored} if names is None else names
        found = {name: next((option for option in some if option in stored), None) for name, some in options.items()}
        self._stored_name = {name: option for name, option in found.items() if option is not None}
        self._info = {name: stored[option] for name, option in self._stored_name.items()}

    def info(self) -> Mapping[str, TensorInfo]:
        """Describe every tensor there is, by the name to read it by."""
        return self._info

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Copy some tensors, under the names asked for."""
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self._info[name].file, []).append(name)
        result: dict[str, Tensor] = {}
        for file, wanted in by_file.items():
            tensors = read_tensors(file, [self._stored_name[name] for name in wanted])
            result |= {name: tensors[self._stored_name[name]] for name in wanted}
        return result

    def sha256(self) -> dict[str, str]:
        """Return the digest of every file that decides what the model is: weights and configuration."""
        config = [path for path in (self.folder / "config.json",) if path.exists()]
        return {path.name: sha256_of(path) for path in (*config, *self.files)}


def _headers(files: Iterable[Path]) -> dict[str, TensorInfo]:
    """Describe what several files hold; a tensor in a later file hides an earlier one of the same name."""
    return {name: info for file in files for name, info in read_header(file).items()}


class Renamed:
    """Read the same tensors under other names: new name -> old name; tensors that are not listed are not there."""

    def __init__(self, below: TensorSource, names: Mapping[str, str]) -> None:
        self.below, self.names = below, names

    def info(self) -> Mapping[str, TensorInfo]:
        """Describe every tensor, by its new name."""
        info = self.below.info()
        return {new: info[old] for new, old in self.names.items()}

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Copy some tensors, by their new names."""
        wanted = {new: self.names[new] for new in names}
        tensors = self.below.read(set(wanted.values()))
        return {new: tensors[old] for new, old in wanted.items()}


class Joined:
    """Read the tensors of two sources that have no name in common."""

    def __init__(self, first: TensorSource, second: TensorSource) -> None:
        self._sources = first, second

    def info(self) -> Mapping[str, TensorInfo]:
        """Describe every tensor of both."""
        first, second = self._sources
        return {**first.info(), **second.info()}

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Copy some tensors of either."""
        result, wanted = dict[str, "Tensor"](), set(names)
        for source in self._sources:
            result |= source.read(sorted(wanted & source.info().keys()))
        return result


class Overlay:
    """Lay the files of a pass's finished units over the tensors that were there before; some names exist no longer."""

    def __init__(self, below: TensorSource, files: Iterable[Path], removed: Iterable[str] = ()) -> None:
        self.below, self._own = below, _headers(files)
        self._removed = frozenset(removed) - self._own.keys()

    def info(self) -> Mapping[str, TensorInfo]:
        """Describe every tensor that exists now."""
        kept = {name: info for name, info in self.below.info().items() if name not in self._removed}
        return kept | self._own

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Copy some tensors, each from the newest file that has it."""
        wanted = list(names)
        if gone := self._removed & set(wanted):
            raise KeyError(f"{min(gone)} was removed by a pass")
        result = self.below.read([name for name in wanted if name not in self._own])
        for name in wanted:
            if name in self._own:
                result |= read_tensors(self._own[name].file, [name])
        return result


def sha256_of(path: Path) -> str:
    """Return the hex digest of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while chunk := handle.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()
