"""Set weights to zero: which linears, how much of each, and the record of a block, as all passes that prune share them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from compress.errors import CompressError
from compress.passes import Block, Context, Needs, Pass, Sizes
from compress.pruning import allocation as rules
from compress.pruning.allocation import Budget, exponent, whole_numbers
from compress.pruning.mrp import Search, Step, curve, grid, non_outlier_ratio, outlier_share, search
from compress.pruning.scores import DEFAULT_GROUP, Measured, measure, pattern_zeros
from compress.pruning.settings import Allocation, Group, Score, SparseConfig
from compress.pruning.sparsegpt import Rule
from compress.quant.base import share_packed
from compress.statistics import hessian_bytes
from compress.structure import block_of, matching
from compress.workspace import Record

_SORTING = 24  # bytes per weight of a matrix whose weights are all compared


@dataclass(frozen=True)
class Plan:
    """Hold what every linear loses."""

    zeros: dict[str, int]  # full name -> number of weights to prune
    steps: Sequence[Step] = ()  # of MRP's search; ``unit`` counts blocks that have anything to prune
    finished: bool = True  # false while the search waits for another round


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

    def scored(self, block: Block, names: Sequence[str]) -> Measured:
        """Score linears of a block, float32 [N, K] each; the smallest go first. A pass with a score of its own overrides it."""
        return measure(block, names, self.score, self.config.damping)

    @abstractmethod
    def prune(self, block: Block, zeros: Mapping[str, int], measured: Measured) -> dict[str, Pruned]:
        """Prune the measured linears of a block in place, each by its number of zeros."""

    def _prune(self, block: Block, zeros: Mapping[str, int], measured: Measured) -> dict[str, Pruned]:
        """Let every process prune some of the linears, and all have the result."""
        sizes = {name: score.numel() * score.shape[1] for name, score in measured.scores.items()}
        own = block.ranks.share(sizes)
        factors = {name: factor for name, factor in measured.factors.items() if name in own}
        pruned = self.prune(block, zeros, Measured({name: measured.scores[name] for name in own}, factors))
        if block.ranks.size == 1:
            return pruned
        tensors = block.ranks.joined(
            {f"weight {name}": block.linears[name].weight for name in own}
            | {f"mask {name}": part.mask for name, part in pruned.items()}
        )
        figures = block.ranks.noted({name: part.figures for name, part in pruned.items()})
        for name in sizes:
            block.linears[name].weight.copy_(tensors[f"weight {name}"])
        share_packed(block, list(sizes))
        return {name: Pruned(tensors[f"mask {name}"], figures[name]) for name in sizes}

    def needs(self) -> Needs:
        """Ask for inputs, unless neither the score nor the allocation looks at them."""
        looks = self.score != "magnitude" or self.config.allocation in ("owl", "dlp", "hessian")
        return Needs(
            inputs="updated" if looks else None, divides=True, pattern=self.config.pattern is not None, zeros=True
        )

    def memory(self, sizes: Sizes, context: Context) -> int:
        """Estimate what a block's scores and masks take, and Hessians: one of every distinct input, and what factoring the largest takes."""
        sorts_all = self._group == "matrix" or self.config.pattern
        largest = max(rows * columns for rows, columns in context.linears.values())
        scored = sizes.block + sizes.block // 4 + (_SORTING * largest if sorts_all else 0)
        if self.score != "sparsegpt" and self.config.allocation != "hessian":
            return scored
        factoring = 2 * 4 * max(columns for _, columns in context.linears.values()) ** 2
        return hessian_bytes(context.structure, context.linears) + max(scored, factoring)

    @property
    def _group(self) -> Group:
        return self.config.group or DEFAULT_GROUP[self.score]

    @property
    def _allocation(self) -> Allocation:
        return self.config.allocation if self.config.sparsity else "uniform"  # nothing to divide

    def rule(self, zeros: int) -> Rule:
        """Return how the weights of one linear are chosen."""
        return Rule(zeros, self._group, self.config.kept_of)

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

    def wants_statistics(self, context: Context, statistics: Sequence[Sequence[Record]]) -> bool:
        """Ask for one round where the allocation measures; for MRP for more, until its search has met the target."""
        if self._allocation in ("uniform", "random", "atp"):
            return False
        if self._allocation != "mrp" or not statistics:
            return not statistics
        return not self.plan(context, statistics).finished

    def measure_block(self, block: Block, context: Context) -> Record:
        """Measure what the allocation must know of a block; in MRP's later rounds leave it as pruned so far."""
        names = self._names(block, context)
        config = self.config
        if not names:
            return {}
        if config.allocation == "alpha":
            return {"exponents": {name: exponent(block.linears[name].weight) for name in names}}
        if config.allocation == "hessian":
            scores = measure(block, names, "sparsegpt", config.damping).scores
            return {"losses": {name: self._estimated_loss(score) for name, score in scores.items()}}
        if config.allocation in ("owl", "dlp"):
            wanda = list(measure(block, names, "wanda", config.damping).scores.values())
            if config.allocation == "owl":
                return {"outliers": outlier_share(wanda, config.outlier)}
            return {"median": float(torch.cat([score.flatten() for score in wanda]).median())}
        measured = self.scored(block, names)
        groups = dict.fromkeys(names, self._group)
        record = {"nor": curve(measured.scores, groups, self._points(), config.outlier, config.ratio)}
        if block.statistics:
            self._prune(block, self.plan(context, block.statistics).zeros, measured)
        return record

    def _points(self) -> list[float]:
        """Return the sparsities at which MRP knows a block's non-outlier ratio."""
        return grid(0.0, self.config.cap, self.config.step)

    def _estimated_loss(self, scores: Tensor) -> float:
        """Return half the sum of the smallest squares up to the target, per weight (arXiv 2409.20094)."""
        flat = scores.flatten()
        count = round(self.config.sparsity * flat.numel())
        return 0.5 * float(flat.sort()[0][:count].double().square().sum()) / flat.numel()

    def plan(self, context: Context, statistics: Sequence[Sequence[Record]]) -> Plan:
        """Divide the target over the linears, knowing the records of all blocks of every round."""
        config, units = self.config, self._units(context)
        if config.kept_of:
            return Plan({n: pattern_zeros(*context.linears[n], *config.kept_of) for unit in units for n in unit})
        size = {name: rows * columns for name, (rows, columns) in context.linears.items()}
        budget = self._budget([sum(size[name] for name in unit) for unit in units])
        if self._allocation == "mrp":
            curves = [[record["nor"] for record in records if record] for records in statistics]
            refresh = 0 if self.score == "magnitude" else config.refresh
            found = search(budget, self._points(), curves, config.step, refresh)
        else:
            records = [record for record in (statistics or [[]])[0] if record]
            found = Search(self._allocated(context, budget, records), [], True)
        each = {n: sparsity for unit, sparsity in zip(units, found.sparsities, strict=True) for n in unit}
        sizes = [size[name] for name in each]
        target = config.sparsity
        if not found.finished:
            target = sum(size[name] * sparsity for name, sparsity in each.items()) / sum(sizes)
        counts = whole_numbers(Budget(sizes, target), list(each.values()))
        return Plan(dict(zip(each, counts, strict=True)), found.steps, found.finished)

    def _allocated(self, context: Context, budget: Budget, records: Sequence[Record]) -> list[float]:
        """Apply the rule of the settings to what the blocks' records say."""
        spread, units = self.config.half_range, self._units(context)

        def by_name(key: str) -> dict[str, float]:
            return {name: value for record in records for name, value in record[key].items()}

        match self._allocation:
            case "random":
                return rules.random(budget, spread, context.generator(len(budget.sizes)))
            case "atp":
                return rules.atp(budget, spread)
            case "owl":
                return rules.owl(budget, [record["outliers"] for record in records], spread)
            case "dlp":
                return rules.dlp(budget, [record["median"] for record in records], spread)
            case "alpha":
                found = by_name("exponents")
                return rules.alpha(budget, [sum(found[name] for name in unit) / len(unit) for unit in units], spread)
            case "hessian":
                found = by_name("losses")
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
        config, plan = self.config, self.plan(context, block.statistics)
        measured = self.scored(block, names)
        pruned = self._prune(block, plan.zeros, measured)
        masks = {name: part.mask for name, part in pruned.items()}
        unit = next(index for index, unit in enumerate(self._units(context)) if names[0] in unit)
        linears = {}
        for name, part in pruned.items():
            weight = block.linears[name].weight
            linears[name] = {"zeros": int((weight == 0).sum()), "parameters": weight.numel(), **part.figures}
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
