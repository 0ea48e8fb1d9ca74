"""Unstructured and n:m pruning by magnitude, Wanda or SparseGPT, under any allocation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field

from compress.passes import Block
from compress.pruning.masked import Pruned, SparseConfig, SparsePass
from compress.pruning.scores import Measured, Score
from compress.pruning.sparsegpt import sweep


class PruneConfig(SparseConfig):
    """Set weights to zero: unstructured or n:m, by magnitude, Wanda or SparseGPT, blocks sharing the target unevenly.

    Works a block at a time on inputs from the blocks pruned before it. The share of zeros over all pruned linears is
    the target, rounded to a whole weight. Zeros make a checkpoint neither smaller nor faster by themselves.
    """

    kind: Literal["prune"] = Field("prune", description="Name of the pass.")
    score: Score = Field(
        "wanda",
        description="Smaller goes first: |W| (magnitude), |W| times the norm of the input (wanda), or W^2 over the squared "
        "Cholesky diagonal of the inverse Hessian, with an update of the weights that stay (sparsegpt).",
    )


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
