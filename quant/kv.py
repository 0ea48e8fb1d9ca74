"""Choose how many bits each layer's keys and values get in the cache, by what they cost on calibration text."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from compress.distillation import apart
from compress.errors import CompressError
from compress.kv import KVCache
from compress.kv_serving import losses_by_blocks, score_by_blocks
from compress.kv_settings import WHOLE, KVSettings
from compress.logits import losses_of
from compress.passes import Context, Needs, Pass, Progress, Whole
from compress.quant.records import PackedShape
from compress.quant.settings import KVCalibrateConfig
from compress.ranks import Ranks
from compress.workspace import Record, write_atomic

_BLOCK = 32
_TOGETHER = 8  # samples
_CACHES = 256 << 20  # bytes
_LISTED = 64  # likeliest tokens of every prediction
Cost = tuple[float, float]
"""Loss and divergence, in nats per token."""


def choose(costs: Sequence[Mapping[int, float]], total: int) -> list[int]:
    """Return a number of bits for each layer: the summed cost is least among those whose sum is at most ``total``.

    ``costs`` has, for every layer, number of bits -> cost. Exact, by dynamic programming over the sum; of equal costs, fewer bits.
    """
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
    for layer in costs:
        found: dict[int, tuple[float, list[int]]] = {}
        for spent, (cost, chosen) in best.items():
            for bits, more in sorted(layer.items()):
                if spent + bits <= total and (spent + bits not in found or cost + more < found[spent + bits][0]):
                    found[spent + bits] = cost + more, [*chosen, bits]
        best = found
    return min(sorted(best.items()), key=lambda item: item[1][0])[1][1]


class KVCalibrate(Pass[KVCalibrateConfig]):
    """Leaves a recommendation in the manifest, with what it and as many bits for every layer cost."""

    Config = KVCalibrateConfig

    def needs(self) -> Needs:
        """Ask for the whole model as it will be used, and text."""
        return Needs(whole_model=True, divides=True, sidecar=True, text=self.config.text)

    def check(self, context: Context) -> None:
        """Refuse groups that do not fit the model, and one that keeps no keys and values."""
        KVCache(config=context.config, **self._settings().options())

    def model_units(self, packed: Mapping[str, PackedShape]) -> list[str]:
        """Name the only unit."""
        return ["kv"]

    @torch.no_grad()
    def run_model(
        self, unit: str, whole: Whole, context: Context, progress: Progress
    ) -> tuple[dict[str, Tensor], Record]:
        """Measure each layer at each number of bits, then the choice, and the control: as many bits for all.

        Figures are in nats per token. ``alone`` is how far the predictions with one packed layer are from those with a whole
        cache, number of bits -> divergence, layer after layer.
        """
        samples = [tokens for tokens in whole.samples if len(tokens) > self.config.residual + _BLOCK]
        if not samples:
            raise CompressError(
                f"kv_calibrate: no sample has more tokens than stay whole ({self.config.residual}); give a longer length, or lower residual."
            )
        kept, few = _Kept(whole.scratch, context.ranks), samples[: self.config.layer_samples]
        plain = self._cache(whole, WHOLE)
        layers, count = list(plain.packed_layers), len(plain.layers)
        choices = sorted(set(self.config.choices))
        total, done = len(layers) * len(choices) + 3, 0

        def cost(beside: _Beside, bits: Any) -> Cost:
            nonlocal done
            progress("divergences with a packed cache", done, total)
            done += 1
            return kept.get(f"{len(beside.samples)} samples, {bits}", lambda: beside.measure(bits))

        beside = _Beside(partial(self._cache, whole), whole.model, few, self.config.residual, context.ranks)
        alone = [
            {bits: cost(beside, [bits if place == layer else WHOLE for place in range(count)])[1] for bits in choices}
            for layer in layers
        ]
        chosen = choose(alone, int(self.config.bits * len(layers)))
        by_layer = dict(zip(layers, chosen, strict=True))
        recommended: list[int] = [by_layer.get(place, WHOLE) for place in range(count)]
        uniform = max(bits for bits in choices if bits <= self.config.bits)
        if len(few) < len(samples):
            beside = _Beside(partial(self._cache, whole), whole.model, samples, self.config.residual, context.ranks)
        found = {"whole": cost(beside, WHOLE), "chosen": cost(beside, recommended), "uniform": cost(beside, uniform)}
        better = found["chosen"][1] <= found["uniform"][1] or sum(chosen) < uniform * len(layers)
        kv = {"bits": recommended if better else uniform, "group": self.config.group, "residual": self.config.residual}
        return {}, {
            "kv": kv,
            "losses": {name: loss for name, (loss, _) in found.items()},
            "divergences": {name: divergence for name, (_, divergence) in found.items()},
            "chosen": recommended,
            "uniform": uniform,
            "alone": [{str(bits): cost for bits, cost in layer.items()} for layer in alone],
        }

    def _cache(self, whole: Whole, bits: Any) -> KVCache:
        return KVCache(bits, config=whole.model.config, **self._settings().options())

    def _settings(self) -> KVSettings:
        return KVSettings(self.config.group, self.config.residual)


class _Beside:
    """Compare what a model says with a packed cache with what it says with a whole one, behind the tokens that stay whole.

    Each process reads its share of the samples, several at once: packed weights are decoded once for all of them.
    """

    def __init__(
        self,
        cache: Callable[[Any], KVCache],
        model: PreTrainedModel,
        samples: Sequence[Tensor],
        residual: int,
        ranks: Ranks,
    ) -> None:
        self.samples, self.ranks, self._cache, self._model = samples, ranks, cache, model
        ordered = sorted(samples, key=len)
        together = self._together(ordered[-1])
        batches = [ordered[first : first + together] for first in range(0, len(ordered), together)]
        self._count, self._own = len(batches), dict[int, tuple[Tensor, Tensor, Tensor]]()
        for number in range(ranks.rank, len(batches), ranks.size):
            batch = batches[number]
            ids = pad_sequence(batch, batch_first=True).to(model.device)  # what pads comes last: none sees it
            ends = torch.tensor([len(tokens) - 1 for tokens in batch])[:, None]
            position = torch.arange(ids.shape[1] - 1)
            said = self._read(ids, WHOLE, _listed)
            self._own[number] = ids, said, (position >= residual) & (position < ends)

    def measure(self, bits: Any) -> Cost:
        """Return the mean loss, and the mean divergence from what the whole cache makes the model say."""
        own = {}
        for number, (ids, said, scored) in self._own.items():

            def score(logits: Tensor, part: slice, ids: Tensor = ids, said: Tensor = said) -> Tensor:
                logs, listed = said[:, part].unbind(-1)
                return torch.stack([losses_of(logits, ids[:, 1:][:, part]), apart(logits, logs, listed)], -1)

            found = self._read(ids, bits, score)[scored.to(ids.device)].double()
            own[str(number)] = [*found.sum(0).tolist(), len(found)]
        all_own = self.ranks.noted(own)
        loss, divergence, count = map(sum, zip(*(all_own[str(number)] for number in range(self._count)), strict=True))
        return loss / count, divergence / count

    def _read(self, ids: Tensor, bits: Any, score: Callable[[Tensor, slice], Tensor]) -> Tensor:
        return score_by_blocks(self._model, ids, self._cache(bits), _BLOCK, score)

    def _together(self, sample: Tensor) -> int:
        """Return how many samples are read at once: their caches take memory."""
        cache = self._cache(WHOLE)
        losses_by_blocks(self._model, sample[None].to(self._model.device), cache, _BLOCK)
        return max(1, min(_TOGETHER, _CACHES // max(1, cache.resident_bytes())))


def _listed(logits: Tensor, _: slice) -> Tensor:
    """Return the likeliest tokens and how likely they are, float32 [..., count, 2]; numbers of tokens are exact."""
    found = logits.log_softmax(-1).topk(min(_LISTED, logits.shape[-1]))
    return torch.stack([found.values, found.indices.float()], -1)


class _Kept:
    """Keep costs in a file, so that a run which was interrupted measures none of them again."""

    def __init__(self, folder: Path, ranks: Ranks) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path, self._ranks, self._known = folder / "costs.json", ranks, dict[str, Cost]()
        with suppress(OSError, ValueError):  # none, or damaged
            self._known |= json.loads(self._path.read_text())
        ranks.wait()  # all have read before one writes

    def get(self, name: str, measure: Callable[[], Cost]) -> Cost:
        """Return a cost, measured where it is not known yet."""
        if name not in self._known:
            self._known[name] = measure()
            if self._ranks.main:
                write_atomic(self._path, json.dumps(self._known))
        return self._known[name]
