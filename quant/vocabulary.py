"""Quantise an embedding or a head: one table of values for the whole matrix, a factor per row and per column.

Its rows are short and many, so that a codebook each would be larger than the planes. What an error costs is told by the head: the
hidden states that it multiplies have a few very large directions, and errors that cancel along these are nearly free, while a row
that is looked up enters the model as it is. So the cost is ``e (H + d I) e^T`` per row, with ``H`` the mean of ``h h^T`` over
the head's inputs; measured on SmolLM2, an error of the head costs twenty times what the same error of the looked-up rows does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from compress.kernels.packing import pack_planes
from compress.quant.format import Codes, split_planes
from compress.quant.hessian import Buffers, Hessian
from compress.quant.kmeans import nested_codebooks
from compress.quant.nested import Objective, Tree, row_parts
from compress.quant.records import STORED_BITS, EmbeddingShape
from compress.quant.shared import Shared, Tables, read_shared
from compress.quant.shared_fit import group_sizes, sized, sized_at
from compress.quant.shared_search import shared_output_codebooks
from compress.ranks import ALONE, Ranks

_BINS = 1 << 14  # of the histogram that the table is fitted to
_SAMPLED = 1 << 13  # rows of which it is made
# What errors of looked-up rows cost, as a share of the mean diagonal of the head's Hessian; and what is added to it without them.
_LOOKED_UP, _DAMPED = 0.05, 1e-3
_SIZE = 0.75  # power of a column's size in its factor
_POWERS = (0.75, 0.75)  # as in compress.quant.nested: what the errors at more bits count, sweep by sweep


@torch.no_grad()
def fit_vocabulary(
    weight: Tensor,
    hessian: Tensor | None,
    looked_up: bool,
    all_bits: Sequence[int],
    ranks: Ranks = ALONE,
    grouped: bool = False,
) -> Codes:
    """Find nested codes of an embedding or a head, and shared codebooks of rank 1 (:mod:`compress.quant.shared`).

    Args:
        weight: float32 [N, K], finite, on the CPU.
        hessian: float32 [K, K], mean of ``h h^T`` over the head's inputs; None to let all errors cost the same.
        looked_up: whether its rows are looked up too, as those of an embedding are.
        all_bits: the numbers of bits that count, ascending; those between can be read too.
        ranks: the processes that share the rows.
        grouped: give rows a size for every group of columns, and search as for linears (:mod:`compress.quant.shared_search`).
    """
    span = range(all_bits[0], all_bits[-1] + 1)
    unit = torch.eye(weight.shape[1])
    cost = unit if hessian is None else hessian / hessian.diagonal().mean().clamp_min(1e-30)
    damped = cost + (_LOOKED_UP if looked_up else _DAMPED) * unit
    if grouped:
        found = shared_output_codebooks(dict.fromkeys(span, weight), damped, ranks=ranks)[0]
        assert found.shared is not None
        return _rounded(found.codes, found.shared, span)
    columns = _column_factors(weight).half().float()
    rows = torch.cat([_root_mean_square(part / columns) for part in torch.split(weight, _SAMPLED)]).half().float()
    shared = _tables(weight, columns, rows, all_bits[0], all_bits[-1])
    search, buffers = Hessian(damped * columns[:, None] * columns), Buffers(weight.device)

    def descended(part: slice) -> dict[str, Tensor]:
        given = weight[part] / columns, None if hessian is None else search, shared.part(part)
        return {"codes": _descended(*given, span, buffers)}

    parts = ranks.over(row_parts(len(weight), weight.device, ranks), descended)
    return _rounded(torch.cat([part["codes"] for part in parts]), shared, span)


def _rounded(codes: Tensor, shared: Shared, bits: range) -> Codes:
    found = shared.to(torch.float16)
    return Codes(codes, Tables(found, bits), shared=found)


def _root_mean_square(rows: Tensor) -> Tensor:
    return rows.square().mean(1, keepdim=True).sqrt().clamp_min(1e-7)


def _column_factors(weight: Tensor) -> Tensor:
    """Return the factor of every column, float32 [K], mean 1: columns differ in size more than rows do."""
    size = torch.zeros(weight.shape[1])
    for part in torch.split(weight, _SAMPLED):
        size += (part / _root_mean_square(part)).square().sum(0)
    factors = size.clamp_min(max(1e-6 * float(size.mean()), 1e-30)) ** (_SIZE / 2)  # also for columns of zeros
    return factors / factors.mean()


def _tables(weight: Tensor, columns: Tensor, rows: Tensor, seed: int, parent: int) -> Shared:
    """Cluster all weights together."""
    some = slice(None, None, -(-len(weight) // _SAMPLED))
    values = (weight[some] / columns / rows[some]).flatten()
    low, high = values.min(), values.max()
    bins = ((values - low) * ((_BINS - 1) / (high - low).clamp_min(1e-30))).round().long()
    counts = torch.zeros(_BINS, dtype=torch.float64).index_add_(0, bins, torch.ones_like(values).double())
    sums = torch.zeros(_BINS, dtype=torch.float64).index_add_(0, bins, values.double())
    there = counts > 0
    means = (sums[there] / counts[there]).float()[None].numpy()
    found = nested_codebooks(means, counts[there].float()[None].numpy(), seed, parent).codebooks
    last = min(parent, max(seed, STORED_BITS))
    basis = {bits: found[bits].half().float() for bits in range(seed, last + 1)}
    more = {bits: found[bits].view(2**last, -1) - basis[last].view(-1, 1) for bits in range(last + 1, parent + 1)}
    return Shared(columns, rows, None, basis, *_cells(more)).to(torch.float16).to(torch.float32)


def _cells(offsets: Mapping[int, Tensor]) -> tuple[Tensor | None, dict[int, Tensor] | None]:
    """Fit one width per cell, [1, cells], and the places of its entries in widths, by bits; ``offsets`` are [cells, entries]."""
    if not offsets:
        return None, None
    most = offsets[max(offsets)]
    width = most.square().mean(1, keepdim=True).sqrt().clamp_min(1e-6)
    inner = slice(len(most) // 4, -len(most) // 4)  # cells at the ends are wide, and few weights lie there
    return width.t().contiguous(), {bits: (part / width)[inner].mean(0) for bits, part in offsets.items()}


def _descended(targets: Tensor, hessian: Hessian | None, shared: Shared, bits: range, buffers: Buffers) -> Tensor:
    """Choose the codes of some rows, [N, K]: the nearest ones first, then those with the least summed cost at all bits."""
    codebooks = {b: shared.codebook(b) for b in bits}
    codes = _nearest(targets, codebooks, bits)
    if hessian is not None:
        tree = Tree(dict.fromkeys(bits, targets), hessian, codes, codebooks, None, buffers)
        for power in _POWERS:
            tree.descend([Objective({b: 4 ** (power * (b - bits[0])) for b in bits})])
        codes = tree.codes
    return codes.to(torch.uint8)


def _nearest(targets: Tensor, codebooks: Mapping[int, Tensor], bits: range) -> Tensor:
    """Choose the nearest entry at the fewest bits, then the nearer half of every cell."""
    first = codebooks[bits[0]]
    codes = torch.searchsorted(((first[:, 1:] + first[:, :-1]) / 2).contiguous(), targets.contiguous())
    for more in bits[1:]:
        middle = (codebooks[more][:, 0::2] + codebooks[more][:, 1::2]) / 2
        codes = 2 * codes + (targets > middle.gather(1, codes))
    return codes


def with_rows(
    shape: EmbeddingShape, tensors: Mapping[str, Tensor], extra: Tensor
) -> tuple[EmbeddingShape, dict[str, Tensor]]:
    """Add rows, float32 [M, K], to a stored embedding or head, by their nearest codes; its tables stay as they are."""
    shared = read_shared(tensors)
    targets = extra / shared.columns.float()
    added = _sized(shared, targets)
    wide = added.to(torch.float32)
    scale = (wide.rows if wide.groups is None else wide.sizes()).clamp_min(1e-7)
    codebooks = {bits: wide.table(bits).expand(len(extra), -1).contiguous() for bits in shape.all_bits}
    codes = _nearest(targets / scale, codebooks, shape.all_bits)
    planes = split_planes(pack_planes(codes.to(torch.uint8), shape.parent_bits), shape)
    larger = {name: torch.cat([tensors[name], plane], -2).contiguous() for name, plane in planes.items()}
    by_row = added.tensors()
    larger |= {name: torch.cat([tensors[name], by_row[name]]) for name in ("rows", "groups") if name in by_row}
    return replace(shape, out_features=shape.out_features + len(extra)), {**tensors, **larger}


def _sized(shared: Shared, targets: Tensor) -> Shared:
    """Return the same of other rows, [M, K], of the sizes that these have; 0 for a row of zeros."""
    if shared.groups is None:
        return replace(shared, rows=targets.square().mean(1, keepdim=True).sqrt().to(shared.rows.dtype))
    entries = shared.basis[sized_at(shared.basis)][0].float()
    found = sized(shared, group_sizes(targets, torch.ones(targets.shape[1]), entries))
    return replace(found, rows=found.rows.to(shared.rows.dtype))
