"""Structured pruning: whole heads, channels or blocks go, and the model that stays is really smaller."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compress.config import BlockShape
from compress.passes import Block, Context, Needs, Pass, Sizes
from compress.pruning.allot import all_parts, block_counts, block_names, cheapest_blocks, depth_of, kept_whole
from compress.pruning.criteria import lowest
from compress.pruning.estimate import SURVEY_TOKENS
from compress.pruning.groups import Part, cut, remaining
from compress.pruning.least_squares import compensated, output_error, removal_order
from compress.pruning.measured import block_price, block_scores, last_linear, moments_of, prices
from compress.pruning.settings import WHOLE_MODEL, MiniLlmConfig
from compress.pruning.survey import whole_model_scores
from compress.shapes import block_shape, config_shape
from compress.statistics import hessian_bytes
from compress.workspace import Record


class MiniLlm(Pass[MiniLlmConfig]):
    """Score, choose, cut, refit: attention first, then the MLP on what attention has become."""

    Config = MiniLlmConfig

    def needs(self) -> Needs:
        """Inputs of blocks for what is measured there, the whole model for what is estimated there."""
        config = self.config
        inside = config.compensate or config.score in ("output", "no_gradient", "noise")
        return Needs(
            inputs="updated" if inside or config.remove == "blocks" else None,
            model_survey=config.score in WHOLE_MODEL,
            changes_shapes=True,
        )

    def memory(self, sizes: Sizes, context: Context) -> int:
        """Estimate what gradients of the whole model take, with all activations, and float64 Hessians of a block."""
        config, total = self.config, 0
        if config.score in WHOLE_MODEL and config.source == "backprop":
            values = sum(rows + columns for rows, columns in context.linears.values())
            total += sizes.model + 4 * values * min(SURVEY_TOKENS, sizes.samples * sizes.length)
        if config.compensate or config.score == "output":  # a Hessian, its inverse and factor
            total += sizes.block + 6 * hessian_bytes(context.structure, context.linears)
        return total

    def check(self, context: Context) -> None:
        """Whether the target can be met."""
        config_shape(context.config)
        if self.config.remove == "blocks":
            depth_of(self.config, context)
        else:
            block_counts(self.config, context, None)

    def shapes_after(self, context: Context) -> dict[str, BlockShape | None]:
        """Exact in modes uniform and local; in mode global, and of blocks, what goes is yet to be found."""
        names = block_names(context)
        if self.config.remove == "blocks":
            return dict.fromkeys(names[-depth_of(self.config, context) :])
        counts = block_counts(self.config, context, None)
        after: dict[str, BlockShape | None] = {}
        for name, parts, lost in zip(names, all_parts(self.config, context), counts, strict=True):
            shape = block_shape(context.config, context.shapes, name)
            for kind, count in lost.items():
                shape = parts[kind].shape(shape, count)
            after[name] = shape
        return after

    def survey_model(
        self, model: PreTrainedModel, samples: Sequence[Tensor], context: Context,
        report: Callable[[str, int, int], None],
    ) -> dict[str, Tensor]:  # fmt: skip
        """Scores that need the whole model, ``<block>.<part>`` -> [U]."""
        parts = all_parts(self.config, context)
        counts = block_counts(self.config, context, None) if self.config.rounds > 1 else []
        return whole_model_scores(self.config, model, samples, context, parts, counts, report)

    def wants_survey(self, context: Context, surveys: Sequence[Sequence[Record]]) -> bool:
        """Comparing blocks needs a look at all of them."""
        return not surveys and (self.config.mode == "global" or self.config.remove == "blocks")

    def survey_block(self, block: Block, context: Context) -> Record:
        """Prices of units in the order in which they would go; or of the whole block."""
        parts = all_parts(self.config, context)[block.index]
        if self.config.remove == "blocks":
            return {"price": block_price(block, parts, self.config, context)}
        return {"prices": {kind: prices(block, part, self.config, context) for kind, part in parts.items()}}

    def run_block(self, block: Block, context: Context) -> Record:
        """Cut the block, attention first."""
        survey = block.surveys[0] if block.surveys else None
        if self.config.remove == "blocks":
            assert survey is not None
            found = [record["price"] for record in survey]
            block.removed = block.index in cheapest_blocks(self.config, context, found)
            return {"price": found[block.index], "removed": block.removed}
        counts = block_counts(self.config, context, survey)[block.index]
        parts = all_parts(self.config, context)[block.index]
        before = sum(parameter.numel() for parameter in block.module.parameters())
        removed, errors = {}, {}
        for kind, part in parts.items():
            if counts.get(kind):
                removed[kind], errors[kind] = self._remove(block, part, counts[kind], context)
        after = sum(parameter.numel() for parameter in block.module.parameters())
        record = {"parameters": {"before": before, "after": after}, "removed": removed, "output_error": errors}
        reason = kept_whole(self.config, context)
        return record | ({"heads_kept": reason} if reason else {})

    def _remove(self, block: Block, part: Part, count: int, context: Context) -> tuple[list[int], float | None]:
        """Returns the units, lowest first, and the relative output error that remains, where it was measured."""
        last = last_linear(block, part)
        weight, bias = last.weight, getattr(last.module, "bias", None)
        bias = None if bias is None else bias.data
        measured = self.config.compensate or self.config.score == "output"
        moments = moments_of(block, part, self.config.compensate) if measured else None
        if self.config.score == "output":
            assert moments is not None
            removed, _ = removal_order(weight, moments, part.columns, part.classes, count)
        else:
            removed = lowest(block_scores(block, part, self.config, context), part.classes, count)
        kept = remaining(weight.shape[1], part.columns[torch.tensor(removed)]).to(weight.device)
        changed = weight[:, kept].clone()
        if self.config.compensate:
            assert moments is not None
            changed, bias = compensated(weight, bias, moments, kept)
        error = None if moments is None else output_error(weight, changed, moments, kept)
        cut(block, part, removed, context.structure, context.config, changed, bias)
        return removed, error
