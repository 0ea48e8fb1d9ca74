"""A width for every matrix: the least measured error that fits a number of bytes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from compress.errors import CompressError
from compress.quant.format import PackedShape, bits_range, packed_bytes
from compress.structure import Architecture
from compress.weights import read_manifest

_STEPS = 20_000  # the budget is counted in this many parts, each matrix's bytes rounded up
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

Option = tuple[int, float]
"""Bytes and error of one choice."""


def parse_bytes(text: str | int) -> int:
    """``"2GB"``, ``"500 MiB"`` or a plain number of bytes.

    Raises:
        CompressError: it is none of these.
    """
    found = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*([KMG]?I?B)?", str(text).strip().upper())
    if not found:
        raise CompressError(f"memory {text!r}: give bytes, or a number and a unit, for example 2GB or 500MiB.")
    return int(float(found[1]) * _UNITS[found[2] or "B"])


def choose(options: Sequence[Mapping[int, Option]], budget: int) -> list[int]:
    """Pick one width per group so that the summed error is least and the bytes do not exceed the budget.

    Multiple-choice knapsack by dynamic programming over the budget in 20,000 parts: exact but for the rounding of each
    group's bytes up to a part, and never worse than one width for all.

    Args:
        options: per group, width -> (bytes, error).
        budget: bytes for all groups together.

    Raises:
        CompressError: not even the smallest choices fit.
    """
    least = sum(min(size for size, _ in group.values()) for group in options)
    if least > budget:
        raise CompressError(
            f"the packed matrices take {least / 1e6:.2f} MB at their smallest, above {budget / 1e6:.2f} MB."
        )
    room = budget - least  # only what goes beyond the smallest choices has to be counted
    part = max(1.0, room / _STEPS)
    parts = int(room / part)
    best = np.zeros(parts + 1)
    taken: list[np.ndarray] = []
    for group in options:
        smallest = min(size for size, _ in group.values())
        widths = sorted(group, key=lambda bits: (group[bits][0], bits))
        totals = np.full((len(widths), parts + 1), np.inf)
        for row, bits in enumerate(widths):
            size, error = group[bits]
            cost = math.ceil((size - smallest) / part)
            if cost <= parts:
                totals[row, cost:] = best[: parts + 1 - cost] + error
        rows = totals.argmin(0)
        best = totals[rows, np.arange(parts + 1)]
        taken.append(np.array(widths)[rows])
    chosen, left = [], parts
    for group, picks in zip(reversed(options), reversed(taken), strict=True):
        bits = int(picks[left])
        smallest = min(size for size, _ in group.values())
        left -= math.ceil((group[bits][0] - smallest) / part)
        chosen.append(bits)
    uniform = [[bits] * len(options) for bits in set.intersection(*map(set, options))]
    fitting = [picks for picks in uniform if _total(options, picks, 0) <= budget]
    return min([chosen[::-1], *fitting], key=lambda picks: _total(options, picks, 1))


def _total(options: Sequence[Mapping[int, Option]], picks: Sequence[int], which: int) -> float:
    return sum(group[bits][which] for group, bits in zip(options, picks, strict=True))


def measured_errors(folder: Path, manifest: Mapping[str, Any], names: Sequence[str]) -> dict[str, dict[int, float]]:
    """Matrix -> width -> weighted error, from the manifest.

    Raises:
        CompressError: there is no manifest, or it has no errors of a matrix.
    """
    found: dict[str, dict[int, float]] = {}
    for step in manifest.get("passes", []):
        for unit in step["units"].values():
            for name, errors in unit.get("errors", {}).items():
                found[name] = {int(bits): float(error["weighted"]) for bits, error in errors.items()}
    for name in names:
        if name not in found:
            raise CompressError(
                f"{folder}: compression.json has no measured errors of {name}, by which widths are chosen; "
                "give a whole width, or patterns."
            )
    return found


def groups(names: Sequence[str], structure: Architecture) -> list[list[str]]:
    """Matrices that must share a width: those that servers fuse, and every other by itself."""
    found: dict[str, list[str]] = {}
    for name in names:
        key = name
        for fused in structure.fused:
            for member in fused:
                if name.startswith(structure.blocks + ".") and name.endswith("." + member):
                    key = name.removesuffix(member) + fused[0]
        found.setdefault(key, []).append(name)
    return list(found.values())


def widths_for_budget(
    folder: Path,
    shapes: Mapping[str, PackedShape],
    structure: Architecture,
    bits: float | None,
    memory: str | int | None,
) -> dict[str, int]:
    """A width per packed matrix with the least summed error, matrices that servers fuse sharing one.

    Args:
        folder: where the checkpoint's manifest is.
        shapes: of the packed matrices, as stored.
        structure: says which are fused.
        bits: a mean width: as many bytes to read as lie between those of the two whole widths around it.
        memory: bytes for all tensors once loaded, as :func:`parse_bytes` reads them.

    Raises:
        CompressError: no measured errors, a mean width outside those stored, or memory too small for any width.
    """
    manifest = read_manifest(folder) or {}
    errors = measured_errors(folder, manifest, list(shapes))
    stored = bits_range(shapes.values())
    low, high = stored[0], stored[-1]

    def size(names: Sequence[str], width: int) -> int:
        held = [shapes[name] if memory is None else shapes[name].dense for name in names]
        return sum(packed_bytes(shape, min(max(width, shape.seed_bits), shape.parent_bits)) for shape in held)

    everything = list(shapes)
    if memory is not None:
        read = sum(packed_bytes(shape, low) for shape in shapes.values())
        others = int(manifest["sizes"]["tensors_at_bits"][str(low)]) - read
        budget = parse_bytes(memory) - others
        if budget < size(everything, low):
            raise CompressError(
                f"memory {memory}: this model's tensors take {(others + size(everything, low)) / 1e6:.2f} MB at their "
                f"smallest, {low} bits; {others / 1e6:.2f} MB of that is not quantised."
            )
    else:
        assert bits is not None
        if not low <= bits <= high:
            raise CompressError(f"width {bits:g} is not available; this model can be read at {low} to {high} bits.")
        below, above = size(everything, math.floor(bits)), size(everything, math.ceil(bits))
        budget = round(below + (bits - math.floor(bits)) * (above - below))
    together = groups(everything, structure)
    options: list[dict[int, Option]] = []
    for names in together:
        widths = set.intersection(*(set(shapes[name].widths) for name in names))
        if not widths:
            raise CompressError(f"{names[0]} and {names[-1]} are served as one matrix, but have no width in common.")
        options.append({width: (size(names, width), sum(errors[n][width] for n in names)) for width in widths})
    return {name: width for names, width in zip(together, choose(options, budget), strict=True) for name in names}


def as_number(bits: Any) -> float | None:
    """A mean width given as a float, or as text with a point; None for anything else."""
    if isinstance(bits, float):
        return bits
    if isinstance(bits, str):
        try:
            return float(bits)
        except ValueError:
            raise CompressError(f"bits {bits!r}: give a width, a mean width such as 3.5, or patterns.") from None
    return None
