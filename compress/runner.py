"""One pass of a recipe: its units of work, each on disk before the next begins."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress.calibration import Samples
from compress.errors import CompressError
from compress.fisher import squared_gradients, unit_of
from compress.passes import OUTSIDE, Block, Context, Pass, Report, Run, Whole
from compress.processes import processes
from compress.quant.format import pack_smaller, shape_of
from compress.shapes import BlockShape, block_shape
from compress.streaming import Call, State, StreamedModel, reshaped
from compress.structure import block_prefix
from compress.version import __version__
from compress.weights import Overlay
from compress.workspace import Record, Stage, Workspace

NOTES = ("packed", "skipped", "shape", "storage")
"""What the pipeline itself keeps in a unit's record, beside the figures of the pass."""


@dataclass(frozen=True)
class Finished:
    """Hold what is known of one finished unit of work: what the pass says of it, and what the pipeline does.

    Attributes:
        figures: as the pass returned them.
        notes: by :data:`NOTES`: name -> fields of its ``PackedShape``, name -> reason, the block's shape (None if it is
            removed), name -> what :func:`pack_smaller` notes.
    """

    figures: Record
    notes: Record

    @classmethod
    def of(cls, record: Record) -> Finished:
        """Take apart the record on disk."""
        notes = {name: value for name, value in record.items() if name in NOTES}
        return cls({name: value for name, value in record.items() if name not in NOTES}, notes)

    def described(self) -> Record:
        """Return what the manifest says of the unit; the config has what is packed."""
        return {name: value for name, value in sorted({**self.figures, **self.notes}.items()) if name != "packed"}


