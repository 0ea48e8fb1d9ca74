"""The one operator every packed linear goes through: ``compress::packed_linear``.

``y = x @ W.T`` with ``W[n, k] = codebook[n, code(n, k)]`` and the code read from bit planes. It is a
``torch.library`` operator with a fake kernel (so ``torch.compile`` and export see one node) and a gradient
for its input only: prompts and adapters train on the packed model while the weights stay frozen.

On a CPU the C library of :mod:`compress.kernels.cpu` serves it where it was built; the plain torch here runs anywhere. On a GPU
layers hold another layout, which :mod:`compress.kernels.gpu` multiplies by. Accumulation is in float32 or wider.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compress.kernels import cpu, gpu
from compress.kernels.layout import Tiled
from compress.kernels.packing import GROUP_UNIT, scale_groups, unpack_planes

SERVED = (torch.float32, torch.bfloat16, torch.float16)  # by the C library: it adds in float32
_WEIGHTS_AT_ONCE = 1 << 20  # looked up in one go: bounds the int64 indices to 8 MiB


def dense_weight(
    planes: list[Tensor],
    codebook: Tensor,
    columns: int,
    dtype: torch.dtype,
    places: Tensor | None = None,
    groups: Tensor | None = None,
) -> Tensor:
    """Look every weight up, or those of some rows.

    Args:
        planes: b int32 tensors [N, ceil(K / 32)], most significant first.
        codebook: floating [N, 2**b], or [1, 2**b] for all rows.
        columns: K.
        dtype: of the result.
        places: int64 [T], rows to look up; all if None.
        groups: uint8 [N, ceil(K / 64)], what the entries of every 64 columns are multiplied by, divided by 255.

    Returns:
        [N, K] in ``dtype``, or [T, K].
    """
    traced = torch.compiler.is_compiling()
    if not traced and dtype.itemsize in (2, 4) and cpu.serves(codebook, *planes):
        if groups is None:
            return cpu.look_up(planes, codebook.to(dtype), columns, places=places)
        to = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        return cpu.scaled_look_up(planes, codebook, groups, columns, to, places=places).to(dtype)
    if places is not None:
        planes = [plane[places] for plane in planes]
        codebook = codebook if len(codebook) == 1 else codebook[places]
        groups = None if groups is None else groups[places]
    wide = dtype if groups is None else torch.promote_types(dtype, torch.float32)  # rounded once
    weight = reference_weight(planes, codebook, columns, wide)
    return weight if groups is None else scale_groups(weight, groups.to(wide) / GROUP_UNIT).to(dtype)


def reference_weight(planes: list[Tensor], codebook: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """Look every weight up as :func:`dense_weight` does, in plain torch, on any device."""
    rows = planes[0].shape[0]
    weight = torch.empty(rows, columns, dtype=dtype, device=codebook.device)
    step = max(1, _WEIGHTS_AT_ONCE // max(columns, 1))
    for start in range(0, rows, step):
        part = slice(start, start + step)
        codes = unpack_planes([plane[part] for plane in planes], columns).long()
        if len(codebook) == rows:
            weight[part] = codebook[part].to(dtype).gather(1, codes)
        else:
            weight[part] = codebook[0].to(dtype)[codes]
    return weight


def matmul(x: Tensor, weight: Tensor) -> Tensor:
    """Return ``x @ weight`` in the dtype of ``x``; differentiable."""
    # float16 matrix products on a CPU are a hundred times slower than float32 ones.
    if x.device.type == "cpu" and x.dtype == torch.float16:
        return (x.float() @ weight.float()).to(x.dtype)
    return (x @ weight.to(x.dtype)).to(x.dtype)  # autocast would return its own type


@torch.library.custom_op("compress::packed_weight", mutates_args=())
def packed_weight(
    tensors: list[Tensor], groups: Tensor | None, rows: int, columns: int, bits: int, head: int, dtype: torch.dtype
) -> Tensor:
    """Look up every weight of the matrix that :func:`packed_linear` would multiply by: [N, K] in ``dtype``."""
    if head:
        return gpu.weight(gpu.GpuMatrix(tensors, rows, columns, bits, head, groups), dtype)
    codebook, *planes = tensors
    return dense_weight(planes, codebook, columns, dtype, groups=groups)


@packed_weight.register_fake
def _(
    tensors: list[Tensor], groups: Tensor | None, rows: int, columns: int, bits: int, head: int, dtype: torch.dtype
) -> Tensor:
    return tensors[0].new_empty(rows, columns, dtype=dtype)


@torch.library.custom_op("compress::packed_linear", mutates_args=())
def packed_linear(
    x: Tensor,
    tensors: list[Tensor],
    bias: Tensor | None,
    groups: Tensor | None,
    rows: int,
    columns: int,
    bits: int,
    head: int,
) -> Tensor:
    """Apply a packed linear layer.

    Args:
        x: floating [..., K], any strides.
        tensors: of a matrix as it is stored (``head`` is 0) the codebook, floating [N, 2**b] or [1, 2**b] for all rows, and
            its b planes, most significant first, int32 [N, ceil(K / 32)] each; of one in the layout of the GPU kernels what
            :meth:`compress.kernels.layout.Tiled.tensors` gives.
        bias: [N], or None.
        groups: uint8 [N, ceil(K / 64)], what the entries of every 64 columns are multiplied by, divided by 255; in the
            layout of the GPU kernels as :class:`compress.kernels.layout.Tiled` has them, with its sizes of rows.
        rows: N.
        columns: K.
        bits: b.
        head: how many planes of that layout lie together, or 0.

    Returns:
        [..., N] in ``x``'s dtype and on its device.

    Raises:
        ValueError: ``x`` is on another device than a matrix in the layout of the GPU kernels.
    """
    if head:
        return gpu.linear(x, gpu.GpuMatrix(tensors, rows, columns, bits, head, groups), bias)
    codebook, *planes = tensors
    if cpu.serves(x, *tensors) and x.dtype in SERVED:
        y = cpu.Prepared(planes, codebook, columns, groups=groups)(x)
    else:
        y = matmul(x, dense_weight(planes, codebook, columns, x.dtype, groups=groups).t()).contiguous()
    return y if bias is None else y + bias


@packed_linear.register_fake
def _(
    x: Tensor,
    tensors: list[Tensor],
    bias: Tensor | None,
    groups: Tensor | None,
    rows: int,
    columns: int,
    bits: int,
    head: int,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], rows)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, tensors, _, groups, *ctx.facts = inputs
    ctx.save_for_backward(*tensors, groups)


def _input_gradient(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    *tensors, groups = ctx.saved_tensors
    weight = packed_weight(tensors, groups, *ctx.facts, gradient.dtype)
    return matmul(gradient, weight), [None] * len(tensors), *([None] * 6)


packed_linear.register_autograd(_input_gradient, setup_context=_keep_for_backward)


def tiled_linear(x: Tensor, tiled: Tiled, bits: int, bias: Tensor | None = None) -> Tensor:
    """Multiply by a matrix in the layout of the GPU kernels at a number of bits: [..., K] to [..., N]; differentiable in ``x``."""
    facts = tiled.groups, tiled.rows, tiled.columns, bits, tiled.head
    y: Tensor = packed_linear(x, tiled.tensors(bits), bias, *facts)
    return y


def tiled_weight(tiled: Tiled, bits: int, dtype: torch.dtype) -> Tensor:
    """Look up every weight of a matrix in the layout of the GPU kernels at a number of bits: [N, K]."""
    facts = tiled.groups, tiled.rows, tiled.columns, bits, tiled.head, dtype
    weight: Tensor = packed_weight(tiled.tensors(bits), *facts)
    return weight


def backend() -> str:
    """Say which implementation serves :func:`packed_linear`, and why."""
    return (
        f"{gpu.describe()}; on CPUs {cpu.describe()}"
        if gpu.available()
        else f"{cpu.describe()}; on GPUs {gpu.describe()}"
    )
