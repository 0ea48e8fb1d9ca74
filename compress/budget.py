"""Choose bits for every matrix: the least measured error that fits a number of bytes."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from compress.errors import CompressError
from compress.manifest import noted, read_manifest
from compress.quant.records import PackedShape, bits_range, model_bytes, packed_bytes
from compress.structure import Architecture, block_of, block_prefix

_STEPS = 20_000  # the budget is counted in this many parts, each matrix's bytes rounded up
_TOGETHER, _WORTH = 4, 0.45
"""Up to how many bits one number for all is taken rather than a mix chosen by weighted errors, unless its error is less than this share
of that number's: of different matrices they compare badly, measured (:mod:`compress.divergence`, by which the default chooses)."""
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

Option = tuple[int, float]
"""Bytes and error of one choice."""


def parse_bytes(text: str | int) -> int:
    """Read ``"2GB"``, ``"500 MiB"`` or a plain number as bytes, and refuse anything else."""
    found = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*([KMG]?I?B)?", str(text).strip().upper())
    if not found:
        raise CompressError(f"memory {text!r}: give bytes, or a number and a unit, for example 2GB or 500MiB.")
    return int(float(found[1]) * _UNITS[found[2] or "B"])


def choose_bits(options: Sequence[Mapping[int, Option]], budget: int) -> list[int]:
    """Pick bits for every group so that the summed error is least and the bytes do not exceed the budget.

    Multiple-choice knapsack by dynamic programming over the budget in 20,000 parts: exact but for the rounding of each
    group's bytes up to a part, and never worse than the same bits for all. ``options`` has, per group, bits -> (bytes,
    error); a budget below the smallest choices is refused.
    """
    smallest = [min(size for size, _ in group.values()) for group in options]
    room = budget - sum(smallest)  # only what goes beyond the smallest choices has to be counted
    if room < 0:
        raise CompressError(f"packed matrices take at least {sum(smallest) / 1e6:.2f} MB, above {budget / 1e6:.2f} MB.")
    part = max(1.0, room / _STEPS)
    parts = int(room / part)
    costs = [
        {bits: math.ceil((size - least) / part) for bits, (size, _) in group.items()}
        for group, least in zip(options, smallest, strict=True)
    ]
    best = np.zeros(parts + 1)
    taken: list[np.ndarray] = []
    for group, cost in zip(options, costs, strict=True):
        all_bits = sorted(group, key=lambda bits: (group[bits][0], bits))
        totals = np.full((len(all_bits), parts + 1), np.inf)
        for row, bits in enumerate(all_bits):
            if cost[bits] <= parts:
                totals[row, cost[bits] :] = best[: parts + 1 - cost[bits]] + group[bits][1]
        rows = totals.argmin(0)
        best = totals[rows, np.arange(parts + 1)]
        taken.append(np.array(all_bits)[rows])
    chosen, left = [], parts
    for cost, picks in zip(reversed(costs), reversed(taken), strict=True):
        chosen.append(int(picks[left]))
        left -= cost[chosen[-1]]

    def total(picks: Sequence[int], which: int) -> float:
        return sum(group[bits][which] for group, bits in zip(options, picks, strict=True))

    uniform = [[bits] * len(options) for bits in set.intersection(*map(set, options))]
    fitting = [picks for picks in uniform if total(picks, 0) <= budget]
    return min([chosen[::-1], *fitting], key=lambda picks: total(picks, 1))


def _measured_errors(
    folder: Path, manifest: Mapping[str, Any], names: Sequence[str]
) -> tuple[bool, dict[str, dict[int, float]]]:
    """Read what each matrix loses, by bits, from the manifest, and refuse one that lacks a matrix; whether all are divergences, first."""
    found = dict(noted(manifest, "errors"))
    if missing := [name for name in names if name not in found]:
        raise CompressError(
            f"{folder}: compression.json has no measured errors of {missing[0]}, by which bits are chosen; "
            "give a whole number of bits, or patterns."
        )
    told = all("divergence" in error for name in names for error in found[name].values())
    kind = "divergence" if told else "weighted"
    return told, {name: {int(bits): error[kind] for bits, error in found[name].items()} for name in names}


