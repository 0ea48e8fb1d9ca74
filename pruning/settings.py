"""Recipe keys of the pruning and recovery passes (no torch: see :mod:`compress.settings`)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from compress.settings import PassConfig, TrainingConfig

Score = Literal["magnitude", "wanda", "sparsegpt"]
Ratio = Literal["survivors", "all"]
Group = Literal["row", "matrix", "columns"]
Allocation = Literal["uniform", "random", "owl", "alpha", "dlp", "atp", "hessian", "mrp"]

# Where a paper has a value, that. mrp, with M = 5, by calibration text: stories260K alone would have 0.25 of the target,
# the built-in model 0.08; 0.17 is between.
SPREAD: dict[str, float] = {
    "random": 0.1,
    "owl": 0.08,
    "alpha": 0.3,
    "dlp": 0.15,
    "atp": 0.15,
    "hessian": 0.075,
    "mrp": 0.17,
}
OUTLIER = 5.0


def _pattern(text: object) -> tuple[int, int] | None:
    match = re.fullmatch(r"(\d+):(\d+)", text) if isinstance(text, str) else None
    return (int(match[1]), int(match[2])) if match and 0 < int(match[1]) < int(match[2]) <= 64 else None


class SparseConfig(PassConfig):
    """Settings of every pass that sets weights to zero."""

    sparsity: float = Field(0.5, ge=0, lt=1, description="Share of zeros over all pruned linears, met exactly.")
    allocation: Allocation = Field(
        "mrp",
        description="How sparsity is divided over blocks (hessian: over linears): uniform, random, owl, alpha "
        "(AlphaPruning), dlp, atp, hessian (clusters of estimated losses), or mrp (most redundant block first).",
    )
    spread: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="How far blocks may be from the target: half the range of owl, dlp, atp and hessian, the bound of "
        "random and mrp, alpha's share of the target. Defaults: "
        + ", ".join(f"{name} {value:g}" for name, value in SPREAD.items())
        + " (mrp: times the sparsity).",
    )
    outlier: float = Field(OUTLIER, gt=1, description="M of owl and mrp: a score above M times the mean is an outlier.")
    floor: float = Field(0.0, ge=0, lt=1, description="Least sparsity of any block.")
    cap: float = Field(0.99, gt=0, lt=1, description="Largest sparsity of any block.")
    step: float = Field(0.01, gt=0, le=0.5, description="mrp: what one iteration adds to a block.")
    ratio: Ratio = Field(
        "survivors",
        description="mrp: non-outlier ratio over surviving weights with the dense block's threshold, or over all "
        "entries of the sparse block, its zeros included, with its own.",
    )
    refresh: int = Field(
        0,
        ge=0,
        description="mrp: iterations after which scores are measured again, on inputs from the model pruned so far; 0 "
        "measures once, on the dense model.",
    )
    pattern: str | None = Field(
        None, description="'2:4' keeps 2 of every 4 consecutive inputs; any n:m. Fixes the sparsity of every block."
    )
    group: Group | None = Field(
        None,
        description="Which scores are compared: those of a row, of the matrix, or of a block of 128 columns. Defaults: "
        "magnitude matrix, wanda row, sparsegpt columns.",
    )
    damping: float = Field(
        0.01,
        gt=0,
        description="sparsegpt: share of the Hessian's mean diagonal added to it; tenfold until it factorises.",
    )
    ignore: tuple[str, ...] = Field(
        (), description="Linears to leave as they are: full names, or 're:' and a regular expression for a full name."
    )

    @model_validator(mode="before")
    @classmethod
    def _what_a_pattern_implies(cls, data: Any) -> Any:
        numbers = _pattern(data.get("pattern")) if isinstance(data, Mapping) else None
        if numbers is None:
            return data
        return {"sparsity": 1 - numbers[0] / numbers[1], "allocation": "uniform", **data}

    @model_validator(mode="after")
    def _one_way_to_choose(self) -> SparseConfig:
        if self.pattern is None:
            return self
        if self.kept_of is None:
            raise ValueError(f"pattern {self.pattern!r} is not n:m with 0 < n < m <= 64, for example 2:4")
        share = 1 - self.kept_of[0] / self.kept_of[1]
        if abs(self.sparsity - share) > 1e-9 or self.allocation != "uniform" or self.group is not None:
            raise ValueError(
                f"pattern {self.pattern} fixes what goes: it needs sparsity {share:g}, allocation uniform and no group"
            )
        return self

    @property
    def kept_of(self) -> tuple[int, int] | None:
        """Return n and m of the pattern, n kept of every m."""
        return _pattern(self.pattern)

    @property
    def half_range(self) -> float:
        """Return ``spread``, or the allocation's default."""
        if self.spread is not None:
            return self.spread
        return SPREAD.get(self.allocation, 0.0) * (self.sparsity if self.allocation == "mrp" else 1.0)


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


