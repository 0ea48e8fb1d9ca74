"""The quantisers that any-precision is measured against, in the same checkpoint format at a single number of bits."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from pydantic import Field

from compress.quant.base import Array, QuantiseConfig, QuantisePass, SensitiveConfig
from compress.quant.format import Codes
from compress.quant.kmeans import kmeans_codebook


class KMeansConfig(SensitiveConfig):
    """Non-nested weighted k-means of each row at one width: what nesting is measured against (SqueezeLLM)."""

    kind: Literal["kmeans"] = Field("kmeans", description="Name of the pass.")
    bits: int = Field(4, ge=2, le=8, description="The width.")


class KMeans(QuantisePass[KMeansConfig]):
    """Find the optimal codebook of each row for one number of bits."""

    Config = KMeansConfig

    @property
    def widths(self) -> tuple[int, int]:
        """Return the one number of bits, as that of seed and parent."""
        return self.config.bits, self.config.bits

    def quantise(self, weight: Array, sensitivity: Array | None) -> Codes:
        """Cluster every row of one matrix."""
        return kmeans_codebook(weight, sensitivity, self.config.bits, self.config.keep_zeros, torch.get_num_threads())


class RoundToNearestConfig(QuantiseConfig):
    """Rounding to an even grid between each row's smallest and largest weight: the simplest quantiser there is."""

    kind: Literal["rtn"] = Field("rtn", description="Name of the pass.")
    bits: int = Field(4, ge=2, le=8, description="The width.")


class RoundToNearest(QuantisePass[RoundToNearestConfig]):
    """Round to ``2**bits`` equally spaced values per row, both ends included."""

    Config = RoundToNearestConfig

    @property
    def widths(self) -> tuple[int, int]:
        """Return the one number of bits, as that of seed and parent."""
        return self.config.bits, self.config.bits

    def quantise(self, weight: Array, sensitivity: Array | None) -> Codes:
        """Round one matrix; the sensitivity is not used."""
        bits = self.config.bits
        low = weight.min(axis=1, keepdims=True).astype(np.float64)
        step = (weight.max(axis=1, keepdims=True) - low) / (2**bits - 1)
        safe = np.where(step > 0, step, 1.0)
        codes = np.clip(np.rint((weight - low) / safe), 0, 2**bits - 1).astype(np.uint8)
        table = (low + step * np.arange(2**bits)).astype(np.float32)
        return Codes(torch.from_numpy(codes), {bits: torch.from_numpy(table)})
