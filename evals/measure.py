"""Run a recipe and measure what it makes: for grids, for controls and for the demo."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import compress
from compress.evals.evaluate import Protocol, evaluate_text
from compress.hub import model_folder
from compress.inspect import inspect
from compress.passes import Progress

Figures = dict[str, dict[str, Any]]  # number of bits, or ``dense`` -> metrics


def make(recipe: Mapping[str, Any], folder: Path, work: Path, progress: Progress | None = None) -> Path:
    """Run a recipe unless its checkpoint is there, and return that; of a recipe without passes the dense model's folder."""
    if not recipe["passes"]:
        return model_folder(recipe["model"])
    if not (folder / "config.json").exists():
        compress.run(recipe, folder, workspace=work, progress=progress)
    return folder


def measure(
    folder: Path,
    text: str,
    protocol: Protocol | None = None,
    bits: Sequence[int] | None = None,
    prompt: bool = False,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Figures:
    """Measure a model as :func:`compress.evals.evaluate.evaluate_text` does, with ``disk_bytes``, what loading at those bits reads."""
    found = evaluate_text(str(folder), text, bits, protocol, device=device, progress=progress, prompt=prompt)["bits"]
    looked = inspect(folder)
    sizes = looked["bytes_at_bits"] or {"dense": looked["bytes"]}
    return {name: {**metrics, "disk_bytes": sizes[name]} for name, metrics in found.items()}
