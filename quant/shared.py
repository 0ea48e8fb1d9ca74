"""Codebooks that all rows of a matrix share: a few coefficients per row, a basis per number of bits, a factor per column.

A codebook of its own for every row and number of bits takes more bytes than the planes where rows are short. Here row n's codebook of b
bits is ``c[n] @ basis[b]``, with the same ``rank`` coefficients at every number of bits. Above 5 bits there is no basis: the entries in
a cell of 5 bits lie at the same places for all cells, in units of the cell's width, ``c[n] @ width``. Before rows are compared, every
column is divided by its factor, as columns differ more in size than rows do. With one coefficient, a row may have a size for every
group of 64 columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compress.quant.records import GROUP


@dataclass(frozen=True)
class Shared:
    """Hold what the codebooks of a matrix of N rows and K columns are computed from."""

    columns: Tensor  # [K]
    rows: Tensor  # [N, 1], the size of a row, or of its largest group
    shapes: (
        Tensor | None
    )  # int8 [N, rank - 1], its other coefficients as multiples of ``rows / 128``; None if rank is 1
    basis: Mapping[int, Tensor]  # bits -> [rank, 2**bits], from the seed's
    width: Tensor | None = None  # [rank, entries of the last basis], for more bits; None if there are none
    place: Mapping[int, Tensor] | None = None  # more bits -> [2**(bits - last)]
    groups: Tensor | None = (
        None  # uint8 [N, ceil(K / 64)], the sizes of groups as multiples of ``rows / 255``; None: all 255
    )

    @property
    def last(self) -> int:
        """Return the largest number of bits that has a basis."""
        return max(self.basis)

    def coefficients(self) -> Tensor:
        """Return what every row multiplies the bases by, float64 [N, rank]."""
        size = self.rows.double()
        return size if self.shapes is None else torch.cat([size, size * self.shapes.double() / 128], 1)

    def codebook(self, bits: int) -> Tensor:
        """Return the codebook of every row, [N, 2**bits] in the dtype of ``rows``."""
        coefficients = self.coefficients()
        table = _product(coefficients, self.basis[min(bits, self.last)])
        if bits > self.last:
            assert self.width is not None
            assert self.place is not None
            steps = _product(coefficients, self.width)[..., None] * self.place[bits].double()
            table = (table[..., None] + steps).flatten(1)
        return table.float().to(self.rows.dtype)

    def table(self, bits: int) -> Tensor:
        """Return the codebook of a row of size 1, float32 [1, 2**bits], where rows have no other coefficients."""
        return replace(self, rows=torch.ones(1, 1, dtype=torch.float32, device=self.rows.device)).codebook(bits)

    def decoded(self, bits: int) -> Tensor:
        """Return the codebook of every row as weights are decoded by it: float32 where the rows' sizes are all there is of them."""
        return self.codebook(bits) if self.shapes is not None else self.table(bits) * self.rows.float()

    def by_group(self) -> Tensor:
        """Return what the entries of :meth:`table` are multiplied by in every group of columns, float32 [N, ceil(K / 64)]."""
        assert self.groups is not None
        return self.rows.float() * (self.groups.float() / 255)

    def sizes(self) -> Tensor:
        """Return the same for every column, float32 [N, K]."""
        return spread(self.by_group(), len(self.columns))

    def factors(self) -> Tensor | None:
        """Return what entries of :meth:`codebook` are multiplied by beside ``columns``, float32 [N, K]; None without groups."""
        return None if self.groups is None else spread(self.groups.float() / 255, len(self.columns))

    def part(self, rows: slice) -> Shared:
        """Return the same of some rows."""
        shapes, groups = (None if held is None else held[rows] for held in (self.shapes, self.groups))
        return replace(self, rows=self.rows[rows], shapes=shapes, groups=groups)

    def to(self, dtype: torch.dtype) -> Shared:
        """Round everything but integers to a dtype."""
        named = self.tensors().items()
        return read_shared({name: t.to(dtype) if t.is_floating_point() else t for name, t in named})

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by their stored names."""
        named = {f"basis_{bits}": part for bits, part in self.basis.items()}
        if self.width is not None:
            named[f"width_{self.last + 1}"] = self.width
        if self.shapes is not None:
            named["shapes"] = self.shapes
        if self.groups is not None:
            named["groups"] = self.groups
        named |= {f"place_{bits}": part for bits, part in (self.place or {}).items()}
        return {"columns": self.columns, "rows": self.rows, **named}


@dataclass(frozen=True)
class Tables(Mapping[int, Tensor]):
    """Compute the codebook of every row when it is asked for: of an embedding all at once would take many times the weights' bytes."""

    shared: Shared
    bits: range

    def __getitem__(self, bits: int) -> Tensor:
        return self.shared.codebook(bits)

    def __iter__(self) -> Iterator[int]:
        return iter(self.bits)

    def __len__(self) -> int:
        return len(self.bits)


def read_shared(tensors: Mapping[str, Tensor]) -> Shared:
    """Find the parts among tensors by their stored names."""
    found: dict[str, dict[int, Tensor]] = {"basis": {}, "width": {}, "place": {}}
    for name, tensor in tensors.items():
        kind, _, bits = name.partition("_")
        if kind in found:
            found[kind][int(bits)] = tensor
    width = next(iter(found["width"].values()), None)
    shapes = tensors.get("shapes")
    groups = tensors.get("groups")
    return Shared(tensors["columns"], tensors["rows"], shapes, found["basis"], width, found["place"] or None, groups)


def spread(groups: Tensor, columns: int) -> Tensor:
    """Repeat a value for every group, [N, ceil(K / 64)], for every column, [N, K]."""
    return groups.repeat_interleave(GROUP, 1)[:, :columns]


def _product(coefficients: Tensor, basis: Tensor) -> Tensor:
    """Multiply in float64, one coefficient after the other, so that every machine finds the same."""
    total = torch.zeros(len(coefficients), basis.shape[1], dtype=torch.float64, device=basis.device)
    for coefficient, entries in zip(coefficients.unbind(1), basis.double(), strict=True):
        total += coefficient[:, None] * entries
    return total
