"""The base class of all weight quantisers: which matrices, sensitivities, the packed result, and its measured error."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from compress.divergence import add_divergences, divergences
from compress.passes import OUTSIDE, Block, Context, Needs, Pass
from compress.quant.errors import matrix_errors
from compress.quant.format import Codes
from compress.quant.records import GROUP, EmbeddingShape, GroupedEmbeddingShape, PackedShape
from compress.quant.settings import QuantiseConfig
from compress.quant.vocabulary import fit_vocabulary
from compress.ranks import ALONE, Ranks, even_parts
from compress.statistics import Moments, check_weight
from compress.structure import matching
from compress.workspace import Record

Array = NDArray[np.float32]
_ROWS_AT_ONCE = 1 << 10
ConfigT = TypeVar("ConfigT", bound=QuantiseConfig)


class QuantisePass(Pass[ConfigT], Generic[ConfigT]):
    """Replace dense matrices by codes and codebooks."""

    def needs(self) -> Needs:
        """Ask for gradients or inputs, whichever the sensitivity is made of."""
        kind = self.sensitivity
        looks = kind == "activation"
        return Needs(
            inputs="original" if looks else None,
            divides=True,
            outputs=looks,
            squared_gradients=kind == "fisher",
            packs=True,
            loses_zeros=not getattr(self.config, "keep_zeros", False),
        )

    @property
    def sensitivity(self) -> str:
        """Return what an error costs: ``none`` where the settings have no such field."""
        return getattr(self.config, "sensitivity", "none")

    @abstractmethod
    def quantise(self, weight: Array, sensitivity: Array | None) -> Codes:
        """Find codes and codebooks of one matrix, finite float32 [N, K], and its sensitivity, not negative, or None for ones."""

    def check(self, context: Context) -> None:
        """Refuse patterns that match nothing."""
        self._ignored(context)
        self._included(context)

    def outside(self, context: Context) -> list[str]:
        """Name the embedding and the head, or those that ``include`` matches; a tied head goes with its embedding."""
        columns = context.outside.get(context.structure.embedding, (0, 0))[1]
        packs = self.config.packs_embedding(columns)
        chosen = list(context.outside) if packs else self._included(context)
        if context.tied and context.head in chosen:
            chosen = [context.structure.embedding if name == context.head else name for name in chosen]
        return sorted({*chosen} & {*context.outside})

    def _included(self, context: Context) -> list[str]:
        names = list(context.outside)
        return sorted({name for pattern in self.config.include for name in matching(pattern, names)})

    def embedding_table(self, columns: int) -> dict[int, int]:
        """Return the bits of embedding and head, of so many columns, by those of the model."""
        seed, parent = self.seed_and_parent
        own, more = range(seed, parent + 1), 1 if self.groups_vocabulary(columns) else 2
        return self.config.embedding_table(own, more) or {bits: bits for bits in own}

    @property
    def seed_and_parent(self) -> tuple[int, int]:
        """Return the seed's and the parent's number of bits: the setting ``bits`` twice, unless overridden."""
        config: Any = self.config
        return config.bits, config.bits

    def packed_shapes(self, context: Context) -> dict[str, PackedShape]:
        """Return the shape of every linear that is not ignored, and of embedding and head where they are quantised."""
        ignored = self._ignored(context)
        chosen = {name: shape for name, shape in context.linears.items() if name not in ignored}
        packed = {name: PackedShape(*shape, *self.seed_and_parent) for name, shape in chosen.items()}
        for name in self.outside(context):
            rows, columns = context.outside[name]
            table = self.embedding_table(columns)
            span, read_at = (min(table.values()), max(table.values())), {str(bits): own for bits, own in table.items()}
            shape = EmbeddingShape(rows, columns, *span, rank=1, read_at=read_at)
            grouped = self.groups_vocabulary(columns)
            packed[name] = GroupedEmbeddingShape(**vars(shape), group=GROUP) if grouped else shape
        return packed

    def groups_vocabulary(self, columns: int) -> bool:
        """Tell whether rows of an embedding and a head, of so many columns, have a size for every group of them."""
        return False

    def _ignored(self, context: Context) -> dict[str, str]:
        """Return ignored linears, and the pattern that names each."""
        names = list(context.linears)
        return {name: pattern for pattern in self.config.ignore for name in matching(pattern, names)}

    def fit_block(self, block: Block, names: Sequence[str]) -> Mapping[str, Codes]:
        """Find codes on the block's inputs; matrices that are left out here are given to :meth:`quantise`."""
        return {}

    def run_block(self, block: Block, context: Context) -> Record:
        """Quantise every linear that is not ignored, and measure the errors."""
        if block.index == OUTSIDE:
            return self._run_outside(block)
        ignored = self._ignored(context)
        block.skipped |= {name: f"ignored by {ignored[name]!r}" for name in block.linears if name in ignored}
        weights = {name: linear.weight for name, linear in block.linears.items() if name not in ignored}
        for name, weight in weights.items():
            check_weight(name, weight)
        if self.needs().variants:  # these put other weights into the block
            weights = {name: weight.clone() for name, weight in weights.items()}
        sensitivities = self._sensitivities(block)
        fitted = self.fit_block(block, list(weights))
        errors: Record = {}
        for name in block.ranks.share({name: weight.numel() for name, weight in weights.items()}):
            weight, sensitivity, found = _on_cpu(weights[name]), sensitivities.get(name), fitted.get(name)
            if found is None:
                importance = None if sensitivity is None else np.ascontiguousarray(sensitivity.numpy())
                found = self.quantise(weight.numpy(), importance)
            block.packed[name] = stored = found.as_stored()
            errors[name] = matrix_errors(weight, stored, sensitivity, context.device)
        share_packed(block, [name for name in weights if name not in fitted])
        block.packed |= {name: found.as_stored() for name, found in fitted.items() if name not in block.packed}
        errors = block.ranks.noted(errors)
        if block.draws:
            self._add_divergences(block, weights, errors)
        few = {"few_tokens": dict(block.few_tokens)} if block.few_tokens else {}
        return {"errors": {name: errors[name] for name in block.linears if name in errors}, **few}

    def _run_outside(self, block: Block) -> Record:
        """Quantise embedding and head, and measure the errors: of outputs where the matrix multiplies hidden states."""
        errors: Record = {}
        for name, linear in block.linears.items():
            check_weight(name, linear.weight)
            weight = _on_cpu(linear.weight)
            hessian = block.hessians.get(name)
            looked_up = isinstance(linear.module, nn.Embedding)
            table, grouped = self.embedding_table(weight.shape[1]), self.groups_vocabulary(weight.shape[1])
            found = fit_vocabulary(weight, hessian, looked_up, sorted(set(table.values())), block.ranks, grouped)
            block.packed[name] = replace(found, read_at={str(bits): own for bits, own in table.items()})
            sensitivity = block.squared_gradients.get(name)
            become = {bits: partial(found.rows, bits) for bits in found.codebooks}
            errors[name] = vocabulary_errors(weight, become, sensitivity, hessian, block.ranks)
            if block.draws:
                bits, device = table[self._measured_at()], linear.weight.device
                lost = partial(_lost_rows, found, bits, weight, device)
                measured = divergences(block.draws, {name: (len(weight), lost)}, block.ranks)
                add_divergences({name: errors[name]}, str(bits), measured)
        return {"errors": errors}

    def _measured_at(self) -> int:
        """Return the number of bits at which the divergence that an error makes is measured: the second, if there are several."""
        seed, parent = self.seed_and_parent
        return min(seed + 1, parent)

    def _add_divergences(self, block: Block, weights: dict[str, Tensor], errors: Record) -> None:
        """Measure what the errors of a block's matrices cost; ``weights`` are the dense ones, taken out as they are used up."""
        bits = self._measured_at()
        lost = {}
        for name in list(weights):
            weight = weights.pop(name)
            block.linears[name].weight.copy_(weight)  # a variant's may be there
            error = block.packed[name].dense(bits).to(weight.device).sub_(weight)
            lost[name] = len(error), error.__getitem__
        add_divergences(errors, str(bits), divergences(block.draws, lost, block.ranks))

    def _sensitivities(self, block: Block) -> dict[str, Tensor]:
        if self.sensitivity == "fisher":
            return dict(block.squared_gradients)
        if self.sensitivity == "none":
            return {}
        moments = Moments(ranks=block.ranks)
        block.for_each_input(moments.add, keep_outputs=self.needs().outputs, end_lot=moments.end_lot)
        rows = {name: linear.shape[0] for name, linear in block.linears.items()}
        return {name: moments.mean(name).cpu().expand(rows[name], -1) for name in moments.owner}


