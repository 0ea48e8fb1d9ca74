"""A layer's metric, ``H``: the mean of ``x x^T`` over its inputs, multiplied fast.

Its few largest directions are those on which the errors of a good rounding cancel, so they need float32. What they leave does not:
in bfloat16 it takes less than half the time, and the errors reached are the same (``tests/quant/test_metric.py``).
"""

from __future__ import annotations

import torch
from torch import Tensor

_LARGE = 1024
_LEADING = 16  # directions in float32, and those that least-squares fits are preconditioned with


def product_dtype(device: torch.device, size: int) -> torch.dtype:
    """bfloat16 where the device multiplies it in hardware and K is large enough to take any time, else float32."""
    if size < _LARGE:
        return torch.float32
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):  # newer versions of torch
        fast = bool(torch.cpu.get_capabilities().get("avx512_bf16"))
    else:
        fast = False
    return torch.bfloat16 if fast else torch.float32


class Metric:
    """A symmetric positive definite matrix as ``U U^T`` and what that leaves.

    Args:
        matrix: float32 [K, K].

    Attributes:
        matrix: as given.
        leading: float32 [K, 16], U (fewer columns if K is smaller).
        rest: [K, K], ``matrix - U U^T``, of :func:`product_dtype`.
        diagonal: float32 [K], of what U leaves, positive.
    """

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self.leading, self.diagonal = leading_directions(matrix, _LEADING)
        self.rest = (matrix - self.leading @ self.leading.t()).to(product_dtype(matrix.device, len(matrix)))

    def times(self, values: Tensor) -> Tensor:
        """float32 [N, K] times the metric."""
        return (values.to(self.rest.dtype) @ self.rest).float().addmm_(values @ self.leading, self.leading.t())


class Follower:
    """A gradient during a sweep over blocks of columns, kept up to date by one product with the metric in all.

    For every block in order, :meth:`enter` lets its gradient know of all blocks before, and :meth:`leave` takes what has
    changed in it. :meth:`finish` then lets every block know of itself and those after.

    Args:
        metric: of [K, K].
        gradient: float32 [N, K]; changed.
    """

    def __init__(self, metric: Metric, gradient: Tensor) -> None:
        self.metric, self.gradient = metric, gradient
        self._changes = torch.zeros(gradient.shape, dtype=metric.rest.dtype, device=gradient.device)
        self._leading = gradient.new_zeros(len(gradient), metric.leading.shape[1])
        self._entered: list[tuple[slice, Tensor]] = []

    def enter(self, part: slice) -> Tensor:
        """The gradient of a block, float32 [N, B], as of now."""
        self._entered.append((part, self._leading.clone()))
        self._add(part, slice(0, part.start), self._leading)
        return self.gradient[:, part]

    def leave(self, part: slice, change: Tensor) -> None:
        """``change``, float32 [N, B], has been added to the block's columns."""
        self._changes[:, part] = change
        self._leading.addmm_(change, self.metric.leading[part])

    def finish(self) -> None:
        """Bring the whole gradient up to date."""
        for part, leading in self._entered:
            self._add(part, slice(part.start, None), self._leading - leading)

    def _add(self, part: slice, changed: slice, leading: Tensor) -> None:
        gradient, rest = self.gradient[:, part], self.metric.rest
        gradient.addmm_(leading, self.metric.leading[part].t())
        gradient += self._changes[:, changed] @ rest[changed, part]


def leading_directions(metric: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Split a metric into ``U U^T``, its largest part by subspace iteration (Nyström), and the diagonal of what remains.

    Args:
        metric: float32 [K, K], symmetric and positive definite.
        rank: columns of ``U``, K at most.

    Returns:
        float32 [K, rank] and [K], positive.
    """
    start = torch.randn(len(metric), min(rank, len(metric)), generator=torch.Generator().manual_seed(0))
    basis = start.to(metric.device)
    for _ in range(2):
        basis = torch.linalg.qr(metric @ basis).Q
    image = metric @ basis
    inner = (basis.t() @ image).double()
    inner.diagonal().add_(1e-5 * inner.diagonal().max())  # what float32 leaves uncertain
    factor = torch.linalg.cholesky(inner).float()
    leading = torch.linalg.solve_triangular(factor, image.t(), upper=False).t()
    diagonal = metric.diagonal()
    return leading, (diagonal - leading.square().sum(1)).clamp_min(1e-4 * diagonal.mean())
