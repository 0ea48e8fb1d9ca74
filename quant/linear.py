"""A linear layer and an embedding held as bit planes, readable at any number of bits from its seed's to its parent's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from compress.errors import CompressError
from compress.kernels import cpu, gpu
from compress.kernels.bitplane import SERVED, dense_weight, matmul, packed_linear, tiled_linear, tiled_weight
from compress.kernels.layout import Tiled, head_for, untiled_groups
from compress.kernels.packing import GROUP_UNIT
from compress.quant.format import join_planes, split_planes
from compress.quant.records import PackedShape
from compress.quant.shared import Shared, read_shared

_SHARED = (
    "columns",
    "rows",
    "groups",
    "shapes",
    "basis_",
    "width_",
    "place_",
)  # how names of the parts of shared codebooks begin
_Key = tuple[int, object, list[Tensor | None]]


def _same(one: _Key, other: _Key) -> bool:
    (bits, kind, buffers), (other_bits, other_kind, others) = one, other
    return bits == other_bits and kind == other_kind and len(buffers) == len(others) and all(map(is_, buffers, others))


_NO_WEIGHT = (
    "an adapter cannot be merged into packed weights, nor can anything else be computed from their bit planes: keep it beside the "
    "model, call dequantize() on the model first, which makes its weights dense, or take dense() of a layer."
)


class Planes(Tensor):
    """Bit planes where others expect a weight: they can be looked at, moved and copied, but not calculated with.

    A model that multiplies by them, or an adapter that is merged into them, would end in torch's words about sizes, or in
    numbers without sense.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Refuse what takes or gives floating-point numbers; results are plain tensors, but for copies."""
        given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        refused = any(not isinstance(value, Planes) and value.is_floating_point() for value in given)
        with torch._C.DisableTorchFunctionSubclass():
            try:
                found = None if refused else func(*args, **(kwargs or {}))
            except RuntimeError as error:  # of sizes, mostly
                raise CompressError(_NO_WEIGHT) from error
            if refused or (isinstance(found, Tensor) and found.is_floating_point()):
                raise CompressError(_NO_WEIGHT)
            kept = func in (Tensor.data.__get__, Tensor.clone)  # type: ignore[attr-defined]
            return found.as_subclass(cls if kept else Tensor) if isinstance(found, Tensor) else found


class PackedModule(nn.Module):
    """Hold buffers that bear the checkpoint's own names; the number of bits in use is a plain attribute.

    Attributes:
        keep_dense: whether the looked-up weight is kept between calls, as large as the dense layer's; None keeps it
            only where nothing multiplies by the planes themselves.
        exact: whether sums are of float32 products; if not, a CPU may round activations and codebook entries to
            8 bits where no gradient is asked for and nothing is compiled, and the kernels of a GPU read 4-bit codebooks
            with entries of 8 bits.
        same_sums: as :class:`compress.kernels.cpu.Prepared` has it; a server sets it to False before the first product.
    """

    def __init__(self, shape: PackedShape) -> None:
        nn.Module.__init__(self)  # past nn.Linear, which would make a dense weight
        self.keep_dense: bool | None = None
        self.exact = self.same_sums = True
        sizes = shape.specification().items()
        self.hold(shape, {name: torch.empty(size, dtype=getattr(torch, kind)) for name, (size, kind) in sizes})
        self.bits = shape.parent_bits

    def hold(self, shape: PackedShape, tensors: Mapping[str, Tensor]) -> None:
        """Take other tensors, as ``shape.specification()`` describes them, in place of those there are.

        The number of bits in use stays. A shape of another form than the dense one is for loading only: its tensors have to
        be rebuilt before the module is called.
        """
        self.shape = shape
        self._dense: tuple[_Key, Tensor] | None = None
        self._table: tuple[_Key, Tensor] | None = None
        self._prepared: tuple[_Key, cpu.Prepared] | None = None
        self._buffers.clear()
        self.is_tiled = False
        self._group: Group | None = None
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    @property
    def weight(self) -> Tensor:
        """Return what is held in the place of a weight, the seed's planes or the layout of the kernels, to look at."""
        held = self._buffers.get("weight", self._buffers.get("tiled_codes"))
        if held is None:
            raise AttributeError("weight")
        found = held.as_subclass(Planes)
        found.__dict__.update(held.__dict__)  # transformers marks tensors
        return found

    @property
    def device(self) -> torch.device:
        """Return where the tensors are."""
        return next(tensor.device for tensor in self._buffers.values() if tensor is not None)

    @property
    def bits(self) -> int:
        """Return the number of bits in use; setting it refuses one that is not held."""
        return self._bits

    @bits.setter
    def bits(self, value: int) -> None:
        if not isinstance(value, int) or value not in self.shape.all_bits:
            held = self.shape.all_bits
            raise ValueError(f"{value} bits are not among the {held[0]} to {held[-1]} held in memory")
        self._bits = value
        self._forget()

    def _forget(self) -> None:
        """Drop what was derived from the buffers."""
        self._dense = self._table = self._prepared = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what a copy or a pickle derives for itself: addresses mean nothing elsewhere."""
        return {**self.__dict__, "_dense": None, "_table": None, "_prepared": None, "_group": None}

    def planes(self, bits: int | None = None) -> list[Tensor]:
        """Return the planes of a number of bits, those in use if None, most significant first, each int32 [N, ceil(K / 32)]."""
        bits = bits or self.bits
        if self.is_tiled:
            return list(self.tiled().canonical()[0][:bits])
        return join_planes(dict(self.named_buffers()), self.shape.seed_bits, bits)

    def codebook(self, bits: int | None = None) -> Tensor:
        """Return the codebook of a number of bits, those in use if None, [N, 2**bits]; shared ones are computed once and kept.

        With one coefficient per row it is [1, 2**bits], for all rows: written out for each it could be as large as the planes.
        """
        bits = bits or self.bits
        if self.is_tiled:
            return self.tiled().codebook(bits)
        if (shared := self.shared()) is None:
            return self.get_buffer(f"codebook_{bits}")
        key, kept = self._key(bits, None), self._table
        if kept is None or not _same(kept[0], key):
            with torch.inference_mode(False), torch.no_grad():
                kept = self._table = key, shared.table(bits) if shared.shapes is None else shared.codebook(bits)
        return kept[1]

    def _shared_parts(self) -> dict[str, Tensor]:
        """Return the tensors that shared codebooks are computed from, by their stored names; none if rows have their own."""
        found = {name: tensor for name, tensor in self.named_buffers() if name.startswith(_SHARED)}
        return found if self.group_sizes is None else found | {"groups": self.group_sizes}

    def shared(self) -> Shared | None:
        """Return what shared codebooks are computed from; None if rows have their own."""
        return read_shared(self._shared_parts()) if "columns" in self._buffers else None

    @property
    def factors(self) -> Tensor | None:
        """Return the factors of the columns, [K], that entries of shared codebooks are multiplied by; else None."""
        return self._buffers.get("columns")

    @property
    def row_factors(self) -> Tensor | None:
        """Return the factors of the rows, [N, 1], where :meth:`codebook` is one row for all of them; else None."""
        return None if self.is_tiled or "shapes" in self._buffers else self._buffers.get("rows")

    @property
    def group_sizes(self) -> Tensor | None:
        """Return the sizes of every row's groups of columns, uint8 [N, ceil(K / 64)] in 255ths, if entries have them; else None."""
        tiled = self._buffers.get("tiled_groups")
        return self._buffers.get("groups") if tiled is None else untiled_groups(tiled, self.shape.out_features)

    def dense(self, dtype: torch.dtype | None = None, bits: int | None = None, places: Tensor | None = None) -> Tensor:
        """Return the weight at a number of bits, those in use if None, [N, K], float32 by default, and keep nothing.

        With ``places``, int64 [T], those rows alone, [T, K].
        """
        bits, dtype = bits or self.bits, dtype or torch.float32
        columns, rows = self.factors, self.row_factors
        wide = dtype if columns is None else torch.float32  # rounded once
        if self.is_tiled:
            found = tiled_weight(self.tiled(), bits, wide)
            found = found if places is None else found[places]
        else:
            columns_held = self.shape.in_features
            found = dense_weight(self.planes(bits), self.codebook(bits), columns_held, wide, places, self.group_sizes)
        if rows is not None:
            found *= rows if places is None else rows[places]
        return found if columns is None else found.mul_(columns).to(dtype)

    def product(self, x: Tensor, bits: int) -> Tensor:
        """Multiply by the matrix as it is stored, at a number of bits: [..., K] to [..., N] in the dtype of ``x``, differentiable in it.

        The module's bias is added, if it has one.
        """
        prepared = self._direct(bits, x)
        if prepared is not None:
            return prepared(x)
        dense = self._kept_dense(bits, x.dtype)
        if dense is not None:
            y = matmul(x, dense.t())
        else:
            shape, rows = self.shape, self.row_factors
            tensors = [self.codebook(bits), *self.planes(bits)]
            sizes = shape.out_features, shape.in_features
            y = packed_linear(self._scaled(x), tensors, None, self.group_sizes, *sizes, bits, 0)
            y = y if rows is None else (y * rows[:, 0]).to(x.dtype)
        bias = self._parameters.get("bias")
        return y if bias is None else y + bias

    def _scaled(self, x: Tensor) -> Tensor:
        """Multiply activations by the factors of the columns, if there are any."""
        columns = self.factors
        return x if columns is None else (x.float() * columns).to(x.dtype)

    def tiled(self) -> Tiled:
        """Return the layout of the GPU kernels; it must be there (:meth:`BitPlaneLinear.tile`)."""
        named = {name: tensor for name, tensor in self._buffers.items() if tensor is not None}
        shape, registers = self.shape, "tiled_registers_"
        return Tiled(
            shape.out_features,
            shape.in_features,
            head_for(shape.seed_bits),
            named["tiled_codes"],
            {bits: named[f"tiled_table_{bits}"] for bits in shape.all_bits},
            {bits: named[registers + str(bits)] for bits in shape.all_bits if registers + str(bits) in named},
            named.get("tiled_rounded"),
            named.get("tiled_groups"),
            named.get("tiled_sizes"),
        )

    def _key(self, bits: int, kind: object) -> _Key:
        """Return all that what is kept between calls was made of; whoever moves tensors may put others in their place."""
        return bits, kind, [*self._buffers.values(), self._parameters.get("bias")]

    def _kept_dense(self, bits: int, dtype: torch.dtype) -> Tensor | None:
        """Return the dense weight kept between calls, ``N * K`` values in the activations' dtype, or None."""
        keep = self.keep_dense
        if keep is None:
            keep = self.codebook(bits).device.type != "cpu" or not cpu.built()
        if not keep:
            self._dense = None
            return None
        key, kept = self._key(bits, dtype), self._dense
        if kept is None or not _same(kept[0], key):
            with torch.inference_mode(False):  # what it keeps may be differentiated through later
                kept = self._dense = key, self.dense(dtype, bits)
        return kept[1]

    def _direct(self, bits: int, x: Tensor) -> cpu.Prepared | None:
        """Return the C library's view of this layer, where it may be called past the operator; else None.

        The operator's dispatch takes longer than a small layer's product; gradients and tracing need it.
        """
        if type(x) is not Tensor or x.device.type != "cpu" or x.dtype not in SERVED:
            return None
        if (x.requires_grad and torch.is_grad_enabled()) or torch.compiler.is_compiling():
            return None
        if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            return None
        return self.prepared(bits)

    def prepared(self, bits: int | None = None) -> cpu.Prepared | None:
        """Return the C library's view of this layer at a number of bits, those in use if None; None where it does not serve it."""
        bits, exact, kept = bits or self.bits, self.exact, self._prepared
        if self.keep_dense or self.is_tiled:
            return None
        key = self._key(bits, exact)
        if kept is not None and _same(kept[0], key):
            return kept[1]
        if not cpu.serves(self.codebook(bits)):
            return None
        planes, table, columns = self.planes(bits), self.codebook(bits), self.shape.in_features
        scales = self.factors, self.row_factors, self._parameters.get("bias"), self.group_sizes
        prepared = cpu.Prepared(planes, table, columns, not exact, None, *scales, same_sums=self.same_sums)
        self._prepared = key, prepared
        return prepared

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedModule:
        self._forget()  # it would stay on the old device
        kinds = "codebook_", "tiled_table_", "tiled_rounded", "tiled_sizes", *_SHARED
        codebooks = {id(buffer) for name, buffer in self.named_buffers() if name.startswith(kinds)}

        def moved(tensor: Tensor) -> Tensor:
            """Move codebooks but never cast them: ``model.to(torch.bfloat16)`` must not cost precision."""
            result = fn(tensor)
            if id(tensor) not in codebooks or result.dtype == tensor.dtype:
                return result
            return tensor.to(result.device)

        return super()._apply(moved, recurse)  # type: ignore[no-any-return, no-untyped-call]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._forget()
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        """Say what there is to say of it where the model is printed."""
        shape = self.shape
        return f"{shape.in_features}, {shape.out_features}, bits={self.bits} of {shape.seed_bits}..{shape.parent_bits}"


