"""Run one pass of a recipe: its units of work, each on disk before the next begins."""

import json
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress.calibration import Samples
from compress.carrying import Call
from compress.config import BlockShape
from compress.divergence import block_draw, outside_draw
from compress.errors import CompressError
from compress.experts import in_stack
from compress.fisher import drawn_gradients, predicted_tokens, squared_gradients, take_hessians, unit_of
from compress.mixtures import with_fewer
from compress.models import untied
from compress.passes import OUTSIDE, Block, Context, Draw, Pass, Progress, Run, Whole
from compress.quant.format import pack, pack_smaller
from compress.quant.records import shape_of
from compress.ranks import ALONE
from compress.shapes import block_shape
from compress.statistics import all_finite
from compress.streaming import State, StreamedModel, reshaped
from compress.structure import block_prefix
from compress.version import __version__
from compress.weights import Overlay
from compress.workspace import Record, Stage, Workspace

NOTES = ("packed", "skipped", "shape", "storage")
"""What the pipeline itself keeps in a unit's record beside the figures of the pass: name -> fields of its ``PackedShape``,
name -> reason, the block's shape (None if it is removed), name -> what :func:`pack_smaller` notes."""


def figures_of(record: Record) -> Record:
    """Return what the pass itself says of a finished unit."""
    return {name: value for name, value in record.items() if name not in NOTES}


class Log:
    """Write the log, one JSON line per unit, and tell the caller of progress."""

    def __init__(self, path: Path, progress: Progress | None, main: bool = True) -> None:
        self.path, self.main = path, main  # only the main process writes and speaks
        self.progress: Progress = progress if progress and main else lambda what, done, total: None
        path.parent.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def unit(self, kind: str, unit: str) -> Iterator[Record]:
        """Time the work within a ``with``, on the clock and on all processors, then write its line, with what is put into the record."""
        record: Record = {}
        started, worked = time.perf_counter(), time.process_time()
        yield record
        spent = {"seconds": time.perf_counter() - started, "processor_seconds": time.process_time() - worked}
        rounded = {name: round(value, 4) for name, value in spent.items()}
        line = {"time": time.time(), "pass": kind, "unit": unit, **rounded, **record}
        if self.main:
            with self.path.open("a", encoding="utf-8") as handle:
                handle.write(json.dumps(line) + "\n")


