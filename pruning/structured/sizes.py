"""Choose how many heads and channels every block loses, or which blocks go, so that a share of the parameters goes."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property

from compress.config import BlockShape
from compress.errors import CompressError
from compress.passes import Context
from compress.pruning.scores import shares
from compress.pruning.settings import SizeSettings
from compress.pruning.structured.groups import Kind, Part, parts_of
from compress.shapes import block_shape, groups_of, ordinary_config
from compress.structure import block_prefix

Counts = Mapping[Kind, int]
"""Groups that a block loses, by part; parts that lose none are absent."""
Prices = Mapping[Kind, Sequence[float]]
"""What each further group of a block costs, by part, in the order in which groups go."""
_UNSAYABLE = "mode uniform: config.json cannot say fewer heads of the same size"


class Removals:
    """Find the parts of a model's blocks, and choose how much of each goes."""

    def __init__(self, settings: SizeSettings, context: Context) -> None:
        self.settings, self.context = settings, context
        structure = context.structure
        self.names = [block_prefix(structure, index) for index in range(structure.depth)]

    @cached_property
    def protected(self) -> set[int]:
        """Find the blocks that are left whole."""
        blocks, protect = len(self.names), self.settings.protect
        if protect == "none":
            return set()
        first, last = (round(4 * blocks / 32), round(2 * blocks / 32)) if protect == "llm_pruner" else protect
        return {*range(min(first, blocks)), *range(max(0, blocks - last), blocks)}

    def shape(self, name: str) -> BlockShape:
        """Return a block's sizes before anything goes."""
        return block_shape(self.context.config, self.context.shapes, name)

    @cached_property
    def parts(self) -> list[Mapping[Kind, Part]]:
        """List every block's parts; none of a protected block, nor attention where all heads are to stay."""
        found: list[Mapping[Kind, Part]] = []
        context = self.context
        for index, name in enumerate(self.names):
            shape, prefix = self.shape(name), f"{name}."
            biased = {linear.removeprefix(prefix) for linear in context.biased if linear.startswith(prefix)}
            whole = index in self.protected
            parts = {} if whole else parts_of(context.structure, context.config, shape, self.settings.unit, biased)
            if self.settings.attention == 0:
                parts.pop("attention", None)
            found.append(parts)
        return found

    @cached_property
    def heads_kept(self) -> str:
        """Say why no heads go from any block; empty where they may."""
        groups = groups_of(self.context.structure)
        if groups.heads_fixed or self.settings.attention == 0:
            return groups.heads_fixed or "attention is 0"
        return _UNSAYABLE if self.settings.mode == "uniform" and not groups.config_heads else ""

    def counts(self, prices: Sequence[Prices] | None = None) -> list[Counts]:
        """Choose how many groups every block loses, in mode global by prices (None for an estimate without them).

        Raises:
            CompressError: the target cannot be met, or not in this mode.
        """
        if not self._open:
            raise CompressError("mini_llm: protect leaves no block from which anything may go; protect fewer.")
        return self._cheapest(prices) if self.settings.mode == "global" else self._equal()

    @property
    def _open(self) -> list[int]:
        """List the blocks that may lose something."""
        return [index for index, parts in enumerate(self.parts) if parts]

    @property
    def _inside(self) -> int:
        """Count the weights of all linears inside the blocks."""
        return sum(rows * columns for rows, columns in self.context.linears.values())

    @cached_property
    def _target(self) -> int:
        """Count the parameters that are to go from the whole model."""
        if self.settings.ratio_of != "layers":
            whole = self._inside if self.settings.ratio_of == "blocks" else self.context.parameters
            return round(self.settings.ratio * whole)
        weights = {"attention": self.settings.attention, "mlp": 1.0}
        count = sum(weights[kind] * part.count * part.cost for parts in self.parts for kind, part in parts.items())
        return round(self.settings.ratio * count)

    def _equal(self) -> list[Counts]:
        """Take the same from every open block: heads as near to their share as can be, channels for the rest."""
        settings, blocks, shape = self.settings, len(self._open), self._common_shape()
        parts = self.parts[self._open[0]]
        mlp, heads = parts["mlp"], parts.get("attention")
        if not self._can_be_said(shape, heads, 0):
            raise CompressError(
                f"mini_llm: the config of model type {self.context.config.model_type!r} cannot say how many channels an MLP "
                "has, so uniform pruning would give a model that plain transformers cannot build; use mode local."
            )
        wanted, room, cost = self._wanted_heads(heads, mlp), mlp.count - settings.multiple, heads.cost if heads else 0
        splits, most = [], 0
        for count in range(0, heads.count, heads.step) if heads else range(1):
            if not self._can_be_said(shape, heads, count):
                continue
            rest = self._target - blocks * count * cost
            if settings.ratio_of == "layers":
                rest = round(settings.ratio * mlp.count) * mlp.cost * blocks
            total = round(rest / mlp.cost)
            most = max(most, blocks * (count * cost + room * mlp.cost))
            if rest >= -0.5 * mlp.cost and total <= blocks * room:
                splits.append((abs(count - wanted), count, total))
        if not splits:
            raise self._too_much(most)
        _, count, total = min(splits)
        exact = settings.mode == "local" and settings.multiple == 1  # then blocks differ by a channel at most
        even = _leaving_multiple(round(total / blocks), mlp.count, settings.multiple)
        channels = iter(shares(total, blocks) if exact else [even] * blocks)
        return [_without_zeros({"attention": count, "mlp": next(channels)}) if parts else {} for parts in self.parts]

    def _common_shape(self) -> BlockShape:
        shapes = {self.shape(name) for name in self.names}
        if len(shapes) > 1:
            raise CompressError(
                f"mini_llm: an earlier pass has left blocks of different sizes, so mode {self.settings.mode} cannot take the "
                "same from each; use mode global."
            )
        return shapes.pop()

    def _can_be_said(self, shape: BlockShape, heads: Part | None, count: int) -> bool:
        """Tell whether a config can express the removal of so many head groups, where the mode needs one to."""
        if self.settings.mode != "uniform":
            return True
        left = heads.shape(shape, count) if heads else shape
        return (
            ordinary_config(self.context.config, self.context.structure, replace(left, channels=left.channels - 1))
            is not None
        )

    def _wanted_heads(self, heads: Part | None, mlp: Part) -> float:
        """Return the number of head groups that the target's share of a block amounts to."""
        ratio, attention = self.settings.ratio, self.settings.attention
        if heads is None:
            return 0.0
        if self.settings.ratio_of == "layers":
            return ratio * attention * heads.count
        weighted = attention * heads.count * heads.cost + mlp.count * mlp.cost
        return self._target / len(self._open) / weighted * attention * heads.count

    def _too_much(self, most: int) -> CompressError:
        hint = ""
        if self.heads_kept == _UNSAYABLE:
            hint = " Mode local can also remove heads, which this model's config cannot say in mode uniform."
        return CompressError(
            f"mini_llm: {self._target} parameters are to go, but with one head and a few channels left in each of the "
            f"{len(self._open)} blocks that may lose something, at most {most} can; lower ratio, or protect fewer blocks.{hint}"
        )

    def _cheapest(self, prices: Sequence[Prices] | None) -> list[Counts]:
        """Take the group that is cheapest per parameter, wherever it is, until the target is met."""
        if prices is None:  # an estimate: prices rise with the share of a part that has gone
            prices = [
                {kind: [part.cost * (n + 1) / part.count for n in range(part.count)] for kind, part in parts.items()}
                for parts in self.parts
            ]
        taken = [dict.fromkeys(parts, 0) for parts in self.parts]
        heap: list[tuple[float, int, Kind]] = []

        def offer(block: int, kind: Kind) -> None:
            part, done = self.parts[block][kind], taken[block][kind]
            if done + part.step < part.count:
                price = sum(prices[block][kind][done : done + part.step]) / (part.step * part.cost)
                heapq.heappush(heap, (price / (self.settings.attention if kind == "attention" else 1.0), block, kind))

        for block, parts in enumerate(self.parts):
            for kind in parts:
                offer(block, kind)
        every = [part for parts in self.parts for part in parts.values()]
        left, smallest = self._target, min(part.cost * part.step for part in every)
        while left >= smallest / 2:
            if not heap:
                raise self._too_much(sum((part.count - part.step) * part.cost for part in every))
            _, block, kind = heapq.heappop(heap)
            part = self.parts[block][kind]
            if part.cost * part.step > left + smallest / 2:
                continue  # a head too many: channels fill what is left
            taken[block][kind] += part.step
            left -= part.cost * part.step
            offer(block, kind)
        return [_without_zeros(counts) for counts in taken]

    def depth(self) -> int:
        """Count the whole blocks that come nearest to the share that is to go.

        Raises:
            CompressError: none or all would go, protect leaves too few, or blocks depend on their position.
        """
        fixed, ratio, blocks = groups_of(self.context.structure).depth_fixed, self.settings.ratio, len(self.names)
        if fixed and getattr(self.context.config, fixed, False):
            raise CompressError(
                f"mini_llm: config.json sets {fixed}, so blocks depend on their position and none can be removed."
            )
        whole = self.context.parameters if self.settings.ratio_of == "model" else self._inside
        size = self._inside // blocks
        count = round(ratio * whole / size)
        if not 1 <= count < blocks:
            raise CompressError(
                f"mini_llm: ratio {ratio} of {whole} parameters is {ratio * whole / size:.2f} blocks of {size}; "
                f"1 to {blocks - 1} blocks can go."
            )
        if count > blocks - len(self.protected):
            raise CompressError(f"mini_llm: {count} blocks are to go, but protect leaves fewer; protect fewer.")
        return count

    def cheapest_blocks(self, prices: Sequence[float]) -> list[int]:
        """Choose the blocks that go, by the price of each."""
        free = [index for index in range(len(prices)) if index not in self.protected]
        return sorted(free, key=lambda index: (prices[index], index))[: self.depth()]


def _without_zeros(counts: Mapping[Kind, int]) -> Counts:
    return {kind: count for kind, count in counts.items() if count}


def _leaving_multiple(count: int, channels: int, multiple: int) -> int:
    """Round a number of channels that go so that those that stay are a multiple of some number."""
    kept = max(multiple, round((channels - count) / multiple) * multiple)
    return max(0, channels - kept) if multiple > 1 else count
