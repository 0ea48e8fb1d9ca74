"""Run a recipe and measure what it makes: for grids, for controls and for the demo."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import compress
from compress.calibration import draw_samples
from compress.evals.evaluate import Protocol, evaluate_text
from compress.evals.perplexity import Text, Window, score
from compress.inspect import inspect, sparsity
from compress.loading import load_tokenizer, read_config
from compress.manifest import read_manifest
from compress.passes import Report
from compress.settings import Calibration
from compress.source import model_folder
from compress.weights import Checkpoint

Figures = dict[str, dict[str, Any]]
"""Number of bits, or ``dense`` -> metrics."""


def make(recipe: Mapping[str, Any], folder: Path, work: Path, progress: Report | None = None) -> Path:
    """Run a recipe unless its checkpoint is there.

    Args:
        recipe: whole, as plain data; one without passes stands for the dense model.
        folder: to write.
        work: workspace, shared with other recipes.
        progress: called with (what, done, total).

    Returns:
        The checkpoint, or the dense model's folder.
    """
    if not recipe["passes"]:
        return model_folder(recipe["model"])
    if not (folder / "config.json").exists():
        compress.run(recipe, folder, workspace=work, report=progress)
    return folder


def measure(
    folder: Path,
    text: str,
    protocol: Protocol | None = None,
    bits: Sequence[int] | None = None,
    prompt: bool = False,
    device: str = "cpu",
    progress: Report | None = None,
) -> Figures:
    """Measure a checkpoint, or a dense model, on a text.

    Returns:
        Of each number of bits the metrics of :func:`compress.evals.evaluate.evaluate_text`, whose arguments these are, and
        ``disk_bytes`` of the tensors that loading at those bits reads.
    """
    found = evaluate_text(str(folder), text, bits, protocol, device=device, report=progress, prompt=prompt)["bits"]
    looked = inspect(folder)
    sizes = looked["bytes_at_bits"] or {"dense": looked["bytes"]}
    return {name: {**metrics, "disk_bytes": sizes[name]} for name, metrics in found.items()}


def facts_of(folder: Path) -> dict[str, float]:
    """Return what the files of a checkpoint tell beside its losses.

    Returns:
        ``parameters`` where nothing is packed; where weights are pruned their share ``sparsity``, and ``nor_spread``, the
        standard deviation of the blocks' non-outlier ratios.
    """
    looked, found = inspect(folder), dict[str, float]()
    if not looked["modules"]:
        found["parameters"] = sum(torch.Size(item.shape).numel() for item in Checkpoint(folder).info().values())
    if looked["pruned"]:
        found["sparsity"] = sparsity(folder)["sparsity"]
    passes = (read_manifest(folder) or {}).get("passes", [])
    ratios = [unit["nor"]["after"] for step in passes for unit in step["units"].values() if unit.get("nor")]
    return {**found, "nor_spread": statistics.pstdev(ratios)} if ratios else found


def held_out_loss(folder: Path, calibration: Calibration, count: int) -> float:
    """Measure a checkpoint on text that no pass has seen and that is not the text to measure on.

    Args:
        folder: the checkpoint.
        calibration: of its recipe.
        count: further samples to draw from the same source.

    Returns:
        Loss in nats per token on those samples, of a packed model at the most bits it has; where the last pass has trained, on what it held back of its own text, summed
        over the numbers of bits it trained at.
    """
    passes = (read_manifest(folder) or {}).get("passes") or [{"units": {}}]
    best = [unit.get("best", {}).get("held_out", {}) for unit in passes[-1]["units"].values()]
    if losses := [loss for held_out in best for loss in held_out.values()]:
        return float(sum(losses))
    tokenizer = load_tokenizer(folder)
    length = getattr(read_config(folder), "max_position_embeddings", None)
    more = calibration.model_copy(update={"samples": calibration.samples + count})
    seen = {tuple(sample.tolist()) for sample in draw_samples(calibration, tokenizer, length).tokens}
    drawn = [sample.tolist() for sample in draw_samples(more, tokenizer, length).tokens]
    fresh = [tokens for tokens in drawn if tuple(tokens) not in seen][:count]
    model = compress.load(folder, dtype=torch.float32)
    return score(model, Text([Window(tokens, len(tokens) - 1) for tokens in fresh], 1)).loss
