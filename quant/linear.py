"""A linear layer and an embedding held as bit planes, readable at any width from its seed to its parent."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import is_
from typing import Any, cast

import torch
from torch import Tensor, nn

from compress.kernels import cpu, gpu
from compress.kernels.bitplane import SERVED, bitplane_linear, dense_weight
from compress.kernels.layout import Tiled, head_for
from compress.quant.format import PackedShape
from compress.quant.fused import Group


class _Packed(nn.Module):
    """Buffers that bear the checkpoint's own names, and a width that is a plain attribute.

    Attributes:
        keep_dense: whether the looked-up weight is kept between calls, as large as the dense layer's; None keeps it
            only where nothing multiplies by the planes themselves.
        exact: whether sums are of float32 products; if not, a CPU may round activations and table entries to
            8 bits where no gradient is asked for and nothing is compiled, and the kernels of a GPU read 4-bit tables
            with entries of 8 bits (:meth:`BitPlaneLinear.tiled`).
    """

    def __init__(self, shape: PackedShape) -> None:
        super().__init__()
        self.keep_dense: bool | None = None
        self.exact = True
        self.hold(shape, {name: torch.empty(size, dtype=kind) for name, (size, kind) in shape.specification().items()})
        self.bits = shape.parent_bits

    def hold(self, shape: PackedShape, tensors: Mapping[str, Tensor]) -> None:
        """Take other tensors, as ``shape.specification()`` describes them, in place of those there are.

        The width in use stays. A shape of another form than the dense one is for loading only: its tensors have to
        be rebuilt before the module is called.
        """
        self.shape = shape
        self._dense: Tensor | None = None
        self._prepared: tuple[list[Tensor | None], bool, cpu.Prepared] | None = None
        self._buffers.clear()
        self.is_tiled = False
        self._group: Group | None = None
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    @property
    def bits(self) -> int:
        """The width in use."""
        return self._bits

    @bits.setter
    def bits(self, value: int) -> None:
        if not isinstance(value, int) or value not in self.shape.widths:
            widths = self.shape.widths
            raise ValueError(f"width {value} is not among the {widths[0]} to {widths[-1]} bits held in memory")
        self._bits = value
        self._forget()

    def _forget(self) -> None:
        """Drop what was derived from the buffers."""
        self._dense = self._prepared = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy or a pickle derives its own: addresses mean nothing elsewhere."""
        return {**self.__dict__, "_dense": None, "_prepared": None, "_group": None}

    def planes(self) -> list[Tensor]:
        """The planes of the width in use, most significant first, each int32 [N, ceil(K / 32)]."""
        seed = self.shape.seed_bits
        extra = [self.get_buffer(f"plane_{bits}") for bits in range(seed + 1, self.bits + 1)]
        return [*self.get_buffer("weight")[: self.bits].unbind(0), *extra]

    def codebook(self) -> Tensor:
        """The table of the width in use, [N, 2**bits]."""
        return self.get_buffer(f"codebook_{self.bits}")

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight at the width in use, [N, K]; float32 unless told otherwise. Nothing is kept."""
        return dense_weight(self.planes(), self.codebook(), self.shape.in_features, dtype or torch.float32)

    def _kept_dense(self, dtype: torch.dtype) -> Tensor | None:
        """The dense weight kept between calls: ``N * K`` values in the activations' dtype, or None."""
        keep = self.keep_dense
        if keep is None:
            keep = self.codebook().device.type != "cpu" or not cpu.built()
        if not keep:
            self._dense = None
            return None
        if self._dense is None or self._dense.dtype != dtype:
            with torch.inference_mode(False):  # what it keeps may be differentiated through later
                self._dense = self.dense(dtype)
        return self._dense

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Packed:
        self._forget()  # it would stay on the old device
        kinds = "codebook_", "tiled_table_", "tiled_rounded"
        tables = {id(buffer) for name, buffer in self.named_buffers() if name.startswith(kinds)}

        def moved(tensor: Tensor) -> Tensor:
            """Tables move but are never cast: ``model.to(torch.bfloat16)`` must not cost precision."""
            result = fn(tensor)
            if id(tensor) not in tables or result.dtype == tensor.dtype:
                return result
            return tensor.to(result.device)

        return super()._apply(moved, recurse)  # type: ignore[no-any-return, no-untyped-call]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._forget()
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        shape = self.shape
        return f"{shape.in_features}, {shape.out_features}, bits={self.bits} of {shape.seed_bits}..{shape.parent_bits}"


