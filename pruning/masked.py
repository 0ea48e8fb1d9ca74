"""What passes share that set weights to zero: settings, which linears, how much of each, and the record of a block."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from compress.errors import CompressError
from compress.hf import matching
from compress.passes import Block, Context, Needs, Pass, PassConfig, Sizes
from compress.pruning import allocation as rules
from compress.pruning.allocation import Budget, exponent, whole_numbers
from compress.pruning.mrp import Ratio, Step, curve, grid, non_outlier_ratio, outlier_share, search
from compress.pruning.scores import DEFAULT_GROUP, Group, Measured, Score, measure, pattern_zeros
from compress.pruning.sparsegpt import Rule
from compress.statistics import hessian_bytes
from compress.structure import block_of
from compress.workspace import Record

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


class SparseConfig(PassConfig):
    """Hold the settings of every pass that sets weights to zero."""

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
        match = re.fullmatch(r"(\d+):([1-9]\d*)", str(data.get("pattern"))) if isinstance(data, Mapping) else None
        if match is None:
            return data
        return {"sparsity": max(1 - int(match[1]) / int(match[2]), 0.0), "allocation": "uniform", **data}

    @model_validator(mode="after")
    def _one_way_to_choose(self) -> SparseConfig:
        if self.pattern is None:
            return self
        match = re.fullmatch(r"(\d+):(\d+)", self.pattern)
        if match is None or not 0 < int(match[1]) < int(match[2]) <= 64:
            raise ValueError(f"pattern {self.pattern!r} is not n:m with 0 < n < m <= 64, for example 2:4")
        share = 1 - int(match[1]) / int(match[2])
        if abs(self.sparsity - share) > 1e-9 or self.allocation != "uniform" or self.group is not None:
            raise ValueError(
                f"pattern {self.pattern} fixes what goes: it needs sparsity {share:g}, allocation uniform and no group"
            )
        return self

    @property
    def kept_of(self) -> tuple[int, int] | None:
        """Return the pattern as numbers."""
        if self.pattern is None:
            return None
        kept, of = self.pattern.split(":")
        return int(kept), int(of)

    @property
    def half_range(self) -> float:
        """Return ``spread``, or the allocation's default."""
        if self.spread is not None:
            return self.spread
        return SPREAD.get(self.allocation, 0.0) * (self.sparsity if self.allocation == "mrp" else 1.0)


@dataclass(frozen=True)
class Plan:
    """Say what every linear loses.

    Attributes:
        zeros: full name -> number of weights to prune.
        sparsities: of the units the allocation works on, in order.
        steps: of MRP's search; ``unit`` counts blocks that have anything to prune.
        finished: false while the search waits for another round.
    """

    zeros: dict[str, int]
    sparsities: list[float]
    steps: list[Step]
    finished: bool


@dataclass(frozen=True)
class Pruned:
    """Hold what was done to one linear: bool [N, K], true where pruned, and figures for the record."""

    mask: Tensor
    figures: dict[str, Any]


ConfigT = TypeVar("ConfigT", bound=SparseConfig)


