"""Measure beyond accuracy: calibration, agreement with the dense model, robustness.

Over the scored tokens of a text:

* ``kl``: mean Kullback-Leibler divergence KL(dense || compressed) of the next-token distribution, in nats.
* ``top1_agreement``: share of tokens where both models' likeliest next token is the same.
* ``flipped``: share of tokens where one model's likeliest token is right and the other's is wrong.
* ``accuracy``: share of tokens where the likeliest token is right.
* ``ece``: expected calibration error of the likeliest token's probability (:func:`calibration_error`).
* ``increase`` (robustness): bits per byte of the text with typing errors (:func:`with_typos`), less those of the text itself.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import compress
from compress.defaults import usual_defaults
from compress.errors import CompressError
from compress.evals.evaluate import OpenText
from compress.evals.perplexity import Window, score
from compress.evals.store import dense_identity, identity
from compress.hub import model_folder
from compress.loading import load
from compress.logits import Predictions
from compress.manifest import read_manifest
from compress.models import text_config

_HELD = 1 << 28  # bytes of the dense model's logits held while all numbers of bits are compared with them


def calibration_error(confidence: Tensor, right: Tensor, bins: int = 15) -> float:
    """Return the expected calibration error (Naeini et al. 2015; Guo et al. 2017, equation 3).

    Predictions, with probabilities and whether they were right, both [N], are sorted into ``bins`` equal intervals
    (m/bins, (m+1)/bins] of confidence; the result is the mean over predictions of |share that is right - mean confidence|
    in their bin: 0 for a model that knows how sure to be.
    """
    place = (confidence.double() * bins).ceil().long().sub(1).clamp(0, bins - 1)
    gap = torch.zeros(bins, dtype=torch.float64).index_add_(0, place, right.double() - confidence.double())
    return float(gap.abs().sum() / max(1, len(confidence)))


def with_typos(text: str, rate: float = 0.05, seed: int = 0) -> str:
    """Swap two neighbouring inner letters in a share of the words of four letters or more, so that bytes stay as many."""
    generator = random.Random(seed)

    def spoil(match: re.Match[str]) -> str:
        word = match.group()
        if generator.random() >= rate:
            return word
        place = generator.randrange(1, len(word) - 2)
        return word[:place] + word[place + 1] + word[place] + word[place + 2 :]

    return re.sub(r"[A-Za-z]{4,}", spoil, text)


@dataclass
class Comparison:
    """Sum over scored tokens what tells a model from the dense one."""

    kl: float = 0.0
    loss: float = 0.0
    agreeing: int = 0
    flipped: int = 0
    confidence: list[Tensor] = field(default_factory=list)
    right: list[Tensor] = field(default_factory=list)

    def add(self, dense: Tensor, other: Tensor, target: Tensor) -> None:
        """Add tokens to the sums: log-probabilities of both models, [T, vocabulary], and the next tokens, [T]."""
        likeliest, choice = dense.argmax(-1), other.argmax(-1)
        self.kl += float((dense.exp() * (dense - other)).sum(dtype=torch.float64))
        self.loss -= float(other.gather(-1, target[:, None]).sum(dtype=torch.float64))
        self.agreeing += int((likeliest == choice).sum())
        self.flipped += int(((likeliest == target) != (choice == target)).sum())
        self.confidence.append(other.max(-1).values.exp().cpu())
        self.right.append((choice == target).cpu())

    def add_window(self, dense: Predictions, other: Predictions, window: Window) -> None:
        """Add the scored tokens of a window, of which both models have made their :func:`predictions`."""
        target = torch.tensor(window.tokens[-window.scored :])
        for part in dense.parts():
            logs = [one.logits(part)[0].log_softmax(-1) for one in (dense, other)]
            self.add(logs[0], logs[1], target[part].to(logs[0].device))

    def metrics(self) -> dict[str, float]:
        """Return the means over all tokens."""
        confidence, right = torch.cat(self.confidence), torch.cat(self.right)
        tokens = len(right)
        return {
            "kl": self.kl / tokens,
            "top1_agreement": self.agreeing / tokens,
            "flipped": self.flipped / tokens,
            "accuracy": float(right.double().mean()),
            "ece": calibration_error(confidence, right),
            "tokens": tokens,
        }


def dense_model_of(folder: str, reference: str | None = None) -> str:
    """Return the dense model of a checkpoint: ``reference`` if it is given, or the recipe's."""
    if reference is not None:
        return str(model_folder(reference))
    manifest = read_manifest(Path(folder))
    if manifest is None:
        raise CompressError(f"{folder}: has no manifest that names its dense model; give --reference.")
    recipe = manifest["recipe"]
    revision = {"revision": recipe["revision"]} if recipe.get("revision") else {}
    try:
        found = str(model_folder(recipe["model"], **revision))
    except CompressError as error:
        raise CompressError(f"the dense model of {folder} is not there ({error}) Give --reference.") from error
    if identity(found) != dense_identity(manifest):
        raise CompressError(f"{found}: is not the model that {folder} was made from; give --reference.")
    return found


