"""The stored matrices of one layer of a server: collected tensor by tensor, cut for tensor parallelism, and built (no vLLM)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from compress.errors import CompressError
from compress.kernels import cpu
from compress.kernels.bitplane import SERVED
from compress.kernels.packing import WORD, pack_planes, unpack_planes
from compress.quant.embedding import BitPlaneEmbedding
from compress.quant.format import expand, join_planes
from compress.quant.fused import join, same_factors
from compress.quant.linear import BitPlaneLinear
from compress.quant.records import GROUP, PackedShape, SparseShape
from compress.vllm.settings import Held


@dataclass(frozen=True)
class Cut:
    """Say which part of a matrix one process serves."""

    rows: range
    columns: range
    padded: int  # rows of the result; those past the end of ``rows`` are zero


def cut(tensors: Mapping[str, Tensor], shape: PackedShape, part: Cut) -> tuple[PackedShape, dict[str, Tensor]]:
    """Take some rows and columns of a matrix that is stored dense: its record, and tensors by their stored names."""
    found = {}
    for name, tensor in tensors.items():
        kind = name.partition("_")[0]
        if kind in ("weight", "plane"):
            tensor = _cut_words(tensor, shape.in_features, part.columns)
        elif kind == "groups":
            tensor = _cut_groups(tensor, shape.in_features, part.columns)
        if kind in ("weight", "plane", "codebook", "rows", "groups", "shapes"):
            tensor = tensor[..., part.rows.start : part.rows.stop, :]
            tensor = pad(tensor, (0, 0, 0, part.padded - len(part.rows)))
        elif kind == "columns":
            tensor = tensor[part.columns.start : part.columns.stop]
        found[name] = tensor
    return replace(shape, out_features=part.padded, in_features=len(part.columns)), found


def _cut_words(planes: Tensor, stored: int, columns: range) -> Tensor:
    """Take some columns of planes, int32 [..., words of ``stored`` columns]; between words their bits have to move."""
    if columns.start % WORD == 0 and (columns.stop % WORD == 0 or columns.stop == stored):
        return planes[..., columns.start // WORD : -(-columns.stop // WORD)]
    flat = planes.reshape(-1, planes.shape[-1])
    moved = pack_planes(unpack_planes([flat], stored)[:, columns.start : columns.stop], 1)[0]
    return moved.view(*planes.shape[:-1], -1)


def _cut_groups(groups: Tensor, stored: int, columns: range) -> Tensor:
    """Take the sizes of groups of some columns, uint8 [N, groups of ``stored`` columns]; a group is not cut."""
    if columns.start % GROUP or (columns.stop % GROUP and columns.stop != stored):
        raise CompressError(
            f"columns {columns.start} to {columns.stop} of {stored} are not whole groups of {GROUP}, which share a size; "
            "serve it at one of the degrees that compress inspect names."
        )
    return groups[:, columns.start // GROUP : -(-columns.stop // GROUP)]


def _from_least(shape: PackedShape, tensors: dict[str, Tensor], least: int) -> tuple[PackedShape, dict[str, Tensor]]:
    """Let a matrix with codebooks of its own begin at more bits: the planes below lie together, their codebooks are not needed."""
    if type(shape) is not PackedShape or least == shape.seed_bits:
        return shape, tensors
    seed = [tensors["weight"], *(tensors[f"plane_{bits}"][None] for bits in range(shape.seed_bits + 1, least + 1))]
    found = {"weight": torch.cat(seed)}
    started = replace(shape, seed_bits=least)
    return started, {name: found.get(name, tensors.get(name)) for name in started.specification()}  # type: ignore[misc]


class StoredMatrix:
    """Collect what a checkpoint stores of one matrix, and keep the part that this process serves.

    Args:
        name: of the matrix in the checkpoint.
        shape: as recorded; None for a matrix that is stored as it was.
        held: the bits to read it at; not used without a shape.
        part: the rows and columns to keep.
    """

    def __init__(self, name: str, shape: PackedShape | None, held: Held, part: Cut) -> None:
        self.name, self.held, self.part, self.recorded = name, held, part, shape
        self.shape = shape and replace(shape, parent_bits=held.most)
        wanted = {"weight": ()} if self.shape is None else self.shape.specification()
        unread = {f"codebook_{bits}" for bits in range(held.least)} if type(shape) is PackedShape else set()
        self.missing = set(wanted) - unread
        self._tensors: dict[str, Tensor] = {}

    def stored_names(self) -> list[str]:
        """Return the names of all tensors that the checkpoint may have of it."""
        return ["weight"] if self.recorded is None else list(self.recorded.specification())

    def take(self, tensor_name: str, tensor: Tensor, device: torch.device) -> None:
        """Keep the part of a stored tensor that is needed, on a device; others are left alone.

        Raises:
            CompressError: the tensor is not of the recorded shape.
        """
        if tensor_name not in self.missing:
            return
        self.missing.discard(tensor_name)
        if self.shape is None:
            self._check(tensor_name, tensor, tensor.shape[0] >= self.part.rows.stop)
            rows = tensor[self.part.rows.start : self.part.rows.stop, self.part.columns.start : self.part.columns.stop]
            tensor = pad(rows, (0, 0, 0, self.part.padded - len(self.part.rows)))
        else:
            self._check(tensor_name, tensor, tensor.shape == self.shape.specification()[tensor_name][0])
            if not isinstance(self.shape, SparseShape):
                tensor = cut({tensor_name: tensor}, self.shape, self.part)[1][tensor_name]
        self._tensors[tensor_name] = tensor.to(device, copy=True).contiguous()

    def _check(self, tensor_name: str, tensor: Tensor, right: bool) -> None:
        if not right:
            raise CompressError(
                f"tensor {self.name}.{tensor_name} is {list(tensor.shape)}, which config.json does not record; "
                "fetch or write the checkpoint again."
            )

    def build(self, dtype: torch.dtype, embedding: bool = False) -> BitPlaneLinear | BitPlaneEmbedding | nn.Linear:
        """Make the module that multiplies by the part, or looks its rows up, and forget the tensors.

        Raises:
            CompressError: a tensor has not come, or a sparse matrix is damaged.
        """
        if self.missing:
            raise CompressError(f"tensor {self.name}.{min(self.missing)} is missing; fetch or write it again.")
        shape, tensors = self.shape, self._tensors
        self._tensors = {}
        if shape is None:
            return _dense(tensors["weight"].to(dtype))
        if isinstance(shape, SparseShape):
            whole = expand(self.name, shape, tensors)
            shape, tensors = cut(whole, shape.dense, self.part)
        else:
            shape = cut({}, shape, self.part)[0]
        shape, tensors = _from_least(shape, tensors, self.held.least)
        module = _packed(shape, tensors, self.held.bits, dtype, embedding)
        module.exact, module.same_sums = self.held.exact, False
        return module


def _dense(weight: Tensor) -> nn.Linear:
    with torch.device("meta"):
        module = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    module.weight = nn.Parameter(weight, requires_grad=False)
    return module


def _packed(
    shape: PackedShape, tensors: Mapping[str, Tensor], bits: int, dtype: torch.dtype, embedding: bool
) -> BitPlaneLinear | BitPlaneEmbedding:
    with torch.device("meta"):
        module = BitPlaneEmbedding(shape, dtype) if embedding else BitPlaneLinear(shape, False, dtype)
    module.hold(shape, {name: tensor.contiguous() for name, tensor in tensors.items()})
    module.bits = bits
    return module


class Matrices(nn.Module):
    """Multiply by the matrices that a server keeps as one: query, key and value; gate and up.

    Those whose rows have codebooks of their own, of the same bits, become one matrix; others stay next to each other.
    """

    def __init__(self, parts: Sequence[nn.Module], names: Sequence[str]) -> None:
        super().__init__()
        found = _merged(parts, names)
        self.parts = nn.ModuleList(found.values())
        self.names = list(found)
        for part in self.packed().values():
            part.tile()
        if len(self.packed()) == len(self.parts) > 1:
            places = [str(place) for place in range(len(self.parts))]
            join({f"part.{place}": part for place, part in zip(places, self.packed().values(), strict=True)}, [places])
        self._linears = list(self.packed().values())
        self._together = _lay_together(list(self.parts))
        self._joined: tuple[list[int], list[cpu.Prepared] | None] | None = None

    def packed(self) -> dict[tuple[str, ...], BitPlaneLinear]:
        """Return the parts that are packed, by the names of their matrices in the checkpoint."""
        both = zip(self.names, self.parts, strict=True)
        return {names: part for names, part in both if isinstance(part, BitPlaneLinear)}

    def twin(self, bits: Mapping[str, int]) -> Matrices | None:
        """Return the same matrices at other bits, by name, with the same tensors; None if those are not all in memory."""
        parts = {names: _twin(part, bits.get(names[0])) for names, part in zip(self.names, self.parts, strict=True)}
        if any(part is None for part in parts.values()):
            return None
        found = copy(self)
        found._modules = {}
        found.parts, found._joined = nn.ModuleList([part for part in parts.values() if part is not None]), None
        found._linears = list(found.packed().values())
        return found

    def forward(self, x: Tensor) -> Tensor:
        """Return all products side by side: [..., K] to [..., N of all] in the dtype of ``x``."""
        calls = self._calls() if x.device.type == "cpu" and x.dtype in SERVED else None
        if calls and len(calls) > 1 and all(call.direct(x) for call in calls):
            wide = x.to(torch.float32)  # once for all
            return torch.cat([call(wide) for call in calls], -1).to(x.dtype)
        products = [call(x) for call in calls or self.parts]
        return products[0] if len(products) == 1 else torch.cat(products, -1)

    def _calls(self) -> list[cpu.Prepared] | None:
        """Return what multiplies at the bits in use past the modules, which take as long as a product: all parts in one, or each; or None."""
        bits = [part.bits for part in self._linears]
        if self._joined is None or self._joined[0] != bits:
            if self._together and len(set(bits)) == 1:
                found = [_at_once(self._linears, self._together)]
            else:
                found = [call for part in self._linears if (call := part.prepared()) is not None]
                found = found if len(found) == len(self.parts) else []
            self._joined = bits, found or None
        return self._joined[1]


def _twin(part: nn.Module, bits: int | None) -> nn.Module | None:
    """Return a module with another's tensors at other bits; dense ones have none."""
    if not isinstance(part, (BitPlaneLinear, BitPlaneEmbedding)):
        return part
    if bits is None or bits not in part.shape.all_bits:
        return None
    found = copy(part)
    found.bits = bits
    return found