class SparsePass(Pass[ConfigT], Generic[ConfigT]):
    """Set weights of linears inside the blocks to zero."""

    @property
    def score(self) -> Score:
        """Return the score by which weights are chosen."""
        return "sparsegpt"

    @abstractmethod
    def prune(self, block: Block, zeros: Mapping[str, int], measured: Measured) -> dict[str, Pruned]:
        """Prune the measured linears of a block in place, each by its number of zeros."""

    def needs(self) -> Needs:
        """Ask for inputs, unless neither the score nor the allocation looks at them."""
        looks = self.score != "magnitude" or self.config.allocation in ("owl", "dlp", "hessian")
        return Needs(inputs="updated" if looks else None)

    def memory(self, sizes: Sizes, context: Context) -> int:
        """Estimate what Hessians take: of every distinct input one, its inverse and factor, and a block's scores."""
        if self.score != "sparsegpt" and self.config.allocation != "hessian":
            return 0
        return sizes.block + 3 * hessian_bytes(context.structure, context.linears)

    def rule(self, zeros: int) -> Rule:
        """Return how the weights of one linear are chosen."""
        return Rule(zeros, self._group, self.config.kept_of)

    @property
    def _group(self) -> Group:
        return self.config.group or DEFAULT_GROUP[self.score]

    def check(self, context: Context) -> None:
        """Refuse patterns of names that match nothing, and a target that is not between floor and cap."""
        for pattern in self.config.ignore:
            matching(pattern, list(context.linears))
        if not self._units(context):
            raise CompressError(
                f"{self.config.kind}: ignore names every linear of the model; there is nothing to prune."
            )
        self._budget([1])

    def chosen(self, context: Context) -> list[str]:
        """Return the linears to prune, in the model's order."""
        names = list(context.linears)
        ignored = {name for pattern in self.config.ignore for name in matching(pattern, names)}
        return [name for name in names if name not in ignored]

    def _units(self, context: Context) -> list[list[str]]:
        """Return the units of the allocation: the linears of each block, or single linears."""
        blocks: dict[int | None, list[str]] = {}
        for name in self.chosen(context):
            blocks.setdefault(block_of(name, context.structure), []).append(name)
        if self.config.allocation == "hessian":
            return [[name] for names in blocks.values() for name in names]
        return list(blocks.values())

    def _budget(self, sizes: Sequence[int]) -> Budget:
        config = self.config
        try:
            budget = Budget(sizes, config.sparsity, config.floor, config.cap)
        except CompressError as error:
            raise CompressError(f"{config.kind}: {error}") from None
        if config.allocation == "mrp":
            low, high = config.sparsity - config.half_range, config.sparsity + config.half_range
            return Budget(sizes, config.sparsity, max(config.floor, low), min(config.cap, high))
        return budget

    def wants_survey(self, context: Context, surveys: Sequence[Sequence[Record]]) -> bool:
        """Ask for one round where the allocation measures; for MRP for more, until its search has met the target."""
        if self.config.allocation in ("uniform", "random", "atp"):
            return False
        if self.config.allocation != "mrp" or not surveys:
            return not surveys
        return not self.plan(context, surveys).finished

    def survey_block(self, block: Block, context: Context) -> Record:
        """Measure what the allocation must know of a block; in MRP's later rounds leave it as pruned so far."""
        names = self._names(block, context)
        config = self.config
        if not names:
            return {}
        if config.allocation == "alpha":
            return {"exponents": {name: exponent(block.linears[name].weight) for name in names}}
        if config.allocation == "owl":
            scores = measure(block, names, "wanda", config.damping).scores
            return {"outliers": outlier_share(scores.values(), config.outlier)}
        if config.allocation == "dlp":
            flat = torch.cat(
                [score.flatten() for score in measure(block, names, "wanda", config.damping).scores.values()]
            )
            return {"median": float(flat.median())}
        if config.allocation == "hessian":
            scores = measure(block, names, "sparsegpt", config.damping).scores
            return {"losses": {name: self._estimated_loss(score) for name, score in scores.items()}}
        measured = measure(block, names, self.score, config.damping)
        groups = dict.fromkeys(names, self._group)
        record = {"nor": curve(measured.scores, groups, self._points(), config.outlier, config.ratio)}
        if block.surveys:
            self.prune(block, self.plan(context, block.surveys).zeros, measured)
        return record

    def _points(self) -> list[float]:
        """Return the sparsities at which MRP knows a block's non-outlier ratio."""
        return grid(0.0, self.config.cap, self.config.step)

    def _estimated_loss(self, scores: Tensor) -> float:
        """Return half the sum of the smallest squares up to the target, per weight (arXiv 2409.20094)."""
        flat = scores.flatten()
        count = round(self.config.sparsity * flat.numel())
        return 0.5 * float(flat.sort()[0][:count].double().square().sum()) / flat.numel()

    def plan(self, context: Context, surveys: Sequence[Sequence[Record]]) -> Plan:
        """Divide the target over the linears.

        Args:
            context: of the run.
            surveys: of every round, the records of all blocks.
        """
        config, units = self.config, self._units(context)
        size = {name: rows * columns for name, (rows, columns) in context.linears.items()}
        if config.kept_of:
            zeros = {n: pattern_zeros(*context.linears[n], *config.kept_of) for unit in units for n in unit}
            return Plan(zeros, [config.sparsity] * len(units), [], True)
        budget = self._budget([sum(size[name] for name in unit) for unit in units])
        steps, finished = list[Step](), True
        if config.allocation == "mrp":
            curves = [[record["nor"] for record in records if record] for records in surveys]
            found = search(
                budget, self._points(), curves, config.step, 0 if self.score == "magnitude" else config.refresh
            )
            sparsities, steps, finished = found.sparsities, found.steps, found.finished
        else:
            sparsities = self._allocated(context, budget, [record for record in (surveys or [[]])[0] if record])
        each = [(name, sparsity) for unit, sparsity in zip(units, sparsities, strict=True) for name in unit]
        whole = Budget([size[name] for name, _ in each], config.sparsity if finished else _mean(size, each))
        counts = whole_numbers(whole, [sparsity for _, sparsity in each])
        return Plan(dict(zip([name for name, _ in each], counts, strict=True)), sparsities, steps, finished)

    def _allocated(self, context: Context, budget: Budget, records: Sequence[Record]) -> list[float]:
        spread, units = self.config.half_range, self._units(context)
        match self.config.allocation:
            case "random":
                return rules.random(budget, spread, context.generator(len(budget.sizes)))
            case "atp":
                return rules.atp(budget, spread)
            case "owl":
                return rules.owl(budget, [record["outliers"] for record in records], spread)
            case "dlp":
                return rules.dlp(budget, [record["median"] for record in records], spread)
            case "alpha":
                found = {name: value for record in records for name, value in record["exponents"].items()}
                means = [sum(found[name] for name in unit) / len(unit) for unit in units]
                return rules.alpha(budget, means, spread)
            case "hessian":
                found = {name: loss for record in records for name, loss in record["losses"].items()}
                return rules.clusters(budget, [found[name] for unit in units for name in unit], spread)
            case _:
                return rules.uniform(budget)

    def _names(self, block: Block, context: Context) -> list[str]:
        wanted = set(self.chosen(context))
        return [name for name in block.linears if name in wanted]

    def run_block(self, block: Block, context: Context) -> Record:
        """Prune one block as planned."""
        names = self._names(block, context)
        if not names:
            return {"linears": {}}
        config, plan = self.config, self.plan(context, block.surveys)
        measured = measure(block, names, self.score, config.damping)
        pruned = self.prune(block, plan.zeros, measured)
        masks = {name: part.mask for name, part in pruned.items()}
        unit = next(index for index, unit in enumerate(self._units(context)) if names[0] in unit)
        linears = {
            name: {"zeros": int((block.linears[name].weight == 0).sum()), "parameters": mask.numel()}
            | pruned[name].figures
            for name, mask in masks.items()
        }
        total = sum(linear["parameters"] for linear in linears.values())
        return {
            "sparsity": sum(linear["zeros"] for linear in linears.values()) / total,
            "nor": {
                "before": non_outlier_ratio(measured.scores, None, config.outlier, config.ratio),
                "after": non_outlier_ratio(measured.scores, masks, config.outlier, config.ratio),
            },
            "linears": linears,
            "iterations": [vars(step) for step in plan.steps if step.unit == unit],
        }


def _mean(size: Mapping[str, int], each: Sequence[tuple[str, float]]) -> float:
    return sum(size[name] * sparsity for name, sparsity in each) / sum(size[name] for name, _ in each)
