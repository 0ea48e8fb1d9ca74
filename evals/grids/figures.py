"""Find what a grid tells of a checkpoint beside its losses, and choose by text that is not the one to measure on."""

from __future__ import annotations

import statistics
from pathlib import Path

import torch

import compress
from compress.calibration import draw_samples
from compress.evals.perplexity import Text, Window, score
from compress.inspect import inspect, sparsity
from compress.loading import load_tokenizer, read_config
from compress.manifest import read_manifest
from compress.settings import Calibration
from compress.weights import Checkpoint


def facts_of(folder: Path) -> dict[str, float]:
    """Return ``parameters`` of dense models; of pruned ones ``sparsity`` and the non-outlier ratios' deviation ``nor_spread``."""
    looked, found = inspect(folder), dict[str, float]()
    if not looked["modules"]:
        found["parameters"] = sum(torch.Size(item.shape).numel() for item in Checkpoint(folder).info().values())
    if looked["pruned"]:
        found["sparsity"] = sparsity(folder)["sparsity"]
    passes = (read_manifest(folder) or {}).get("passes", [])
    ratios = [unit["nor"]["after"] for step in passes for unit in step["units"].values() if unit.get("nor")]
    return {**found, "nor_spread": statistics.pstdev(ratios)} if ratios else found


def held_out_loss(folder: Path, calibration: Calibration, count: int) -> float:
    """Return the loss of a checkpoint in nats per token on text that no pass has seen and that is not the text to measure on.

    That text is ``count`` further samples from where ``calibration`` drew the recipe's; a packed model has the most bits it
    can have. Where the last pass has trained, it is what training held back, summed over the numbers of bits it trained at.
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