def _at_once(parts: Sequence[BitPlaneLinear], together: Mapping[str, Tensor]) -> cpu.Prepared:
    """Make one call of the C library of parts, at the bits in use, whose planes lie behind each other."""
    first = parts[0]
    planes = join_planes(together, first.shape.seed_bits, first.bits)
    codebook = torch.cat([part.codebook() for part in parts])
    factors = {"inputs": first.factors, "factors": first.row_factors, "groups": first.group_sizes}
    same = {"same_sums": first.same_sums}
    return cpu.Prepared(planes, codebook, first.in_features, not first.exact, **factors, **same)  # type: ignore[arg-type]


def _lay_together(parts: Sequence[nn.Module]) -> dict[str, Tensor]:
    """Put planes of parts behind each other where one call of the C library can multiply by all, else return nothing.

    That is where all parts multiply the same values, and where there are several every row has a codebook of its own, be it
    computed.
    """
    packed = [part for part in parts if isinstance(part, BitPlaneLinear)]
    if len(packed) < len(parts) or not all(_direct(part) for part in packed):
        return {}
    first = packed[0]
    same = all(
        part.shape.all_bits == first.shape.all_bits
        and part.shape.codebook_dtype == first.shape.codebook_dtype
        and same_factors(part.factors, first.factors)
        and (part.row_factors is None or len(packed) == 1)
        for part in packed
    )
    if not same:
        return {}
    names = ["weight", *(f"plane_{bits}" for bits in first.shape.all_bits[1:])]
    together = {name: torch.cat([part.get_buffer(name) for part in packed], -2) for name in names}
    for name, planes in together.items():
        views = torch.split(planes, [part.out_features for part in packed], -2)
        for part, view in zip(packed, views, strict=True):
            part.register_buffer(name, view)
    return together


