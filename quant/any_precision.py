"""Any-precision quantisation: one set of nested codes read at every width (arXiv 2402.10517)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field, model_validator

from compress.passes import Block, Context, Needs, Sizes
from compress.quant.base import Array, QuantisePass, SensitiveConfig
from compress.quant.block_sweep import fit_block, fitting_bytes
from compress.quant.format import Codes
from compress.quant.kmeans import nested_codebooks
from compress.quant.nested import CARRIED


class AnyPrecisionConfig(SensitiveConfig):
    """Any-precision: one set of nested codes, read at every width from seed to parent.

    Every output row gets a table per width; the b-bit code is the top b bits of the parent's. Objective ``weight`` is the
    method of the paper with exact clustering: the seed is the optimal weighted one-dimensional k-means of each row, every
    further bit splits each cell at its best point. Objective ``output`` starts there and lowers the error of the layer's
    output on calibration text, all widths up to 6 together. Deterministic. Works a block at a time; the Fisher
    sensitivity costs one backward pass over the calibration samples, with one block in memory and the samples' hidden
    states on disk.
    """

    kind: Literal["any_precision"] = Field("any_precision", description="Name of the pass.")
    seed_bits: int = Field(3, ge=2, le=8, description="The smallest width, whose codes are optimised directly.")
    parent_bits: int = Field(8, ge=2, le=8, description="The largest width.")
    objective: Literal["weight", "output"] = Field(
        "output",
        description="Which error is made small: of each weight, by its sensitivity, or of each layer's output.",
    )
    focus: dict[int, float] = Field(
        {}, description="Objective output: width -> how much its error counts beside the others', 1 where not given."
    )
    correction: float = Field(
        0.5,
        ge=0,
        le=1,
        description="Objective output: share of the correction by which a layer makes up for the errors of those before.",
    )

    @model_validator(mode="after")
    def _ordered(self) -> AnyPrecisionConfig:
        if self.seed_bits > self.parent_bits:
            raise ValueError(f"seed_bits {self.seed_bits} must not exceed parent_bits {self.parent_bits}")
        widths = range(self.seed_bits, self.parent_bits + 1)
        for bits, share in self.focus.items():
            if bits not in widths or not 0 < share < float("inf"):
                raise ValueError(f"focus {bits}: {share} must be a width from seed to parent and a positive number")
        return self


class AnyPrecision(QuantisePass[AnyPrecisionConfig]):
    """Cluster at the seed's number of bits, then split cells up to the parent's; see the config for the objectives."""

    Config = AnyPrecisionConfig

    @property
    def widths(self) -> tuple[int, int]:
        """Return the seed's and the parent's number of bits."""
        return self.config.seed_bits, self.config.parent_bits

    def needs(self) -> Needs:
        """Ask for what the sensitivity needs, and for the output objective also for both kinds of inputs."""
        needs = super().needs()
        if self.config.objective == "weight":
            return needs
        seed, parent = self.widths
        corrected = range(seed, min(parent, CARRIED) + 1) if self.config.correction else ()
        variants = tuple(str(bits) for bits in corrected)
        return replace(needs, inputs="original", variants=variants)

    def memory(self, sizes: Sizes, context: Context) -> int:
        """Estimate what the output objective takes: the original block beside its own, and one linear's statistics."""
        if self.config.objective == "weight":
            return 0
        return sizes.block + fitting_bytes(context.linears.values(), len(self.needs().variants), sizes.length)

    def fit_block(self, block: Block, names: Sequence[str]) -> Mapping[str, Codes]:
        """Find codes that minimise output errors; embedding and head, outside of blocks, have the weight objective."""
        config = self.config
        if config.objective == "weight" or not block.samples:
            return {}
        widths = range(config.seed_bits, config.parent_bits + 1)
        return fit_block(block, names, widths, config.correction, config.focus, config.keep_zeros)

    def quantise(self, weight: Array, sensitivity: Array | None) -> Codes:
        """Find nested codes of one matrix by the weight objective."""
        config = self.config
        return nested_codebooks(
            weight, sensitivity, config.seed_bits, config.parent_bits, config.keep_zeros, torch.get_num_threads()
        )
