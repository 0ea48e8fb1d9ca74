"""How many heads and channels every block loses, so that a share of the parameters goes."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from compress.errors import CompressError
from compress.pruning.groups import Kind, Part
from compress.pruning.scores import shares

Counts = Mapping[Kind, int]
"""Units that a block loses, by part."""


@dataclass(frozen=True)
class Target:
    """What is to be reached.

    Attributes:
        parameters: that are to go, over the whole model.
        parts: of every block, in order; empty for a protected one.
        share: that a part loses at most under the layer-ratio convention; None where parameters are counted.
        attention: what attention loses in proportion to the MLP.
        multiple: the channels that stay are a multiple of this.
    """

    parameters: int
    parts: Sequence[Mapping[Kind, Part]]
    share: float | None
    attention: float
    multiple: int

    @property
    def open(self) -> list[int]:
        """Blocks that may lose something."""
        return [index for index, parts in enumerate(self.parts) if parts]


def protected_blocks(blocks: int, first: int, last: int) -> set[int]:
    """The first and last few blocks."""
    return {*range(min(first, blocks)), *range(max(0, blocks - last), blocks)}


def equal_counts(target: Target, allowed: Callable[[int], bool], exact: bool, hint: str = "") -> list[Counts]:
    """The same from every open block (all have the same size): attention units as near to the share as can be, and channels for the rest.

    Args:
        target: what to reach.
        allowed: whether a block may lose so many attention units.
        exact: let the channels differ by one between blocks, so that the target is met to within one channel.
        hint: what else to do where it cannot be met.

    Raises:
        CompressError: it cannot be met.
    """
    blocks = len(target.open)
    parts = target.parts[target.open[0]]
    mlp, heads = parts["mlp"], parts.get("attention")
    wanted = _attention_units(target, blocks)
    options = range(0, heads.units, heads.step) if heads else range(1)
    splits = []
    most = 0
    for units in filter(allowed, options):
        rest = target.parameters - blocks * units * (heads.cost if heads else 0)
        if target.share is not None:
            rest = round(target.share * mlp.units) * mlp.cost * blocks
        total = round(rest / mlp.cost)
        most = max(most, blocks * (units * (heads.cost if heads else 0) + (mlp.units - target.multiple) * mlp.cost))
        if rest >= -0.5 * mlp.cost and total <= blocks * (mlp.units - target.multiple):
            even = _multiple(round(total / blocks), mlp.units, target.multiple)
            splits.append((abs(units - wanted), units, total, even))
    if not splits:
        raise _too_much(target, most, hint)
    _, units, total, even = min(splits)
    channels = shares(total, blocks) if exact and target.multiple == 1 else [even] * blocks
    found: list[Counts] = [{} for _ in target.parts]
    for index, count in zip(target.open, channels, strict=True):
        lost: dict[Kind, int] = {"attention": units, "mlp": count}
        found[index] = {kind: number for kind, number in lost.items() if number}
    return found


def _attention_units(target: Target, blocks: int) -> float:
    """How many attention units the target's share amounts to."""
    parts = target.parts[target.open[0]]
    heads, mlp = parts.get("attention"), parts["mlp"]
    if heads is None:
        return 0.0
    if target.share is not None:
        return target.share * target.attention * heads.units
    weighted = target.attention * heads.units * heads.cost + mlp.units * mlp.cost
    return target.parameters / blocks / weighted * target.attention * heads.units


def _multiple(count: int, units: int, multiple: int) -> int:
    kept = max(multiple, round((units - count) / multiple) * multiple)
    return max(0, units - kept) if multiple > 1 else count


def _too_much(target: Target, most: int, hint: str = "") -> CompressError:
    return CompressError(
        f"mini_llm: {target.parameters} parameters are to go, but with one head and a few channels left in each of the "
        f"{len(target.open)} blocks that may lose something, at most {most} can; lower ratio, or protect fewer blocks.{hint}"
    )


def ranked_counts(target: Target, prices: Sequence[Mapping[Kind, Sequence[float]]]) -> list[Counts]:
    """Take the cheapest unit per parameter, wherever it is, until the target is met.

    Args:
        target: what to reach.
        prices: of every block and part, what each further unit costs, in the order in which they go.

    Raises:
        CompressError: too little can go.
    """
    taken = [dict.fromkeys(parts, 0) for parts in target.parts]
    heap: list[tuple[float, int, Kind]] = []

    def offer(block: int, kind: Kind) -> None:
        part, done = target.parts[block][kind], taken[block][kind]
        step = part.step
        if done + step < part.units:
            price = sum(prices[block][kind][done : done + step]) / (step * part.cost)
            heapq.heappush(heap, (price / (target.attention if kind == "attention" else 1.0), block, kind))

    for block, parts in enumerate(target.parts):
        for kind in parts:
            if kind == "mlp" or target.attention > 0:
                offer(block, kind)
    left = target.parameters
    smallest = min(part.cost * part.step for parts in target.parts for part in parts.values())
    while left >= smallest / 2:
        if not heap:
            free = [part for parts in target.parts for part in parts.values()]
            raise _too_much(target, sum((part.units - part.step) * part.cost for part in free))
        _, block, kind = heapq.heappop(heap)
        part = target.parts[block][kind]
        if part.cost * part.step > left + smallest / 2:
            continue  # a head too many: channels fill what is left
        taken[block][kind] += part.step
        left -= part.cost * part.step
        offer(block, kind)
    return [{kind: count for kind, count in counts.items() if count} for counts in taken]


def depth_count(ratio: float, parameters: int, block: int, blocks: int) -> int:
    """How many blocks come nearest to a share of the parameters.

    Raises:
        CompressError: none would be left, or less than half a block is to go.
    """
    count = round(ratio * parameters / block)
    if not 1 <= count < blocks:
        raise CompressError(
            f"mini_llm: ratio {ratio} of {parameters} parameters is {ratio * parameters / block:.2f} blocks of {block}; "
            f"1 to {blocks - 1} blocks can go."
        )
    return count
