"""A score for pruning: Wanda's, relative to the sums of the weight's row and column (relative importance)."""

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from compress.passes import Block
from compress.pruning.prune import Prune
from compress.pruning.scores import Measured
from compress.pruning.settings import PruneConfig


class PruneRelativeConfig(PruneConfig):
    """Set weights to zero whose input-weighted share of their row and column is smallest."""

    kind: Literal["prune_relative"] = Field("prune_relative", description="Name of the pass.")
    score: Literal["wanda"] = Field("wanda", description="What the shares are of.")


class PruneRelative(Prune):
    """Prunes as ``prune`` does, at every sparsity, pattern and allocation, by a score of its own."""

    Config = PruneRelativeConfig

    def scored(self, block: Block, names: Sequence[str]) -> Measured:
        """Score linears of a block, [out_features, in_features] each; the smallest go first."""
        scores = super().scored(block, names).scores
        for name, score in scores.items():
            size = block.linears[name].weight.abs().clamp_min(1e-30)
            score *= 1 / size.sum(0, keepdim=True) + 1 / size.sum(1, keepdim=True)
        return Measured(scores, {})