class Log:
    """Write the log, one JSON line per unit, and tell the caller of progress."""

    def __init__(self, path: Path, report: Report | None) -> None:
        self.path, self._report = path, report
        path.parent.mkdir(parents=True, exist_ok=True)

    def progress(self, what: str, done: int, total: int) -> None:
        """Tell the caller how far the work is."""
        if self._report is not None:
            self._report(what, done, total)

    def unit(self, kind: str, unit: str, seconds: float, record: Record) -> None:
        """Write the line of one unit."""
        line = {"time": time.time(), "pass": kind, "unit": unit, "seconds": round(seconds, 4), **record}
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
        self.stage: Stage = work.stage(
            self.kind, state.key, settings, text, context.seed, context.device.type, __version__
        )
        self.outside = step.outside(context)
        self.fisher = work.stage("fisher", state.key, text, self.outside, context.device.type, __version__)
        self.processes = processes(context.device)
        self.surveys: list[list[Record]] = []
        self.beside: dict[str, dict[str, Tensor]] = {}
        self._model: StreamedModel | None = None

    @property
    def model(self) -> StreamedModel:
        """Open the model when it is first needed: a pass that is finished needs none."""
        if self._model is None:
            self._model = StreamedModel(self.state, self.context.device)
        return self._model

    def run(self) -> tuple[State, dict[str, Finished]]:
        """Do what is not done yet; return the state after the pass, and its units."""
        if self.needs.whole_model:
            units = self.step.model_units(self.state.packed)
            self._run_whole(units)
        else:
            units = [f"block-{i}" for i in range(self._block_count())] + (["outside"] if self.outside else [])
            if self.processes.is_main_process and any(self.stage.record(unit) is None for unit in units):
                self._run_blocks()
        self.processes.wait_for_everyone()
        self._report("done", len(units), len(units))
        return self._after(units)

    def _run_blocks(self) -> None:
        if self.needs.squared_gradients:
            assert self.samples is not None
            started = time.perf_counter()
            squared_gradients(self.model, self.samples, self.fisher, self.outside, self._report)
            self.log.unit(self.kind, "squared gradients", time.perf_counter() - started, {})
        if self.needs.model_survey and self.stage.record("model-survey") is None:
            self._survey_model()
        count = self._block_count()
        self._survey(count)
        self._walk("block", "inputs", count, self._block)
        if self.outside and self.stage.record("outside") is None:
            self._outside()

    def _run_whole(self, units: Sequence[str]) -> None:
        """Work on the units of a pass that has the whole model in memory."""
        open_units = [unit for unit in units if self.stage.record(unit) is None]
        self.processes.wait_for_everyone()  # before any is finished: all must see the same
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
            started = time.perf_counter()
            tensors, record = self.step.run_model(unit, whole, self.context, self._report)
            self._check_finite(tensors)
            if not self.processes.is_main_process:
                continue
            stored = {} if self.needs.beside else self.state.source.info()
            tensors = {n: t.to(stored[n].dtype) if n in stored else t for n, t in tensors.items()}
            self._save(unit, tensors, record, {"packed": {}, "skipped": {}})
            shutil.rmtree(whole.scratch, ignore_errors=True)
            self.log.unit(self.kind, unit, time.perf_counter() - started, record)

    def _survey_model(self) -> None:
        """Let the pass look at the whole model; what it finds is a unit like any other."""
        assert self.samples is not None
        started = time.perf_counter()
        model = StreamedModel(self.state, self.context.device).whole()
        found = self.step.survey_model(model, self.samples.tokens, self.context, self._report)
        self._check_finite(found)
        self.stage.save("model-survey", found)
        self.log.unit(self.kind, "model survey", time.perf_counter() - started, {})

    def _survey(self, count: int) -> None:
        """Go over all blocks before any is changed, for as long as the pass wants another round."""
        while self.step.wants_survey(self.context, self.surveys):
            label = f"survey-{len(self.surveys)}"
            self._walk(label, f"{label}-inputs", count, self._survey_block)
            records = [self.stage.record(f"{label}-{i}") for i in range(count)]
            self.surveys.append([record for record in records if record is not None])

    def _walk(self, label: str, inputs: str, count: int, work: Callable[[int, str, str], None]) -> None:
        """Finish units ``<label>-0 …`` in order, and clear away the inputs that led to them."""
        first = next((i for i in range(count) if self.stage.record(f"{label}-{i}") is None), 0)
        if self.needs.inputs and first and self.stage.record(f"{inputs}-{first}") is None:
            for i in range(count):  # a finished unit was damaged later: what led to it is gone, so begin again
                self.stage.discard(f"{label}-{i}")
        for i in range(count):
            self._report(f"{label.replace('-', ' ')} {i}", i, count)
            if self.stage.record(f"{label}-{i}") is None:
                work(i, f"{label}-{i}", inputs)
            self.stage.discard(f"{inputs}-{i}")
        self.stage.discard(f"{inputs}-{count}")

    def _block_count(self) -> int:
        prefix = self.context.structure.blocks + "."
        return len({name.removeprefix(prefix).split(".")[0] for name in self.context.linears})

    def _report(self, what: str, done: int, total: int) -> None:
        self.log.progress(f"{self.kind}: {what}", done, total)

    def _open(self, i: int, module: nn.Module, inputs: str) -> Block:
        name = block_prefix(self.context.structure, i)
        samples, variants = self._samples(i, inputs)
        findings = self.stage.load("model-survey") if self.needs.model_survey else {}
        shape = (
            None if self.context.structure.groups is None else block_shape(self.state.config, self.state.shapes, name)
        )
        linears = self.model.linears(i)
        return Block(i, name, module, linears, self._fisher(i), samples, variants, self.surveys, findings, shape)

    def _survey_block(self, i: int, unit: str, inputs: str) -> None:
        started = time.perf_counter()
        with self.model.block(i) as module:
            block = self._open(i, module, inputs)
            record = self.step.survey_block(block, self.context)
            self._carry(i, inputs, self._outputs(module, block.samples))
        self.stage.save(unit, {}, record)
        self.log.unit(self.kind, unit, time.perf_counter() - started, record)

    def _block(self, i: int, unit: str, inputs: str) -> None:
        started = time.perf_counter()
        with self.model.block(i) as module:
            block = self._open(i, module, inputs)
            unchanged = self.needs.inputs == "original"
            outputs = self._outputs(module, block.samples) if unchanged else {}
            record = self.step.run_block(block, self.context)
            tensors = self._collect(block)
            if block.removed:
                outputs, tensors = self.stage.load(f"{inputs}-{i}") if self.needs.inputs else {}, {}
            elif not unchanged:
                self._restore(module, tensors, block.name)
                outputs = self._outputs(module, block.samples)
            for name, calls in ({} if block.removed else block.variants).items():
                assert block.show is not None
                block.show(name)
                outputs |= self._outputs(module, calls, f"{name}-")
            self._carry(i, inputs, outputs)
            self._finish(unit, block, tensors, record, started)

    def _fisher(self, i: int) -> dict[str, Tensor]:
        return self.fisher.load(unit_of(i)) if self.needs.squared_gradients else {}

    def _samples(self, i: int, inputs: str) -> tuple[list[Run], dict[str, list[Run]]]:
        """Return the block's calls on the calibration samples, and those of every variant.

        ``inputs`` is the name under which a walk over the blocks keeps its carried activations; the first are made here.
        """
        if self.needs.inputs is None:
            return [], {}
        assert self.samples is not None
        tokens = self.samples.tokens
        with torch.no_grad():
            if i == 0 and self.stage.record(f"{inputs}-0") is None:
                self.stage.save(f"{inputs}-0", {str(n): self.model.capture(t)[0] for n, t in enumerate(tokens)})
        hidden = self.stage.load(f"{inputs}-{i}")
        captures: dict[int, Call] = {}

        def call(n: int, key: str) -> Run:
            def run(module: nn.Module) -> Tensor:
                if n not in captures:
                    captures[n] = self.model.capture(tokens[n])[1][i]
                return self.model.run(module, hidden[key].to(self.model.device), captures[n])

            return run

        def calls(prefix: str) -> list[Run]:
            return [call(n, f"{prefix}{n}") for n in range(len(tokens))]

        return calls(""), {name: calls(f"{name}-" if i else "") for name in self.needs.variants}

    @torch.no_grad()
    def _outputs(self, module: nn.Module, calls: Sequence[Run], prefix: str = "") -> dict[str, Tensor]:
        return {f"{prefix}{n}": run(module).cpu() for n, run in enumerate(calls)}

    def _carry(self, i: int, inputs: str, outputs: Mapping[str, Tensor]) -> None:
        """Store the next block's inputs; those of an earlier try stay, so that a resumed run sees the same bits."""
        if outputs and self.stage.record(f"{inputs}-{i + 1}") is None:
            self.stage.save(f"{inputs}-{i + 1}", outputs)

    def _outside(self) -> None:
        started = time.perf_counter()
        linears = {name: linear for name, linear in self.model.outside().items() if name in self.outside}
        block = Block(OUTSIDE, "", self.model.model, linears, self._fisher(OUTSIDE), surveys=self.surveys)
        record = self.step.run_block(block, self.context)
        self._finish("outside", block, {}, record, started)

    def _collect(self, block: Block) -> dict[str, Tensor]:
        """Return the block's dense tensors as they will be stored, in the dtype they came in."""
        stored = self.state.source.info()
        dense = {f"{block.name}.{name}": tensor for name, tensor in block.module.state_dict().items()}
        packed = {f"{name}.weight" for name in block.packed}
        return {name: tensor.to("cpu", stored[name].dtype) for name, tensor in dense.items() if name not in packed}

    def _restore(self, module: nn.Module, tensors: Mapping[str, Tensor], prefix: str) -> None:
        """Load into the block exactly what was stored."""
        inner = {name.removeprefix(prefix + "."): tensor for name, tensor in tensors.items()}
        module.load_state_dict({name: value.float() for name, value in inner.items()}, strict=False)

    def _finish(self, unit: str, block: Block, tensors: dict[str, Tensor], record: Record, started: float) -> None:
        self._check_finite(tensors)
        shapes, storage = {}, {}
        for name, found in block.packed.items():
            shape, stored, note = pack_smaller(found)
            tensors |= {f"{name}.{inner}": tensor for inner, tensor in stored.items()}
            shapes[name], storage[name] = vars(shape), note
        notes: Record = {"packed": shapes, "skipped": block.skipped}
        if self.needs.changes_shapes:
            notes["shape"] = None if block.removed or block.shape is None else asdict(block.shape)
        if any(storage.values()):  # units without a pruned weight are as they always were
            notes["storage"] = {name: note for name, note in storage.items() if note}
        self._save(unit, tensors, record, notes)
        self.log.unit(self.kind, block.name or unit, time.perf_counter() - started, record)

    def _save(self, unit: str, tensors: Mapping[str, Tensor], figures: Record, notes: Record) -> None:
        taken = sorted(figures.keys() & set(NOTES))
        if taken:
            raise CompressError(
                f"pass {self.kind}: its record has {taken[0]!r}, a name that the pipeline uses; choose another."
            )
        self.stage.save(unit, tensors, {**figures, **notes})

    def _check_finite(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise CompressError(f"{name}: {self.kind} left values that are not finite.")

    def _after(self, units: Sequence[str]) -> tuple[State, dict[str, Finished]]:
        finished = {unit: Finished.of(self.stage.record(unit) or {}) for unit in units}
        new = {name: shape_of(fields) for unit in finished.values() for name, fields in unit.notes["packed"].items()}
        packed = {**self.state.packed, **new}
        config = self.state.config
        if self.context.head in packed and config.tie_word_embeddings:
            config = type(config).from_dict({**config.to_dict(), "tie_word_embeddings": False})
        if self.needs.beside:
            self.beside = {unit: self.stage.load(unit) for unit in units}
            return State(self.state.source, config, packed, self.stage.key, self.state.shapes), finished
        removed = [f"{name}.weight" for name in new]
        source = Overlay(self.state.source, [self.stage.path(unit) for unit in units], removed)
        state = State(source, config, packed, self.stage.key, self.state.shapes)
        if self.needs.changes_shapes:
            names = [block_prefix(self.context.structure, i) for i in range(self._block_count())]
            found = {name: finished[f"block-{i}"].notes.get("shape") for i, name in enumerate(names)}
            state = reshaped(state, {name: shape and BlockShape(**shape) for name, shape in found.items()})
        return state, finished
