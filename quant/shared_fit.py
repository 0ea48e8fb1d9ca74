"""Fit shared codebooks (:mod:`compress.quant.shared`): factors of columns, coefficients of rows, bases, and places in cells."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from compress.quant.kmeans import nested_codebooks
from compress.quant.records import STORED_BITS
from compress.quant.shared import Shared

_SIZE, _INPUT = 0.5, -0.06  # powers of a column's weights and of its inputs in its factor; measured
_ROUNDS = 6  # of alternating least squares
_NEARLY = 1e-6  # share of the mean diagonal that keeps least squares solvable
_FARTHEST = 4.0  # of other coefficients from a row's size: an odd row must not coarsen all others
_POOLED = 1 << 16  # weights whose places in their cells are clustered


def column_factors(weight: Tensor, inputs: Tensor) -> Tensor:
    """Return the factor of every column of a weight [N, K], given the mean squares [K] of its inputs: float32 [K], mean 1.

    Values are those of float16, so that what is divided by them is what is stored.
    """
    size = weight / weight.square().mean(1, keepdim=True).sqrt().clamp_min(1e-30)
    factors = _floored(size.square().mean(0)) ** (_SIZE / 2) * _floored(inputs) ** _INPUT
    return (factors / factors.mean()).half().float()


def _floored(squares: Tensor) -> Tensor:
    """Keep columns of zeros from a factor of zero."""
    mean = squares.mean()
    return squares.clamp_min(1e-4 * torch.where(mean > 0, mean, 1.0))


def fit_shared(codebooks: Mapping[int, Tensor], masses: Mapping[int, Tensor], columns: Tensor, rank: int) -> Shared:
    """Find the coefficients and bases nearest to codebooks of N rows by alternating weighted least squares.

    ``codebooks`` holds float32 [N, 2**bits] for consecutive numbers of bits, ``masses`` alike what errors of entries cost;
    those of more bits than are stored do not count. ``rank`` is at most the entries of the first.
    """
    stored = [bits for bits in sorted(codebooks) if bits <= max(min(codebooks), STORED_BITS)]
    wanted = torch.cat([codebooks[bits] for bits in stored], 1).double()
    mass = torch.cat([masses[bits] for bits in stored], 1).double()
    cost = mass.sum(0).sqrt().clamp_min(1e-30)
    start = wanted * cost
    start = start / start.norm(dim=1, keepdim=True).clamp_min(1e-30)
    entries = torch.linalg.eigh(start.t() @ start).eigenvectors[:, -rank:].t() / cost
    for round_ in range(_ROUNDS):
        inner = torch.einsum("ie,ne,je->nij", entries, mass, entries)
        rows = solved(inner, (mass * wanted) @ entries.t())
        if round_ < _ROUNDS - 1:
            inner = torch.einsum("ni,ne,nj->eij", rows, mass, rows)
            entries = solved(inner, (mass * wanted).t() @ rows).t()
    parts = entries.float().split([2**bits for bits in stored], 1)
    return from_coefficients(columns, rows.float(), dict(zip(stored, parts, strict=True)))


def from_coefficients(columns: Tensor, rows: Tensor, basis: Mapping[int, Tensor]) -> Shared:
    """Make shared codebooks of coefficients, float32 [N, rank], each row's first being its size; the others are rounded.

    Coefficients and bases are scaled to fit float16 and int8 well.
    """
    mean = rows.mean(0)  # makes the first basis the mean row's codebook, whichever coefficients there are
    turn = torch.linalg.qr(torch.cat([mean[:, None], torch.eye(len(mean), device=rows.device)], 1).double()).Q.float()
    rows, basis = rows @ turn, {bits: turn.t() @ part for bits, part in basis.items()}
    scale = torch.stack([part[0].abs().amax() for part in basis.values()]).amax().clamp_min(1e-30)
    size = rows[:, :1]
    floor = 1e-3 * size.abs().mean() + 1e-30
    size = torch.where(size.abs() < floor, torch.where(size < 0, -floor, floor), size)
    if rows.shape[1] == 1:
        return Shared(columns, size * scale, None, {bits: part / scale for bits, part in basis.items()})
    others = (rows[:, 1:] / size).clamp(-_FARTHEST, _FARTHEST)
    most = others.abs().amax(0).clamp_min(1e-30)
    shapes = (others / most * 127).round().to(torch.int8)
    factor = torch.cat([torch.ones(1, device=rows.device), most * (128 / 127)])[:, None] / scale
    return Shared(columns, size * scale, shapes, {bits: (part * factor).contiguous() for bits, part in basis.items()})


def with_places(shared: Shared, codes: Tensor, weight: Tensor, parent: int) -> Shared:
    """Find widths of cells, and places in them for all numbers of bits up to the parent's, from what is left of a weight.

    ``codes``, uint8 [N, K], are those of the last number of bits that has a basis; ``weight`` [N, K] is divided by ``columns``.
    """
    if parent <= shared.last:
        return shared
    cells, index = 2**shared.last, codes.long()
    left = weight - shared.codebook(shared.last).gather(1, index)
    count = torch.zeros(len(codes), cells, device=codes.device).scatter_add_(1, index, torch.ones_like(left))
    size = torch.zeros_like(count).scatter_add_(1, index, left.abs()) / count.clamp_min(1)
    coefficients = shared.coefficients().float()
    inner = torch.einsum("ni,ne,nj->eij", coefficients, count, coefficients)
    width = solved(inner, (count * size).t() @ coefficients).t()
    held = (coefficients @ width).clamp_min(1e-3 * size.mean()).gather(1, index)
    every = max(1, left.numel() // _POOLED)
    relative = (left / held).flatten()[::every].clamp(-16, 16).cpu()[None].contiguous()
    cost = held.square().flatten()[::every].cpu()[None].contiguous()
    found = nested_codebooks(relative.numpy(), (cost / cost.mean()).numpy(), 1, parent - shared.last).codebooks
    place = {shared.last + more: entries[0].to(codes.device) for more, entries in found.items()}
    return replace(shared, width=width.float().contiguous(), place=place)


def solved(inner: Tensor, right: Tensor) -> Tensor:
    """Solve symmetric problems [N, V, V] with right sides [N, V], in float64; directions that nothing depends on stay near 0."""
    inner = inner.double()
    diagonal = inner.diagonal(dim1=1, dim2=2)
    diagonal += _NEARLY * diagonal.mean(1, keepdim=True) + 1e-30
    result: Tensor = torch.linalg.solve(inner, right.double())
    return result.to(right.dtype)