def _direct(part: BitPlaneLinear) -> bool:
    return not part.is_tiled and cpu.serves(part.get_buffer("weight"))


def _merged(parts: Sequence[nn.Module], names: Sequence[str]) -> dict[tuple[str, ...], nn.Module]:
    """Make neighbours that are stored alike one matrix; each has the names of what it is made of."""
    found: list[tuple[tuple[str, ...], nn.Module]] = []
    for part, name in zip(parts, names, strict=True):
        before, last = found[-1] if found else ((), None)
        if isinstance(last, BitPlaneLinear) and isinstance(part, BitPlaneLinear) and _alike(last, part):
            rows = last.shape.out_features + part.shape.out_features
            tensors = {kind: torch.cat([tensor, part.get_buffer(kind)], -2) for kind, tensor in last.named_buffers()}
            shape = replace(last.shape, out_features=rows)
            one = _packed(shape, tensors, last.bits, torch.float32, embedding=False)
            one.exact, one.same_sums = last.exact, last.same_sums
            found[-1] = (*before, name), one
        else:
            found.append(((name,), part))
    return dict(found)


def _alike(one: BitPlaneLinear, other: BitPlaneLinear) -> bool:
    own = type(one.shape) is PackedShape and type(other.shape) is PackedShape
    same = replace(one.shape, out_features=1) == replace(other.shape, out_features=1)
    return own and same and one.bits == other.bits and one.exact == other.exact


