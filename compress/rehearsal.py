"""Foresee the processor time of a run by doing a little of it: a few samples and a few rows of the first block."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from compress.calibration import Samples, draw_samples
from compress.carrying import Call
from compress.divergence import block_draw, outside_draw
from compress.fisher import HESSIAN, drawn_gradients, squared_gradients, take_hessians, unit_of
from compress.passes import OUTSIDE, Block, Context, Pass, Run, Work
from compress.quant.records import PackedShape
from compress.settings import Calibration
from compress.streaming import State, StreamedModel
from compress.structure import Linear, block_prefix
from compress.workspace import Record, Stage

_FEW, _MORE = 1, 9  # samples
_WEIGHTS, _OUTSIDE_WEIGHTS = 1_000_000, 2_000_000  # of a block and outside of them, in whole rows, that are worked on


class _Thin(Linear):
    """Show the first rows of a weight matrix as if they were all: what is done to them costs so much less."""

    def __init__(self, linear: Linear, share: float) -> None:
        super().__init__(linear.name, linear.module)
        self._rows = max(1, round(share * linear.shape[0]))

    @property
    def weight(self) -> Tensor:
        """Return the first rows, a view."""
        return super().weight[: self._rows]


@dataclass(frozen=True)
class Amount:
    """Say how much to rehearse: samples, and the share of every matrix's rows."""

    samples: int
    share: float


def foreseen_seconds(
    step: Pass[Any],
    state: State,
    context: Context,
    text: Calibration | None,
    device: torch.device,
    packed: Mapping[str, PackedShape],
) -> float | None:
    """Return the processor time of one pass, all threads together; None where it cannot be foreseen.

    Reading and writing of checkpoints is not counted, and of rounds of statistics one.
    """
    needs = step.needs()
    work = step.work(text.samples, text.length, packed) if needs.whole_model and text is not None else None
    if (needs.whole_model and work is None) or needs.model_statistics or needs.changes_shapes or needs.removes_experts:
        return None
    samples, count = Samples((), {}), 0
    if text is not None:
        assert context.tokenizer is not None
        count, few = text.samples, text.model_copy(update={"samples": min(text.samples, _MORE)})
        samples = draw_samples(few, context.tokenizer, context.context_length)
    fast = work is None or getattr(step.config, "precision", "bfloat16") == "bfloat16"
    rehearsal = _Rehearsal(step, StreamedModel(state, device, fast=fast), context, samples, count)
    return rehearsal.seconds() if work is None else rehearsal.training(work)


