"""The base class of all weight quantisers: which matrices, sensitivities, the packed result, and its measured error."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compress.errors import CompressError
from compress.passes import Block, Context, Needs, Pass
from compress.quant.errors import matrix_errors
from compress.quant.format import Codes
from compress.quant.records import PackedShape
from compress.quant.settings import QuantiseConfig
from compress.statistics import Moments, check_weight
from compress.structure import matching
from compress.workspace import Record

Array = NDArray[np.float32]
ConfigT = TypeVar("ConfigT", bound=QuantiseConfig)


class QuantisePass(Pass[ConfigT], Generic[ConfigT]):
    """Replace dense matrices by codes and codebooks."""

    def needs(self) -> Needs:
        """Ask for gradients or inputs, whichever the sensitivity is made of."""
        kind = self.sensitivity
        looks = kind == "activation"
        return Needs(
            inputs="original" if looks else None, outputs=looks, squared_gradients=kind == "fisher", packs=True
        )

    @property
    def sensitivity(self) -> str:
        """Return what an error costs: ``none`` where the settings have no such field."""
        return getattr(self.config, "sensitivity", "none")

    @abstractmethod
    def quantise(self, weight: Array, sensitivity: Array | None) -> Codes:
        """Find codes and codebooks of one matrix, finite float32 [N, K], and its sensitivity, not negative, or None for ones."""

    def check(self, context: Context) -> None:
        """Refuse patterns that match nothing, and an embedding that would be torn from its head by accident."""
        self._ignored(context)
        chosen = self.outside(context)
        head, embedding = context.head, context.structure.embedding
        if self.sensitivity == "activation" and chosen:
            raise CompressError(f"{self.config.kind}: include works with sensitivity fisher or none, not activation.")
        if embedding in chosen and head not in chosen and context.tied:
            raise CompressError(
                f"{self.config.kind}: {embedding} is tied to {head}; to quantise it, name both in include."
            )

    def outside(self, context: Context) -> list[str]:
        """Return the names among embedding and head that ``include`` matches."""
        names = list(context.outside)
        return sorted({name for pattern in self.config.include for name in matching(pattern, names)})

    @property
    def seed_and_parent(self) -> tuple[int, int]:
        """Return the seed's and the parent's number of bits: the setting ``bits`` twice, unless overridden."""
        config: Any = self.config
        return config.bits, config.bits

    def packed_shapes(self, context: Context) -> dict[str, PackedShape]:
        """Return the shape of every linear that is not ignored, and of what ``include`` names."""
        ignored = self._ignored(context)
        chosen = {name: shape for name, shape in context.linears.items() if name not in ignored}
        chosen |= {name: context.outside[name] for name in self.outside(context)}
        return {name: PackedShape(*shape, *self.seed_and_parent) for name, shape in chosen.items()}

    def _ignored(self, context: Context) -> dict[str, str]:
        """Return ignored linears, and the pattern that names each."""
        names = list(context.linears)
        return {name: pattern for pattern in self.config.ignore for name in matching(pattern, names)}

    def fit_block(self, block: Block, names: Sequence[str]) -> Mapping[str, Codes]:
        """Find codes on the block's inputs; matrices that are left out here are given to :meth:`quantise`."""
        return {}

    def run_block(self, block: Block, context: Context) -> Record:
        """Quantise every linear that is not ignored, and measure the errors."""
        ignored = self._ignored(context)
        block.skipped |= {name: f"ignored by {ignored[name]!r}" for name in block.linears if name in ignored}
        weights = {name: _checked(name, linear.weight) for name, linear in block.linears.items() if name not in ignored}
        sensitivities = self._sensitivities(block)
        fitted = self.fit_block(block, list(weights))
        errors: Record = {}
        for name, weight in weights.items():
            sensitivity = sensitivities.get(name)
            found = fitted.get(name)
            if found is None:
                importance = None if sensitivity is None else np.ascontiguousarray(sensitivity.numpy())
                found = self.quantise(weight.numpy(), importance)
            block.packed[name] = stored = found.as_stored()
            errors[name] = matrix_errors(weight, stored, sensitivity, context.device)
        return {"errors": errors}

    def _sensitivities(self, block: Block) -> dict[str, Tensor]:
        if self.sensitivity == "fisher":
            return dict(block.squared_gradients)
        if self.sensitivity == "none":
            return {}
        moments = Moments()
        block.for_each_input(moments.add, keep_outputs=self.needs().outputs)
        rows = {name: linear.shape[0] for name, linear in block.linears.items()}
        return {name: moments.mean(name).cpu().expand(rows[name], -1) for name in moments.owner}


def _checked(name: str, weight: Tensor) -> Tensor:
    """Copy a weight to the CPU, float32 [N, K], and refuse values that are not finite."""
    weight = weight.detach().to("cpu", torch.float32, copy=True).contiguous()
    check_weight(name, weight)
    return weight
