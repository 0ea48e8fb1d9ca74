"""A packed linear whose codebooks are trained: a stand-in with the same codes and, for a while, codebooks that have gradients."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from compress.kernels.packing import unpack_planes
from compress.quant.descent import Floats32, U
from compress.quant.kmeans_seed import compiled, in_threads
from compress.quant.linear import BitPlaneLinear
from compress.quant.records import GROUP
from compress.quant.shared import read_shared, spread
from compress.quant.shared_fit import by_group

Bytes = NDArray[np.uint8]
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
    """Do what :class:`_Product` does where all rows share one codebook and groups of columns have sizes, [N, ceil(K / 64)].

    ``codes`` are uint8 and have ``more`` bits below those that are read.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor, sizes: Tensor, columns: Tensor, codes: Tensor, more: int) -> Tensor:
        ctx.save_for_backward(x, table, sizes, columns, codes)
        ctx.more = more
        return x @ decoded(table, sizes, columns, codes, more).to(x.dtype).t()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, table, sizes, columns, codes = ctx.saved_tensors
        given = gradients[0]
        by_weight = (given.flatten(0, -2).t() @ x.flatten(0, -2)).float()
        by_entry, by_size = gathered(by_weight, table, sizes, columns, codes, ctx.more)
        weight = decoded(table, sizes, columns, codes, ctx.more).to(x.dtype)
        return given @ weight, by_entry, by_size, None, None, None


def decoded(table: Tensor, sizes: Tensor, columns: Tensor, codes: Tensor, more: int) -> Tensor:
    """Return a weight, float32 [N, K]: an entry of ``table`` times the size of its group times its column's factor."""
    if codes.device.type != "cpu":
        return table[(codes >> more).int()] * spread(sizes, len(columns)) * columns
    weight = torch.empty(codes.shape, dtype=torch.float32)
    found, index, groups, entries, factors = _arrays(weight, codes, sizes, table, columns)

    def run(rows: slice) -> None:
        _decode(found[rows], index[rows], groups[rows], entries, factors, U(more))

    in_threads(run, len(codes), torch.get_num_threads())
    return weight


def gathered(
    by_weight: Tensor, table: Tensor, sizes: Tensor, columns: Tensor, codes: Tensor, more: int
) -> tuple[Tensor, Tensor]:
    """Sum the gradients of weights, float32 [N, K], for every entry of ``table`` and for every group's size."""
    if codes.device.type != "cpu":
        index = (codes >> more).int()
        by_size = by_group(by_weight * table[index] * columns).sum(2)
        wide = spread(sizes, len(columns)) * columns
        return torch.zeros_like(table).index_add_(0, index.flatten(), (by_weight * wide).flatten()), by_size
    by_entry = torch.zeros(len(codes), len(table), dtype=torch.float32)
    by_size = torch.empty_like(sizes)
    to_entry, to_size, given, index, groups, entries, factors = _arrays(
        by_entry, by_size, by_weight, codes, sizes, table, columns
    )

    def run(rows: slice) -> None:
        _gather(to_entry[rows], to_size[rows], given[rows], index[rows], groups[rows], entries, factors, U(more))

    in_threads(run, len(codes), torch.get_num_threads())
    return by_entry.sum(0), by_size


def _arrays(*tensors: Tensor) -> list[Any]:
    return [tensor.detach().contiguous().numpy() for tensor in tensors]


@compiled
def _decode(
    weight: Floats32, codes: Bytes, sizes: Floats32, table: Floats32, columns: Floats32, more: np.uint64
) -> None:
    for n in range(U(codes.shape[0])):
        for k in range(U(codes.shape[1])):
            weight[n, k] = table[U(codes[n, k]) >> more] * sizes[n, k // U(GROUP)] * columns[k]


@compiled
def _gather(
    by_entry: Floats32,
    by_size: Floats32,
    by_weight: Floats32,
    codes: Bytes,
    sizes: Floats32,
    table: Floats32,
    columns: Floats32,
    more: np.uint64,
) -> None:
    for n in range(U(codes.shape[0])):
        for group in range(U(sizes.shape[1])):
            size, total = sizes[n, group], np.float32(0)
            for k in range(group * U(GROUP), min((group + U(1)) * U(GROUP), U(codes.shape[1]))):
                code, given = U(codes[n, k]) >> more, by_weight[n, k] * columns[k]
                total += given * table[code]
                by_entry[n, code] += given * size
            by_size[n, group] = total


class Student(nn.Module):
    """Stand in for a packed linear, at the bits that it has in use; some of its stored tensors are trained.

    What is learned, ``offsets``, is in units of the size of a step that makes sense for each tensor: of codebooks the mean distance
    between entries, of factors a share of themselves.

    Args:
        packed: the layer.
        trained: the stored names of the tensors that are trained; exact zeros in codebooks may stand for pruned weights, and stay.
    """

    def __init__(self, packed: BitPlaneLinear, trained: Collection[str]) -> None:
        super().__init__()
        self.packed = packed
        most = packed.planes(packed.shape.parent_bits)
        self.codes = unpack_planes(most, packed.in_features)
        kinds = "codebook_", "columns", "rows", "groups", "shapes", "basis_", "width_", "place_"
        self.start = {name: tensor.float() for name, tensor in packed.named_buffers() if name.startswith(kinds)}
        self.unit = {name: _unit(name, self.start[name]) for name in trained}
        self.offsets = nn.ParameterDict({name: nn.Parameter(torch.zeros_like(self.start[name])) for name in trained})
        self.plain = torch.ones(packed.in_features, device=self.codes.device)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that codebooks are made of, by their stored names, as they are by now, in float32."""
        moved = {name: self.start[name] + self.unit[name] * offset for name, offset in self.offsets.items()}
        return {**self.start, **moved}

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer: [..., K] to [..., N], differentiable in ``x`` and in what is trained."""
        now, bits = self.tensors(), self.packed.bits
        more = self.packed.shape.parent_bits - bits
        x = x.to(torch.get_autocast_dtype(x.device.type)) if torch.is_autocast_enabled(x.device.type) else x
        if "groups" in now:
            sizes = now["rows"] * now["groups"] / 255
            given = now[f"basis_{bits}"][0], sizes, now["columns"], self.codes
            y: Tensor = _Grouped.apply(x, *given, more)  # type: ignore[no-untyped-call]
            return y if self.packed.bias is None else y + self.packed.bias
        if "columns" in now:
            with torch.autocast(x.device.type, enabled=False):  # entries are not to be rounded
                table, columns = read_shared(now).differentiable(bits), now["columns"]
        else:
            table, columns = now[f"codebook_{bits}"], self.plain
        y = _Product.apply(x, table, columns, self.codes >> more)  # type: ignore[no-untyped-call]
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