class JointConfig(SparseConfig):
    """Prune and round to an even grid in one SparseGPT sweep; what is left is packed at one number of bits.

    Every row has an even grid between its smallest and largest weight, fixed beforehand and moved so that it holds an
    exact zero (arXiv 2301.00774, section 3.5; arXiv 2409.20094). Survivors that round to zero come on top of the target.
    """

    kind: Literal["joint"] = Field("joint", description="Name of the pass.")
    bits: int = Field(4, ge=2, le=8, description="Number of bits.")


StructuredScore = Literal[
    "output", "fms", "taylor", "gates", "no_gradient", "noise", "magnitude", "frequency", "random"
]
Estimator = Literal["spsa", "backprop", "residual"]
Formula = Literal["F1", "F2", "F3", "vector"]
Aggregate = Literal["sum", "max"]
Unit = Literal["groups", "queries", "experts"]
"""What goes as one: a key-value head with its query heads, or one query head of every key-value head; or an expert of a mixture."""
EXPERT_SCORES = ("output", "frequency", "magnitude", "random")
ESTIMATORS: dict[str, tuple[Estimator, ...]] = {
    "fms": ("spsa", "backprop"),
    "taylor": ("backprop", "spsa"),
    "gates": ("residual", "spsa", "backprop"),
}
"""Scores of :class:`MiniLlmConfig` that look at the whole model in memory, and where their gradients may come from, the usual first."""
WHOLE_MODEL = tuple(ESTIMATORS)


@dataclass(frozen=True)
class SizeSettings:
    """Hold the settings of ``mini_llm`` that decide how much goes from where, under the recipe's names."""

    ratio: float
    ratio_of: Literal["model", "blocks", "layers"]
    mode: Literal["uniform", "local", "global"]
    protect: Literal["none", "llm_pruner"] | tuple[int, int]
    attention: float
    unit: Unit
    multiple: int


@dataclass(frozen=True)
class ScoreSettings:
    """Hold the settings of ``mini_llm`` that decide what a group is worth, under the recipe's names."""

    score: StructuredScore
    aggregate: Aggregate
    compensate: bool


@dataclass(frozen=True)
class GradientSettings:
    """Hold the settings of ``mini_llm`` for scores of the whole model, under the recipe's names but for ``variant``: ``formula`` here."""

    score: StructuredScore
    estimator: Estimator
    draws: int
    step: float
    formula: Formula
    aggregate: Aggregate
    rounds: int


