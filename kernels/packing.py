"""Bit planes: a matrix of b-bit codes stored as b matrices of single bits, 32 columns to an int32 word.

Plane 0 is the most significant bit. Bit ``k % 32`` (from the least significant) of word ``k // 32`` belongs
to column ``k``; the unused bits of the last word are zero. See ``quant/FORMAT.md``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

WORD = 32
GROUP = 64  # columns of a row that share a size
GROUP_UNIT = 255  # sizes of groups are whole numbers of this part of their row's


def words(columns: int) -> int:
    """Return the number of int32 words that hold ``columns`` bits."""
    return -(-columns // WORD)


def pack_planes(codes: Tensor, bits: int) -> Tensor:
    """Pack codes, uint8 [N, K], every value below ``2**bits``, into 1 to 8 planes, int32 [bits, N, ceil(K / 32)]."""
    rows, columns = codes.shape
    padded = pad(codes, (0, words(columns) * WORD - columns))
    octets = padded.view(rows, -1, 8)
    place = torch.arange(8, dtype=torch.uint8, device=codes.device)
    planes = [(((octets >> (bits - 1 - plane)) & 1) << place).sum(-1, dtype=torch.uint8) for plane in range(bits)]
    return torch.stack(planes).view(torch.int32)


def unpack_planes(planes: list[Tensor], columns: int) -> Tensor:
    """Read codes back, uint8 [N, K], from planes, int32 [N, ceil(K / 32)] each, most significant first."""
    place = torch.arange(8, dtype=torch.uint8, device=planes[0].device)
    rows = planes[0].shape[0]
    codes = torch.zeros(rows, planes[0].shape[1] * 4, 8, dtype=torch.uint8, device=planes[0].device)
    for plane in planes:
        octets = plane.contiguous().view(torch.uint8)
        codes = (codes << 1) | ((octets.unsqueeze(-1) >> place) & 1)
    return codes.view(rows, -1)[:, :columns]


def scale_groups(weight: Tensor, sizes: Tensor) -> Tensor:
    """Multiply every 64 columns of a weight [N, K] by their size, floating [N, ceil(K / 64)]: in place, and return it."""
    whole = weight.shape[1] // GROUP
    weight[:, : whole * GROUP].view(len(weight), whole, GROUP).mul_(sizes[:, :whole, None])
    weight[:, whole * GROUP :].mul_(sizes[:, whole:])
    return weight
