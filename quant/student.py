"""A packed linear whose codebooks are trained: a stand-in with the same codes and, for a while, codebooks that have gradients."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from compress.kernels.packing import unpack_planes
from compress.quant.linear import BitPlaneLinear
from compress.quant.shared import read_shared, spread
from compress.quant.shared_fit import by_group

_FACTOR = 0.05  # a factor of a row or a column, or a coefficient, is learned in units of this share of its size
_COEFFICIENTS = 128 * _FACTOR


class _Product(torch.autograd.Function):
    """Multiply by a weight looked up in codebooks; for the gradient it keeps the codes, not the weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor, columns: Tensor, codes: Tensor) -> Tensor:
        ctx.save_for_backward(x, table, columns, codes)
        return x @ (table.gather(1, codes.long()) * columns).to(x.dtype).t()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, table, columns, codes = ctx.saved_tensors
        given, index = gradients[0], codes.long()
        entries = table.gather(1, index)
        by_weight = (given.flatten(0, -2).t() @ x.flatten(0, -2)).float()
        by_column = (by_weight * entries).sum(0)
        by_entry = torch.zeros_like(table).scatter_add_(1, index, by_weight * columns)
        return given @ (entries * columns).to(x.dtype), by_entry, by_column, None


class _Grouped(torch.autograd.Function):
    """Do what :class:`_Product` does where all rows share one codebook and groups of columns have sizes, [N, ceil(K / 64)]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor, sizes: Tensor, columns: Tensor, codes: Tensor) -> Tensor:
        ctx.save_for_backward(x, table, sizes, columns, codes)
        return x @ (table[codes.long()] * spread(sizes, len(columns)) * columns).to(x.dtype).t()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, table, sizes, columns, codes = ctx.saved_tensors
        given, index, wide = gradients[0], codes.long(), spread(sizes, len(columns)) * columns
        entries = table[index]
        by_weight = (given.flatten(0, -2).t() @ x.flatten(0, -2)).float()
        by_size = by_group(by_weight * entries * columns).sum(2)
        by_entry = torch.zeros_like(table).index_add_(0, index.flatten(), by_weight.mul_(wide).flatten())
        return given @ (entries * wide).to(x.dtype), by_entry, by_size, None, None


class Student(nn.Module):
    """Stand in for a packed linear at several numbers of bits, one of which is in use; some of its stored tensors are trained.

    What is learned, ``offsets``, is in units of the size of a step that makes sense for each tensor: of codebooks the mean distance
    between entries, of factors a share of themselves.

    Args:
        packed: the layer.
        trained: the stored names of the tensors that are trained; exact zeros in codebooks may stand for pruned weights, and stay.
        all_bits: numbers of bits that it is read at.
    """

    def __init__(self, packed: BitPlaneLinear, trained: Collection[str], all_bits: Collection[int]) -> None:
        super().__init__()
        self.packed = packed
        most = packed.planes(packed.shape.parent_bits)
        codes = unpack_planes(most, packed.in_features)
        self.codes = {bits: codes >> (packed.shape.parent_bits - bits) for bits in all_bits}
        kinds = "codebook_", "columns", "rows", "groups", "shapes", "basis_", "width_", "place_"
        self.start = {name: tensor.float() for name, tensor in packed.named_buffers() if name.startswith(kinds)}
        self.unit = {name: _unit(name, self.start[name]) for name in trained}
        self.offsets = nn.ParameterDict({name: nn.Parameter(torch.zeros_like(self.start[name])) for name in trained})
        self.plain = torch.ones(packed.in_features, device=codes.device)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that codebooks are made of, by their stored names, as they are by now, in float32."""
        moved = {name: self.start[name] + self.unit[name] * offset for name, offset in self.offsets.items()}
        return {**self.start, **moved}

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer: [..., K] to [..., N], differentiable in ``x`` and in what is trained."""
        bits, now = self.packed.bits, self.tensors()
        x = x.to(torch.get_autocast_dtype(x.device.type)) if torch.is_autocast_enabled(x.device.type) else x
        if "groups" in now:
            sizes = now["rows"] * now["groups"] / 255
            given = now[f"basis_{bits}"][0], sizes, now["columns"], self.codes[bits]
            y: Tensor = _Grouped.apply(x, *given)  # type: ignore[no-untyped-call]
            return y if self.packed.bias is None else y + self.packed.bias
        if "columns" in now:
            with torch.autocast(x.device.type, enabled=False):  # entries are not to be rounded
                table, columns = read_shared(now).differentiable(bits), now["columns"]
        else:
            table, columns = now[f"codebook_{bits}"], self.plain
        y = _Product.apply(x, table, columns, self.codes[bits])  # type: ignore[no-untyped-call]
        return y if self.packed.bias is None else y + self.packed.bias


def _unit(name: str, start: Tensor) -> Tensor:
    """Return how much of a stored tensor a step of size 1 is."""
    if name in ("rows", "columns", "groups"):
        return _FACTOR * start.abs().clamp_min(1e-30)
    if name == "shapes":
        return torch.full_like(start, _COEFFICIENTS)
    # Entries reach about two standard deviations to either side of their mean.
    spread = start[0] if name.startswith("basis_") else start  # the other bases are what rows differ from the first by
    distance = 4 * spread.std().clamp_min(1e-30) / start.shape[-1]
    return distance * (start != 0) if name.startswith("codebook_") else distance.expand_as(start)
