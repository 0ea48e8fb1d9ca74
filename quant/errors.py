"""What a quantised matrix loses."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from compress.quant.format import Codes

Errors = dict[str, float]
_AT_ONCE = 1 << 22  # weights that are worked on at a time


def matrix_errors(weight: Tensor, found: Codes, sensitivity: Tensor | None, device: torch.device) -> dict[str, Errors]:
    """Measure the errors of a matrix at every number of bits, on a GPU if there is one: its products outweigh those of the search."""
    place = device if device.type == "cuda" else torch.device("cpu")  # others have no float64
    weight, there = weight.to(place), found.to(place)
    sensitivity, hessian = (None if tensor is None else tensor.to(place) for tensor in (sensitivity, found.hessian))
    scale = None if hessian is None else OutputScale(weight, sensitivity, hessian)
    return {str(bits): layer_errors(weight, partial(there.dense, bits), sensitivity, scale) for bits in there.codebooks}


class OutputScale:
    """Hold what errors of a layer's output are compared with, so that all numbers of bits share it.

    ``hessian`` is the mean of ``x x^T``, float32 [K, K]; ``weight`` and ``sensitivity`` are as for :func:`layer_errors`.
    """

    def __init__(self, weight: Tensor, sensitivity: Tensor | None, hessian: Tensor) -> None:
        self._hessian = hessian
        self.power = float(self.rows(weight).sum()) or 1.0
        trace = hessian.diagonal().sum(dtype=torch.float64).clamp_min(1e-30)
        self.cost: Tensor | float = 1.0 if sensitivity is None else sensitivity.double().sum(1) / trace

    def rows(self, error: Tensor) -> Tensor:
        """Return ``e H e^T`` of every row, float64 [N]; products are in float32, as sums of squares lose nothing there."""
        step = max(1, _AT_ONCE // len(self._hessian))
        parts = torch.split(error, step)
        return torch.cat([((part @ self._hessian) * part).sum(1, dtype=torch.float64) for part in parts])


def layer_errors(
    weight: Tensor, quantised: Callable[[slice], Tensor], sensitivity: Tensor | None, scale: OutputScale | None
) -> Errors:
    """Measure the errors of a quantised matrix, of which some rows are given when asked for, with ``e`` the difference of two rows.

    ``relative`` is the sum of ``e e^T`` over that of ``w w^T``; ``weighted`` the sum of ``s e^2``, with the sensitivity
    ``s``, float32 [N, K] (None for 1). With a Hessian there is ``output``, the sum of ``e H e^T`` over that of ``w H w^T``,
    and ``weighted`` is the sum of ``e H e^T`` times each row's mean cost of an error in its output, ``sum(s) / trace(H)``.
    """
    lost = power = weighted = 0.0
    outputs = []
    step = max(1, _AT_ONCE // max(weight.shape[1], 1))
    for part in (slice(start, start + step) for start in range(0, len(weight), step)):
        error = quantised(part) - weight[part]
        squares = error.double().square()
        lost, power = lost + float(squares.sum()), power + float(weight[part].double().square().sum())
        if scale is None:
            weighted += float((squares if sensitivity is None else squares * sensitivity[part]).sum())
        else:
            outputs.append(scale.rows(error))
    result = {"relative": lost / (power or 1.0)}
    if scale is None:
        return result | {"weighted": weighted}
    rows = torch.cat(outputs)
    return result | {"output": float(rows.sum()) / scale.power, "weighted": float((rows * scale.cost).sum())}
