"""Find and cut what structured pruning removes together: heads with their rows and columns, channels with theirs."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PretrainedConfig

from compress.config import BlockShape
from compress.passes import Block, Context
from compress.pruning.settings import Unit
from compress.shapes import groups_of, head_dim, linear_sizes, set_linear, tell_block, without
from compress.structure import Architecture, Linear

Kind = Literal["attention", "mlp"]


@dataclass(frozen=True)
class Part:
    """Hold the attention or the MLP of a block, as the G groups (heads or channels) that can be removed from it."""

    kind: Kind
    last: str  # name within the block of the linear that leads back to the residual stream
    columns: Tensor  # int64 [G, c], for each group its columns of ``last``
    rows: Mapping[str, Tensor]  # name within the block -> int64 [G, r], each group's rows of a linear before ``last``
    classes: Tensor  # int64 [G]; every class loses equally many groups. All 0 where any may go
    cost: int  # parameters that go with one group
    each: Mapping[str, int]  # what one group takes off a :class:`BlockShape`

    @property
    def count(self) -> int:
        """Return the number of groups, G."""
        return self.columns.shape[0]

    @property
    def step(self) -> int:
        """Return the number that groups go in multiples of."""
        return int(self.classes.max()) + 1

    @property
    def members(self) -> list[str]:
        """Return the names within the block of all linears that lose something."""
        return [*self.rows, self.last]

    def shape(self, before: BlockShape, removed: int) -> BlockShape:
        """Return a block's sizes after some groups have gone."""
        return without(before, **{field: removed * count for field, count in self.each.items()})


def parts_of(
    structure: Architecture, config: PretrainedConfig, shape: BlockShape, heads: Unit, biased: Collection[str]
) -> dict[Kind, Part]:
    """Return the parts of a block; attention is left out where the architecture's heads are fixed.

    Of query heads alone, every key-value head loses equally many. ``biased`` holds the names within the block of linears
    with a bias, which count in a group's cost.
    """
    dimension, hidden = head_dim(config), int(config.hidden_size)
    found: dict[Kind, Part] = {}
    if groups_of(structure).layout is not None:
        found["attention"] = _attention(structure, shape, heads, dimension, hidden, biased)
    *first, last = structure.mlp
    channels = torch.arange(shape.channels)[:, None]
    cost = (len(first) + 1) * hidden + sum(name in biased for name in first)
    zeros = torch.zeros(shape.channels, dtype=torch.long)
    found["mlp"] = Part("mlp", last, channels, dict.fromkeys(first, channels), zeros, cost, {"channels": 1})
    return found


def _attention(
    structure: Architecture, shape: BlockShape, heads: Unit, dimension: int, hidden: int, biased: Collection[str]
) -> Part:
    *first, last = structure.attention
    layout, size = groups_of(structure).layout, shape.heads * dimension
    columns = torch.arange(size).view(shape.heads, dimension)
    each = {"heads": 1}
    if layout == "stacked":
        rows = {first[0]: torch.cat([columns + part * size for part in range(3)], dim=1)}
    elif layout == "interleaved":
        rows = {first[0]: torch.arange(3 * size).view(shape.heads, 3 * dimension)}
    else:
        rows = {first[0]: columns}
    classes = torch.zeros(shape.heads, dtype=torch.long)
    if heads == "queries" and shape.queries > 1:
        classes = torch.arange(shape.heads) // shape.queries
    else:
        each = {"heads": shape.queries, "key_value_heads": 1}
        columns = columns.view(shape.key_value_heads, -1)
        classes = torch.zeros(shape.key_value_heads, dtype=torch.long)
        if layout == "separate":
            shared = torch.arange(shape.key_value_heads * dimension).view(-1, dimension)
            rows = {first[0]: columns, **dict.fromkeys(first[1:], shared)}
    lost = sum(index.shape[1] for index in rows.values())
    cost = (lost + columns.shape[1]) * hidden + sum(index.shape[1] for name, index in rows.items() if name in biased)
    return Part("attention", last, columns, rows, classes, cost, each)


def last_linear(block: Block, part: Part) -> Linear:
    """Return the linear that leads a part back to the residual stream."""
    return Linear(part.last, block.module.get_submodule(part.last))


def remaining(size: int, gone: Tensor) -> Tensor:
    """Return the indices 0 … size - 1 without some, int64, in order."""
    keep = torch.ones(size, dtype=torch.bool)
    keep[gone.flatten()] = False
    return keep.nonzero().flatten()


def cut(block: Block, part: Part, removed: Sequence[int], context: Context, last: Tensor, bias: Tensor | None) -> None:
    """Remove groups from a block in memory, and adapt its recorded sizes.

    ``last`` is the new weight of ``part.last``, [hidden, columns left], ``bias`` its new bias (None if it has none).
    """
    assert block.shape is not None
    structure, dimension = context.structure, head_dim(context.config)
    gone = torch.tensor(list(removed), dtype=torch.long)
    for name, rows in part.rows.items():
        module = block.module.get_submodule(name)
        weight, old = Linear(name, module).weight, getattr(module, "bias", None)
        keep = remaining(weight.shape[0], rows[gone]).to(weight.device)
        set_linear(module, weight[keep].clone(), None if old is None else old.data[keep].clone())
    set_linear(block.module.get_submodule(part.last), last, bias)
    block.shape = part.shape(block.shape, len(removed))
    tell_block(block.module, structure, block.shape, dimension)
    sizes = linear_sizes(structure, block.shape, dimension)
    for name in part.members:  # a declaration that does not fit its model must not pass unseen
        found = Linear(name, block.module.get_submodule(name)).shape
        assert all(size in (None, there) for size, there in zip(sizes[name], found, strict=True)), name
