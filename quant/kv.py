"""Choose how many bits each layer's keys and values get in the cache, by what they cost on calibration text."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from compress.errors import CompressError
from compress.kv import KVCache
from compress.kv_serving import losses_by_blocks
from compress.kv_settings import WHOLE, KVSettings
from compress.passes import Context, Needs, Pass, Progress, Whole
from compress.quant.records import PackedShape
from compress.quant.settings import KVCalibrateConfig
from compress.ranks import Ranks
from compress.workspace import Record, write_atomic

_BLOCK = 32
_TOGETHER = 8  # samples
_CACHES = 256 << 20  # bytes


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

        Losses are in nats per token; ``alone`` is what a layer alone adds, number of bits -> cost, layer after layer.
        """
        samples = [tokens for tokens in whole.samples if len(tokens) > self.config.residual + _BLOCK]
        if not samples:
            raise CompressError(
                f"kv_calibrate: no sample has more tokens than stay whole ({self.config.residual}); give a longer length, or lower residual."
            )
        plain = self._cache(whole, WHOLE)
        layers, count = list(plain.packed_layers), len(plain.layers)
        choices = sorted(set(self.config.choices))
        total, done = len(layers) * len(choices) + 3, 0
        batches = _batches(samples, self._together(whole, max(samples, key=len)))
        kept = _Kept(whole.scratch, context.ranks)

        def loss(bits: Any) -> float:
            nonlocal done
            progress("losses with a packed cache", done, total)
            done += 1
            return kept.get(str(bits), lambda: self._loss(whole, batches, bits, context.ranks))

        base = loss(WHOLE)
        alone = [
            {bits: loss([bits if place == layer else WHOLE for place in range(count)]) - base for bits in choices}
            for layer in layers
        ]
        chosen = choose(alone, int(self.config.bits * len(layers)))
        by_layer = dict(zip(layers, chosen, strict=True))
        recommended: list[int] = [by_layer.get(place, WHOLE) for place in range(count)]
        uniform = max(bits for bits in choices if bits <= self.config.bits)
        found, control = loss(recommended), loss(uniform)
        better = found <= control or sum(chosen) < uniform * len(layers)
        kv = {"bits": recommended if better else uniform, "group": self.config.group, "residual": self.config.residual}
        return {}, {
            "kv": kv,
            "losses": {"whole": base, "chosen": found, "uniform": control},
            "chosen": recommended,
            "uniform": uniform,
            "alone": [{str(bits): cost for bits, cost in layer.items()} for layer in alone],
        }

    def _settings(self) -> KVSettings:
        return KVSettings(self.config.group, self.config.residual)

    def _cache(self, whole: Whole, bits: Any) -> KVCache:
        return KVCache(bits, config=whole.model.config, **self._settings().options())

    def _together(self, whole: Whole, sample: Tensor) -> int:
        """Return how many samples are read at once: what is packed is decoded for all of them, and their caches take memory."""
        cache = self._cache(whole, WHOLE)
        losses_by_blocks(whole.model, sample[None].to(whole.model.device), cache, _BLOCK)
        return max(1, min(_TOGETHER, _CACHES // max(1, cache.resident_bytes())))

    def _loss(self, whole: Whole, batches: Sequence[Sequence[Tensor]], bits: Any, ranks: Ranks) -> float:
        """Return the mean loss of a predicted token behind the tokens that stay whole; each process measures its share of batches."""
        own = {}
        for place in range(ranks.rank, len(batches), ranks.size):
            ids = pad_sequence(list(batches[place]), batch_first=True).to(whole.model.device)
            losses = losses_by_blocks(whole.model, ids, self._cache(whole, bits), _BLOCK).cpu()
            ends = torch.tensor([len(tokens) - 1 for tokens in batches[place]])[:, None]
            position = torch.arange(losses.shape[1])
            losses = losses[
                (position >= self.config.residual) & (position < ends)
            ]  # what pads comes last: nothing before sees it
            own[str(place)] = float(losses.double().sum()), losses.numel()
        found = ranks.noted(own)
        sums, counts = zip(*(found[str(place)] for place in range(len(batches))), strict=True)
        return float(sum(sums)) / int(sum(counts))


def _batches(samples: Sequence[Tensor], together: int) -> list[Sequence[Tensor]]:
    """Put samples of about one length together, so many at most."""
    ordered = sorted(samples, key=len)
    return [ordered[first : first + together] for first in range(0, len(ordered), together)]


class _Kept:
    """Keep losses in a file, so that a run which was interrupted measures none of them again."""

    def __init__(self, folder: Path, ranks: Ranks) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path, self._ranks, self._known = folder / "losses.json", ranks, dict[str, float]()
        with suppress(OSError, ValueError):  # none, or damaged
            self._known |= json.loads(self._path.read_text())
        ranks.wait()  # all have read before one writes

    def get(self, name: str, measure: Callable[[], float]) -> float:
        """Return a loss, measured where it is not known yet."""
        if name not in self._known:
            self._known[name] = measure()
            if self._ranks.main:
                write_atomic(self._path, json.dumps(self._known))
        return self._known[name]