class BitPlaneLinear(PackedModule, nn.Linear):  # type: ignore[override]  # a weight to look at
    """Stand in for ``nn.Linear``: a frozen layer of N outputs and K inputs in ``bits`` planes.

    It is one by class, so that peft puts adapters on it as on any other; its ``weight`` is the seed's planes.
    On a GPU that the kernels serve it holds their layout in place of the stored tensors, which are made again where they are
    asked for (``state_dict``, ``planes``, moving to another kind of device).
    """

    _exact = True

    def __init__(self, shape: PackedShape, bias: bool, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(shape)
        self.in_features, self.out_features = shape.in_features, shape.out_features
        held = nn.Parameter(torch.empty(shape.out_features, dtype=dtype), requires_grad=False) if bias else None
        self.register_parameter("bias", held)

    @property
    def exact(self) -> bool:
        """Tell whether sums are of float32 products; setting it in the layout of the kernels parts a group."""
        return self._exact

    @exact.setter
    def exact(self, value: bool) -> None:
        if value == self._exact:
            return
        self._exact = value
        if self.is_tiled:
            made = self.tiled().with_entries(value)
            self._part()
            self._take(made)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer: [..., K] to [..., N] in the dtype of ``x``, differentiable in ``x``."""
        bits, group = self.bits, self._group  # once: another thread may change them meanwhile
        if self.is_tiled and not self.keep_dense:
            shared = group.take(self, bits, x) if group is not None else None
            return tiled_linear(self._scaled(x), self.tiled(), bits, self.bias) if shared is None else shared
        return self.product(x, bits)

    def tile(self) -> None:
        """Take the layout of the GPU kernels in place of the stored tensors, if they serve the device those are on."""
        if self.is_tiled or self.shape.dense is not self.shape:  # one in the sparse form is not rebuilt yet
            return
        if not gpu.serves(self.device):
            return
        shape, buffers, shared = self.shape, dict(self.named_buffers()), self.shared()
        codebooks = {
            bits: buffers[f"codebook_{bits}"] if shared is None else shared.decoded(bits) for bits in shape.all_bits
        }
        planes, groups = join_planes(buffers, shape.seed_bits, shape.parent_bits), None
        if shared is not None and shared.groups is not None:
            groups, codebooks = _grouped(shared, shape)
        self._take(Tiled.build(planes, codebooks, shape.in_features, self.exact, groups))

    def _take(self, made: Tiled) -> None:
        """Hold a layout in place of what there is."""
        self.hold(self.shape, {name: part for name, part in self._shared_parts().items() if name != "groups"})
        self.register_buffer("tiled_codes", made.codes, persistent=False)
        for bits, table in made.tables.items():
            self.register_buffer(f"tiled_table_{bits}", table, persistent=False)
        for bits, packed in made.registers.items():
            self.register_buffer(f"tiled_registers_{bits}", packed, persistent=False)
        if made.rounded is not None:
            self.register_buffer("tiled_rounded", made.rounded, persistent=False)
        if made.groups is not None:
            self.register_buffer("tiled_groups", made.groups, persistent=False)
            self.register_buffer("tiled_sizes", made.sizes, persistent=False)
        self.is_tiled = True

    def share(self, part: Tiled, group: Group) -> None:
        """Become a member of a group that holds this layer's layout as a part of its own."""
        self._take(part)
        self._group = group

    def _part(self) -> None:
        if self._group is not None:
            self._group.part()

    def untile(self) -> None:
        """Hold the stored tensors again."""
        self._part()
        if self.is_tiled:
            self.hold(self.shape, self._stored())

    def _stored(self) -> dict[str, Tensor]:
        """Return the checkpoint's tensors, made from the layout of the kernels, bit for bit."""
        planes, codebooks = self.tiled().canonical()
        tensors, parts = split_planes(planes, self.shape), self._shared_parts()
        return tensors | (parts or {f"codebook_{bits}": codebook for bits, codebook in codebooks.items()})

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedModule:
        self._part()
        super()._apply(fn, recurse)
        if self.is_tiled and not gpu.serves(self.device):
            self.untile()
        self.tile()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.is_tiled:
            destination |= {prefix + name: tensor for name, tensor in self._stored().items()}

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.untile()
        super()._load_from_state_dict(*args, **kwargs)
        self.tile()


def _grouped(shared: Shared, shape: PackedShape) -> tuple[tuple[Tensor, Tensor], dict[int, Tensor]]:
    """Return sizes of groups and rows as the GPU's layout wants them, and the codebook that rows share, written out for each.

    Entries that are stored as float16 stay so, and are of about a weight's size, as float16 products want them.
    """
    assert shared.groups is not None
    size = shared.rows.abs().amax().double().clamp(min=2.0**-24).log2().floor().exp2().float()  # a power of two
    codebooks = {}
    for bits in shape.all_bits:
        table = shared.table(bits) * size
        kind = shared.rows.dtype if bits <= shared.last else torch.float32
        codebooks[bits] = table.to(kind).expand(shape.out_features, -1).contiguous()
    return (shared.groups, shared.rows.float() / (size * GROUP_UNIT)), codebooks


class Group:
    """Hold layers that multiply the same input, launched together on a GPU (:func:`compress.quant.fused.join`).

    The first member, of those in the order of their calls, multiplies by the layouts of all, one behind the other, and leaves
    the others' results for them; a member that is called with another input, or at another number of bits, computes its own.
    """

    def __init__(self, members: Sequence[BitPlaneLinear], tiled: Tiled) -> None:
        self.members, self._tiled = list(members), tiled
        self._sizes = [member.out_features for member in members]
        biases: list[Tensor] = [member.bias for member in members if member.bias is not None]
        self._bias = torch.cat(biases) if biases else None
        self._waiting: tuple[Tensor, int, tuple[Tensor, ...]] | None = None

    def take(self, member: BitPlaneLinear, bits: int, x: Tensor) -> Tensor | None:
        """Return the member's product at a number of bits, [..., N], or None if it has to compute its own."""
        if member is self.members[0]:
            if any(other.bits != bits or other.keep_dense for other in self.members):
                return None
            parts = torch.split(tiled_linear(member._scaled(x), self._tiled, bits, self._bias), self._sizes, -1)
            self._waiting = x, bits, parts
            return parts[0]
        waiting = self._waiting
        if waiting is None or waiting[0] is not x or waiting[1] != bits:
            return None
        if member is self.members[-1]:
            self._waiting = None  # the memory is wanted elsewhere
        return waiting[2][self.members.index(member)]

    def part(self) -> None:
        """Let every member go its own way, for good; each holds what it held."""
        for member in self.members:
            member._group = None
        self._waiting = None
