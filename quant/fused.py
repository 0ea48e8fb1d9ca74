"""Packed linears of one input, launched together on a GPU: query, key and value; gate and up.

Their layouts are put one behind the other, and each holds its part as a view, so nothing is there twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

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


def views(joined: Tiled, tiles: Sequence[Tiled]) -> list[Tiled]:
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
                for member, part in zip(members, views(joined, tiles), strict=True):
                    member.share(part, group)
                made += 1
    return made
