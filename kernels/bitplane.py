"""The one operator every packed linear goes through: ``compress::bitplane_linear``.

``y = x @ W.T`` with ``W[n, k] = codebook[n, code(n, k)]`` and the code read from bit planes. It is a
``torch.library`` operator with a fake kernel (so ``torch.compile`` and export see one node) and a gradient
for its input only: prompts and adapters train on the packed model while the weights stay frozen.

On a CPU the C library of :mod:`compress.kernels.cpu` serves it where it was built; the plain torch here runs anywhere. On a GPU
layers hold another layout, and go through the operator of :mod:`compress.kernels.gpu`.
Accumulation is in float32 or wider.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compress.kernels import cpu, gpu
from compress.kernels.packing import unpack_planes

SERVED = (torch.float32, torch.bfloat16, torch.float16)  # by the C library: it adds in float32
_WEIGHTS_AT_ONCE = 1 << 20  # looked up in one go: bounds the int64 indices to 8 MiB


def dense_weight(planes: list[Tensor], codebook: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """Look every weight up.

    Args:
        planes: b int32 tensors [N, ceil(K / 32)], most significant first.
        codebook: floating [N, 2**b].
        columns: K.
        dtype: of the result.

    Returns:
        [N, K] in ``dtype``.
    """
    traced = torch.compiler.is_compiling()
    if not traced and dtype.itemsize in (2, 4) and cpu.serves(codebook, *planes):
        return cpu.look_up(planes, codebook.to(dtype), columns)
    return reference_weight(planes, codebook, columns, dtype)


def reference_weight(planes: list[Tensor], codebook: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """:func:`dense_weight` in plain torch, on any device."""
    rows = codebook.shape[0]
    weight = torch.empty(rows, columns, dtype=dtype, device=codebook.device)
    step = max(1, _WEIGHTS_AT_ONCE // max(columns, 1))
    for start in range(0, rows, step):
        part = slice(start, start + step)
        codes = unpack_planes([plane[part] for plane in planes], columns)
        weight[part] = codebook[part].to(dtype).gather(1, codes.long())
    return weight


def _matmul(x: Tensor, weight: Tensor) -> Tensor:
    # float16 matrix products on a CPU are a hundred times slower than float32 ones.
    if x.device.type == "cpu" and x.dtype == torch.float16:
        return (x.float() @ weight.float()).to(x.dtype)
    return x @ weight


@torch.library.custom_op("compress::bitplane_linear", mutates_args=())
def bitplane_linear(x: Tensor, planes: list[Tensor], codebook: Tensor, columns: int, dense: Tensor | None) -> Tensor:
    """Apply a packed linear layer.

    Args:
        x: floating [..., K], any strides.
        planes: b int32 tensors [N, ceil(K / 32)], most significant first.
        codebook: floating [N, 2**b].
        columns: K.
        dense: the result of :func:`dense_weight` in ``x``'s dtype where the caller keeps one, else None.

    Returns:
        [..., N] in ``x``'s dtype and on its device.
    """
    if dense is None and cpu.serves(x, codebook, *planes) and x.dtype in SERVED:
        return cpu.Prepared(planes, codebook, columns)(x)
    weight = dense if dense is not None else dense_weight(planes, codebook, columns, x.dtype)
    return _matmul(x, weight.t()).to(x.dtype).contiguous()  # autocast would return its own type


@bitplane_linear.register_fake
def _(x: Tensor, planes: list[Tensor], codebook: Tensor, columns: int, dense: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], codebook.shape[0])


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, planes, codebook, columns, dense = inputs
    ctx.columns, ctx.count, ctx.has_dense = columns, len(planes), dense is not None
    ctx.save_for_backward(*planes, codebook, *([dense] if dense is not None else []))


def _input_gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor, list[None], None, None, None]:
    saved = ctx.saved_tensors
    planes, codebook = list(saved[: ctx.count]), saved[ctx.count]
    weight = saved[-1] if ctx.has_dense else dense_weight(planes, codebook, ctx.columns, gradient.dtype)
    return _matmul(gradient, weight.to(gradient.dtype)), [None] * len(planes), None, None, None


bitplane_linear.register_autograd(_input_gradient, setup_context=_keep_for_backward)


def backend() -> str:
    """Which implementation serves :func:`bitplane_linear`, and why."""
    return (
        f"{gpu.describe()}; on CPUs {cpu.describe()}"
        if gpu.available()
        else f"{cpu.describe()}; on GPUs {gpu.describe()}"
    )