def share_packed(block: Block, names: Sequence[str]) -> None:
    """Give every process the matrices among ``names`` that one has packed, with codebooks by row; their order is the block's."""
    if block.ranks.size == 1:
        return
    own = {name: block.packed[name] for name in names if name in block.packed}
    tensors = {f"codes {name}": found.codes for name, found in own.items()}
    for name, found in own.items():
        tensors |= {f"{bits} {name}": codebook for bits, codebook in found.codebooks.items()}
    tensors, bits = block.ranks.joined(tensors), block.ranks.noted({n: list(f.codebooks) for n, f in own.items()})
    packed = {n: Codes(tensors[f"codes {n}"], {b: tensors[f"{b} {n}"] for b in bits[n]}) for n in names if n in bits}
    block.packed = packed | block.packed


def _lost_rows(found: Codes, bits: int, weight: Tensor, device: torch.device, part: slice) -> Tensor:
    """Return the error of some rows of an embedding or a head, float32 [rows, K]."""
    return (found.rows(bits, part) - weight[part]).to(device)


def _on_cpu(weight: Tensor) -> Tensor:
    """Return a weight on the CPU, float32 [N, K], row after row; not to be written to."""
    return weight.detach().to("cpu", torch.float32).contiguous()


def vocabulary_errors(
    weight: Tensor,
    rows: Mapping[int, Callable[[slice], Tensor]],
    sensitivity: Tensor | None,
    hessian: Tensor | None,
    ranks: Ranks = ALONE,
) -> dict[str, dict[str, float]]:
    """Measure what :func:`layer_errors` does, of a matrix too large to be there in float64, some rows at a time.

    ``rows``, by bits, return some rows of what ``weight``, float32 [N, K], has become; ``sensitivity``, float32 [N, 1], is the
    mean over every row's weights.
    """
    exact = torch.eye(weight.shape[1], dtype=torch.float64) if hessian is None else hessian.double()
    mean = exact.trace() / len(exact)

    def measured(part: slice) -> dict[str, Tensor]:
        """Sum squares, outputs and costs."""
        dense = weight[part].double()
        cost = torch.ones(len(dense)) if sensitivity is None else sensitivity[part, 0].double()
        scale = cost if hessian is None or sensitivity is None else cost / mean
        found = {"reach": torch.stack([dense.square().sum(), ((dense @ exact) * dense).sum()])}
        for bits, become in rows.items():
            error = become(part).double() - dense
            lost = ((error @ exact) * error).sum(1)
            found[str(bits)] = torch.stack([error.square().sum(), lost.sum(), (lost * scale).sum()])
        return found

    parts = ranks.over(even_parts(len(weight), _ROWS_AT_ONCE), measured)
    totals = {name: torch.stack([part[name] for part in parts]).sum(0).tolist() for name in parts[0]}
    power, reach = totals.pop("reach")
    errors = {}
    for bits, (error, lost, weighted) in totals.items():
        errors[bits] = {"relative": error / (power or 1.0), "weighted": weighted}
        if hessian is not None:
            errors[bits]["output"] = lost / (reach or 1.0)
    return errors
