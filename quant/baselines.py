"""The quantisers that any-precision is measured against, in the same checkpoint format at a single number of bits."""

from __future__ import annotations

import numpy as np
import torch

from compress.quant.base import Array, QuantisePass
from compress.quant.format import Codes
from compress.quant.kmeans import nested_codebooks
from compress.quant.settings import KMeansConfig, RoundToNearestConfig

_AT_ONCE = 1 << 20  # weights that are there in float64


class KMeans(QuantisePass[KMeansConfig]):
    """Find the optimal codebook of each row for one number of bits."""

    Config = KMeansConfig

    def quantise(self, weight: Array, sensitivity: Array | None) -> Codes:
        """Cluster every row of one matrix."""
        zeros, threads = self.config.keep_zeros, torch.get_num_threads()
        return nested_codebooks(weight, sensitivity, *self.seed_and_parent, zeros, threads)


class RoundToNearest(QuantisePass[RoundToNearestConfig]):
    """Round to ``2**bits`` equally spaced values per row, both ends included."""

    Config = RoundToNearestConfig

    def quantise(self, weight: Array, sensitivity: Array | None) -> Codes:
        """Round one matrix; the sensitivity is not used."""
        bits = self.config.bits
        low = weight.min(axis=1, keepdims=True).astype(np.float64)
        step = (weight.max(axis=1, keepdims=True) - low) / (2**bits - 1)
        safe, codes = np.where(step > 0, step, 1.0), np.empty(weight.shape, np.uint8)
        count = max(1, _AT_ONCE // weight.shape[1])
        for rows in (slice(start, start + count) for start in range(0, len(weight), count)):
            codes[rows] = np.clip(np.rint((weight[rows] - low[rows]) / safe[rows]), 0, 2**bits - 1)
        codebook = (low + step * np.arange(2**bits)).astype(np.float32)
        return Codes(torch.from_numpy(codes), {bits: torch.from_numpy(codebook)})
