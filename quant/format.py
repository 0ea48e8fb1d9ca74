"""The stored form of packed matrices, as ``quant/FORMAT.md`` describes it: records, packing, and the sparse form.

A matrix is stored dense, as bit planes and a codebook for every number of bits, or sparse: a mask, and the planes of the
survivors alone. The sparse form is for the disk only: loading rebuilds the planes that every kernel reads. The survivors of a
matrix, row after row, are stored as a matrix of one row. The mask holds the number of pruned weights before each
survivor, its gap, as a Rice code: ``gap >> gap_bits`` in unary in one tensor, the low ``gap_bits`` as planes over the
survivors in another. With no low bits the unary part is the occupancy plane itself, one bit per weight; with more,
a random mask of 50 % or more is within 4 % of its entropy (0.889 bits per weight at 70 % sparsity, entropy 0.881).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from compress.errors import CompressError
from compress.kernels.packing import pack_planes, unpack_planes
from compress.quant.records import (
    GROUP,
    MAX_GAP_BITS,
    EmbeddingShape,
    GroupedEmbeddingShape,
    GroupedShape,
    PackedShape,
    SharedShape,
    SparseShape,
)
from compress.quant.shared import Shared, read_shared

_AT_ONCE = 1 << 20  # bounds int64 indices to 8 MiB


@dataclass(frozen=True)
class Codes:
    """Hold one quantised matrix of N rows and K columns: a code per weight, and a codebook per row and number of bits."""

    codes: Tensor  # uint8 [N, K], of the parent's number of bits; those of b bits are ``codes >> (parent - b)``
    codebooks: Mapping[int, Tensor]  # bits -> [N, 2**bits], float32 or as stored, from the seed's to the parent's
    hessian: Tensor | None = None  # float32 [K, K], mean of ``x x^T`` over the layer's inputs, where measured
    shared: Shared | None = None  # what the codebooks are computed from, and factors of columns to multiply by
    read_at: Mapping[str, int] | None = None  # of an embedding or head: the model's bits -> its own

    def dense(self, bits: int, part: slice = slice(None)) -> Tensor:
        """Return the weights that a number of bits stands for, or some rows of them, float32 [N, K]."""
        codes, codebook = self.codes[part], self.codebooks[bits][part].float()
        found = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
        step, lower = max(1, _AT_ONCE // max(codes.shape[1], 1)), max(self.codebooks) - bits
        for rows in (slice(start, start + step) for start in range(0, len(found), step)):
            torch.gather(codebook[rows], 1, (codes[rows] >> lower).long(), out=found[rows])
        if self.shared is None:
            return found
        factors = self.shared.part(part).factors()
        return (found if factors is None else found.mul_(factors)).mul_(self.shared.columns.float())

    def rows(self, bits: int, part: slice) -> Tensor:
        """Return some rows of an embedding or head (one coefficient per row) at a number of bits, float32 [rows, K]."""
        assert self.shared is not None
        codes, some = (self.codes[part] >> (max(self.codebooks) - bits)).long(), self.shared.part(part)
        sizes = some.rows.float() if some.groups is None else some.sizes()
        return some.table(bits)[0][codes] * sizes * some.columns.float()

    def to(self, device: torch.device | str) -> Codes:
        """Move all but the Hessian to a device."""
        shared = self.shared
        if shared is not None:
            shared = read_shared({name: tensor.to(device) for name, tensor in shared.tensors().items()})
        codebooks = {bits: codebook.to(device) for bits, codebook in self.codebooks.items()}
        return replace(self, codes=self.codes.to(device), codebooks=codebooks, shared=shared)

    def as_stored(self) -> Codes:
        """Round the codebooks to the dtype that a checkpoint stores.

        That is float16 where it keeps every entry within a relative error of 2**-10 (entries below 1/256 of their row's
        largest: within that error of 1/256 of the largest), else float32. Shared codebooks are computed from rounded parts.
        """
        if self.shared is not None:
            shared = self.shared.to(torch.float16)
            if not all(_near(shared.codebook(bits), codebook) for bits, codebook in self.codebooks.items()):
                shared = self.shared.to(torch.float32)
            return replace(self, codebooks={bits: shared.codebook(bits) for bits in self.codebooks}, shared=shared)
        dtype = torch.float16 if all(map(_fits_half, self.codebooks.values())) else torch.float32
        return replace(self, codebooks={bits: codebook.to(dtype) for bits, codebook in self.codebooks.items()})


def _fits_half(codebook: Tensor) -> bool:
    error = (codebook.half().float() - codebook).abs()
    scale = codebook.abs().amax(dim=1, keepdim=True)
    return bool((error <= torch.maximum(codebook.abs(), 2.0**-8 * scale) * 2.0**-10).all())


def _near(half: Tensor, codebook: Tensor) -> bool:
    scale = codebook.abs().amax(dim=1, keepdim=True)
    return bool(((half.float() - codebook).abs() <= scale * 2.0**-8).all())


def split_planes(planes: Tensor, shape: PackedShape) -> dict[str, Tensor]:
    """Copy planes, one after another along the first dimension, into tensors by their stored names."""
    tensors = {"weight": planes[: shape.seed_bits].clone()}  # a view would keep the other planes' storage alive
    return tensors | {f"plane_{bits}": planes[bits - 1].clone() for bits in shape.all_bits[1:]}


def join_planes(tensors: Mapping[str, Tensor], seed: int, bits: int) -> list[Tensor]:
    """Return the first planes of a stored matrix, ``bits`` of them, most significant first."""
    return [*tensors["weight"][:bits].unbind(0), *(tensors[f"plane_{b}"] for b in range(seed + 1, bits + 1))]


def pack(codes: Tensor, codebooks: Mapping[int, Tensor]) -> tuple[PackedShape, dict[str, Tensor]]:
    """Turn nested codes, uint8 [N, K], into the dense form: the shape record, and tensors by their names under the module.

    ``codebooks`` holds float32 [N, 2**bits] for all from seed to parent, stored as :meth:`Codes.as_stored` leaves them.
    """
    seed, parent = min(codebooks), max(codebooks)
    stored = Codes(codes, codebooks).as_stored().codebooks
    shape = PackedShape(codes.shape[0], codes.shape[1], seed, parent, str(stored[seed].dtype).removeprefix("torch."))
    tensors = split_planes(pack_planes(codes, parent), shape)
    return shape, tensors | {f"codebook_{bits}": stored[bits] for bits in shape.all_bits}


def _pack_shared(found: Codes, shared: Shared) -> tuple[PackedShape, dict[str, Tensor]]:
    """Turn codes with shared codebooks, as stored, into the record and tensors by their names under the module."""
    bits, dtype = sorted(found.codebooks), str(shared.rows.dtype).removeprefix("torch.")
    (rows, columns), rank = found.codes.shape, len(shared.basis[shared.last])
    shape = SharedShape(rows, columns, bits[0], bits[-1], dtype, rank=rank)
    if found.read_at is not None and shared.groups is not None:
        shape = GroupedEmbeddingShape(**vars(shape), read_at=found.read_at, group=GROUP)
    elif found.read_at is not None:
        shape = EmbeddingShape(**vars(shape), read_at=found.read_at)
    elif shared.groups is not None:
        shape = GroupedShape(**vars(shape), group=GROUP)
    return shape, split_planes(pack_planes(found.codes, bits[-1]), shape) | shared.tensors()


def pack_smaller(found: Codes) -> tuple[PackedShape, Mapping[str, Tensor], dict[str, Any] | None]:
    """Pack a matrix, on the CPU, in the form, dense or sparse, that takes fewer bytes: its shape, tensors and a report.

    The sparse form leaves out weights that are exactly 0.0 at every number of bits; all bits decode to the same weights. The
    report, for the manifest, is ``{"form": "sparse" or "dense", "zeros": weights that are left out or could be, "bytes":
    {"sparse", "dense"}}``; None where there are no such weights.
    """
    if found.shared is not None:
        return *_pack_shared(found, found.shared), None
    shape, tensors = pack(found.codes, found.codebooks)
    zero = _zero_codes(shape, tensors)
    if not zero.any():
        return shape, tensors, None
    occupied = _occupied(found.codes, zero)
    survivors = int(occupied.sum())
    if survivors == occupied.numel():
        return shape, tensors, None
    gaps = _gaps(occupied, survivors)
    low = _gap_bits(gaps)
    mask_bits = survivors + _total(gaps[part] >> low for part in _parts(survivors))
    smaller = SparseShape(**vars(shape), survivors=survivors, gap_bits=low, mask_bits=mask_bits)
    sizes = {form: sum(of.tensor_bytes().values()) for form, of in (("sparse", smaller), ("dense", shape))}
    form = "sparse" if sizes["sparse"] < sizes["dense"] else "dense"
    note = {"form": form, "zeros": occupied.numel() - survivors, "bytes": sizes}
    if form == "dense":
        return shape, tensors, note
    return smaller, _sparse_tensors(smaller, tensors, found.codes, occupied, zero, gaps), note


def _zero_codes(shape: PackedShape, tensors: Mapping[str, Tensor]) -> Tensor:
    """Tell which parent codes mean 0.0 at every number of bits: bool [N, 2**parent]."""
    device = tensors["weight"].device
    zero = torch.ones(shape.out_features, 2**shape.parent_bits, dtype=torch.bool, device=device)
    for bits in shape.all_bits:
        zero &= (tensors[f"codebook_{bits}"] == 0).repeat_interleave(2 ** (shape.parent_bits - bits), dim=1)
    return zero


def _occupied(codes: Tensor, zero: Tensor) -> Tensor:
    """Tell which weights are not zero at every number of bits: bool [N * K]."""
    occupied = torch.empty(codes.shape, dtype=torch.bool, device=codes.device)
    step = max(1, _AT_ONCE // codes.shape[1])
    for start in range(0, codes.shape[0], step):
        part = slice(start, start + step)
        occupied[part] = ~zero[part].gather(1, codes[part].long())
    return occupied.view(-1)


def _sparse_tensors(
    shape: SparseShape, tensors: Mapping[str, Tensor], codes: Tensor, occupied: Tensor, zero: Tensor, gaps: Tensor
) -> dict[str, Tensor]:
    """Build the survivors' planes, the mask, and codebooks whose entry 0 is that of the pruned weights.

    Codes of a row are renumbered by exclusive or with its zero code: the b-bit code stays the top b bits of the parent's, and
    a reader fills in zeros.
    """
    first = zero.byte().argmax(dim=1).to(torch.uint8)  # 0 for rows without a zero code, which stay as they are
    codes = (codes ^ first[:, None]).view(-1)
    kept = torch.cat([codes[part][occupied[part]] for part in _parts(codes.numel())])
    sparse = split_planes(_pack_row(kept, shape.parent_bits), shape)
    for bits in shape.all_bits:
        moved = torch.arange(2**bits, device=first.device) ^ (first >> (shape.parent_bits - bits)).long()[:, None]
        sparse[f"codebook_{bits}"] = tensors[f"codebook_{bits}"].gather(1, moved)
    sparse["mask"] = _pack_row(_unary(gaps, shape), 1).view(-1)
    if low := shape.gap_bits:
        sparse["mask_low"] = _pack_row((gaps & (2**low - 1)).byte(), low).view(low, -1)
    return sparse


def _pack_row(values: Tensor, bits: int) -> Tensor:
    """Pack one row, which may be empty: uint8 [K] to int32 [bits, 1, ceil(K / 32)]."""
    if not values.numel():
        return torch.empty(bits, 1, 0, dtype=torch.int32, device=values.device)
    return pack_planes(values[None], bits)


def _unpack_row(planes: list[Tensor], columns: int) -> Tensor:
    """Undo :func:`_pack_row`, from planes of any shape: uint8 [columns]."""
    if not columns:
        return torch.empty(0, dtype=torch.uint8, device=planes[0].device)
    return unpack_planes([plane.view(1, -1) for plane in planes], columns)[0]


def _parts(count: int) -> Iterator[slice]:
    """Cut a long vector into parts, so that indices are never in memory for all of it."""
    return (slice(start, min(start + _AT_ONCE, count)) for start in range(0, count, _AT_ONCE))


def _gaps(occupied: Tensor, survivors: int) -> Tensor:
    """Count the pruned weights between each survivor and the one before: int32 [survivors]."""
    gaps, done, last = torch.empty(survivors, dtype=torch.int32, device=occupied.device), 0, -1
    for part in _parts(occupied.numel()):
        places = occupied[part].nonzero().view(-1) + part.start
        if places.numel():
            gaps[done : done + places.numel()] = torch.diff(places, prepend=places.new_tensor([last])) - 1
            done, last = done + places.numel(), int(places[-1])
    return gaps


def _gap_bits(gaps: Tensor) -> int:
    """Choose the number of low bits that makes the mask smallest.

    One more costs a bit per survivor, and saves what halving does to the unary part: less each time, so stop there.
    """
    low = 0
    while low < MAX_GAP_BITS and _total((gaps[part] >> low) + 1 >> 1 for part in _parts(gaps.numel())) > gaps.numel():
        low += 1
    return low


def _total(parts: Iterable[Tensor]) -> int:
    return sum(int(part.sum()) for part in parts)


def _unary(gaps: Tensor, shape: SparseShape) -> Tensor:
    """Write for every survivor ``gap >> gap_bits`` zeros and a one: uint8 [mask_bits]."""
    unary = torch.zeros(shape.mask_bits, dtype=torch.uint8, device=gaps.device)
    end = -1
    for part in _parts(gaps.numel()):
        ones = torch.cumsum((gaps[part] >> shape.gap_bits) + 1, 0) + end
        unary[ones] = 1
        end = int(ones[-1])
    return unary


def expand(name: str, shape: SparseShape, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rebuild the tensors of ``shape.dense`` from the sparse form, on the device the tensors are on.

    The shape is as recorded, with the number of bits that was read as ``parent_bits``.

    Raises:
        CompressError: the mask is not that of so many survivors in a matrix of this size.
    """
    survivors = _unpack_row(join_planes(tensors, shape.seed_bits, shape.parent_bits), shape.survivors)
    codes = torch.zeros(shape.out_features * shape.in_features, dtype=torch.uint8, device=survivors.device)
    done = 0
    for places in _places(shape, tensors):
        last = done + places.numel()
        if last > shape.survivors or int(places[-1]) >= codes.numel():
            done = -1
            break
        codes[places] = survivors[done:last]
        done = last
    if done != shape.survivors:
        raise CompressError(
            f"{name}: its mask does not fit {shape.survivors} survivors of {shape.out_features} x {shape.in_features} "
            "weights; the checkpoint is damaged: fetch or write it again."
        )
    planes = pack_planes(codes.view(shape.out_features, shape.in_features), shape.parent_bits)
    return split_planes(planes, shape) | {f"codebook_{bits}": tensors[f"codebook_{bits}"] for bits in shape.all_bits}


def _places(shape: SparseShape, tensors: Mapping[str, Tensor]) -> Iterator[Tensor]:
    """Find the places of survivors in the mask, counted along the rows: int64, in ascending parts.

    A mask with more ones than survivors ends with a part that has too many.
    """
    unary = _unpack_row([tensors["mask"]], shape.mask_bits)
    low = _unpack_row(list(tensors["mask_low"]), shape.survivors) if shape.gap_bits else None
    done, end, place = 0, -1, -1
    for part in _parts(unary.numel()):
        ones = unary[part].nonzero().view(-1) + part.start
        if not ones.numel():
            continue
        steps = torch.diff(ones, prepend=ones.new_tensor([end]))
        if low is not None:
            below = low[done : done + ones.numel()]
            if below.numel() < ones.numel():
                yield ones
                return
            steps = (steps - 1 << shape.gap_bits) + below + 1
        places = torch.cumsum(steps, 0) + place
        done, end, place = done + ones.numel(), int(ones[-1]), int(places[-1])
        yield places
