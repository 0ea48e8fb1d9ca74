"""Codebooks that all rows of a matrix share: a few coefficients per row, a basis per number of bits, a factor per column.

A codebook of its own for every row and number of bits takes more bytes than the planes where rows are short. Here row n's codebook of b
bits is ``rows[n] @ basis[b]``, with the same ``rank`` coefficients at every number of bits. Above 4 bits nothing more is stored: a cell of
4 bits is divided evenly, over a width of its own, ``rows[n] @ span``. Before rows are compared, every column is divided by its factor,
as columns differ more in size than rows do; measured, that lowers a layer's error more than scales of groups of columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.quant.records import STORED_BITS

_SIZE, _INPUT = 0.5, -0.06  # powers of a column's weights and of its inputs in its factor; measured
_ROUNDS = 6  # of alternating least squares
_NEARLY = 1e-6  # share of the mean diagonal that keeps least squares solvable


@dataclass(frozen=True)
class Shared:
    """Hold what the codebooks of a matrix of N rows and K columns are computed from."""

    columns: Tensor  # [K]
    rows: Tensor  # [N, rank]
    basis: Mapping[int, Tensor]  # bits -> [rank, 2**bits], from the seed's
    span: Tensor | None  # [rank, entries of the last basis], for more bits; None if there are none

    def codebook(self, bits: int) -> Tensor:
        """Return the codebook of every row, [N, 2**bits] in the dtype of ``rows``."""
        last = max(self.basis)
        table = _product(self.rows, self.basis[min(bits, last)])
        if bits > last:
            assert self.span is not None
            place = places(bits - last, table.device)
            table = (table[..., None] + _product(self.rows, self.span)[..., None] * place).flatten(1)
        return table.to(self.rows.dtype)

    def table(self, bits: int) -> Tensor:
        """Return what rows of coefficient 1 have for a codebook, float32 [1, 2**bits], where there is one coefficient."""
        one = torch.ones(1, 1, dtype=torch.float32, device=self.rows.device)
        return Shared(self.columns, one, self.basis, self.span).codebook(bits)

    def to(self, dtype: torch.dtype) -> Shared:
        """Round everything to a dtype."""
        basis = {bits: part.to(dtype) for bits, part in self.basis.items()}
        return Shared(
            self.columns.to(dtype), self.rows.to(dtype), basis, None if self.span is None else self.span.to(dtype)
        )

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by their stored names."""
        named = {f"basis_{bits}": part for bits, part in self.basis.items()}
        if self.span is not None:
            named[f"span_{max(self.basis) + 1}"] = self.span
        return {"columns": self.columns, "rows": self.rows, **named}


def read_shared(tensors: Mapping[str, Tensor]) -> Shared:
    """Find the parts among tensors by their stored names."""
    numbered = {name.partition("_"): tensor for name, tensor in tensors.items()}
    basis = {int(bits): part for (kind, _, bits), part in numbered.items() if kind == "basis"}
    span = next((part for (kind, _, _), part in numbered.items() if kind == "span"), None)
    return Shared(tensors["columns"], tensors["rows"], basis, span)


def places(more: int, device: torch.device) -> Tensor:
    """Return where in a cell, -1/2 to 1/2, the entries of so many more bits lie: float64 [2**more]."""
    return (torch.arange(2**more, dtype=torch.float64, device=device) + 0.5) / 2**more - 0.5


def _product(rows: Tensor, basis: Tensor) -> Tensor:
    """Multiply in float64, one coefficient after the other, so that every machine finds the same."""
    total = torch.zeros(len(rows), basis.shape[1], dtype=torch.float64, device=rows.device)
    for coefficient, entries in zip(rows.double().unbind(1), basis.double(), strict=True):
        total += coefficient[:, None] * entries
    return total


def column_factors(weight: Tensor, inputs: Tensor) -> Tensor:
    """Return the factor of every column of a weight [N, K], given the mean squares [K] of its inputs: float32 [K], mean 1."""
    size = weight / weight.square().mean(1, keepdim=True).sqrt().clamp_min(1e-30)
    size = size.square().mean(0)
    factors = _floored(size) ** (_SIZE / 2) * _floored(inputs) ** _INPUT
    return factors / factors.mean()


def _floored(squares: Tensor) -> Tensor:
    """Keep columns of zeros from a factor of zero."""
    mean = squares.mean()
    return squares.clamp_min(1e-4 * torch.where(mean > 0, mean, 1.0))


