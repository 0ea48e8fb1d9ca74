"""Any-precision quantisation: one set of nested codes read at every width (arXiv 2402.10517)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from compress.passes import Block, Needs
from compress.quant.kmeans import Nested, nested_codebooks
from compress.quant.output import Fitted, sweep
from compress.quant.quantise import Array, QuantisePass
from compress.quant.settings import AnyPrecisionConfig
from compress.quant.tree import CARRIED


class AnyPrecision(QuantisePass[AnyPrecisionConfig]):
    """Seed k-means, then nested upscaling to the parent width."""

    Config = AnyPrecisionConfig

    @property
    def widths(self) -> tuple[int, int]:
        """Seed and parent width."""
        return self.config.seed_bits, self.config.parent_bits

    def needs(self) -> Needs:
        """Inputs of both kinds for the output objective, besides what the sensitivity asks."""
        needs = super().needs()
        if self.config.objective == "weight":
            return needs
        seed, parent = self.widths
        corrected = range(seed, min(parent, CARRIED) + 1) if self.config.correction else ()
        variants = tuple(str(bits) for bits in corrected)
        return replace(needs, inputs="original", variants=variants, hessians=True)

    def sweep(self, block: Block, names: Sequence[str]) -> Mapping[str, Fitted]:
        """Codes that minimise output errors; embedding and head, which are not in a block, have the weight objective."""
        config = self.config
        if config.objective == "weight" or not block.samples:
            return {}
        widths = range(config.seed_bits, config.parent_bits + 1)
        return sweep(block, names, widths, config.correction, config.focus, config.keep_zeros)

    def quantise(self, weight: Array, sensitivity: Array | None) -> Nested:
        """Nested codes and tables of one matrix."""
        config = self.config
        return nested_codebooks(
            weight, sensitivity, config.seed_bits, config.parent_bits, config.keep_zeros, torch.get_num_threads()
        )
