"""Fast products with a layer's Hessian, ``H``: the mean of ``x x^T`` over its inputs.

Its few largest directions are those on which the errors of a good rounding cancel, so they need float32. What they leave does not:
in bfloat16 it takes less than half the time, and the errors reached are the same (``tests/quant/test_hessian.py``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from threading import local

import torch
from torch import Tensor

from compress.precision import multiplies_bfloat16

_LARGE = 1024
_LEADING = 16  # directions in float32, and those that least-squares fits are preconditioned with


def product_dtype(device: torch.device, size: int) -> torch.dtype:
    """Return bfloat16 where the device multiplies it in hardware and K is large enough to gain, else float32."""
    return torch.bfloat16 if size >= _LARGE and multiplies_bfloat16(device) else torch.float32


class Hessian:
    """Split a symmetric positive definite matrix, float32 [K, K], into ``U U^T`` and the rest, to multiply by it fast.

    ``leading`` is U, float32 [K, 16] (fewer columns if K is smaller), ``rest`` is ``matrix - U U^T``, of
    :func:`product_dtype`, and ``diagonal``, float32 [K], that of the rest, positive.
    """

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self.leading, self.diagonal = leading_directions(matrix, _LEADING)
        rest = torch.addmm(matrix, self.leading, self.leading.t(), alpha=-1)
        self.rest = rest.to(product_dtype(matrix.device, len(matrix)))

    def times(
        self, values: Tensor, leading: Tensor | None = None, buffers: Buffers | None = None, name: str = "times"
    ) -> Tensor:
        """Multiply [N, K] by the Hessian, to float32; ``leading`` is float32 ``values @ U`` if it is known (more exactly).

        The product lies in ``buffers`` until the next call with this name.
        """
        buffers = buffers or Buffers(values.device)
        leading = values @ self.leading if leading is None else leading
        dtype = self.rest.dtype
        narrow = values if values.dtype == dtype else buffers("narrow", *values.shape, dtype=dtype).copy_(values)
        product = torch.mm(narrow, self.rest, out=buffers("product", *values.shape, dtype=dtype))
        return buffers(name, *values.shape).copy_(product).addmm_(leading, self.leading.t())


class Buffers:
    """Keep memory from one use to the next: on a CPU a new allocation takes longer than most work done in it.

    Each thread has its own.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._own = device, local()

    def __call__(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return a tensor of any values; the next call with this name has the same memory."""
        found: dict[str, Tensor] = self._own.__dict__
        size = math.prod(shape)
        if name not in found or len(found[name]) < size:
            found[name] = torch.empty(size, dtype=dtype, device=self._device)
        return found[name][:size].view(shape)


class Follower:
    """Keep gradients up to date during a sweep over blocks of columns, by one and a half products with the Hessian in all.

    For every block in order, :meth:`enter` adds to its gradients what was changed in all columns before the sweep and in the
    blocks swept so far, and :meth:`leave` takes note of what the sweep has changed in it. :meth:`finish` then adds to every
    block's gradients what was changed in that block and in those after it. ``gradients`` are W of float32 [N, K] as before
    ``changes``, [W, N, K] of the dtype of the Hessian's rest; ``leading``, float32 [W, N, 16], is ``changes @ U``. All are
    changed.
    """

    def __init__(
        self, hessian: Hessian, gradients: Sequence[Tensor], changes: Tensor, leading: Tensor, buffers: Buffers
    ) -> None:
        self.hessian, self.gradients, self._leading = hessian, gradients, leading
        self._all = changes.flatten(0, 1)
        self._swept = buffers("swept", *self._all.shape, dtype=changes.dtype)
        self._entered: list[tuple[slice, Tensor]] = []

    def enter(self, part: slice) -> Tensor:
        """Return the gradients of a block as of now, float32 [W, N, B]."""
        self._entered.append((part, self._leading.clone()))
        self._add(part, self._all, slice(None), self._leading)
        return torch.stack([gradient[:, part] for gradient in self.gradients])

    def leave(self, part: slice, change: Tensor) -> None:
        """Take note that ``change``, float32 [W, N, B], has been added to the block's columns."""
        self._leading.baddbmm_(change, self.hessian.leading[part].expand(len(change), -1, -1))
        self._swept[:, part] = change.flatten(0, 1)
        self._all[:, part] += self._swept[:, part]

    def finish(self) -> None:
        """Bring the whole gradients up to date."""
        for part, leading in self._entered:
            self._add(part, self._swept, slice(part.start, None), self._leading - leading)

    def _add(self, part: slice, changes: Tensor, changed: slice, leading: Tensor) -> None:
        rest = changes[:, changed] @ self.hessian.rest[part, changed].t()  # symmetric
        for gradient, by, of in zip(self.gradients, rest.view(*leading.shape[:2], -1), leading, strict=True):
            gradient[:, part].addmm_(of, self.hessian.leading[part].t()).add_(by)


def leading_directions(hessian: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Split a Hessian, float32 [K, K], into ``U U^T`` and what remains, of which the diagonal is returned.

    ``U``, float32 [K, rank], is its largest part by subspace iteration (Nyström); the diagonal is float32 [K], positive.
    """
    start = torch.randn(len(hessian), min(rank, len(hessian)), generator=torch.Generator().manual_seed(0))
    basis = start.to(hessian.device)
    for _ in range(2):
        basis = torch.linalg.qr(hessian @ basis).Q
    image = hessian @ basis
    inner = (basis.t() @ image).double()
    inner.diagonal().add_(1e-5 * inner.diagonal().max())  # what float32 leaves uncertain
    factor = torch.linalg.cholesky(inner).float()
    leading = torch.linalg.solve_triangular(factor, image.t(), upper=False).t()
    diagonal = hessian.diagonal()
    return leading, (diagonal - leading.square().sum(1)).clamp_min(1e-4 * diagonal.mean())