class Runner:
    """Run one pass over all blocks, or over the whole model."""

    def __init__(
        self,
        step: Pass[Any],
        state: State,
        origin: State,
        samples: Samples | None,
        context: Context,
        work: Workspace,
        log: Log,
    ) -> None:
        self.origin = origin
        self.step, self.state, self.context, self.log = step, state, context, log
        self.kind, self.needs = step.config.kind, step.needs()
        self.samples = samples if self.needs.calibration else None
        # pydantic leaves out nothing: the resolved settings, defaults included, decide the key.
        text = self.samples.key if self.samples else None
        settings = step.config.model_dump(mode="json")
        device = context.device.type
        # A pass that has the whole model shares out what it does in run_model.
        self.ranks = context.ranks if self.needs.divides and not self.needs.whole_model else ALONE
        stage = work.stage(self.kind, state.key, settings, text, context.seed, device, __version__)
        self.stage: Stage = replace(stage, ranks=self.ranks)
        self.outside = step.outside(context)
        count, length = self.needs.gradient_samples, self.needs.gradient_length
        self.gradient_samples = self.samples and self.samples.first(count, length)
        label = "draws" if self.needs.draws else "fisher"
        gradients = work.stage(label, state.key, text, count, length, self.outside, device, __version__)
        self.gradients = replace(gradients, ranks=self.ranks)
        self.lots = self.ranks.lots(len(samples.tokens)) if samples and self.needs.inputs else []
        self.own = [n for lot in self.lots for n in lot]  # the samples of this process
        self.statistics: list[list[Record]] = []
        self.blocks = [block_prefix(context.structure, i) for i in range(context.structure.depth)]

    @cached_property
    def model(self) -> StreamedModel:
        """Open the model when it is first needed: a pass that is finished needs none."""
        return StreamedModel(self.state, self.context.device, fast=True)

    def run(self) -> tuple[State, dict[str, Record]]:
        """Do what is not done yet; return the state after the pass, and the records of its units."""
        if self.needs.whole_model:
            units = self.step.model_units(self.state.packed)
            self._run_whole(units)
        else:
            units = [f"block-{i}" for i in range(len(self.blocks))] + (["outside"] if self.outside else [])
            unfinished = any(self.stage.record(unit) is None for unit in units)
            self.context.ranks.wait()  # before any is finished: all must see the same
            if unfinished and (self.needs.divides or self.context.ranks.main):
                self._run_blocks()
        self.context.ranks.wait()
        self._progress("done", len(units), len(units))
        records = {unit: self.stage.record(unit) or {} for unit in units}
        return self._after(records), records

    def sidecars(self, units: Iterable[str]) -> dict[str, dict[str, Tensor]]:
        """Load what finished units have left beside the model; nothing where they changed the model itself."""
        return {unit: self.stage.load(unit) for unit in units} if self.needs.sidecar else {}

    def _run_blocks(self) -> None:
        if self.needs.squared_gradients or self.needs.draws:
            assert self.gradient_samples is not None
            measure = drawn_gradients if self.needs.draws else squared_gradients
            with self.log.unit(self.kind, "gradients"):
                measure(self.model, self.gradient_samples, self.gradients, self.outside, self._progress)
        if self.needs.model_statistics and self.stage.record("model-survey") is None:
            assert self.samples is not None
            with self.log.unit(self.kind, "model survey"):
                self.stage.save("model-survey", self._measured_model(self.samples.tokens) if self.ranks.main else {})
        while self.step.wants_statistics(self.context, self.statistics):
            label = f"survey-{len(self.statistics)}"
            self._walk(label, f"{label}-inputs", self._measure_block)
            self.statistics.append([self.stage.record(f"{label}-{i}") or {} for i in range(len(self.blocks))])
        self._walk("block", "inputs", self._block)
        if self.outside and self.stage.record("outside") is None:
            with self.log.unit(self.kind, "outside") as line:
                linears = {name: linear for name, linear in self.model.outside().items() if name in self.outside}
                block = Block(OUTSIDE, "", self.model.model, linears, statistics=self.statistics, ranks=self.ranks)
                self._take_gradients(block, {})
                line |= self.step.run_block(block, self.context)
                self._finish("outside", block, {}, line)

    def _measured_model(self, samples: Sequence[Tensor]) -> dict[str, Tensor]:
        model = StreamedModel(self.state, self.context.device).whole()
        found = self.step.measure_model(model, samples, self.context, self._progress)
        self._check_finite(found)
        return found

    def _run_whole(self, units: Sequence[str]) -> None:
        """Work on the units of a pass that has the whole model in memory."""
        open_units = [unit for unit in units if self.stage.record(unit) is None]
        self.context.ranks.wait()  # before any is finished: all must see the same
        if not open_units:
            return
        assert self.samples is not None
        device = self.context.device
        whole = Whole(
            StreamedModel(self.state, device).whole(),
            lambda: StreamedModel(self.origin, device).whole(),
            self.samples.tokens,
            self.stage.folder / "scratch",
        )
        for unit in open_units:
            with self.log.unit(self.kind, unit) as line:
                tensors, record = self.step.run_model(unit, whole, self.context, self._progress)
                line |= record
                self._check_finite(tensors)
                if not self.context.ranks.main:
                    continue
                stored = {} if self.needs.sidecar else self.state.source.info()
                tensors = {n: t.to(getattr(torch, stored[n].dtype)) if n in stored else t for n, t in tensors.items()}
                self._save(unit, tensors, record, {"packed": {}, "skipped": {}})
                shutil.rmtree(whole.scratch, ignore_errors=True)

    def _walk(self, label: str, inputs: str, work: Callable[[int, str, str], None]) -> None:
        """Finish units ``<label>-0 …`` in order, and clear away the inputs that led to them."""
        count = len(self.blocks)
        first = next((i for i in range(count) if self.stage.record(f"{label}-{i}") is None), 0)
        if self.needs.inputs and first and self.stage.record(f"{inputs}-{first}") is None:
            for i in range(count):  # a finished unit was damaged later: what led to it is gone, so begin again
                self.stage.discard(f"{label}-{i}")
        unfinished = [self.stage.record(f"{label}-{i}") is None for i in range(count)]
        self.ranks.wait()
        for i in range(count):
            self._progress(f"{label.replace('-', ' ')} {i}", i, count)
            if unfinished[i]:
                work(i, f"{label}-{i}", inputs)
            self.stage.discard(f"{inputs}-{i}")
        self.stage.discard(f"{inputs}-{count}")

    def _progress(self, what: str, done: int, total: int) -> None:
        self.log.progress(f"{self.kind}: {what}", done, total)

    def _open(self, i: int, module: nn.Module, inputs: str) -> Block:
        name, state = self.blocks[i], self.state
        samples, variants, drawn = self._samples(i, inputs)
        whole = self.stage.load("model-survey") if self.needs.model_statistics else {}
        shape = block_shape(state.config, state.shapes, name) if self.context.structure.groups else None
        linears = self.model.linears(i)
        block = Block(i, name, module, linears, {}, samples, variants, self.statistics, whole, shape)
        block.ranks, block.lots = self.ranks, [len(lot) for lot in self.lots]
        self._take_gradients(block, drawn)
        return block

    def _measure_block(self, i: int, unit: str, inputs: str) -> None:
        with self.log.unit(self.kind, unit) as line, self.model.block(i) as module:
            block = self._open(i, module, inputs)
            line |= self.step.measure_block(block, self.context)
            self._carry(i, inputs, self._outputs(module, block.samples))
            self.stage.save(unit, {}, line)

    def _block(self, i: int, unit: str, inputs: str) -> None:
        with self.log.unit(self.kind, self.blocks[i]) as line:
            with self.model.block(i) as module:
                block, tensors = self._worked_on(i, module, inputs, line)
            self._finish(unit, block, tensors, line)  # the dense weights are let go: packing takes memory too

    def _worked_on(self, i: int, module: nn.Module, inputs: str, line: Record) -> tuple[Block, dict[str, Tensor]]:
        """Let the pass work on a block, note what it measured, and carry the outputs on: the block, and its dense tensors as stored."""
        block = self._open(i, module, inputs)
        unchanged = self.needs.inputs == "original"
        outputs = self._outputs(module, block.samples) if unchanged and not self.needs.outputs else {}
        line |= self.step.run_block(block, self.context)
        tensors = self._collect(block)
        if block.removed:
            outputs, tensors = self.stage.load(f"{inputs}-{i}", self.own) if self.needs.inputs else {}, {}
        elif not unchanged:  # load exactly what will be stored
            inner = {name.removeprefix(f"{block.name}."): tensor for name, tensor in tensors.items()}
            module.load_state_dict(inner, strict=False)
            outputs = self._outputs(module, block.samples)
        for name, found in block.outputs.items():
            own = zip(self.own, found, strict=True)
            outputs |= {f"{name}-{n}" if name else f"{n}": output.cpu() for n, output in own}
        for name, calls in ({} if block.removed or self.needs.outputs else block.variants).items():
            assert block.show is not None
            block.show(name)
            outputs |= self._outputs(module, calls, f"{name}-")
        self._carry(i, inputs, outputs)
        return block, tensors

    def _drawn(self) -> list[int]:
        """Return the samples of this process among those that gradients are measured with."""
        assert self.gradient_samples is not None
        return [n for lot in self.ranks.lots(len(self.gradient_samples.tokens)) for n in lot]

    def _take_gradients(self, block: Block, runs: Mapping[int, Run]) -> None:
        """Give a block what was measured of its gradients; ``runs`` are its calls on the samples that labels are drawn for."""
        if self.needs.squared_gradients:
            found = self.gradients.load(unit_of(block.index))
            block.hessians, block.squared_gradients = take_hessians(found), found
        if not self.needs.draws:
            return
        assert self.gradient_samples is not None
        samples = self.gradient_samples
        found = self.gradients.load(unit_of(block.index), None if block.index == OUTSIDE else self._drawn())
        block.hessians, predicted = take_hessians(found), predicted_tokens(samples)

        def draw(n: int) -> Draw:
            if block.index == OUTSIDE:
                return outside_draw(self.model, self.outside, n, samples.tokens[n], found, predicted)
            return block_draw(block.module, block.linears, runs[n], found[str(n)])

        block.draws = [[draw(n) for n in lot] for lot in self.ranks.lots(len(samples.tokens))]

    def _samples(self, i: int, inputs: str) -> tuple[list[Run], dict[str, list[Run]], dict[int, Run]]:
        """Return the block's calls on the calibration samples, those of every variant, and those of samples that labels are drawn for.

        ``inputs`` is the name under which a walk over the blocks keeps its carried activations; the first are made here.
        """
        if self.needs.inputs is None:
            return [], {}, {}
        assert self.samples is not None
        tokens, drawn = self.samples.tokens, self._drawn() if self.needs.draws else []
        if i == 0 and self.stage.record(f"{inputs}-0") is None:
            self.stage.save_joined(f"{inputs}-0", self.model.first_inputs({n: tokens[n] for n in self.own}))
        hidden = self.stage.load(f"{inputs}-{i}", {*self.own, *drawn})
        model, captures = self.model, dict[tuple[int, int], Call]()

        def call(n: int, key: str, length: int | None = None) -> Run:
            def run(module: nn.Module) -> Tensor:
                state = hidden[key][:, :length].to(model.device)
                place = n, state.shape[1]
                if place not in captures:
                    captures[place] = model.capture(tokens[n][:length])[1][i]
                return model.run(module, state, captures[place])

            return run

        def varied(name: str) -> list[Run]:
            return [call(n, f"{name}-{n}" if i else f"{n}", self.needs.variant_length) for n in self.own]

        variants = {name: varied(name) for name in self.needs.variants}
        drawn_for = {n: call(n, f"{n}", self.needs.gradient_length) for n in drawn}
        return [call(n, f"{n}") for n in self.own], variants, drawn_for

    @torch.no_grad()
    def _outputs(self, module: nn.Module, calls: Sequence[Run], prefix: str = "") -> dict[str, Tensor]:
        return {f"{prefix}{n}": run(module).cpu() for n, run in zip(self.own, calls, strict=True)}

    def _carry(self, i: int, inputs: str, outputs: Mapping[str, Tensor]) -> None:
        """Store the next block's inputs; those of an earlier try stay, so that a resumed run sees the same bits."""
        if self.needs.inputs and self.stage.record(f"{inputs}-{i + 1}") is None:
            self.stage.save_joined(f"{inputs}-{i + 1}", outputs)

    def _collect(self, block: Block) -> dict[str, Tensor]:
        """Return the block's dense tensors as they will be stored, in the dtype they came in."""
        stored = self.state.source.info()
        dense = {f"{block.name}.{name}": tensor for name, tensor in block.module.state_dict().items()}
        kept = dense.keys() & stored.keys() - {
            f"{name}.weight" for name in block.packed
        }  # what an earlier block has is not
        return {n: t.to("cpu", getattr(torch, stored[n].dtype)) for n, t in dense.items() if n in kept}

    def _finish(self, unit: str, block: Block, tensors: dict[str, Tensor], record: Record) -> None:
        if not self.ranks.main:
            self.ranks.wait()
            return
        self._check_finite(tensors)
        shapes, storage = {}, {}
        for name, found in block.packed.items():
            dense = found.shared is None and in_stack(
                name, self.context.structure.experts
            )  # stacks have no sparse form
            shape, stored, note = (*pack(found.codes, found.codebooks), None) if dense else pack_smaller(found)
            tensors |= {f"{name}.{inner}": tensor for inner, tensor in stored.items()}
            shapes[name], storage[name] = vars(shape), note
        notes: Record = {"packed": shapes, "skipped": block.skipped}
        if self.needs.changes_shapes:
            notes["shape"] = None if block.removed or block.shape is None else vars(block.shape)
        if any(storage.values()):  # units without a pruned weight are as they always were
            notes["storage"] = {name: note for name, note in storage.items() if note}
        self._save(unit, tensors, record, notes)

    def _save(self, unit: str, tensors: Mapping[str, Tensor], figures: Record, notes: Record) -> None:
        if taken := sorted(figures.keys() & set(NOTES)):
            raise CompressError(f"pass {self.kind}: its record has {taken[0]!r}, the pipeline's own; choose another.")
        self.stage.save(unit, tensors, {**figures, **notes})

    def _check_finite(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not all_finite(tensor):
                raise CompressError(f"{name}: {self.kind} left values that are not finite.")

    def _tied_in(self, packed: Collection[str]) -> bool:
        """Tell whether a tied embedding is among those that are packed: its head goes with it."""
        return self.context.tied and self.context.structure.embedding in packed and self.context.head not in packed

    def _after(self, records: Mapping[str, Record]) -> State:
        """Return the model as the finished units leave it."""
        if self.needs.sidecar:
            return replace(self.state, key=self.stage.key)
        new = {name: shape_of(fields) for record in records.values() for name, fields in record["packed"].items()}
        packed, config = {**self.state.packed, **new}, self.state.config
        if self.context.head in packed and self.context.tied:
            config = untied(config)
        files = [self.stage.path(unit) for unit in records]
        gone = {*new, self.context.head} if self._tied_in(new) else set(new)  # files may hold a copy for the head
        source = Overlay(self.state.source, files, [f"{name}.weight" for name in sorted(gone)])
        state = replace(self.state, source=source, config=config, packed=packed, key=self.stage.key)
        if self.needs.removes_experts:
            return with_fewer(state, self.step.experts_after(self.context))
        if not self.needs.changes_shapes:
            return state
        shapes = {name: records[f"block-{i}"].get("shape") for i, name in enumerate(self.blocks)}
        return reshaped(state, {name: shape and BlockShape(**shape) for name, shape in shapes.items()})
