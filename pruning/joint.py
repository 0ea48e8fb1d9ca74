"""Prune and quantise in one sweep: what rounding breaks, too, the columns to the right make up for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from compress.passes import Block, Context, Needs
from compress.pruning.masked import Pruned, SparseConfig, SparsePass
from compress.pruning.scores import Measured
from compress.pruning.sparsegpt import sweep
from compress.quant.format import Codes, PackedShape


class JointConfig(SparseConfig):
    """Prune and round to an even grid in one SparseGPT sweep; what is left is packed at one width.

    Every row has an even grid between its smallest and largest weight, fixed beforehand and moved so that it holds an
    exact zero (arXiv 2301.00774, section 3.5; arXiv 2409.20094). Survivors that round to zero come on top of the target.
    """

    kind: Literal["joint"] = Field("joint", description="Name of the pass.")
    bits: int = Field(4, ge=2, le=8, description="The width.")


class Joint(SparsePass[JointConfig]):
    """Prune and round column by column, as SparseGPT does."""

    Config = JointConfig

    def needs(self) -> Needs:
        """Ask for inputs from the packed blocks; leave packed matrices."""
        return Needs(inputs="updated", packs=True)

    def packed_shapes(self, context: Context) -> dict[str, PackedShape]:
        """Return the shape of every linear that is not ignored."""
        bits = self.config.bits
        return {name: PackedShape(*context.linears[name], bits, bits) for name in self.chosen(context)}

    def prune(self, block: Block, zeros: Mapping[str, int], measured: Measured) -> dict[str, Pruned]:
        """Sweep, and hand over codes; the dense weights become what the codes stand for."""
        result = {}
        for name, factor in measured.factors.items():
            weight = block.linears[name].weight
            table = even_tables(weight, self.config.bits)
            swept = sweep(weight, factor, self.rule(zeros[name]), rounding(table))
            weight.copy_(swept.weight)
            block.packed[name] = Codes(codes_of(swept.weight, table).cpu(), {self.config.bits: table.cpu()})
            result[name] = Pruned(swept.pruned, swept.figures(factor))
        for name in block.linears.keys() - result.keys():
            block.skipped[name] = f"ignored by the pass {self.config.kind}"
        return result


def even_tables(weight: Tensor, bits: int) -> Tensor:
    """Space ``2**bits`` values evenly from about a row's smallest to its largest weight, one of them exactly 0.

    Values are those of float16, in which tables are stored, unless a row is too large or too small for that.

    Args:
        weight: float32 [N, K].
        bits: width.

    Returns:
        float32 [N, 2**bits], ascending.
    """
    top = 2**bits - 1
    low, high = weight.amin(1, keepdim=True).clamp(max=0), weight.amax(1, keepdim=True).clamp(min=0)
    step = (high - low) / top
    zero = torch.where(step > 0, -low / step, 0.0).round()
    table = (torch.arange(top + 1, device=weight.device) - zero) * step
    half = table.half().float()
    close = (half - table).abs() <= table.abs() * 2.0**-10
    return torch.where(close.all(), half, table)


def codes_of(weight: Tensor, table: Tensor) -> Tensor:
    """Find the code of the nearest entry, uint8 [N, K]; of two equally near the lower."""
    middles = (table[:, 1:] + table[:, :-1]) / 2
    return torch.searchsorted(middles.contiguous(), weight.contiguous()).to(torch.uint8)


def rounding(table: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a function that rounds a column [N], each row to its own table."""

    def nearest(column: Tensor) -> Tensor:
        return table.gather(1, codes_of(column[:, None], table).long())[:, 0]

    return nearest
