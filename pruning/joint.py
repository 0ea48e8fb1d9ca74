"""Prune and quantise in one sweep: what rounding breaks, too, the columns to the right make up for."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from compress.passes import Block, Context, Needs
from compress.pruning.masked import Pruned, SparsePass
from compress.pruning.scores import Measured
from compress.pruning.settings import JointConfig
from compress.pruning.sparsegpt import sweep
from compress.quant.format import Codes
from compress.quant.records import PackedShape
from compress.workspace import Record


class Joint(SparsePass[JointConfig]):
    """Prune and round column by column in one SparseGPT sweep."""

    Config = JointConfig

    def needs(self) -> Needs:
        """Ask for inputs from the packed blocks; leave packed matrices."""
        return Needs(inputs="updated", divides=True, packs=True, pattern=self.config.pattern is not None)

    def packed_shapes(self, context: Context) -> dict[str, PackedShape]:
        """Return the shape of every linear that is not ignored."""
        bits = self.config.bits
        return {name: PackedShape(*context.linears[name], bits, bits) for name in self.chosen(context)}

    def prune(self, block: Block, zeros: Mapping[str, int], measured: Measured) -> dict[str, Pruned]:
        """Sweep the linears and hand over their codes; the dense weights become what the codes stand for."""
        result = {}
        for name, factor in measured.factors.items():
            weight = block.linears[name].weight
            codebook = even_codebook(weight, self.config.bits)
            swept = sweep(weight, factor, self.rule(zeros[name]), rounding(codebook))
            weight.copy_(swept.weight)
            block.packed[name] = Codes(codes_of(swept.weight, codebook).cpu(), {self.config.bits: codebook.cpu()})
            result[name] = Pruned(swept.pruned, swept.figures(factor))
        return result

    def run_block(self, block: Block, context: Context) -> Record:
        """Prune and round one block as planned."""
        for name in block.linears.keys() - set(self.chosen(context)):
            block.skipped[name] = f"ignored by the pass {self.config.kind}"
        return super().run_block(block, context)


def even_codebook(weight: Tensor, bits: int) -> Tensor:
    """Space ``2**bits`` values evenly from about a row's smallest to its largest weight, one of them 0: float32 [N, 2**bits].

    Values are those of float16, in which codebooks are stored, unless a row is too large or too small for that.
    """
    top = 2**bits - 1
    low, high = weight.amin(1, keepdim=True).clamp(max=0), weight.amax(1, keepdim=True).clamp(min=0)
    step = (high - low) / top
    zero = torch.where(step > 0, -low / step, 0.0).round()
    codebook = (torch.arange(top + 1, device=weight.device) - zero) * step
    half = codebook.half().float()
    close = (half - codebook).abs() <= codebook.abs() * 2.0**-10
    return torch.where(close.all(), half, codebook)


def codes_of(weight: Tensor, codebook: Tensor) -> Tensor:
    """Find the code of the nearest entry, uint8 [N, K]; of two equally near the lower."""
    return torch.searchsorted(_middles(codebook), weight.contiguous()).to(torch.uint8)


def _middles(codebook: Tensor) -> Tensor:
    return ((codebook[:, 1:] + codebook[:, :-1]) / 2).contiguous()


def rounding(codebook: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a function that rounds a column [N], each row to its own codebook."""
    middles = _middles(codebook)

    def nearest(column: Tensor) -> Tensor:
        return codebook.gather(1, torch.searchsorted(middles, column[:, None].contiguous()))[:, 0]

    return nearest
