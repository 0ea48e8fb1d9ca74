"""Remove whole heads, channels or blocks, so that the model is really smaller."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compress.config import BlockShape
from compress.passes import Block, Context, Needs, Pass, Progress, Sizes
from compress.pruning.settings import WHOLE_MODEL, MiniLlmConfig
from compress.pruning.structured.experts import ExpertRemoval
from compress.pruning.structured.gradients import STATISTICS_TOKENS, whole_model_scores
from compress.pruning.structured.groups import Part, cut, last_linear, remaining
from compress.pruning.structured.scores import BlockScores, compensated, lowest, output_error, removal_order
from compress.pruning.structured.sizes import Removals
from compress.shapes import config_shape, groups_of
from compress.statistics import hessian_bytes
from compress.workspace import Record


class MiniLlm(Pass[MiniLlmConfig]):
    """Score, choose, cut, refit: attention first, then the MLP on what attention has become."""

    Config = MiniLlmConfig

    def __init__(self, config: MiniLlmConfig) -> None:
        super().__init__(config)
        self._experts = ExpertRemoval(config) if config.unit == "experts" else None

    def needs(self) -> Needs:
        """Ask for inputs of blocks for what is measured there, for the whole model for what is estimated there."""
        config = self.config
        if self._experts:
            measured = config.score in ("output", "frequency")
            return Needs(inputs="updated" if measured else None, divides=True, removes_experts=True)
        inside = config.compensate or config.score in ("output", "no_gradient", "noise")
        return Needs(
            inputs="updated" if inside or config.remove == "blocks" else None,
            divides=True,
            model_statistics=config.score in WHOLE_MODEL,
            changes_shapes=True,
            breaks_pattern=config.remove == "groups",
        )

    def memory(self, sizes: Sizes, context: Context) -> int:
        """Estimate what gradients of the whole model take, with all activations, and float64 Hessians of a block."""
        config, total = self.config, 0
        if self._experts:  # what the experts of a block make of a sample, with and without one
            return 4 * hessian_bytes(context.structure, context.linears) + sizes.block // 2
        if config.score in WHOLE_MODEL and config.gradients.estimator == "backprop":
            values = sum(rows + columns for rows, columns in context.linears.values())
            total += sizes.model + 4 * values * min(STATISTICS_TOKENS, sizes.samples * sizes.length)
        if config.compensate or config.score == "output":  # a Hessian, its inverse and factor
            total += sizes.block + 6 * hessian_bytes(context.structure, context.linears)
        return total

    def _removals(self, context: Context) -> Removals:
        return Removals(self.config.sizes, context)

    def check(self, context: Context) -> None:
        """Refuse a target that cannot be met."""
        if self._experts:
            self._experts.check(context)
            return
        groups_of(context.structure)
        config_shape(context.config)
        self.shapes_after(context)

    def experts_after(self, context: Context) -> int:
        """Return how many experts stay in every mixture."""
        assert self._experts
        return self._experts.change(context).after

    def shapes_after(self, context: Context) -> dict[str, BlockShape | None]:
        """Foresee sizes: exact in modes uniform and local; in mode global, and of blocks, what goes is yet to be found."""
        removals = self._removals(context)
        if self.config.remove == "blocks":
            return dict.fromkeys(removals.names[-removals.depth() :])
        after: dict[str, BlockShape | None] = {}
        for name, parts, lost in zip(removals.names, removals.parts, removals.counts(), strict=True):
            shape = removals.shape(name)
            for kind, count in lost.items():
                shape = parts[kind].shape(shape, count)
            after[name] = shape
        return after

    def measure_model(
        self, model: PreTrainedModel, samples: Sequence[Tensor], context: Context, progress: Progress
    ) -> dict[str, Tensor]:
        """Compute the scores that need the whole model, ``<block>.<part>`` -> [G]."""
        removals = self._removals(context)
        counts = removals.counts() if self.config.rounds > 1 else []
        return whole_model_scores(self.config.gradients, model, samples, context, removals.parts, counts, progress)

    def wants_statistics(self, context: Context, statistics: Sequence[Sequence[Record]]) -> bool:
        """Ask for a look at all blocks where they are to be compared."""
        return not self._experts and not statistics and (self.config.mode == "global" or self.config.remove == "blocks")

    def measure_block(self, block: Block, context: Context) -> Record:
        """Price the groups in the order in which they would go, or the whole block."""
        parts, scores = self._removals(context).parts[block.index], BlockScores(self.config.scores, block, context)
        if self.config.remove == "blocks":
            return {"price": scores.price(parts)}
        return {"prices": {kind: scores.prices(part) for kind, part in parts.items()}}

    def run_block(self, block: Block, context: Context) -> Record:
        """Cut the block, attention first."""
        if self._experts:
            return self._experts.run_block(block, context)
        removals, measured = self._removals(context), block.statistics[0] if block.statistics else None
        if self.config.remove == "blocks":
            assert measured is not None
            found = [record["price"] for record in measured]
            block.removed = block.index in removals.cheapest_blocks(found)
            return {"price": found[block.index], "removed": block.removed}
        counts = removals.counts(None if measured is None else [record["prices"] for record in measured])[block.index]
        before = sum(parameter.numel() for parameter in block.module.parameters())
        removed, errors = {}, {}
        for kind, part in removals.parts[block.index].items():
            if counts.get(kind):
                removed[kind], errors[kind] = self._remove(block, part, counts[kind], context)
        after = sum(parameter.numel() for parameter in block.module.parameters())
        record = {"parameters": {"before": before, "after": after}, "removed": removed, "output_error": errors}
        return record | ({"heads_kept": removals.heads_kept} if removals.heads_kept else {})

    def _remove(self, block: Block, part: Part, count: int, context: Context) -> tuple[list[int], float | None]:
        """Remove groups; return them, lowest first, and the relative output error that remains, where it was measured."""
        last, scores = last_linear(block, part), BlockScores(self.config.scores, block, context)
        weight, bias = last.weight, getattr(last.module, "bias", None)
        bias = None if bias is None else bias.data
        by_error = self.config.score == "output"
        moments = scores.moments(part) if self.config.compensate or by_error else None
        if by_error and moments:
            removed, _ = removal_order(weight, moments, part.columns, part.classes, count)
        else:
            removed = lowest(scores.scores(part), part.classes, count)
        kept = remaining(weight.shape[1], part.columns[torch.tensor(removed)]).to(weight.device)
        changed = weight[:, kept].clone()
        if self.config.compensate and moments:
            changed, bias = compensated(weight, bias, moments, kept)
        error = output_error(weight, changed, moments, kept) if moments else None
        cut(block, part, removed, context, changed, bias)
        return removed, error
