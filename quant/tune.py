"""Codebooks trained on what the whole model says: distillation of the dense model's next-token distribution.

Codes stay as they are, so the loss at a number of bits depends on its codebooks alone: each number of bits is a training of its own.
What changes is a few numbers per hundred weights, or per matrix; the checkpoint keeps its size and format.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from compress.distillation import likeliest, listed_divergence
from compress.errors import CompressError
from compress.hf import packed_modules
from compress.logits import token_losses
from compress.models import text_config
from compress.passes import Context, Needs, Pass, Progress, Whole, Work
from compress.precision import multiplies_bfloat16
from compress.quant.linear import BitPlaneLinear
from compress.quant.records import EmbeddingShape, GroupedShape, PackedShape, SharedShape, bits_range
from compress.quant.settings import TuneTablesConfig
from compress.quant.shared import read_shared
from compress.quant.shared_fit import sized
from compress.quant.student import Student
from compress.ranks import Ranks, processes
from compress.training import share_gradients
from compress.workspace import Record

_NOTHING = "no linear has a codebook of this number of bits"
_LISTED = 64  # likeliest tokens of the dense model that are kept of every prediction
_HELD_OUT, _MOST_HELD_OUT = 8, 16  # one piece of so many, and how many at most
_FAST_FROM = 512  # hidden units: below, products in bfloat16 gain nothing


class TuneTables(Pass[TuneTablesConfig]):
    """Train codebooks with codes as they are."""

    Config = TuneTablesConfig
    _kept: _Lesson | None = None

    def needs(self) -> Needs:
        """Ask for the whole model, packed, and for the dense one."""
        return Needs(packed=True, whole_model=True, divides=True, teacher=True, text=self.config.text)

    def _chosen(self, packed: Mapping[str, PackedShape]) -> list[int]:
        there = list(bits_range(packed.values()))
        for bits in self.config.widths:
            if bits not in there:
                raise CompressError(
                    f"tune_tables: {bits} bits are not among the {there[0]} to {there[-1]} of the model."
                )
        return [bits for bits in there if bits in (self.config.widths or there)]

    def model_units(self, packed: Mapping[str, PackedShape]) -> list[str]:
        """Name a unit for each number of bits.

        Raises:
            CompressError: a number of bits that no matrix has.
        """
        return [f"width-{bits}" for bits in self._chosen(packed)]

    def work(self, samples: int, length: int, packed: Mapping[str, PackedShape]) -> Work:
        """Count pieces: those trained on and held out, twice for each number of bits, and of all what the dense model is asked."""
        config, units, pieces = self.config, len(self._chosen(packed)), samples * -(-length // self.config.length)
        held, asked = min(-(-pieces // _HELD_OUT), _MOST_HELD_OUT), config.steps * config.batch
        taught = min(pieces, units * asked + held) if config.target == "dense" else 0
        return Work(units * asked, 2 * units * held + taught, min(length, config.length), weights=True)

    def run_model(
        self, unit: str, whole: Whole, context: Context, progress: Progress
    ) -> tuple[dict[str, Tensor], Record]:
        """Train the codebooks of one number of bits."""
        bits, packed = int(unit.removeprefix("width-")), packed_modules(whole.model)
        trained = {name: _trained(module.shape, bits) for name, module in packed.items()}
        if not any(trained.values()):
            return {}, {"kept": False, "reason": _NOTHING}
        lesson = self._lesson(whole, context.ranks)
        with _students(whole.model, trained) as students:
            before = lesson.held_out_loss(bits)
            offsets = [offset for student in students.values() for offset in student.offsets.values()]
            for step in self._train(offsets, lesson, bits, before, context.generator(bits)):
                progress(unit, step, self.config.steps)
            after = lesson.held_out_loss(bits)
        kind = "divergence" if self.config.target == "dense" else "loss"
        record: Record = {kind: {"before": before, "after": after}, "kept": after < before}
        return _stored(students) if after < before else {}, record

    def _lesson(self, whole: Whole, ranks: Ranks) -> _Lesson:
        if self._kept is None:  # what the dense model says is asked for once, for all units
            self._kept = _Lesson(whole, self.config, ranks)
        return self._kept

    def _train(
        self,
        offsets: Sequence[nn.Parameter],
        lesson: _Lesson,
        bits: int,
        start: float,
        generator: torch.Generator,
    ) -> Iterator[int]:
        """Train offsets at a number of bits where the loss is ``start``; yield the number of every step before it is taken."""
        config = self.config
        optimizer = torch.optim.Adam(offsets, config.learning_rate)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1.0, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * step / config.steps))
        )
        order = torch.empty(0, dtype=torch.long)
        for step in range(config.steps):
            yield step
            while len(order) < config.batch:
                order = torch.cat([order, torch.randperm(len(lesson.trained), generator=generator)])
            chosen, order = order[: config.batch].tolist(), order[config.batch :]
            loss = lesson.own_loss(bits, [lesson.trained[place] for place in chosen])
            optimizer.zero_grad()
            (loss / max(start, 1e-6)).backward()  # type: ignore[no-untyped-call]
            # Adam leaves alone what has no gradient, such as codebooks of other bits.
            share_gradients([offset for offset in offsets if offset.grad is not None], processes(offsets[0].device))
            optimizer.step()
            schedule.step()


def _trained(shape: PackedShape, bits: int) -> list[str]:
    """Name the stored tensors of a matrix that are trained at a number of bits: those that no other number reads."""
    if isinstance(shape, SharedShape) and (isinstance(shape, EmbeddingShape) or not isinstance(shape, GroupedShape)):
        return []
    alone = len(shape.all_bits) == 1
    return [
        name
        for name in shape.specification()
        if name in (f"codebook_{bits}", f"basis_{bits}") or (alone and name == "groups")
    ]


@contextmanager
def _students(model: PreTrainedModel, trained: Mapping[str, Sequence[str]]) -> Iterator[dict[str, Student]]:
    """Let stand-ins take the places of packed linears with something to train, for the length of a ``with``."""
    packed = packed_modules(model)
    in_use = {name: (module.bits, module.keep_dense) for name, module in packed.items()}
    found: dict[str, Student] = {}
    for name, module in packed.items():
        module.keep_dense = True
        if isinstance(module, BitPlaneLinear) and trained[name]:
            found[name] = Student(module, trained[name])
            model.set_submodule(name, found[name])
    try:
        yield found
    finally:
        for name, module in packed.items():
            if name in found:
                model.set_submodule(name, module)
            module.bits, module.keep_dense = in_use[name]


def _stored(students: Mapping[str, Student]) -> dict[str, Tensor]:
    """Return what was trained, by full name, as it is stored."""
    tensors = {}
    for name, student in students.items():
        now = student.tensors()
        if "groups" in student.offsets:  # the largest group of a row may be another by now
            groups = sized(read_shared(now), now["rows"] * now["groups"] / 255)
            now |= groups.tensors()
        for kind in student.offsets:
            value, stored = now[kind].detach().cpu(), student.packed.get_buffer(kind).dtype
            if not stored.is_floating_point:
                value = value.round().clamp(1, 255) if stored == torch.uint8 else value.round().clamp(-127, 127)
            tensors[f"{name}.{kind}"] = value.to(stored)
    return tensors


class _Lesson:
    """Hold the text in pieces, those held out, and what the dense model says of those that were asked for."""

    def __init__(self, whole: Whole, config: TuneTablesConfig, ranks: Ranks) -> None:
        self._whole, self._config, self._ranks = whole, config, ranks
        self.pieces = [part for sample in whole.samples for part in torch.split(sample, config.length) if len(part) > 1]
        self.held_out = list(range(0, len(self.pieces), _HELD_OUT))[:_MOST_HELD_OUT]
        self.trained = [place for place in range(len(self.pieces)) if place % _HELD_OUT] or self.held_out
        self._said: dict[int, tuple[Tensor, Tensor]] = {}
        hidden = int(getattr(text_config(whole.model.config), "hidden_size", 0))
        self._fast = hidden >= _FAST_FROM and multiplies_bfloat16(whole.model.device)

    def loss(self, bits: int, pieces: Sequence[int]) -> Tensor:
        """Return what is minimised, in nats per predicted token, on some pieces at a number of bits."""
        model, device = self._whole.model, self._whole.model.device
        for module in packed_modules(model).values():
            if module.bits != module.shape.at(bits):
                module.bits = module.shape.at(bits)
        # Padding on the right is out of sight of what comes before it, so no mask is needed in the models.
        tokens = _side_by_side([self.pieces[place] for place in pieces]).to(device)
        scored = _side_by_side([torch.ones(len(self.pieces[place]) - 1, dtype=torch.bool) for place in pieces])
        said = [self._say(place) for place in pieces] if self._config.target == "dense" else []
        with self._precision():
            if said:
                logs, listed = (_side_by_side([each[part] for each in said]).to(device) for part in range(2))
                lost = listed_divergence(model, tokens, logs, listed)
            else:
                lost = token_losses(model, tokens)
        return lost[scored.to(device)].mean()

    def own_loss(self, bits: int, pieces: Sequence[int]) -> Tensor:
        """Return this process's part of it: of its share of the pieces, and summed over all processes the whole."""
        own = pieces[self._ranks.rank :: self._ranks.size]
        part = self._predicted(own) / self._predicted(pieces)
        return self.loss(bits, own or pieces[:1]) * part  # without a piece, a gradient of zeros for the same parameters

    def _predicted(self, pieces: Sequence[int]) -> int:
        return sum(len(self.pieces[place]) - 1 for place in pieces)

    @torch.no_grad()
    def held_out_loss(self, bits: int) -> float:
        """Return the same on what is not trained on, each process measuring its share of the batches."""
        size = self._config.batch
        parts = [self.held_out[start : start + size] for start in range(0, len(self.held_out), size)]
        own = range(self._ranks.rank, len(parts), self._ranks.size)
        found = self._ranks.noted({str(place): self.loss(bits, parts[place]).item() for place in own})
        tokens = [self._predicted(part) for part in parts]
        return float(sum(found[str(place)] * count for place, count in enumerate(tokens))) / sum(tokens)

    def _say(self, place: int) -> tuple[Tensor, Tensor]:
        """Return the dense model's likeliest tokens after every token of a piece, and how likely, [T - 1, count] each."""
        if place not in self._said:
            with self._precision():
                logs, tokens = likeliest(
                    self._whole.dense, self.pieces[place][None].to(self._whole.model.device), _LISTED
                )
            self._said[place] = logs[0].cpu(), tokens[0].cpu()
        return self._said[place]

    def _precision(self) -> torch.autocast:
        return torch.autocast(self._whole.model.device.type, torch.bfloat16, enabled=self._fast)


def _side_by_side(rows: Sequence[Tensor]) -> Tensor:
    return pad_sequence(list(rows), batch_first=True)
