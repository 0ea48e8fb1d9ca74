"""Any-precision quantisation: one set of nested codes read at every width (arXiv 2402.10517)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator

from compress.quant.kmeans import Nested, nested_codebooks
from compress.quant.quantise import Array, QuantisePass, SensitiveConfig


class AnyPrecisionConfig(SensitiveConfig):
    """Any-precision: one set of nested codes, read at every width from seed to parent.

    Every output row gets a table per width; the b-bit code is the top b bits of the parent's. The seed is the exact weighted one-dimensional k-means of each row; every further bit splits each cell at
    its exact best point. Deterministic. Works a block at a time; the Fisher sensitivity costs one backward
    pass over the calibration samples, with one block in memory and the samples' hidden states on disk.
    """

    kind: Literal["any_precision"] = Field("any_precision", description="Name of the pass.")
    seed_bits: int = Field(3, ge=2, le=8, description="The smallest width, whose codes are optimised directly.")
    parent_bits: int = Field(8, ge=2, le=8, description="The largest width.")

    @model_validator(mode="after")
    def _ordered(self) -> AnyPrecisionConfig:
        if self.seed_bits > self.parent_bits:
            raise ValueError(f"seed_bits {self.seed_bits} must not exceed parent_bits {self.parent_bits}")
        return self


class AnyPrecision(QuantisePass[AnyPrecisionConfig]):
    """Seed k-means, then nested upscaling to the parent width."""

    Config = AnyPrecisionConfig

    @property
    def widths(self) -> tuple[int, int]:
        """Seed and parent width."""
        return self.config.seed_bits, self.config.parent_bits

    def quantise(self, weight: Array, sensitivity: Array | None) -> Nested:
        """Nested codes and tables of one matrix."""
        config = self.config
        return nested_codebooks(
            weight, sensitivity, config.seed_bits, config.parent_bits, config.keep_zeros, torch.get_num_threads()
        )