class Fit:
    """Find the shared codebooks nearest to codebooks of N rows by weighted least squares.

    ``codebooks`` holds float32 [N, 2**bits] for consecutive numbers of bits, ``masses`` alike what errors of entries cost;
    ``rank`` is at most the entries of the first.
    """

    def __init__(self, codebooks: Mapping[int, Tensor], masses: Mapping[int, Tensor], rank: int) -> None:
        self.bits = sorted(codebooks)
        self.last = max(self.bits[0], min(self.bits[-1], STORED_BITS))
        self.stored = [bits for bits in self.bits if bits <= self.last]
        self.map = self._map(codebooks[self.bits[0]].device)
        self.wanted = torch.cat([codebooks[bits] for bits in self.bits], 1)
        self.mass = torch.cat([masses[bits] for bits in self.bits], 1)
        first = sum(2**bits for bits in self.stored)
        start = self.wanted[:, :first] * self.mass[:, :first].sum(0).sqrt()
        start = start / start.norm(dim=1, keepdim=True).clamp_min(1e-30)
        self.rank = rank
        _, vectors = torch.linalg.eigh((start.t() @ start).double())
        leading = vectors[:, -self.rank :].flip(1).t().float() / self.mass[:, :first].sum(0).sqrt().clamp_min(1e-30)
        self.parameters = torch.zeros(self.rank, len(self.map), device=leading.device)
        self.parameters[:, :first] = leading
        if self.bits[-1] > self.last:
            self.parameters[:, first:] = _widths(leading[:, -(2**self.last) :])
        self.rows = torch.zeros(len(self.wanted), self.rank, device=leading.device)

    def _map(self, device: torch.device) -> Tensor:
        """Return float32 [parameters, entries]: how entries of all numbers of bits follow from the bases and the span."""
        more = self.bits[-1] > self.last
        sizes = [2**bits for bits in self.stored] + ([2**self.last] if more else [])
        parts = []
        for bits in self.bits:
            part = torch.zeros(sum(sizes), 2**bits, device=device)
            cells = torch.arange(2**bits, device=device) >> max(0, bits - self.last)
            base = sum(2**other for other in self.stored if other < min(bits, self.last))
            part[base + cells, torch.arange(2**bits, device=device)] = 1.0
            if bits > self.last:
                place = places(bits - self.last, device).float().repeat(2**self.last)
                part[sum(sizes) - 2**self.last + cells, torch.arange(2**bits, device=device)] = place
            parts.append(part)
        return torch.cat(parts, 1)

    def run(self) -> None:
        """Alternate between the coefficients of the rows and what they multiply."""
        for _ in range(_ROUNDS):
            self._solve_rows()
            self._solve_parameters()
        self._solve_rows()

    def _solve_rows(self) -> None:
        entries = self.parameters @ self.map
        inner = torch.einsum("ie,ne,je->nij", entries, self.mass, entries)
        self.rows = solved(inner, (self.mass * self.wanted) @ entries.t())

    def _solve_parameters(self) -> None:
        pairs = torch.einsum("ni,nj,ne->ije", self.rows, self.rows, self.mass)
        inner = torch.einsum("pe,ije,qe->ipjq", self.map, pairs, self.map).flatten(2).flatten(0, 1)
        right = torch.einsum("ni,ne,pe->ip", self.rows, self.mass * self.wanted, self.map).flatten()
        self.parameters = solved(inner[None], right[None])[0].view_as(self.parameters)

    def shared(self, columns: Tensor, rows: Tensor | None = None) -> Shared:
        """Return the result; other ``rows`` may take the place of those found."""
        basis, start = {}, 0
        for bits in self.stored:
            basis[bits] = self.parameters[:, start : start + 2**bits].contiguous()
            start += 2**bits
        span = self.parameters[:, start:].contiguous() if self.bits[-1] > self.last else None
        return balanced(Shared(columns, self.rows if rows is None else rows, basis, span))


def balanced(shared: Shared) -> Shared:
    """Scale coefficients and bases so that both fit float16 well: each basis has a largest entry of 1 in size."""
    scale = torch.stack([part.abs().amax(1) for part in shared.basis.values()]).amax(0).clamp_min(1e-30)
    basis = {bits: part / scale[:, None] for bits, part in shared.basis.items()}
    span = None if shared.span is None else shared.span / scale[:, None]
    return Shared(shared.columns, shared.rows * scale, basis, span)


def _widths(entries: Tensor) -> Tensor:
    """Return the distance between the middles to both neighbours of entries [rank, C], as a first width of cells."""
    middles = (entries[:, 1:] + entries[:, :-1]) / 2
    inner = middles[:, 1:] - middles[:, :-1]
    return torch.cat([inner[:, :1], inner, inner[:, -1:]], 1)


def solved(inner: Tensor, right: Tensor) -> Tensor:
    """Solve symmetric problems [N, V, V] with right sides [N, V], in float64; directions that nothing depends on stay 0."""
    inner = inner.double()
    diagonal = inner.diagonal(dim1=1, dim2=2)
    diagonal += _NEARLY * diagonal.mean(1, keepdim=True) + 1e-30
    result: Tensor = torch.linalg.solve(inner, right.double())
    return result.float()
