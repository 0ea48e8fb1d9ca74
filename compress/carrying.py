"""Carry what blocks hand on besides the hidden states, such as shared keys and values, together with these in one tensor.

What travels from block to block is then one tensor whatever the model, [1, T, width]: it is kept, sent and has a gradient as a whole.
"""

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Item:
    """Tell where a block is given a tensor that earlier ones have made.

    Attributes:
        slot: place among the positional arguments after the hidden states, or a keyword.
        key: key of a mapping in that slot, whose values are tuples; None where the tensor itself is given.
        place: its place in that tuple, or among the values that the block before returns.
        shape: its shape, -1 for the dimension of tokens.
        dtype: what the block is given; carried as float32, which holds whole numbers up to 2^24.
    """

    slot: int | str
    key: Any
    place: int
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Load:
    """Tell what one block is given that earlier ones have made: the shape of the hidden states, and all the rest."""

    hidden: tuple[int, ...] = ()
    items: tuple[Item, ...] = ()


@dataclass(frozen=True)
class Call:
    """Hold what the model gives to one block besides the hidden states, and what that and the next one are given by blocks."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    given: Load = field(default_factory=Load)
    handed_on: Load = field(default_factory=Load)


def unpack(carried: Tensor, call: Call) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a block's call: hidden states, others by position, and by keyword."""
    load, args, kwargs = call.given, list(call.args), dict(call.kwargs)
    if not load.items:
        return carried, call.args, kwargs
    shapes = [load.hidden, *(item.shape for item in load.items)]
    hidden, *tensors = (
        _unfolded(part, shape)
        for part, shape in zip(torch.split(carried, [_width(s) for s in shapes], 2), shapes, strict=True)
    )
    mappings: dict[int | str, MutableMapping[Any, Any]] = {}
    for item, tensor in zip(load.items, tensors, strict=True):
        where: Any = kwargs if isinstance(item.slot, str) else args
        if item.key is None:
            where[item.slot] = tensor.to(item.dtype)
            continue
        if item.slot not in mappings:
            where[item.slot] = mappings[item.slot] = type(where[item.slot])()
        mapping = mappings[item.slot]
        mapping[item.key] = (*mapping.get(item.key, ()), tensor.to(item.dtype))
    return hidden, tuple(args), kwargs


def pack(output: Any, args: Sequence[Any], kwargs: Mapping[str, Any], call: Call) -> Tensor:
    """Return what the next block is given, float32, of what a block returns and has left in the mappings it was given."""
    values = output if isinstance(output, (tuple, list)) else (output,)
    load = call.handed_on
    if not load.items:
        return values[0].float()  # type: ignore[no-any-return]
    parts = [_folded(values[0], load.hidden)]
    for item in load.items:
        where: Any = kwargs if isinstance(item.slot, str) else args
        tensor = values[item.place] if item.key is None else where[item.slot][item.key][item.place]
        parts.append(_folded(tensor, item.shape))
    return torch.cat(parts, 2)


def _width(shape: tuple[int, ...]) -> int:
    return -prod(shape)


def _folded(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return a tensor as [1, T, width], float32."""
    return tensor.float().movedim(shape.index(-1), 0).flatten(1)[None]


def _unfolded(part: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Undo :func:`_folded`."""
    tokens = shape.index(-1)
    return part[0].reshape(part.shape[1], *shape[:tokens], *shape[tokens + 1 :]).movedim(0, tokens)