class BitPlaneLinear(_Packed):
    """A frozen linear layer of N outputs and K inputs in ``bits`` planes; stands in for ``nn.Linear``.

    On a GPU that the kernels serve it holds their layout in place of the stored tensors, which are made again where they are
    asked for (``state_dict``, ``planes``, moving to another kind of device).
    """

    _exact = True

    def __init__(self, shape: PackedShape, bias: bool, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(shape)
        self.in_features, self.out_features = shape.in_features, shape.out_features
        self.bias = nn.Parameter(torch.empty(shape.out_features, dtype=dtype), requires_grad=False) if bias else None

    @property
    def exact(self) -> bool:
        """As for every packed module. Setting it in the layout of the kernels parts a group (:func:`fused.join`)."""
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
        """[..., K] -> [..., N] in the dtype of ``x``; differentiable in ``x``."""
        if self.is_tiled:
            return self._forward_tiled(x)
        prepared = self._direct(x)
        y: Tensor
        if prepared is not None:
            y = prepared(x)
        else:
            y = bitplane_linear(x, self.planes(), self.codebook(), self.in_features, self._kept_dense(x.dtype))
        return y if self.bias is None else y + self.bias

    def _forward_tiled(self, x: Tensor) -> Tensor:
        if self.keep_dense:
            return nn.functional.linear(x, cast(Tensor, self._kept_dense(x.dtype)), self.bias)
        shared = self._group.take(self, x) if self._group is not None else None
        return gpu.linear(x, self.tiled(), self.bits, self.bias) if shared is None else shared

    def tiled(self) -> Tiled:
        """The layout of the GPU kernels; it must be there (:meth:`tile`)."""
        named = {name: tensor for name, tensor in self._buffers.items() if tensor is not None}
        tables = {bits: named[f"tiled_table_{bits}"] for bits in self.shape.widths}
        registers = {
            bits: named[f"tiled_registers_{bits}"] for bits in self.shape.widths if f"tiled_registers_{bits}" in named
        }
        head = head_for(self.shape.seed_bits)
        return Tiled(
            self.out_features,
            self.in_features,
            head,
            named["tiled_codes"],
            tables,
            registers,
            named.get("tiled_rounded"),
        )

    def tile(self) -> None:
        """Take the layout of the GPU kernels in place of the stored tensors, if they serve the device those are on."""
        if self.is_tiled or self.shape.dense is not self.shape:  # one in the sparse form is not rebuilt yet
            return
        if not gpu.serves(self.get_buffer("weight").device):
            return
        shape = self.shape
        extra = [self.get_buffer(f"plane_{bits}") for bits in shape.widths[1:]]
        books = {bits: self.get_buffer(f"codebook_{bits}") for bits in shape.widths}
        self._take(Tiled.build([*self.get_buffer("weight").unbind(0), *extra], books, shape.in_features, self.exact))

    def _take(self, made: Tiled) -> None:
        """Hold a layout in place of what there is."""
        self.hold(self.shape, {})
        self.register_buffer("tiled_codes", made.codes, persistent=False)
        for bits, table in made.tables.items():
            self.register_buffer(f"tiled_table_{bits}", table, persistent=False)
        for bits, packed in made.registers.items():
            self.register_buffer(f"tiled_registers_{bits}", packed, persistent=False)
        if made.rounded is not None:
            self.register_buffer("tiled_rounded", made.rounded, persistent=False)
        self.is_tiled = True

    def share(self, part: Tiled, group: Group) -> None:
        """Become a member of a group that holds this layer's layout as a part of its own."""
        self._take(part)
        self._group = group

    def leave(self) -> None:
        """Be alone again."""
        self._group = None

    def _part(self) -> None:
        if self._group is not None:
            self._group.part()

    def untile(self) -> None:
        """Hold the stored tensors again."""
        self._part()
        if self.is_tiled:
            self.hold(self.shape, self._stored())

    def _stored(self) -> dict[str, Tensor]:
        """The checkpoint's tensors, made from the layout of the kernels, bit for bit."""
        planes, books = self.tiled().canonical()
        seed = self.shape.seed_bits
        tensors = {"weight": planes[:seed].clone()}  # a view would keep the other planes
        tensors |= {f"plane_{bits}": planes[bits - 1].clone() for bits in self.shape.widths[1:]}
        return tensors | {f"codebook_{bits}": book for bits, book in books.items()}

    def planes(self) -> list[Tensor]:
        """The planes of the width in use, most significant first, each int32 [N, ceil(K / 32)]."""
        return list(self.tiled().canonical()[0][: self.bits]) if self.is_tiled else super().planes()

    def codebook(self) -> Tensor:
        """The table of the width in use, [N, 2**bits]."""
        return self.tiled().codebook(self.bits) if self.is_tiled else super().codebook()

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight at the width in use, [N, K]; float32 unless told otherwise. Nothing is kept."""
        if self.is_tiled:
            return gpu.weight(self.tiled(), self.bits, dtype or torch.float32)
        return super().dense(dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Packed:
        self._part()
        super()._apply(fn, recurse)
        if self.is_tiled and not gpu.serves(self.get_buffer("tiled_codes").device):
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

    def _direct(self, x: Tensor) -> cpu.Prepared | None:
        """The C library's view of this layer, where it may be called past the operator; else None.

        The operator's dispatch takes longer than a small layer's product. What it is there for, gradients and tracing, goes
        through it.
        """
        if self.keep_dense or type(x) is not Tensor or x.device.type != "cpu" or x.dtype not in SERVED:
            return None
        if (x.requires_grad and torch.is_grad_enabled()) or torch.compiler.is_compiling():
            return None
        if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            return None
        buffers = list(self._buffers.values())  # whoever moves tensors may put others in their place
        if self._prepared is not None:
            held, exact, prepared = self._prepared
            if exact == self.exact and all(map(is_, held, buffers)):
                return prepared
        if not cpu.serves(self.codebook()):
            return None
        prepared = cpu.Prepared(self.planes(), self.codebook(), self.in_features, int8=not self.exact)
        self._prepared = buffers, self.exact, prepared
        return prepared


class BitPlaneEmbedding(_Packed):
    """A frozen embedding table of N rows and K values each; stands in for ``nn.Embedding``."""

    def __init__(self, shape: PackedShape, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> None:
        super().__init__(shape)
        self.num_embeddings, self.embedding_dim = shape.out_features, shape.in_features
        self.dtype, self.scale = dtype, scale

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 [...] -> [..., K]: only the rows asked for are looked up."""
        rows = tokens.reshape(-1)
        table = dense_weight(
            [plane[rows] for plane in self.planes()], self.codebook()[rows], self.embedding_dim, self.dtype
        )
        # The constant is rounded to the dtype first, as the dense module does.
        return (table * torch.tensor(self.scale, dtype=self.dtype, device=table.device)).view(*tokens.shape, -1)
