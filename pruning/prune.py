"""Unstructured and n:m pruning by magnitude, Wanda or SparseGPT, under any allocation."""

from __future__ import annotations

from collections.abc import Mapping

from compress.passes import Block
from compress.pruning.masked import Pruned, SparsePass
from compress.pruning.scores import Measured
from compress.pruning.settings import PruneConfig, Score
from compress.pruning.sparsegpt import sweep


class Prune(SparsePass[PruneConfig]):
    """Choose, set to zero, and with SparseGPT make up for it."""

    Config = PruneConfig

    @property
    def score(self) -> Score:
        """Return the score of the settings."""
        return self.config.score

    def prune(self, block: Block, zeros: Mapping[str, int], measured: Measured) -> dict[str, Pruned]:
        """Prune the block's measured linears in place."""
        result = {}
        for name, scores in measured.scores.items():
            weight, rule = block.linears[name].weight, self.rule(zeros[name])
            if name in measured.factors:
                swept = sweep(weight, measured.factors[name], rule)
                weight.copy_(swept.weight)
                result[name] = Pruned(swept.pruned, swept.figures(measured.factors[name]))
            else:
                mask = rule.mask(scores)
                weight.masked_fill_(mask, 0.0)
                result[name] = Pruned(mask, {})
        return result
