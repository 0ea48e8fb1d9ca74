"""Choose how many bits each layer's keys and values get in the cache, by what they cost on calibration text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from compress.errors import CompressError
from compress.kv import KVCache
from compress.kv_serving import losses_by_blocks
from compress.kv_settings import WHOLE, KVSettings
from compress.passes import Context, Needs, Pass, Progress, Whole
from compress.quant.records import PackedShape
from compress.quant.settings import KVCalibrateConfig
from compress.ranks import Ranks
from compress.workspace import Record

_BLOCK = 32


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
        plain = KVCache(WHOLE, config=whole.model.config, **self._settings().options())
        layers, count = list(plain.packed_layers), len(plain.layers)
        choices = sorted(set(self.config.choices))
        total, done = len(layers) * len(choices) + 3, 0

        def loss(bits: Any) -> float:
            nonlocal done
            progress("losses with a packed cache", done, total)
            done += 1
            return self._loss(whole, samples, bits, context.ranks)

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

    def _loss(self, whole: Whole, samples: Sequence[Tensor], bits: Any, ranks: Ranks) -> float:
        """Return the mean loss of a predicted token behind the tokens that stay whole; each process measures its share of samples."""
        own = {}
        for place in range(ranks.rank, len(samples), ranks.size):
            cache = KVCache(bits, config=whole.model.config, **self._settings().options())
            ids = samples[place][None].to(whole.model.device)
            losses = losses_by_blocks(whole.model, ids, cache, _BLOCK)[:, self.config.residual :]
            own[str(place)] = float(losses.double().sum()), losses.numel()
        found = ranks.noted(own)
        sums, counts = zip(*(found[str(place)] for place in range(len(samples))), strict=True)
        return float(sum(sums)) / int(sum(counts))
