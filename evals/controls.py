"""Stages and controls of a checkpoint: the same recipe cut short, or with a plainer method in a pass's place.

Each is made, measured and removed again; finished units are shared, so a stage costs little more than its evaluation.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from compress.errors import CompressError
from compress.evals.evaluate import Protocol, documents_of
from compress.evals.measure import make, measure
from compress.evals.store import Key, Results, identity
from compress.manifest import read_manifest
from compress.passes import Report

Passes = list[dict[str, Any]]
CONTROLS = {"rtn": "round to nearest", "kmeans": "k-means"}


@dataclass(frozen=True)
class Variant:
    """A recipe to measure beside the checkpoint's own.

    Attributes:
        group: ``stage`` or ``control``.
        label: its name in tables.
        passes: instead of the recipe's.
    """

    group: str
    label: str
    passes: Passes


def stages(passes: Sequence[Mapping[str, Any]]) -> Iterator[Variant]:
    """Yield the recipe cut short after each of its passes but the last."""
    for count in range(1, len(passes)):
        yield Variant(
            "stage", "after " + " → ".join(step["kind"] for step in passes[:count]), [*map(dict, passes[:count])]
        )


def controls(passes: Sequence[Mapping[str, Any]], widths: Sequence[int]) -> Iterator[Variant]:
    """Yield plainer methods in a pass's place: for any-precision round-to-nearest and k-means, for an allocation uniform and random."""
    for place, step in enumerate(passes):
        before, after = [*map(dict, passes[:place])], [*map(dict, passes[place + 1 :])]
        if step["kind"] == "any_precision":
            shared = {name: step[name] for name in ("include", "ignore") if step.get(name)}
            for kind, label in CONTROLS.items():
                for bits in widths:
                    yield Variant("control", label, [*before, {"kind": kind, "bits": bits, **shared}])
        if step["kind"] == "prune" and step.get("allocation") not in (None, "uniform"):
            for allocation in ("uniform", "random"):
                yield Variant(
                    "control", f"{allocation} allocation", [*before, {**step, "allocation": allocation}, *after]
                )


def measure_variants(
    folder: Path,
    source: str,
    protocol: Protocol,
    widths: Sequence[int],
    store: Results,
    device: str = "cpu",
    report: Report | None = None,
) -> None:
    """Make every stage and control of a checkpoint, measure it on a text, keep the figures.

    Args:
        folder: the checkpoint, whose manifest names model, calibration and passes.
        source: text to measure on.
        protocol: how it is cut.
        widths: of the controls.
        store: what it has is not made again. Rows are of the kind ``variant``, under the checkpoint's own digest.
        device: to measure on.
        report: called with (what, done, total).

    Raises:
        CompressError: the folder has no manifest, or its model or calibration text is no longer there.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise CompressError(f"{folder}: has no manifest, so its stages and controls are not known.")
    recipe = manifest["recipe"]
    work = folder.with_name(folder.name + ".variants")
    found = [*stages(recipe["passes"]), *controls(recipe["passes"], widths)]
    digest, settings = documents_of(source, protocol)[1], {"protocol": asdict(protocol)}
    origin = identity(folder)
    for variant in found:
        key = Key("variant", source, origin, "", settings={**settings, "sha256": digest, "passes": variant.passes})
        if store.find(key) is not None:
            continue
        shutil.rmtree(work / "model", ignore_errors=True)
        made = make({**recipe, "passes": variant.passes}, work / "model", work / "units", report)
        figures = measure(made, source, protocol, device=device, progress=report)
        store.add(key, {}, group=variant.group, label=variant.label, widths=figures)
    shutil.rmtree(work, ignore_errors=True)