class Vocabulary(nn.Module):
    """Look rows of a packed embedding up, and multiply by all of them."""

    def __init__(self, rows: BitPlaneEmbedding, name: str) -> None:
        super().__init__()
        self.rows, self.name = rows, name

    def packed(self) -> dict[tuple[str, ...], BitPlaneEmbedding]:
        """Return the packed module, by the name of its matrix in the checkpoint."""
        return {(self.name,): self.rows}

    def twin(self, bits: Mapping[str, int]) -> Vocabulary | None:
        """Return the same embedding at other bits, with the same tensors; None if those are not in memory."""
        rows = _twin(self.rows, bits[self.name])
        return Vocabulary(rows, self.name) if isinstance(rows, BitPlaneEmbedding) else None

    def forward(self, tokens: Tensor) -> Tensor:
        """Look rows up: int64 [...] to [..., K]."""
        found: Tensor = self.rows(tokens)
        return found

    def product(self, x: Tensor) -> Tensor:
        """Multiply by all rows: [..., K] to [..., N] in the dtype of ``x``."""
        return self.rows.product(x, self.rows.bits)


def packed_parts(model: nn.Module) -> dict[tuple[str, ...], BitPlaneLinear | BitPlaneEmbedding]:
    """Find all packed modules of a served model, each by the names in the checkpoint of the matrices that it is made of."""
    found: dict[tuple[str, ...], BitPlaneLinear | BitPlaneEmbedding] = {}
    for module in model.modules():
        if isinstance(module, (Matrices, Vocabulary)):
            found.update(module.packed())
    return found


def switch(parts: Mapping[tuple[str, ...], BitPlaneLinear | BitPlaneEmbedding], bits: Mapping[str, int]) -> None:
    """Change the bits of packed modules: all of them, or none where one cannot be read so.

    Raises:
        CompressError: bits that are not in memory, or not the same for matrices that are kept as one.
    """
    for names, part in parts.items():
        wanted = {bits[name] for name in names}
        held = part.shape.all_bits
        if len(wanted) > 1:
            raise CompressError(f"{names[0]} and {names[-1]} are served as one matrix; give them the same bits.")
        if not wanted <= set(held):
            raise CompressError(
                f"{names[0]}: {wanted.pop()} bits are not in memory, which has {held[0]} to {held[-1]}; "
                "start the server with --held-bits."
            )
    for names, part in parts.items():
        part.bits = bits[names[0]]
