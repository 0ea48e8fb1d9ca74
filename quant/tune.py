"""Codebooks trained on what the whole model says: distillation of the dense model's next-token distribution.

Codes stay as they are, so the loss at a number of bits depends on its codebooks alone, and each is a training of its own. What changes is a few hundred numbers per thousand weights; the checkpoint keeps its size and format.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from operator import mul
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, linear
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from compress.errors import CompressError
from compress.hf import packed_modules
from compress.kernels.packing import unpack_planes
from compress.logits import Predictions
from compress.passes import Context, Needs, Pass, Progress, Whole
from compress.quant.linear import BitPlaneLinear
from compress.quant.records import EmbeddingShape, PackedShape, bits_range, own_tensor
from compress.quant.settings import TuneTablesConfig
from compress.workspace import Record

_OF_MORE_BITS = "codebooks of more bits are computed from these, and would change with them"


class _LookUp(torch.autograd.Function):
    """Look up a weight [N, K] in a codebook [N, 2**b]; the gradient of an entry is the sum over its weights."""

    @staticmethod
    def forward(ctx: Any, codebook: Tensor, columns: int, *planes: Tensor) -> Tensor:
        ctx.save_for_backward(*planes)
        ctx.columns, ctx.shape = columns, codebook.shape
        return codebook.gather(1, unpack_planes(list(planes), columns).long())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        codes = unpack_planes(list(ctx.saved_tensors), ctx.columns).long()
        sums = torch.zeros(ctx.shape, device=codes.device).scatter_add_(1, codes, gradients[0])
        return (sums, *[None] * (1 + len(ctx.saved_tensors)))


class _Tuned(nn.Module):
    """Stand in for a packed linear; ``offset`` is learned, in units of the mean distance between entries.

    Where rows share their codebooks, only what no other number of bits reads is trained: the basis, or places in cells.
    """

    def __init__(self, packed: BitPlaneLinear, stored: str) -> None:
        super().__init__()
        self.packed, self.stored = packed, stored
        self.start = packed.get_buffer(self.stored).float()
        # An exact zero may stand for pruned weights.
        self.free = self.start != 0 if self.stored.startswith("codebook") else torch.ones_like(self.start)
        # Entries reach about two standard deviations to either side of their mean.
        self.distance = 4 * self.start.std().clamp_min(1e-30) / self.start.shape[-1]
        self.offset = nn.Parameter(torch.zeros_like(self.start))

    def trained(self) -> Tensor:
        return self.start + self.free * self.distance * self.offset

    def codebook(self) -> Tensor:
        shared, found = self.packed.shared(), self.trained()
        if shared is None:
            return found
        return shared.differentiable(self.packed.bits, found)

    def forward(self, x: Tensor) -> Tensor:
        packed = self.packed
        weight: Tensor = _LookUp.apply(self.codebook(), packed.in_features, *packed.planes())  # type: ignore[no-untyped-call]
        if packed.factors is not None:
            weight = weight * packed.factors
        return linear(x, weight, packed.bias)


class TuneTables(Pass[TuneTablesConfig]):
    """Train codebooks, one number of bits at a time: codes are common to all, codebooks are not."""

    Config = TuneTablesConfig

    def needs(self) -> Needs:
        """Ask for the whole model, packed, and for the dense one."""
        return Needs(packed=True, whole_model=True, teacher=True)

    def model_units(self, packed: Mapping[str, PackedShape]) -> list[str]:
        """Name a unit per number of bits.

        Raises:
            CompressError: a number of bits that no matrix has.
        """
        there = list(bits_range(packed.values()))
        for bits in self.config.widths:
            if bits not in there:
                raise CompressError(
                    f"tune_tables: {bits} bits are not among the {there[0]} to {there[-1]} of the model."
                )
        return [f"width-{bits}" for bits in there if bits in (self.config.widths or there)]

    def run_model(
        self, unit: str, whole: Whole, context: Context, progress: Progress
    ) -> tuple[dict[str, Tensor], Record]:
        """Train the codebooks of one number of bits."""
        bits = int(unit.removeprefix("width-"))
        packed = packed_modules(whole.model)
        in_use = {name: module.bits for name, module in packed.items()}
        tuned: dict[str, _Tuned] = {}
        for name, module in packed.items():
            module.bits = module.shape.at(bits)
            own = None if isinstance(module.shape, EmbeddingShape) else own_tensor(module.shape, module.bits)
            if isinstance(module, BitPlaneLinear) and module.bits == bits and own is not None:
                tuned[name] = _Tuned(module, own)
                whole.model.set_submodule(name, tuned[name])
        if not tuned:
            return {}, {"kept": False, "reason": _OF_MORE_BITS}
        held, trained = whole.samples[::8], [s for i, s in enumerate(whole.samples) if i % 8] or whole.samples
        try:
            before = _held_out(whole, held)
            for step in self._train(
                [module.offset for module in tuned.values()], whole, trained, context.generator(bits)
            ):
                progress(unit, step, self.config.steps)
            after = _held_out(whole, held)
        finally:
            for name, module in packed.items():
                if name in tuned:
                    whole.model.set_submodule(name, module)
                module.bits = in_use[name]
        record = {"divergence": {"before": before, "after": after}, "kept": after < before}
        if after >= before:
            return {}, record
        tensors = {}
        for name, stand_in in tuned.items():
            kind = packed[name].get_buffer(stand_in.stored).dtype
            tensors[f"{name}.{stand_in.stored}"] = stand_in.trained().detach().to("cpu", kind)
        return tensors, record

    def _train(
        self, offsets: Sequence[nn.Parameter], whole: Whole, samples: Sequence[Tensor], generator: torch.Generator
    ) -> Iterator[int]:
        """Train offsets; yield the number of every step before it is taken."""
        config = self.config
        optimizer = torch.optim.Adam(offsets, config.learning_rate)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1.0, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * step / config.steps))
        )
        order = torch.empty(0, dtype=torch.long)
        for step in range(config.steps):
            yield step
            while len(order) < config.batch:
                order = torch.cat([order, torch.randperm(len(samples), generator=generator)])
            chosen, order = order[: config.batch], order[config.batch :]
            loss = divergence(whole.model, whole.dense, [samples[int(i)] for i in chosen])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()


@torch.no_grad()
def _held_out(whole: Whole, samples: Sequence[Tensor]) -> float:
    """Return the mean divergence in nats per token."""
    tokens = [len(sample) - 1 for sample in samples]
    apart = [divergence(whole.model, whole.dense, [sample]).item() for sample in samples]
    return float(sum(map(mul, tokens, apart))) / sum(tokens)


def divergence(model: PreTrainedModel, dense: PreTrainedModel, samples: Sequence[Tensor]) -> Tensor:
    """Return the mean over predicted tokens of KL(dense || model), in nats, on samples int64 [T] of any lengths."""
    device = model.device
    # Padding on the right is out of sight of what comes before it, so no mask is needed in the models.
    tokens = pad_sequence(list(samples), batch_first=True).to(device)
    scored = pad_sequence([torch.ones(len(sample) - 1, dtype=torch.bool) for sample in samples], batch_first=True)
    with torch.no_grad():
        wanted = Predictions(dense, tokens)

    def apart(logits: Tensor, part: slice) -> Tensor:
        with torch.no_grad():
            logs = wanted.logits(part).log_softmax(-1)
        return kl_div(logits.log_softmax(-1), logs, reduction="none", log_target=True).sum(-1)

    return Predictions(model, tokens).each(apart)[scored.to(device)].mean()
