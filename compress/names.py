"""Read a model's tensors out of files that may have other names, parts and orders for them.

What a file calls a tensor, and how several become one, is transformers' own knowledge: the table by which ``from_pretrained``
converts on loading.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from compress.errors import CompressError, first_line
from compress.structure import Architecture
from compress.weights import Checkpoint, TensorInfo


@dataclass
class _Conversion:
    """Hold one step that makes tensors of the model out of tensors of the files."""

    converter: WeightConverter
    first: str  # the first tensor it makes
    parts: list[tuple[str, str]] = field(default_factory=list)  # (pattern of the converter, tensor in the files)


class NamedTensors:
    """Read the tensors of ``expected``, name -> shape, of a model, from the files of a folder."""

    def __init__(
        self,
        files: Checkpoint,
        model: PreTrainedModel,
        expected: Mapping[str, tuple[int, ...]],
        structure: Architecture,
    ) -> None:
        self.files, self._model = files, model
        declared = {structure.stored_name(name): name for name in expected}
        self._plain: dict[str, str] = {}
        self._made: dict[str, _Conversion] = {}
        used = set[str]()
        table = get_model_conversion_mapping(model)
        renamings = [entry for entry in table if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in table if isinstance(entry, WeightConverter)]
        if _exact(files, expected, model):
            converters = []
        by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
        steps: dict[str, _Conversion] = {}
        prefix, known = str(model.base_model_prefix), dict(expected)
        for stored in sorted(files.info(), key=dot_natural_key):
            name, pattern = rename_source_key(stored, renamings, converters, prefix, known)
            if name in expected and pattern is not None:
                steps.setdefault(name, _Conversion(by_pattern[pattern], name)).parts.append((pattern, stored))
                continue
            # Our own checkpoints have the names of modules, those of base models lack a prefix, or have one in excess.
            options = (name, stored, declared.get(stored, ""), f"{prefix}.{stored}", stored.removeprefix(f"{prefix}."))
            if found := next((option for option in options if option in expected), ""):
                self._plain.setdefault(found, stored)
        for step in steps.values():
            for name in _targets(step):
                if name in expected and name not in self._plain:
                    self._made[name] = step
                    used |= {stored for _, stored in step.parts}
        for (
            name,
            origin,
        ) in model.all_tied_weights_keys.items():  # two names of one tensor: files may have the other one
            if origin in known and origin not in self._plain and name in self._plain:
                self._plain[origin] = self._plain[name]
        self.unused = tuple(name for name in files.info() if name not in used and name not in self._plain.values())
        stored_info = files.info()
        self._info = {name: stored_info[stored] for name, stored in self._plain.items()}
        for name, step in self._made.items():
            part = stored_info[step.parts[0][1]]
            self._info[name] = TensorInfo(tuple(expected[name]), part.dtype, part.itemsize, part.file)

    def info(self) -> Mapping[str, TensorInfo]:
        """Describe every tensor, by its name in the model; the shape of one that is put together is the model's own."""
        return self._info

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Copy some tensors, as the model has them."""
        wanted = list(names)
        plain = {name: self._plain[name] for name in wanted if name in self._plain}
        tensors = self.files.read(set(plain.values()))
        result = {name: tensors[stored] for name, stored in plain.items()}
        steps = {id(self._made[name]): self._made[name] for name in wanted if name not in plain}
        for step in steps.values():
            made = self._convert(step)
            result |= {name: made[name] for name in wanted if self._made.get(name) is step and name in made}
        for name in wanted:
            if name not in result:
                raise CompressError(f"{self.files.folder}: tensor {name!r} of the model is not in its files.")
            if tuple(result[name].shape) != self._info[name].shape:
                raise CompressError(
                    f"tensor {name!r} is {list(result[name].shape)} in the files of {self.files.folder}, but config.json makes it "
                    f"{list(self._info[name].shape)}; the two do not belong together."
                )
        return result

    def _convert(self, step: _Conversion) -> dict[str, Tensor]:
        converter: Any = copy.deepcopy(step.converter)
        tensors = self.files.read([stored for _, stored in step.parts])
        for pattern, stored in step.parts:
            converter.add_tensor(step.first, stored, pattern, tensors[stored])
        try:
            found = converter.convert(step.first, model=self._model, config=self._model.config)
        except Exception as error:  # parts that are missing or do not fit each other
            raise CompressError(
                f"{self.files.folder}: {step.first} cannot be put together ({first_line(error)})."
            ) from error
        made = found[0] if isinstance(found, tuple) else found  # with a list of errors in transformers 5.0
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def sha256(self) -> dict[str, str]:
        """Return the digest of every file that decides what the model is."""
        return self.files.sha256()

    @property
    def folder(self) -> Path:
        """Return the folder of the files."""
        return self.files.folder


def _exact(files: Checkpoint, expected: Mapping[str, tuple[int, ...]], model: PreTrainedModel) -> bool:
    """Tell whether files have every tensor as the model has it, as our own do."""
    stored, tied = files.info(), model.all_tied_weights_keys
    return all(name in tied or (name in stored and stored[name].shape == size) for name, size in expected.items())


def _targets(step: _Conversion) -> list[str]:
    """Return the names of all tensors that a step makes."""
    first, *others = step.converter.target_patterns
    return [step.first, *(step.first.replace(first, other) for other in others)]
