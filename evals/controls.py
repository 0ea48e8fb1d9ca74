"""Measure stages and controls of a checkpoint: its recipe cut short, or with a plainer method in a pass's place."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from compress.errors import CompressError
from compress.evals.evaluate import Protocol, documents_of
from compress.evals.measure import make, measure
from compress.evals.store import Key, Results, identity
from compress.manifest import read_manifest
from compress.passes import Progress

Passes = list[dict[str, Any]]
CONTROLS = {"rtn": "round to nearest", "kmeans": "k-means"}


class Variant(NamedTuple):
    """Hold a recipe to measure beside the checkpoint's own."""

    group: str  # stage or control
    label: str  # in tables
    passes: Passes  # instead of the recipe's


def stages(passes: Sequence[Mapping[str, Any]]) -> Iterator[Variant]:
    """Yield the recipe cut short after each of its passes but the last."""
    for count in range(1, len(passes)):
        label = "after " + " → ".join(step["kind"] for step in passes[:count])
        yield Variant("stage", label, [*map(dict, passes[:count])])


def controls(passes: Sequence[Mapping[str, Any]], all_bits: Sequence[int]) -> Iterator[Variant]:
    """Yield plainer methods in a pass's place: for any-precision round-to-nearest and k-means, for an allocation uniform and random."""
    for place, step in enumerate(passes):
        before, after = [*map(dict, passes[:place])], [*map(dict, passes[place + 1 :])]
        if step["kind"] == "any_precision":
            shared = {name: step[name] for name in ("include", "ignore") if step.get(name)}
            for kind, label in CONTROLS.items():
                for bits in all_bits:
                    yield Variant("control", label, [*before, {"kind": kind, "bits": bits, **shared}])
        if step["kind"] == "prune" and step.get("allocation") not in (None, "uniform"):
            for allocation in ("uniform", "random"):
                changed = [*before, {**step, "allocation": allocation}, *after]
                yield Variant("control", f"{allocation} allocation", changed)


def measure_variants(
    folder: Path,
    source: str,
    protocol: Protocol,
    all_bits: Sequence[int],
    store: Results,
    device: str = "cpu",
    progress: Progress | None = None,
) -> None:
    """Make, measure on a text and remove every stage and control of a checkpoint that the store does not have; units are shared."""
    manifest = read_manifest(folder)
    if manifest is None:
        raise CompressError(f"{folder}: has no manifest, so its stages and controls are not known.")
    recipe, origin = manifest["recipe"], identity(folder)
    work = folder.with_name(folder.name + ".variants")
    settings = {"protocol": asdict(protocol), "sha256": documents_of(source, protocol)[1]}
    for group, label, passes in [*stages(recipe["passes"]), *controls(recipe["passes"], all_bits)]:
        key = Key("variant", source, origin, "", settings={**settings, "passes": passes})
        if store.find(key) is None:
            shutil.rmtree(work / "model", ignore_errors=True)
            made = make({**recipe, "passes": passes}, work / "model", work / "units", progress)
            figures = measure(made, source, protocol, device=device, progress=progress)
            store.add(key, {}, group=group, label=label, widths=figures)
    shutil.rmtree(work, ignore_errors=True)
