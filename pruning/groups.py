"""What structured pruning removes together: heads with their rows and columns, channels with theirs."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PretrainedConfig

from compress.config import BlockShape
from compress.passes import Block
from compress.pruning.settings import Unit
from compress.shapes import groups_of, head_dim, linear_sizes, set_linear, tell_block, without
from compress.structure import Architecture, Linear

Kind = Literal["attention", "mlp"]


@dataclass(frozen=True)
class Part:
    """The attention or the MLP of a block, as units each of which can be removed.

    Attributes:
        kind: which of the two.
        last: inner name of the linear that leads back to the residual stream.
        columns: int64 [U, c], for each unit its columns of ``last``.
        rows: inner name -> int64 [U, r], its rows of the linears before.
        classes: int64 [U]; units of every class are removed in equal numbers. All 0 where any may go.
        cost: parameters that go with one unit.
        each: what one unit takes off a :class:`BlockShape`.
    """

    kind: Kind
    last: str
    columns: Tensor
    rows: Mapping[str, Tensor]
    classes: Tensor
    cost: int
    each: Mapping[str, int]

    @property
    def units(self) -> int:
        """How many there are."""
        return self.columns.shape[0]

    @property
    def step(self) -> int:
        """Units go in multiples of this."""
        return int(self.classes.max()) + 1

    @property
    def members(self) -> list[str]:
        """Inner names of all linears that lose something."""
        return [*self.rows, self.last]

    def shape(self, before: BlockShape, removed: int) -> BlockShape:
        """A block's sizes after some units have gone."""
        return without(before, **{field: removed * count for field, count in self.each.items()})


def parts_of(
    structure: Architecture, config: PretrainedConfig, shape: BlockShape, unit: Unit, biased: Collection[str]
) -> dict[Kind, Part]:
    """The parts of a block of some shape; attention is left out where the architecture's heads are fixed.

    Args:
        structure: of the model.
        config: of the model, for the sizes that pruning leaves alone.
        shape: of the block.
        unit: what an attention unit is: a key-value head with its query heads, or a query head, of which every key-value
            head then loses as many.
        biased: inner names of linears with a bias, for the cost.
    """
    dimension, hidden = head_dim(config), int(config.hidden_size)
    found: dict[Kind, Part] = {}
    if groups_of(structure).layout is not None:
        found["attention"] = _attention(structure, shape, unit, dimension, hidden, biased)
    *first, last = structure.mlp
    channels = torch.arange(shape.channels)[:, None]
    cost = (len(first) + 1) * hidden + sum(name in biased for name in first)
    zeros = torch.zeros(shape.channels, dtype=torch.long)
    found["mlp"] = Part("mlp", last, channels, dict.fromkeys(first, channels), zeros, cost, {"channels": 1})
    return found


def _attention(
    structure: Architecture, shape: BlockShape, unit: Unit, dimension: int, hidden: int, biased: Collection[str]
) -> Part:
    *first, last = structure.attention
    layout, width = groups_of(structure).layout, shape.heads * dimension
    heads = torch.arange(width).view(shape.heads, dimension)
    each = {"heads": 1}
    if layout == "stacked":
        rows = {first[0]: torch.cat([heads + part * width for part in range(3)], dim=1)}
    elif layout == "interleaved":
        rows = {first[0]: torch.arange(3 * width).view(shape.heads, 3 * dimension)}
    else:
        rows = {first[0]: heads}
    columns, classes = heads, torch.zeros(shape.heads, dtype=torch.long)
    if unit == "queries" and shape.queries > 1:
        classes = torch.arange(shape.heads) // shape.queries
    else:
        each = {"heads": shape.queries, "key_value_heads": 1}
        columns = heads.view(shape.key_value_heads, -1)
        classes = torch.zeros(shape.key_value_heads, dtype=torch.long)
        if layout == "separate":
            shared = torch.arange(shape.key_value_heads * dimension).view(-1, dimension)
            rows = {first[0]: columns, **dict.fromkeys(first[1:], shared)}
    lost = sum(index.shape[1] for index in rows.values())
    cost = (lost + columns.shape[1]) * hidden + sum(index.shape[1] for name, index in rows.items() if name in biased)
    return Part("attention", last, columns, rows, classes, cost, each)


def remaining(size: int, gone: Tensor) -> Tensor:
    """Indices 0 … size - 1 without some, in order."""
    keep = torch.ones(size, dtype=torch.bool)
    keep[gone.flatten()] = False
    return keep.nonzero().flatten()


def cut(
    block: Block, part: Part, removed: Sequence[int], structure: Architecture, config: PretrainedConfig, last: Tensor,
    bias: Tensor | None,
) -> None:  # fmt: skip
    """Take units out of a block in memory; its sizes follow.

    Args:
        block: to change.
        part: of it.
        removed: units.
        structure: of the model.
        config: of the model.
        last: what becomes of the weight of ``part.last``, [hidden, columns left].
        bias: what becomes of its bias; None if it has none.
    """
    assert block.shape is not None
    gone = torch.tensor(list(removed), dtype=torch.long)
    for name, rows in part.rows.items():
        module = block.module.get_submodule(name)
        weight, old = Linear(name, module).weight, getattr(module, "bias", None)
        keep = remaining(weight.shape[0], rows[gone]).to(weight.device)
        set_linear(module, weight[keep].clone(), None if old is None else old.data[keep].clone())
    set_linear(block.module.get_submodule(part.last), last, bias)
    block.shape = part.shape(block.shape, len(removed))
    tell_block(block.module, structure, block.shape, head_dim(config))
    sizes = linear_sizes(structure, block.shape, head_dim(config))
    for name in part.members:  # a declaration that does not fit its model must not pass unseen
        found = Linear(name, block.module.get_submodule(name)).shape
        wanted = sizes[name]
        assert all(size is None or size == there for size, there in zip(wanted, found, strict=True)), name
