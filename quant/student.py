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
from compress.quant.shared import spread
from compress.quant.shared_fit import by_group

Bytes = NDArray[np.uint8]
_SIZE = 0.15  # the size of a group is learned in units of this share of itself; measured


class _Product(torch.autograd.Function):
    """Multiply by a weight looked up in codebooks; for the gradient it keeps the codes, not the weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor, codes: Tensor) -> Tensor:
        ctx.save_for_backward(x, table, codes)
        return x @ table.gather(1, codes.long()).to(x.dtype).t()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, table, codes = ctx.saved_tensors
        given, index = gradients[0], codes.long()
        by_weight = (given.flatten(0, -2).t() @ x.flatten(0, -2)).float()
        by_entry = torch.zeros_like(table).scatter_add_(1, index, by_weight)
        return given @ table.gather(1, index).to(x.dtype), by_entry, None


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
        return _decoded_in_torch(table, sizes, columns, codes, more)
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
        return _gathered_in_torch(by_weight, table, sizes, columns, codes, more)
    by_entry = torch.zeros(len(codes), len(table), dtype=torch.float32)
    by_size = torch.empty_like(sizes)
    to_entry, to_size, given, index, groups, entries, factors = _arrays(
        by_entry, by_size, by_weight, codes, sizes, table, columns
    )

    def run(rows: slice) -> None:
        _gather(to_entry[rows], to_size[rows], given[rows], index[rows], groups[rows], entries, factors, U(more))

    in_threads(run, len(codes), torch.get_num_threads())
    return by_entry.sum(0), by_size


def _decoded_in_torch(table: Tensor, sizes: Tensor, columns: Tensor, codes: Tensor, more: int) -> Tensor:
    return table[(codes >> more).int()] * spread(sizes, len(columns)) * columns


def _gathered_in_torch(
    by_weight: Tensor, table: Tensor, sizes: Tensor, columns: Tensor, codes: Tensor, more: int
) -> tuple[Tensor, Tensor]:
    index, wide = (codes >> more).int(), spread(sizes, len(columns)) * columns
    by_entry = torch.zeros_like(table).index_add_(0, index.flatten(), (by_weight * wide).flatten())
    return by_entry, by_group(by_weight * table[index] * columns).sum(2)


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
    between entries, of sizes of groups a share of themselves.

    Args:
        packed: the layer.
        trained: the stored names of the tensors that are trained; exact zeros in codebooks may stand for pruned weights, and stay.
    """

    def __init__(self, packed: BitPlaneLinear, trained: Collection[str]) -> None:
        super().__init__()
        self.packed = packed
        self.codes = unpack_planes(packed.planes(packed.shape.parent_bits), packed.in_features)
        kinds = "codebook_", "columns", "rows", "groups", "basis_"
        self.start = {name: tensor.float() for name, tensor in packed.named_buffers() if name.startswith(kinds)}
        self.unit = {name: _unit(name, self.start[name]) for name in trained}
        self.offsets = nn.ParameterDict({name: nn.Parameter(torch.zeros_like(self.start[name])) for name in trained})

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
        else:
            y = _Product.apply(x, now[f"codebook_{bits}"], self.codes >> more)  # type: ignore[no-untyped-call]
        return y if self.packed.bias is None else y + self.packed.bias


def _unit(name: str, start: Tensor) -> Tensor:
    """Return how much of a stored tensor a step of size 1 is."""
    if name == "groups":
        return _SIZE * start
    # Entries reach about two standard deviations to either side of their mean.
    distance = 4 * start.std().clamp_min(1e-30) / start.shape[-1]
    return distance * (start != 0) if name.startswith("codebook_") else distance.expand_as(start)
