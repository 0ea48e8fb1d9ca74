"""Structured pruning: whole heads, channels or blocks go, and the model that stays is really smaller."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from transformers import PreTrainedModel

from compress.passes import Block, Context, Needs, Pass, PassConfig, Report, Sizes
from compress.pruning.structured.gradients import SURVEY_TOKENS, Estimator, GradientSettings, whole_model_scores
from compress.pruning.structured.groups import HeadGroups, Part, cut, last_linear, remaining
from compress.pruning.structured.scores import (
    WHOLE_MODEL,
    Aggregate,
    BlockScores,
    Formula,
    Score,
    ScoreSettings,
    compensated,
    lowest,
    output_error,
    removal_order,
)
from compress.pruning.structured.sizes import Removals, SizeSettings
from compress.shapes import BlockShape, config_shape
from compress.statistics import hessian_bytes
from compress.workspace import Record

PAPER = {"score": "fms", "estimator": "spsa", "variant": "F1"}
LLM_PRUNER = {"score": "taylor", "estimator": "backprop", "variant": "F3", "ratio_of": "layers", "ratio": 0.25}
_BOTH = {"mode": "local", "protect": "llm_pruner", "compensate": False}
PRESETS: dict[str, dict[str, Any]] = {"default": {}, "paper": PAPER | _BOTH, "llm_pruner": LLM_PRUNER | _BOTH}


class MiniLlmConfig(PassConfig):
    """Structured pruning: remove whole heads and channels (or blocks), so that the model is really smaller.

    What stays is refitted, by default, so that each layer's output on calibration text changes least (least squares). Mode ``uniform``
    leaves the same size in every block and so an ordinary config that plain transformers loads without this library; ``local``
    and ``global`` record the sizes in quantization_config.
    """

    kind: Literal["mini_llm"] = Field("mini_llm", description="Name of the pass.")
    preset: Literal["default", "paper", "llm_pruner"] = Field(
        "default",
        description="Settings for keys that are not given: this library's, MINI-LLM's (arXiv 2407.11681: one SPSA draw, F1, "
        "first 4 and last 2 of 32 blocks kept), or LLM-Pruner's (25 % of the groups of those blocks, backpropagated Taylor).",
    )
    ratio: float = Field(0.2, gt=0, lt=1, description="Share that is to go.")
    ratio_of: Literal["model", "blocks", "layers"] = Field(
        "model",
        description="Of what: all parameters, those inside blocks, or the groups of every layer that is not protected.",
    )
    remove: Literal["groups", "blocks"] = Field("groups", description="Heads and channels, or whole blocks.")
    mode: Literal["uniform", "local", "global"] = Field(
        "uniform",
        description="The same size in all blocks; the same share of each block that is not protected; or the groups that are cheapest "
        "per parameter, wherever they are.",
    )
    score: Score = Field(
        "output",
        description="What a group is worth: the error of the block's output that least squares cannot make up for (output); "
        "|W| |X| |gradient| (fms), the same without gradient (no_gradient) or with noise for one (noise); |W gradient| (taylor); "
        "the loss's sensitivity to a gate on the group (gates); the weights' L2 norm (magnitude); nothing (random).",
    )
    estimator: Estimator | None = Field(
        None,
        description="Where gradients come from: forward passes with perturbed weights or gates (spsa), backpropagation (backprop), or "
        "for gates, the residual stream's gradient (residual). If absent: spsa for fms, backprop for taylor, residual for gates.",
    )
    draws: int = Field(1, ge=1, description="Perturbations that spsa averages over.")
    step: float = Field(1e-3, gt=0, description="Size of a perturbation.")
    variant: Formula = Field(
        "F1",
        description="Score of one weight for fms and taylor: |W||X||g|, |W mean(X) g|, |W g|, or their signed sum.",
    )
    aggregate: Aggregate = Field("sum", description="Over the matrices that a group has parts in.")
    rounds: int = Field(
        1, ge=1, description="For fms, taylor and gates: score again after each of so many equal parts."
    )
    compensate: bool = Field(True, description="Refit what stays to the calibration text by least squares.")
    protect: Literal["none", "llm_pruner"] | tuple[int, int] = Field(
        "none", description="Blocks left whole: the first and last so many; llm_pruner: 4 and 2 of every 32."
    )
    attention: float = Field(
        1.0, ge=0, description="Share that attention loses, as a multiple of what MLPs lose; 0 leaves all heads."
    )
    unit: HeadGroups = Field(
        "groups",
        description="Heads go as key-value heads with all their queries, or as queries, equally many of every key-value head.",
    )
    multiple: int = Field(1, ge=1, description="Channels that stay are a multiple of this (modes uniform and local).")

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and data.get("preset") in PRESETS:
            settings = {**PRESETS[str(data["preset"])], **data}
        else:
            settings = data
        if isinstance(settings, Mapping) and settings.get("score") == "taylor":
            settings = {"variant": "F3", **settings}
        return settings

    @model_validator(mode="after")
    def _consistent(self) -> MiniLlmConfig:
        fitting = {
            "fms": ("spsa", "backprop"),
            "taylor": ("backprop", "spsa"),
            "gates": ("residual", "spsa", "backprop"),
        }
        if self.estimator is not None and self.estimator not in fitting.get(self.score, ()):
            known = ", ".join(fitting.get(self.score, ())) or "none"
            raise ValueError(f"estimator {self.estimator} does not go with score {self.score}, which knows {known}")
        if self.rounds > 1 and self.score not in WHOLE_MODEL:
            raise ValueError(f"rounds {self.rounds} goes with the scores {', '.join(WHOLE_MODEL)} only")
        if self.mode == "uniform" and self.protect not in ("none", (0, 0)) and self.remove == "groups":
            raise ValueError(
                "mode uniform leaves every block the same size, so none can be protected; take local or global"
            )
        if isinstance(self.protect, tuple) and min(self.protect) < 0:
            raise ValueError(f"protect {self.protect} counts blocks, so neither number can be negative")
        if self.remove == "blocks" and self.rounds > 1:
            raise ValueError("rounds is for heads and channels, not for whole blocks")
        if self.mode == "global" and self.multiple > 1:
            raise ValueError("multiple goes with the modes uniform and local")
        return self

    @property
    def sizes(self) -> SizeSettings:
        """Return the settings that decide how much goes from where."""
        return SizeSettings(
            self.ratio, self.ratio_of, self.mode, self.protect, self.attention, self.unit, self.multiple
        )

    @property
    def scores(self) -> ScoreSettings:
        """Return the settings that decide what a group is worth."""
        return ScoreSettings(self.score, self.aggregate, self.compensate)

    @property
    def gradients(self) -> GradientSettings:
        """Return the settings of scores of the whole model, with the estimator in use."""
        usual: dict[str, Estimator] = {"fms": "spsa", "taylor": "backprop"}
        estimator = self.estimator or usual.get(self.score, "residual")
        return GradientSettings(self.score, estimator, self.draws, self.step, self.variant, self.aggregate, self.rounds)


class MiniLlm(Pass[MiniLlmConfig]):
    """Score, choose, cut, refit: attention first, then the MLP on what attention has become."""

    Config = MiniLlmConfig

    def needs(self) -> Needs:
        """Ask for inputs of blocks for what is measured there, for the whole model for what is estimated there."""
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
        if config.score in WHOLE_MODEL and config.gradients.estimator == "backprop":
            values = sum(rows + columns for rows, columns in context.linears.values())
            total += sizes.model + 4 * values * min(SURVEY_TOKENS, sizes.samples * sizes.length)
        if config.compensate or config.score == "output":  # a Hessian, its inverse and factor
            total += sizes.block + 6 * hessian_bytes(context.structure, context.linears)
        return total

    def _removals(self, context: Context) -> Removals:
        return Removals(self.config.sizes, context)

    def check(self, context: Context) -> None:
        """Refuse a target that cannot be met."""
        config_shape(context.config)
        self.shapes_after(context)

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

    def survey_model(
        self, model: PreTrainedModel, samples: Sequence[Tensor], context: Context, report: Report
    ) -> dict[str, Tensor]:
        """Compute the scores that need the whole model, ``<block>.<part>`` -> [G]."""
        removals = self._removals(context)
        counts = removals.counts() if self.config.rounds > 1 else []
        return whole_model_scores(self.config.gradients, model, samples, context, removals.parts, counts, report)

    def wants_survey(self, context: Context, surveys: Sequence[Sequence[Record]]) -> bool:
        """Ask for a look at all blocks where they are to be compared."""
        return not surveys and (self.config.mode == "global" or self.config.remove == "blocks")

    def survey_block(self, block: Block, context: Context) -> Record:
        """Price the groups in the order in which they would go, or the whole block."""
        parts, scores = self._removals(context).parts[block.index], BlockScores(self.config.scores, block, context)
        if self.config.remove == "blocks":
            return {"price": scores.price(parts)}
        return {"prices": {kind: scores.prices(part) for kind, part in parts.items()}}

    def run_block(self, block: Block, context: Context) -> Record:
        """Cut the block, attention first."""
        removals, survey = self._removals(context), block.surveys[0] if block.surveys else None
        if self.config.remove == "blocks":
            assert survey is not None
            found = [record["price"] for record in survey]
            block.removed = block.index in removals.cheapest_blocks(found)
            return {"price": found[block.index], "removed": block.removed}
        counts = removals.counts(None if survey is None else [record["prices"] for record in survey])[block.index]
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
        if by_error:
            assert moments is not None
            removed, _ = removal_order(weight, moments, part.columns, part.classes, count)
        else:
            removed = lowest(scores.scores(part), part.classes, count)
        kept = remaining(weight.shape[1], part.columns[torch.tensor(removed)]).to(weight.device)
        changed = weight[:, kept].clone()
        if self.config.compensate:
            assert moments is not None
            changed, bias = compensated(weight, bias, moments, kept)
        error = None if moments is None else output_error(weight, changed, moments, kept)
        cut(block, part, removed, context, changed, bias)
        return removed, error
