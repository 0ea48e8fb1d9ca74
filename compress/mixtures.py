"""Leave experts of a mixture out: which tensors become smaller by that, and along which axis, is found by building both models."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from compress.errors import CompressError, first_line
from compress.experts import Experts
from compress.streaming import State, built
from compress.structure import Architecture, block_of
from compress.weights import Renamed

_COUNT = re.compile(r"(moe_)?(num|n)_(routed_|local_)?experts")


@dataclass(frozen=True)
class Fewer:
    """Tell how a model changes when every mixture in it has fewer experts.

    Attributes:
        config: of the smaller model.
        before: experts of every mixture.
        after: experts that stay.
        paths: full names of the modules that hold them.
        axes: full name of a router's tensor -> the axis along which it has an entry for every expert, perhaps with others after them.
        lost: how many parameters there are fewer.
    """

    config: PretrainedConfig
    before: int
    after: int
    paths: tuple[str, ...]
    axes: Mapping[str, int]
    lost: int

    def cut(self, tensors: Mapping[str, Tensor], prefix: str, kept: Sequence[int]) -> dict[str, Tensor]:
        """Return the tensors of a module, by name within it, with those of the kept experts alone; ``prefix`` is its full name and a dot."""
        found = {}
        for name, tensor in tensors.items():
            full = prefix + name
            new = _renumbered(full, self.paths, kept)
            if new is not None:
                found[new.removeprefix(prefix)] = self.rows(full, tensor, kept)
        return found

    def rows(self, name: str, tensor: Tensor, kept: Sequence[int]) -> Tensor:
        """Return a tensor of a router with the entries of the kept experts alone; any other as it is."""
        axis = self.axes.get(name)
        if axis is None:
            return tensor
        places = [*kept, *range(self.before, tensor.shape[axis])]
        return tensor.index_select(axis, torch.tensor(places, device=tensor.device))


def _renumbered(name: str, paths: Sequence[str], kept: Sequence[int]) -> str | None:
    """Return the name of a tensor where only some experts are left: None for one of another expert."""
    path = next((path for path in paths if name.startswith(f"{path}.")), None)
    place, _, rest = name.removeprefix(f"{path}.").partition(".") if path else ("", "", "")
    if not place.isdigit():
        return name
    return f"{path}.{kept.index(int(place))}.{rest}" if int(place) in kept else None


def mixtures(model: nn.Module) -> dict[str, Experts]:
    """Find the modules of a model that hold experts among which a router chooses, by full name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Experts) and module.routed}


def experts_of(config: PretrainedConfig) -> int:
    """Return how many experts every mixture of a model has, among which a router chooses.

    Raises:
        CompressError: it has none, or not in every layer as many.
    """
    counts = {module.num_experts for module in mixtures(built(config, {}, {})).values()}
    if len(counts) != 1:
        why = "layers have different numbers of them" if counts else "it has none among which a router chooses"
        raise CompressError(f"model type {config.model_type!r}: no experts can be removed: {why}.")
    return counts.pop()


def smaller(config: PretrainedConfig, before: int, after: int) -> PreTrainedModel:
    """Build an empty model with other numbers of experts; nothing else may come of them in its config.

    Raises:
        CompressError: the config has no number of experts, or transformers refuses this one.
    """
    data = config.to_dict()
    if not _set(data, before, after):
        raise CompressError(
            f"model type {config.model_type!r}: no experts can be removed: its config does not say with one number how many there are."
        )
    try:
        return built(type(config).from_dict(data), {}, {})
    except (CompressError, StrictDataclassError, ValueError, TypeError, RuntimeError) as error:
        raise CompressError(
            f"model type {config.model_type!r}: transformers builds no model of it with {after} of {before} experts ({first_line(error)})."
        ) from error


def fewer(config: PretrainedConfig, structure: Architecture, after: int) -> Fewer:
    """Find what changes in a model when every mixture has ``after`` experts.

    Raises:
        CompressError: no experts can be removed from it.
    """
    before = experts_of(config)
    model, empty = built(config, {}, {}), smaller(config, before, after)
    paths = tuple(mixtures(model))
    old, new = ({name: tuple(t.shape) for name, t in each.state_dict().items()} for each in (model, empty))
    axes = {name: _axis(old.get(name, ()), size, before - after) for name, size in new.items() if size != old.get(name)}
    staying = {_renumbered(name, paths, range(after)) for name in old} - {None}
    wrong = [name for name, axis in axes.items() if axis is None or block_of(name, structure) is None]
    if wrong or staying != new.keys():
        raise CompressError(
            f"model type {config.model_type!r}: no experts can be removed: with fewer in its config more changes than experts and what "
            f"chooses them ({min(wrong, default='some tensors go')})."
        )
    lost = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in empty.parameters())
    known = {name: axis for name, axis in axes.items() if axis is not None}
    return Fewer(empty.config, before, after, paths, known, lost)


def _set(data: dict[str, Any], before: int, after: int) -> bool:
    """Set the keys that say how many experts there are, in a config and the parts of it; tell whether there were any."""
    found = False
    for key, value in data.items():
        if isinstance(value, dict):
            found |= _set(value, before, after)
        elif _COUNT.fullmatch(str(key)) and type(value) is int and value == before:
            data[key], found = after, True
    return found


def _axis(old: tuple[int, ...], new: tuple[int, ...], fewer: int) -> int | None:
    """Find the one axis along which a shape has become shorter by a number."""
    changed = [axis for axis, (a, b) in enumerate(zip(old, new, strict=False)) if a != b]
    single = len(old) == len(new) and len(changed) == 1
    return changed[0] if single and old[changed[0]] - new[changed[0]] == fewer else None


def with_fewer(state: State, after: int) -> State:
    """Return the same tensors, cut already, as a model with fewer experts in every mixture.

    Raises:
        CompressError: the files have mixtures beyond the model, which the config would then not describe.
    """
    change = fewer(state.config, state.structure, after)
    beside = sorted(state.beside.info()) if state.beside else []
    if other := next((name for name in beside if ".experts." in name), None):
        raise CompressError(
            f"the files have experts beyond the model ({other}) that its config tells the number of too, so none can be removed "
            "from the model; remove those tensors from the files first."
        )
    names = {name: name for name in state.source.info() if _renumbered(name, change.paths, range(after)) == name}
    left = {n: why for n, why in state.structure.left.items() if _renumbered(n, change.paths, range(after)) == n}
    structure = replace(state.structure, left=left)
    return replace(state, source=Renamed(state.source, names), config=change.config, structure=structure)
