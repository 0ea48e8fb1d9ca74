"""Any-precision quantisation: one set of nested codes read at every number of bits (arXiv 2402.10517)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from compress.passes import Block, Context, Needs, Sizes
from compress.quant.base import Array, QuantisePass
from compress.quant.block_sweep import CORRECTING, fit_block, fitting_bytes
from compress.quant.format import Codes
from compress.quant.kmeans import nested_codebooks
from compress.quant.nested import CARRIED
from compress.quant.records import GROUP, GroupedShape, PackedShape
from compress.quant.settings import AnyPrecisionConfig
from compress.statistics import hessian_bytes
from compress.structure import block_of

# Samples, of CORRECTING tokens, that the divergence which an error makes is measured with: a draw of labels for each.
_GRADIENTS = 32


class AnyPrecision(QuantisePass[AnyPrecisionConfig]):
    """Cluster at the seed's number of bits, then split cells up to the parent's; see the config for the objectives."""

    Config = AnyPrecisionConfig

    @property
    def seed_and_parent(self) -> tuple[int, int]:
        """Return the seed's and the parent's number of bits."""
        return self.config.seed_bits, self.config.parent_bits

    def needs(self) -> Needs:
        """Ask for what the sensitivity needs, and for the output objective for both kinds of inputs, and what errors cost."""
        needs = super().needs()
        if self.config.objective == "weight":
            return needs
        seed, parent = self.seed_and_parent
        corrected = range(seed, min(parent, CARRIED) + 1) if self.config.correction else ()
        variants = tuple(str(bits) for bits in corrected)
        draws = needs.squared_gradients
        return replace(
            needs,
            squared_gradients=False,
            draws=draws,
            inputs="original",
            variants=variants,
            variant_length=CORRECTING,
            outputs=True,
            gradient_samples=_GRADIENTS if draws else None,
            gradient_length=CORRECTING if draws else None,
        )

    def memory(self, sizes: Sizes, context: Context) -> int:
        """Estimate what the output objective takes: the Hessians of a block, what is kept of the samples, one linear's work."""
        if self.config.objective == "weight":
            return 0
        needs, blocks = self.needs(), dict[int | None, list[tuple[int, int]]]()
        for name, shape in context.linears.items():
            blocks.setdefault(block_of(name, context.structure), []).append(shape)
        tokens = sizes.samples * min(sizes.length, needs.variant_length or sizes.length)
        fitting = fitting_bytes(max(blocks.values(), key=len), len(needs.variants), tokens, sizes.length)
        return hessian_bytes(context.structure, context.linears) + fitting

    def fit_block(self, block: Block, names: Sequence[str]) -> Mapping[str, Codes]:
        """Find codes that minimise output errors; embedding and head, outside of blocks, have the weight objective."""
        if self.config.objective == "weight" or not block.samples:
            return {}
        return fit_block(block, names, self.config)

    def packed_shapes(self, context: Context) -> dict[str, PackedShape]:
        """Return the shape of every chosen linear; those in blocks have shared codebooks, if the settings say so."""
        shapes = super().packed_shapes(context)
        shared = {
            name: GroupedShape(**vars(shape), rank=1, group=GROUP)
            for name, shape in shapes.items()
            if name not in context.outside and self.config.shares(shape.in_features)
        }
        return {**shapes, **shared}

    def groups_vocabulary(self, columns: int) -> bool:
        """Tell whether rows of an embedding and a head have sizes of groups: where linears of as many columns have."""
        return self.config.shares(columns)

    def quantise(self, weight: Array, sensitivity: Array | None) -> Codes:
        """Find nested codes of one matrix by the weight objective."""
        zeros, threads = self.config.keep_zeros, torch.get_num_threads()
        return nested_codebooks(weight, sensitivity, *self.seed_and_parent, zeros, threads)