class _Rehearsal:
    """Measure what one pass takes on the first block with a few of its ``count`` samples."""

    def __init__(self, step: Pass[Any], model: StreamedModel, context: Context, samples: Samples, count: int) -> None:
        self.step, self.model, self.context, self.needs = step, model, context, step.needs()
        self.samples, self.count, self.blocks = samples.tokens, count, len(model.blocks)
        self._records: list[list[Record]] = []
        inside = sum(rows * columns for rows, columns in context.linears.values()) / self.blocks
        self._share = min(0.5, _WEIGHTS / inside)
        self._outside = step.outside(context)
        self._gradients: dict[int, dict[str, Tensor]] = {}

    def seconds(self) -> float:
        """Return the processor time of the pass, all threads together."""
        once = self._measured_gradients() if self.needs.squared_gradients or self.needs.draws else 0.0
        if self.needs.draws:
            once += self._draws()
        per_block = self._forward() * self.count if self.needs.inputs and not self.needs.outputs else 0.0
        if self.step.wants_statistics(self.context, []):
            measured = self._foresee(self._measure, self._share)
            self._records = [[self._record] * self.blocks]
            per_block += measured + self._forward() * self.count
        per_block += self._foresee(self._work, self._share)
        if self._outside:
            outside = [linear for name, linear in self.model.outside().items() if name in self._outside]
            share = min(0.5, _OUTSIDE_WEIGHTS / sum(linear.weight.numel() for linear in outside))
            once += self._foresee(self._work_outside, share, samples=False)
        return once + self.blocks * per_block

    def training(self, work: Work) -> float:
        """Return the processor time of a training, by one sample in the first block and at the head, forward and backward."""
        tokens = self.samples[0][: work.length]
        hidden, calls = self.model.capture(tokens)

        def through(module: nn.Module, backward: bool) -> None:
            with torch.set_grad_enabled(backward):
                output = self.model.run(module, hidden.detach().requires_grad_(backward), calls[0])
                if backward:
                    output.sum().backward()  # type: ignore[no-untyped-call]

        def scored(backward: bool) -> None:
            with torch.set_grad_enabled(backward):
                logits = self.model.logits(tokens, hidden.detach().requires_grad_(backward))[:-1]
                loss = cross_entropy(logits, tokens[1:].to(logits.device))
                if backward:
                    loss.backward()  # type: ignore[no-untyped-call]

        with self.model.block(0) as module:
            module.requires_grad_(work.weights)
            through(module, True)
            block = [_timed(partial(through, module), backward) for backward in (False, True)]
        scored(True)
        head = [_timed(scored, backward) for backward in (False, True)]
        of_sample = [self.blocks * block[way] + head[way] for way in (False, True)]
        return (work.scored * of_sample[0] + work.trained * of_sample[1]) * work.length / len(tokens)

    def _foresee(self, work: Callable[[Amount], object], share: float, samples: bool = True) -> float:
        """Extrapolate from a few samples and a share of the rows to all, each by its own slope."""
        few, more = min(_FEW, self.count), min(_MORE, self.count)
        base = Amount(few, share / 2)
        work(base)  # what is compiled or loaded now is there already in a run
        start = _timed(work, base)
        rows = (_timed(work, Amount(few, share)) - start) / (share / 2)
        found = start + rows * (1 - share / 2)
        if samples and self.needs.inputs and more > few:
            found += (_timed(work, Amount(more, base.share)) - start) / (more - few) * (self.count - few)
        return found

    @contextmanager
    def _open(self, amount: Amount) -> Iterator[Block]:
        """Open the first block as the pipeline would, thinned."""
        with self.model.block(0) as module:
            linears = {name: _Thin(linear, amount.share) for name, linear in self.model.linears(0).items()}
            squared = self._gradients.get(0, {}) if self.needs.squared_gradients else {}
            gradients = {name: full[: linears[name].shape[0]] for name, full in squared.items()}
            runs = self._runs()[: amount.samples] if self.needs.inputs else []
            varied = self._runs(self.needs.variant_length)[: amount.samples] if self.needs.variants else []
            variants = dict.fromkeys(self.needs.variants, varied)
            name = block_prefix(self.model.structure, 0)
            yield Block(0, name, module, dict(linears), gradients, runs, variants, self._records)

    def _runs(self, length: int | None = None) -> list[Run]:
        def call(hidden: Tensor, how: Call) -> Run:
            return lambda module: self.model.run(module, hidden, how)

        found = (self.model.capture(tokens[:length]) for tokens in self.samples)
        return [call(hidden, calls[0]) for hidden, calls in found]

    @torch.no_grad()
    def _work(self, amount: Amount) -> None:
        with self._open(amount) as block:
            self.step.run_block(block, self.context)

    @torch.no_grad()
    def _work_outside(self, amount: Amount) -> None:
        linears = self.model.outside().items()
        thin: dict[str, Linear] = {
            name: _Thin(linear, amount.share) for name, linear in linears if name in self._outside
        }
        found = {name: t for name, t in self._gradients.get(OUTSIDE, {}).items() if name in thin or HESSIAN in name}
        hessians = take_hessians(found)
        block = Block(OUTSIDE, "", self.model.model, thin, found, statistics=self._records, hessians=hessians)
        self.step.run_block(block, self.context)

    @torch.no_grad()
    def _measure(self, amount: Amount) -> None:
        with self._open(amount) as block:
            self._record = self.step.measure_block(block, self.context)

    @torch.no_grad()
    def _forward(self) -> float:
        if not self.samples:
            return 0.0
        with self.model.block(0) as module:
            runs = self._runs()
            runs[0](module)
            return _timed(lambda _: [run(module) for run in runs], None) / len(runs)

    def _measured_gradients(self) -> float:
        """Measure them with one block and with two; of the first are those that the pass is shown."""
        few = Samples(self.samples, {}).first(_FEW, self.needs.gradient_length)
        gradients = drawn_gradients if self.needs.draws else squared_gradients

        def measure(blocks: int) -> None:
            model = StreamedModel(self.model.state, self.model.device, fast=True)
            model.blocks = model.blocks[:blocks]
            with TemporaryDirectory() as folder:
                stage = Stage(Path(folder), "")
                gradients(model, few, stage, self._outside, lambda *_: None)
                indices = (0, OUTSIDE) if self._outside else (0,)
                self._gradients = {index: stage.load(unit_of(index)) for index in indices}

        took = [_timed(measure, 1), _timed(measure, min(2, self.blocks))]
        return (took[0] + (self.blocks - 1) * (took[1] - took[0])) * self._drawn() / _FEW

    def _drawn(self) -> int:
        return min(self.count, self.needs.gradient_samples or self.count)

    def _draws(self) -> float:
        """Measure one draw for a block, and for embedding and head."""
        rows = {name: linear.shape[0] for name, linear in self.model.outside().items()}
        length = self.needs.gradient_length

        def outside(tokens: Tensor) -> None:
            draw = outside_draw(self.model, self._outside, 0, tokens, self._gradients[OUTSIDE], len(tokens))
            for name, use in draw().items():
                use(slice(0, rows[name]))

        def inside(module: nn.Module) -> None:
            block_draw(module, self.model.linears(0), self._runs(length)[0], self._gradients[0]["0"])()

        with self.model.block(0) as module:
            took = self.blocks * _timed(inside, module)
        return (took + (_timed(outside, self.samples[0][:length]) if self._outside else 0.0)) * self._drawn()


def _timed(work: Callable[[Any], object], amount: Any) -> float:
    began = time.process_time()
    work(amount)
    return time.process_time() - began
