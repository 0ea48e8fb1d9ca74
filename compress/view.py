"""A second reading of a loaded model, at other bits, that shares every tensor with it: its own low planes as a draft."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from compress.config import Bits
from compress.decoding import JOINED
from compress.loading import set_bits
from compress.quant.embedding import BitPlaneHead
from compress.quant.linear import PackedModule

DRAFTED = 4  # tokens, at first: transformers drafts more where all were right and fewer where not


def view(model: PreTrainedModel, bits: Bits, exact: bool | None = None) -> PreTrainedModel:
    """Return a model of the same tensors that is read at other bits, for drafts of what ``model`` then checks.

    ``model.generate(tokens, assistant_model=compress.view(model, bits=3))`` writes what ``model.generate(tokens)`` does. Beyond
    ``model``, a view takes the memory of its cache of keys and values, and of what a backend derives from codebooks at its bits.
    It is of the tensors that the model has now: moved or cast later, the two part.

    Args:
        model: loaded by :func:`compress.load` or ``from_pretrained``, with as many bits as both need.
        bits: as for :func:`compress.set_bits`.
        exact: as for :func:`compress.load`; as the model has it if None.

    Raises:
        CompressError: the model has no packed modules, or the bits were not loaded.
    """
    made = _twin(model, {})
    set_bits(made, bits)
    for module in made.modules():
        if isinstance(module, PackedModule) and exact is not None:
            module.exact = exact
    made.generation_config = copy.deepcopy(model.generation_config)
    made.generation_config.num_assistant_tokens = DRAFTED
    return made


def _twin(module: Any, made: dict[int, nn.Module]) -> Any:
    """Copy the tree of modules and none of its tensors; a module that is there twice stays one."""
    if id(module) in made:
        return made[id(module)]
    twin = made[id(module)] = module.__class__.__new__(module.__class__)
    held = module.__getstate__() if isinstance(module, PackedModule) else module.__dict__
    own = {name: copy.copy(value) if isinstance(value, (dict, set)) else value for name, value in held.items()}
    own.pop(JOINED, None)
    own["_modules"] = {name: None if child is None else _twin(child, made) for name, child in module._modules.items()}
    twin.__dict__.update(own)
    if isinstance(twin, BitPlaneHead):
        twin._of = (_twin(module.embedding, made),)
    return twin
