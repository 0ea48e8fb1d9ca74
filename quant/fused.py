"""Packed linears of one input, launched together on a GPU: query, key and value; gate and up.

Their layouts are put one behind the other, and each holds its part as a view, so nothing is there twice. The first of a group
multiplies by all of it and leaves the others' results for them; one that is called with another input, or at another
width, computes its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from compress.kernels.bitplane import tiled_linear
from compress.kernels.layout import ROWS, Tiled

if TYPE_CHECKING:
    from compress.quant.linear import BitPlaneLinear


class Group:
    """Layers that multiply the same input.

    Args:
        members: in the order in which they are called.
    """

    def __init__(self, members: Sequence[BitPlaneLinear]) -> None:
        self.members = list(members)
        self._sizes = [member.out_features for member in members]
        self._tiled = _behind_each_other([member.tiled() for member in members])
        biases: list[Tensor] = [member.bias for member in members if member.bias is not None]
        self._bias = torch.cat(biases) if biases else None
        self._waiting: tuple[Tensor, tuple[Tensor, ...]] | None = None
        for member, part in zip(members, _views(self._tiled, [member.tiled() for member in members]), strict=True):
            member.share(part, self)

    def take(self, member: BitPlaneLinear, x: Tensor) -> Tensor | None:
        """The member's product, [..., N], or None if it has to compute its own."""
        if member is self.members[0]:
            if any(other.bits != member.bits or other.keep_dense for other in self.members):
                return None
            parts = torch.split(tiled_linear(x, self._tiled, member.bits, self._bias), self._sizes, -1)
            self._waiting = x, parts
            return parts[0]
        waiting = self._waiting
        if waiting is None or waiting[0] is not x:
            return None
        if member is self.members[-1]:
            self._waiting = None  # the memory is wanted elsewhere
        place = next(place for place, other in enumerate(self.members) if other is member)
        return waiting[1][place]

    def part(self) -> None:
        """Let every member go its own way, for good; each holds what it held."""
        for member in self.members:
            member.leave()
        self._waiting = None


def _behind_each_other(tiles: Sequence[Tiled]) -> Tiled:
    """One layout of all rows; each matrix but the last has whole tiles."""
    first = tiles[0]
    return Tiled(
        sum(tiled.rows for tiled in tiles),
        first.columns,
        first.head,
        torch.cat([tiled.codes for tiled in tiles], 1),
        {bits: torch.cat([tiled.tables[bits] for tiled in tiles]) for bits in first.tables},
        {bits: torch.cat([tiled.registers[bits] for tiled in tiles], -1) for bits in first.registers},
        None if first.rounded is None else torch.cat([cast(Tensor, tiled.rounded) for tiled in tiles]),
    )


def _views(joined: Tiled, tiles: Sequence[Tiled]) -> list[Tiled]:
    """The parts of a joined layout."""
    found, start = [], 0
    for tiled in tiles:
        count = tiled.codes.shape[1]
        tables = {bits: table[start : start + count] for bits, table in joined.tables.items()}
        rows = slice(start * ROWS, (start + count) * ROWS)
        registers = {bits: words[..., rows] for bits, words in joined.registers.items()}
        codes = joined.codes[:, start : start + count]
        rounded = None if joined.rounded is None else joined.rounded[start : start + count]
        found.append(Tiled(tiled.rows, tiled.columns, tiled.head, codes, tables, registers, rounded))
        start += count
    return found


def _alike(members: Sequence[BitPlaneLinear]) -> bool:
    """Whether layers can be put behind each other."""
    first = members[0]
    whole = all(member.out_features % ROWS == 0 for member in members[:-1])
    same = all(
        member.in_features == first.in_features
        and member.shape.widths == first.shape.widths
        and member.shape.codebook_dtype == first.shape.codebook_dtype
        and member.exact == first.exact
        and (member.bias is None) == (first.bias is None)
        and member.get_buffer("tiled_codes").device == first.get_buffer("tiled_codes").device
        for member in members
    )
    return whole and same


def join(modules: Mapping[str, BitPlaneLinear], together: Sequence[Sequence[str]]) -> int:
    """Put layers into groups; those that are not in the kernels' layout, or not alike, stay alone.

    Args:
        modules: packed linears by name.
        together: names of the members of each kind of group, relative to a block, in the order of their calls.

    Returns:
        How many groups there are.
    """
    made = 0
    for names in together:
        for name in modules:
            if not name.endswith("." + names[0]):
                continue
            prefix = name.removesuffix(names[0])
            members = [modules[prefix + other] for other in names if prefix + other in modules]
            if len(members) == len(names) and all(member.is_tiled for member in members) and _alike(members):
                Group(members)
                made += 1
    return made
