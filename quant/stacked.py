"""The experts of a mixture on a GPU: one layout for all, of which each holds its part, and one launch for all tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from compress.kernels import experts, gpu
from compress.kernels.layout import ROWS
from compress.quant.fused import behind_each_other, views
from compress.quant.linear import BitPlaneLinear, Group


class ExpertStack(Group):
    """Hold one matrix of every expert: alike but for their numbers, and at one number of bits when they multiply together."""

    def __init__(self, members: Sequence[BitPlaneLinear]) -> None:
        tiles = [member.tiled() for member in members]
        joined = behind_each_other(tiles)
        joined.rows = ROWS * joined.codes.shape[1]
        super().__init__(members, joined)
        first = members[0]
        self._each = None if first.bias is None else torch.stack([cast(Tensor, member.bias) for member in members])
        scaled = first.factors is not None  # those of an expert that stands for none are not looked at
        self._factors = torch.stack([cast(Tensor, m.factors) for m in members]) if scaled else None
        for member, part in zip(members, views(joined, tiles), strict=True):
            member.share(part, self)

    def take(self, member: BitPlaneLinear, bits: int, x: Tensor) -> Tensor | None:
        """Let a member that is called by itself compute its own product."""
        return None

    @property
    def whole(self) -> bool:
        """Tell whether all members still hold their part of the layout, and are read at one number of bits."""
        bits = self.members[0].bits
        return all(member._group is self and member.bits == bits and not member.keep_dense for member in self.members)

    def multiply(self, x: Tensor, given: experts.Sorted) -> Tensor:
        """Multiply rows that are sorted by expert, [R, K], by the matrices of these: [R, N]."""
        first = self.members[0]
        if self._factors is not None:
            x = (x.float() * self._factors[given.expert.clamp(max=len(self.members) - 1)]).to(x.dtype)
        with torch.cuda.device(x.get_device()):
            return experts.multiply(x, given, self._tiled, first.out_features, first.bits, self._each)


def stacked(members: Sequence[object]) -> ExpertStack | None:
    """Return the stack of one matrix of every expert, made where it is not yet; None where they are not alike or not on a GPU."""
    packed = [member for member in members if isinstance(member, BitPlaneLinear) and member.is_tiled]
    if len(packed) < len(members) or not gpu.serves(packed[0].device):
        return None
    held = packed[0]._group
    if isinstance(held, ExpertStack) and len(held.members) == len(packed):
        return held if held.whole else None
    first = packed[0]
    alike = all(
        (one.in_features, one.out_features, one.shape.all_bits)
        == (first.in_features, first.out_features, first.shape.all_bits)
        and one.shape.codebook_dtype == first.shape.codebook_dtype
        and (one.bias is None) == (first.bias is None)
        and (one.factors is None) == (first.factors is None)
        and (one.group_sizes is None) == (first.group_sizes is None)
        and one.exact == first.exact
        and one._group is None
        for one in packed
    )
    return ExpertStack(packed) if alike else None