def groups(names: Sequence[str], structure: Architecture) -> list[list[str]]:
    """Group the matrices that must have the same bits: those that servers fuse, and every other by itself."""
    first = {member: fused[0] for fused in structure.fused for member in fused}
    found: dict[str, list[str]] = {}
    for name in names:
        place = block_of(name, structure)
        prefix = "" if place is None else f"{block_prefix(structure, place)}."
        inner = name.removeprefix(prefix)
        found.setdefault(prefix + first.get(inner, inner), []).append(name)
    return list(found.values())


def bits_for_budget(
    folder: Path,
    shapes: Mapping[str, PackedShape],
    structure: Architecture,
    bits: float | None,
    memory: str | int | None,
) -> dict[str, int]:
    """Choose bits for every packed matrix with the least summed error; matrices that servers fuse get the same.

    Where divergences were not measured and a mix is not much better than 4 bits for all, or fewer, with the embedding at its own, it is that.
    A mean of ``bits`` allows as many bytes to read as lie between those of the two whole numbers around it; ``memory`` is
    the bytes for all tensors once loaded, as :func:`parse_bytes` reads them.
    """
    manifest = read_manifest(folder) or {}
    told, errors = _measured_errors(folder, manifest, list(shapes))
    stored = bits_range(shapes.values())
    low, high = stored[0], stored[-1]

    held = {name: shape if memory is None else shape.dense for name, shape in shapes.items()}

    def size(names: Sequence[str], bits: int) -> int:
        return sum(packed_bytes(held[name], bits) for name in names)

    everything = list(shapes)
    if memory is not None:
        others = int(manifest["sizes"]["tensors_at_bits"][str(low)]) - model_bytes(shapes.values(), low)
        budget, least = parse_bytes(memory) - others, sum(packed_bytes(s, s.seed_bits) for s in held.values())
        if budget < least:
            raise CompressError(
                f"memory {memory}: this model's tensors take {(others + least) / 1e6:.2f} MB at their "
                f"smallest, {low} bits; {others / 1e6:.2f} MB of that is not quantised."
            )
    else:
        assert bits is not None
        if not low <= bits <= high:
            raise CompressError(f"{bits:g} bits are not available; this model can be read at {low} to {high} bits.")
        below, above = (model_bytes(held.values(), whole) for whole in (math.floor(bits), math.ceil(bits)))
        budget = round(below + (bits - math.floor(bits)) * (above - below))
    together = groups(everything, structure)
    options: list[dict[int, Option]] = []
    for names in together:
        common = set.intersection(*(set(shapes[name].all_bits) for name in names))
        if not common:
            raise CompressError(f"{names[0]} and {names[-1]} are served as one matrix, but have no bits in common.")
        options.append({bits: (size(names, bits), sum(errors[name][bits] for name in names)) for bits in common})
    picks = zip(together, choose_bits(options, budget), strict=True)
    chosen = {name: bits for names, bits in picks for name in names}

    def error(bits: Mapping[str, int]) -> float:
        return sum(errors[name][b] for name, b in bits.items())

    same = ({name: shape.at(whole) for name, shape in shapes.items()} for whole in stored if whole <= _TOGETHER)
    fitting = [bits for bits in same if sum(size([name], b) for name, b in bits.items()) <= budget]
    simplest = min(fitting, key=error, default=None)
    return chosen if simplest is None or error(chosen) < (1 if told else _WORTH) * error(simplest) else simplest


def as_number(bits: Any) -> float | None:
    """Return the mean that is given as a float or as text; None for bits given in another way."""
    if not isinstance(bits, float | str):
        return None
    try:
        return float(bits)
    except ValueError:
        raise CompressError(f"bits {bits!r}: give a number, a mean such as 3.5, or patterns.") from None