class MiniLlmConfig(PassConfig):
    """Structured pruning: remove whole heads and channels (or blocks), so that the model is really smaller.

    What stays is refitted, by default, so that each layer's output on calibration text changes least (least squares). Mode ``uniform``
    leaves the same size in every block and so an ordinary config that plain transformers loads without this library; ``local``
    and ``global`` record the sizes in quantization_config.
    """

    PRESETS: ClassVar = {
        "paper": {
            "score": "fms",
            "estimator": "spsa",
            "variant": "F1",
            "mode": "local",
            "protect": "llm_pruner",
            "compensate": False,
        },
        "llm_pruner": {
            "score": "taylor",
            "estimator": "backprop",
            "variant": "F3",
            "mode": "local",
            "protect": "llm_pruner",
            "ratio_of": "layers",
            "ratio": 0.25,
            "compensate": False,
        },
    }

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
    score: StructuredScore = Field(
        "output",
        description="What a group is worth: the error of the block's output that least squares cannot make up for (output); "
        "|W| |X| |gradient| (fms), the same without gradient (no_gradient) or with noise for one (noise); |W gradient| (taylor); "
        "the loss's sensitivity to a gate on the group (gates); the weights' L2 norm (magnitude); nothing (random). Of experts: the error "
        "without it, others taking its place (output), how often it is chosen (frequency), magnitude or random.",
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
    unit: Unit = Field(
        "groups",
        description="Heads go as key-value heads with all their queries, or as queries, equally many of every key-value head. Or, and "
        "nothing else, whole experts of mixtures, equally many in every layer and without refitting.",
    )
    multiple: int = Field(
        1, ge=1, description="Channels, or experts, that stay are a multiple of this (modes uniform and local)."
    )

    @model_validator(mode="before")
    @classmethod
    def _formula_of_taylor(cls, data: Any) -> Any:
        return {"variant": "F3", **data} if isinstance(data, Mapping) and data.get("score") == "taylor" else data

    @model_validator(mode="after")
    def _consistent(self) -> MiniLlmConfig:
        fitting = ESTIMATORS.get(self.score, ())
        if self.estimator is not None and self.estimator not in fitting:
            known = ", ".join(fitting) or "none"
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
        if (self.unit == "experts") > (self.score in EXPERT_SCORES) or (self.score == "frequency") > (
            self.unit == "experts"
        ):
            raise ValueError(
                f"unit experts goes with the scores {', '.join(EXPERT_SCORES)}, and frequency with no other unit"
            )
        if self.unit == "experts" and (self.mode != "uniform" or self.remove == "blocks"):
            raise ValueError(
                "unit experts removes equally many experts of every layer: mode uniform, and no whole blocks"
            )
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
        estimator = self.estimator or ESTIMATORS.get(self.score, ESTIMATORS["gates"])[0]
        return GradientSettings(self.score, estimator, self.draws, self.step, self.variant, self.aggregate, self.rounds)


class LoraRecoveryConfig(TrainingConfig):
    """Train the model on text after pruning: low-rank adapters on every linear inside the blocks, or all of its weights.

    Adapters are merged into dense weights, of which those that are zero, as ``prune`` leaves them, stay zero. On a quantised model, whose weights are frozen, or where ``merge`` is false, they
    stay an ordinary peft adapter in ``adapter/`` beside the model, and the pass comes last. The best state on
    held-out samples is kept, which may be the one before the first step.
    """

    # LLM-Pruner's (arXiv 2305.11627): two epochs of alpaca-cleaned, 256 tokens at most, which is for ``text`` to say.
    PRESETS: ClassVar = {
        "llm_pruner": {
            "rank": 8,
            "alpha": 16.0,
            "dropout": 0.05,
            "learning_rate": 1e-4,
            "batch": 64,
            "micro_batch": 4,
            "warmup": 100,
            "epochs": 2,
            "validate_every": 200,
            "precision": "bfloat16",
        }
    }

    kind: Literal["lora_recovery"] = Field("lora_recovery", description="Name of the pass.")
    preset: Literal["llm_pruner"] | None = Field(
        None, description="'llm_pruner' takes that paper's settings for every key that is not given."
    )
    full: bool = Field(False, description="Train all dense weights instead of adapters: for small models.")
    rank: int = Field(8, ge=1, description="Of the adapters.")
    alpha: float = Field(16.0, gt=0, description="Their output is scaled by alpha / rank.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Of the adapters' inputs while training.")
    merge: bool = Field(True, description="Add the adapters to the weights; false keeps them beside the model.")
    instructions: bool = Field(
        False,
        description="text.text is a JSON lines file of instruction, input and output: only outputs are learned.",
    )
    epochs: float | None = Field(None, gt=0, description="Passes over the samples, in place of steps.")

    @model_validator(mode="after")
    def _consistent(self) -> LoraRecoveryConfig:
        if self.full and not self.merge:
            raise ValueError(
                "full trains the weights themselves, so nothing is left to keep beside them; leave merge true"
            )
        if self.instructions and (self.text is None or self.text.text is None):
            raise ValueError("instructions needs text: {text: FILE.jsonl, column: output, samples: …}")
        return self