@usual_defaults()
@torch.no_grad()
def evaluate_agreement(work: OpenText, reference: str | None = None) -> dict[str, dict[str, float]]:
    """Compare a model at all its numbers of bits with the dense model, token by token; that is loaded once.

    Args:
        work: checkpoint and text.
        reference: dense model; the recipe's if None.

    Returns:
        ``{bits: {"kl", "top1_agreement", "flipped", "accuracy", "ece", "tokens"}}``, and the dense model as ``"dense"``.

    Raises:
        CompressError: no dense model, or nothing to score.
    """
    original = dense_model_of(work.folder, reference)
    origin = identity(original)
    key = work.key("agreement", work.source, {**work.settings, "dense": origin})
    keys = {label: replace(key, width=label) for label in work.all_bits}
    keys["dense"] = replace(key, width="dense", model=origin)
    sums = {label: Comparison() for label, key in keys.items() if work.store.find(key) is None}
    if sums:
        dense = load(original, dtype=getattr(torch, work.dtype), device_map=str(work.model.device))
        windows, watch = work.protocol.cut(work.documents, work.tokenizer).windows, work.watch("agreement")
        longest = max(window.scored for window in windows)
        step = max(1, _HELD // (4 * longest * int(text_config(dense.config).vocab_size)))
        for start in range(0, len(windows), step):
            chunk = windows[start : start + step]
            expected = [predictions(dense, window) for window in chunk]
            for label, comparison in sums.items():
                if label != "dense":
                    compress.set_bits(work.model, work.all_bits[label])
                for window, truth in zip(chunk, expected, strict=True):
                    got = truth if label == "dense" else predictions(work.model, window)
                    comparison.add_window(truth, got, window)
            if watch is not None:
                watch(start + len(chunk), len(windows))
        for label, comparison in sums.items():
            work.store.add(keys[label], comparison.metrics())
    rows = {label: work.store.find(key) for label, key in keys.items()}
    return {label: row["metrics"] for label, row in rows.items() if row is not None}


def predictions(model: PreTrainedModel, window: Window) -> Predictions:
    """Return what a model predicts for the scored tokens of a window."""
    last = len(window.tokens) - 1
    return Predictions(model, torch.tensor([window.tokens], device=model.device), range(last - window.scored, last))


def evaluate_robustness(work: OpenText, rate: float = 0.05) -> dict[str, dict[str, float]]:
    """Measure what typing errors in a text cost, at every number of bits.

    Args:
        work: checkpoint, or a dense model, and text.
        rate: share of words with an error, :func:`with_typos`.

    Returns:
        ``{bits: {"bits_per_byte", "bits_per_byte_typos", "increase"}}``.
    """
    before = work.evaluate()["bits"]
    spoilt = work.protocol.cut([with_typos(document, rate) for document in work.documents], work.tokenizer)

    def measure(label: str) -> dict[str, Any]:
        clean = before[label]["bits_per_byte"]
        after = score(work.model, spoilt, progress=work.watch(f"with typos, {label}")).bits_per_byte
        return {"metrics": {"bits_per_byte": clean, "bits_per_byte_typos": after, "increase": after - clean}}

    rows = work.measure(work.key("robustness", work.source, {**work.settings, "rate": rate}), measure)
    return {label: row["metrics"] for label, row in rows.items()}
