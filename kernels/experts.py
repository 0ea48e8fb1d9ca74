"""Tokens sorted by the experts that a router has chosen for them, and one launch for all experts in use.

Nothing here waits for the GPU: how many tokens every expert has is known there alone, so a launch has as many programs as there can
be, of which some find nothing to do.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from compress.kernels import gpu
from compress.kernels.layout import ROWS, Tiled

BM, BN, WARPS = 16, 32, 4
"""Rows of activations, rows of weights and warps of a program."""


@dataclass(frozen=True)
class Sorted:
    """Tell how rows of activations lie that are sorted by expert.

    Attributes:
        order: int64 [rows], which pair of a token and one of its choices a sorted row is: token * choices + choice.
        expert: int64 [rows], the expert of each; one more than the last for those that belong to none, at the end.
        experts: int32 [programs], whose rows a program multiplies; -1 for none.
        firsts: int32 [programs], the first of them.
        ends: int32 [programs], where that expert's rows end.
    """

    order: Tensor
    expert: Tensor
    experts: Tensor
    firsts: Tensor
    ends: Tensor


def sort_by_expert(index: Tensor, experts: int) -> Sorted:
    """Sort what a router has chosen, int [tokens, choices], by expert; numbers from ``experts`` on belong to none."""
    flat = index.flatten().long().clamp(max=experts)
    expert, order = flat.sort(stable=True)
    ones = torch.ones_like(flat)
    counts = ones.new_zeros(experts + 1).scatter_add_(0, flat, ones)[:experts]
    ends, programs = counts.cumsum(0), (counts + BM - 1) // BM
    last = programs.cumsum(0)
    most = -(-len(flat) // BM) + min(experts, len(flat))
    number = torch.arange(most, device=flat.device)
    whose = torch.searchsorted(last, number, right=True).clamp(max=experts - 1)
    firsts = (ends - counts)[whose] + (number - (last - programs)[whose]) * BM
    used = torch.where(number < last[-1], whose, -1)
    return Sorted(order, expert, used.int(), firsts.int(), ends[whose].int())


def multiply(x: Tensor, given: Sorted, tiled: Tiled, rows: int, bits: int, bias: Tensor | None) -> Tensor:
    """Multiply sorted rows, [R, K], by their experts' matrices, [N, K] each: [R, N] in the dtype of ``x``; rows of no expert give 0.

    ``tiled`` has the tiles of all experts one behind the other, those of each as many as its N rows fill; ``bias`` is [experts, N].
    """
    kernel, tiles = _kernel(), -(-rows // ROWS)
    x = x if x.stride(1) == 1 else x.contiguous()
    y = x.new_zeros(len(x), rows)
    constants: dict[str, Any] = {"BITS": bits, "HEAD": tiled.head, "BM": BM, "BN": BN, "STEP": 1}
    if not gpu.interpreting():
        constants |= {"num_warps": WARPS, "num_stages": 1}
    kernel[(len(given.experts), -(-rows // BN))](
        x,
        given.experts,
        given.firsts,
        given.ends,
        tiled.codes,
        tiled.read(bits),
        tiled.groups,
        tiled.sizes,
        bias,
        y,
        rows,
        tiled.columns,
        tiled.codes.shape[2],
        tiles,
        tiled.codes.stride(0),
        x.stride(0),
        BIAS=bias is not None,
        UPCAST=gpu.interpreting(),
        GROUPS=tiled.groups is not None,
        **constants,
    )
    return y


@cache
def _kernel() -> Any:
    from compress.kernels.triton_experts import dot

    return dot
