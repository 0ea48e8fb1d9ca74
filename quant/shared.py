"""Codebooks that all rows of a matrix share: a few coefficients per row, a basis per number of bits, a factor per column.

A codebook of its own for every row and number of bits takes more bytes than the planes where rows are short. Here row n's codebook of b
bits is ``rows[n] @ basis[b]``, with the same ``rank`` coefficients at every number of bits. Above 4 bits there is no basis: the entries in
a cell of 4 bits lie at the same places for all cells, in units of the cell's width, ``rows[n] @ width``. Before rows are compared, every
column is divided by its factor, as columns differ more in size than rows do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shared:
    """Hold what the codebooks of a matrix of N rows and K columns are computed from."""

    columns: Tensor  # [K]
    rows: Tensor  # [N, rank]
    basis: Mapping[int, Tensor]  # bits -> [rank, 2**bits], from the seed's
    width: Tensor | None = None  # [rank, entries of the last basis], for more bits; None if there are none
    place: Mapping[int, Tensor] | None = None  # more bits -> [2**(bits - last)]

    @property
    def last(self) -> int:
        """Return the largest number of bits that has a basis."""
        return max(self.basis)

    def codebook(self, bits: int) -> Tensor:
        """Return the codebook of every row, [N, 2**bits] in the dtype of ``rows``."""
        table = _product(self.rows, self.basis[min(bits, self.last)])
        if bits > self.last:
            assert self.width is not None
            assert self.place is not None
            steps = _product(self.rows, self.width)[..., None] * self.place[bits].double()
            table = (table[..., None] + steps).flatten(1)
        return table.to(self.rows.dtype)

    def to(self, dtype: torch.dtype) -> Shared:
        """Round everything to a dtype."""
        return read_shared({name: tensor.to(dtype) for name, tensor in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by their stored names."""
        named = {f"basis_{bits}": part for bits, part in self.basis.items()}
        if self.width is not None:
            named[f"width_{self.last + 1}"] = self.width
        return {
            "columns": self.columns,
            "rows": self.rows,
            **named,
            **{f"place_{bits}": part for bits, part in (self.place or {}).items()},
        }


def read_shared(tensors: Mapping[str, Tensor]) -> Shared:
    """Find the parts among tensors by their stored names."""
    found: dict[str, dict[int, Tensor]] = {"basis": {}, "width": {}, "place": {}}
    for name, tensor in tensors.items():
        kind, _, bits = name.partition("_")
        if kind in found:
            found[kind][int(bits)] = tensor
    width = next(iter(found["width"].values()), None)
    return Shared(tensors["columns"], tensors["rows"], found["basis"], width, found["place"] or None)


def _product(rows: Tensor, basis: Tensor) -> Tensor:
    """Multiply in float64, one coefficient after the other, so that every machine finds the same."""
    total = torch.zeros(len(rows), basis.shape[1], dtype=torch.float64, device=rows.device)
    for coefficient, entries in zip(rows.double().unbind(1), basis.double(), strict=True):
        total += coefficient[:, None] * entries
    return total
