"""Packed linears that are launched together on a GPU: query, key and value, or gate and up, of one input; a mixture's experts.

Their layouts are put one behind the other, and each holds its part as a view, so nothing is there twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from compress.kernels import experts, gpu
from compress.kernels.layout import ROWS, Tiled
from compress.quant.linear import BitPlaneLinear, Group


def behind_each_other(tiles: Sequence[Tiled]) -> Tiled:
    """Make one layout of all rows; each matrix but the last has whole tiles."""
    first = tiles[0]
    return Tiled(
        sum(tiled.rows for tiled in tiles),
        first.columns,
        first.head,
        torch.cat([tiled.codes for tiled in tiles], 1),
        {bits: torch.cat([tiled.tables[bits] for tiled in tiles]) for bits in first.tables},
        {bits: torch.cat([tiled.registers[bits] for tiled in tiles], -1) for bits in first.registers},
        None if first.rounded is None else torch.cat([cast(Tensor, tiled.rounded) for tiled in tiles]),
        None if first.groups is None else torch.cat([cast(Tensor, tiled.groups) for tiled in tiles]),
        None if first.sizes is None else torch.cat([cast(Tensor, tiled.sizes) for tiled in tiles]),
    )


def _views(joined: Tiled, tiles: Sequence[Tiled]) -> list[Tiled]:
    """Return the parts of a joined layout."""
    found, start = [], 0
    for tiled in tiles:
        count = tiled.codes.shape[1]
        tables = {bits: table[start : start + count] for bits, table in joined.tables.items()}
        rows = slice(start * ROWS, (start + count) * ROWS)
        registers = {bits: words[..., rows] for bits, words in joined.registers.items()}
        codes = joined.codes[:, start : start + count]
        sizes = None if joined.sizes is None else joined.sizes[rows]
        rounded, groups = (
            None if whole is None else whole[start : start + count] for whole in (joined.rounded, joined.groups)
        )
        found.append(Tiled(tiled.rows, tiled.columns, tiled.head, codes, tables, registers, rounded, groups, sizes))
        start += count
    return found


def same_factors(one: Tensor | None, other: Tensor | None) -> bool:
    """Tell whether what two layers multiply is still one input after their columns' factors."""
    return one is other or (one is not None and other is not None and torch.equal(one, other))


def _alike(members: Sequence[BitPlaneLinear]) -> bool:
    """Tell whether layers can be put behind each other."""
    first = members[0]
    whole = all(member.out_features % ROWS == 0 for member in members[:-1])
    same = all(
        member.in_features == first.in_features
        and member.shape.all_bits == first.shape.all_bits
        and member.shape.codebook_dtype == first.shape.codebook_dtype
        and (member.group_sizes is None) == (first.group_sizes is None)
        and member.exact == first.exact
        and (member.bias is None) == (first.bias is None)
        and same_factors(member.factors, first.factors)
        and member.get_buffer("tiled_codes").device == first.get_buffer("tiled_codes").device
        for member in members
    )
    return whole and same


def join(modules: Mapping[str, BitPlaneLinear], together: Sequence[Sequence[str]]) -> int:
    """Group layers named ``together``, relative to a block in the order of their calls; return the number of groups.

    Layers that are not in the kernels' layout, or not alike, stay alone.
    """
    made = 0
    for names in together:
        for name in modules:
            if not name.endswith("." + names[0]):
                continue
            prefix = name.removesuffix(names[0])
            members = [modules[prefix + other] for other in names if prefix + other in modules]
            if len(members) == len(names) and all(member.is_tiled for member in members) and _alike(members):
                tiles = [member.tiled() for member in members]
                joined = behind_each_other(tiles)
                group = Group(members, joined)
                for member, part in zip(members, _views(joined, tiles), strict=True):
                    member.share(part, group)
                made += 1
    return made


class ExpertStack(Group):
    """Hold one matrix of every expert: alike but for their numbers, and at one number of bits when they multiply together."""

    def __init__(self, members: Sequence[BitPlaneLinear]) -> None:
        tiles = [member.tiled() for member in members]
        joined = behind_each_other(tiles)
        joined.rows = ROWS * joined.codes.shape[1]
        super().__init__(members, joined)
        first = members[0]
        self._each = None if first.bias is None else torch.stack([cast(Tensor, member.bias) for member in members])
        scaled = first.factors is not None  # those of an expert that stands for none are not looked at
        self._factors = torch.stack([cast(Tensor, m.factors) for m in members]) if scaled else None
        for member, part in zip(members, _views(joined, tiles), strict=True):
            member.share(part, self)

    def take(self, member: BitPlaneLinear, bits: int, x: Tensor) -> Tensor | None:
        """Let a member that is called by itself compute its own product."""
        return None

    @property
    def whole(self) -> bool:
        """Tell whether all members still hold their part of the layout, and are read at one number of bits."""
        bits = self.members[0].bits
        return all(member._group is self and member.bits == bits and not member.keep_dense for member in self.members)

    def multiply(self, x: Tensor, given: experts.Sorted) -> Tensor:
        """Multiply rows that are sorted by expert, [R, K], by the matrices of these: [R, N]."""
        first = self.members[0]
        if self._factors is not None:
            x = (x.float() * self._factors[given.expert.clamp(max=len(self.members) - 1)]).to(x.dtype)
        with torch.cuda.device(x.get_device()):
            return experts.multiply(x, given, self._tiled, first.out_features, first.bits, self._each)


def stacked(members: Sequence[object]) -> ExpertStack | None:
    """Return the stack of one matrix of every expert, made where it is not yet; None where they are not alike or not on a GPU."""
    packed = [member for member in members if isinstance(member, BitPlaneLinear) and member.is_tiled]
    if len(packed) < len(members) or not gpu.serves(packed[0].device):
        return None
    held = packed[0]._group
    if isinstance(held, ExpertStack) and len(held.members) == len(packed):
        return held if held.whole else None
    first = packed[0]
    alike = all(
        (one.in_features, one.out_features, one.shape.all_bits)
        == (first.in_features, first.out_features, first.shape.all_bits)
        and one.shape.codebook_dtype == first.shape.codebook_dtype
        and (one.bias is None) == (first.bias is None)
        and (one.factors is None) == (first.factors is None)
        and (one.group_sizes is None) == (first.group_sizes is None)
        and one.exact == first.exact
        and one._group is None
        for one in packed
    )
    return ExpertStack(packed) if alike else None
