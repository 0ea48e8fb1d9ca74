"""From a recipe to a checkpoint: every pass on every block, each step on disk before the next begins."""

from __future__ import annotations

import errno
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from compress import writer
from compress.calibration import Samples, draw_samples
from compress.errors import CompressError
from compress.fisher import squared_gradients
from compress.passes import Block, Context, Pass, pass_class
from compress.quant.sparse import shape_of, smaller_form
from compress.recipe import Overrides, Recipe, load_recipe
from compress.streaming import Call, State, StreamedModel, empty_model, tensor_names
from compress.structure import architecture, block_prefix
from compress.version import __version__
from compress.weights import Checkpoint, Overlay
from compress.workspace import Record, Stage, Workspace, digest

Run = Callable[[nn.Module], Tensor]
_ORIGINAL = "original-"  # of carried activations that come from the original blocks, where both kinds are kept
Report = Callable[[str, int, int], None]
"""Called with (what, steps done, steps in all)."""


@dataclass(frozen=True)
class Source:
    """The dense model a recipe starts from."""

    folder: Path
    state: State
    tokenizer: PreTrainedTokenizerBase
    sha256: dict[str, str]


def run(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    output: str | Path | None = None,
    overrides: Overrides = (),
    workspace: str | Path | None = None,
    report: Report | None = None,
) -> Path:
    """Compress a model.

    Run again after an interruption, it continues where it was and ends with the same bytes.

    Args:
        recipe: YAML file, mapping or :class:`Recipe`.
        output: folder to create; the recipe's own ``output`` otherwise.
        overrides: ``key.0.key=value`` assignments on the recipe, or a mapping of paths to values.
        workspace: where finished units are kept; ``<output>.work`` otherwise, which is deleted at the end. One
            that is given stays, and recipes that share a beginning share its units.
        report: called as work proceeds.

    Returns:
        The checkpoint folder. Beside it, ``<output>.log.jsonl`` has one line per unit, with seconds.

    Raises:
        CompressError: anything a user can put right; nothing half-written is left at ``output``.
    """
    settings = load_recipe(recipe, overrides)
    target = _target(output or settings.output)
    work = Workspace(Path(workspace) if workspace else target.with_name(target.name + ".work"))
    with _disk_errors(work.folder), work.locked():
        source = open_source(settings.model, settings.revision)
        log = _Log(target.with_name(target.name + ".log.jsonl"), report)
        _compress(settings, source, work, target, log)
    if workspace is None:
        work.remove()
    return target


def _target(output: str | Path | None) -> Path:
    if output is None:
        raise CompressError("no output folder: give -o, or output in the recipe.")
    target = Path(output)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CompressError(f"output {target}: exists already and is not an empty folder; choose another or remove it.")
    return target


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        if full:
            raise CompressError(
                f"{folder}: the disk is full; what is finished is kept: free space and run again."
            ) from error
        if isinstance(error, OSError) and error.filename:
            raise CompressError(f"{error.filename}: {error.strerror}.") from error
        raise


class _Log:
    """The per-unit log: one JSON line each, and the caller's progress report."""

    def __init__(self, path: Path, report: Report | None) -> None:
        self.path, self._report = path, report
        path.parent.mkdir(parents=True, exist_ok=True)

    def progress(self, what: str, done: int, total: int) -> None:
        if self._report is not None:
            self._report(what, done, total)

    def unit(self, kind: str, unit: str, seconds: float, record: Record) -> None:
        line = {"time": time.time(), "pass": kind, "unit": unit, "seconds": round(seconds, 4), **record}
        with self.path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(line) + "\n")


def open_source(model: str, revision: str | None = None) -> Source:
    """Find a dense model: a folder, the built-in one, or a hub id.

    Raises:
        CompressError: it is not there, has no safetensors, is quantised, or of an undeclared architecture.
    """
    folder = model_folder(model, revision)
    config = read_config(folder)
    if getattr(config, "quantization_config", None) is not None:
        raise CompressError(f"{folder}: is already quantised; compress starts from a dense model.")
    architecture(config)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # tokenizer classes fail in many ways
        raise CompressError(f"{folder}: its tokenizer cannot be loaded ({_first_line(error)}).") from error
    empty = empty_model(config)
    checkpoint = Checkpoint(folder, tensor_names(empty))
    sha256 = checkpoint.sha256()
    return Source(folder, State(checkpoint, config, {}, digest(sha256)), tokenizer, sha256)


def model_folder(model: str, revision: str | None = None) -> Path:
    """The local folder of a model name."""
    if model == "builtin":
        return Path(str(files("compress.demo") / "model"))
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise CompressError(f"model {model!r}: there is no such folder, and it is not a hub id (owner/name).")
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
    except Exception as error:  # network, authorisation, absence: the hub's own types change between releases
        raise CompressError(
            f"model {model!r}: there is no such folder, and the hub did not deliver it ({_first_line(error)})."
        ) from error


def read_config(folder: Path) -> PretrainedConfig:
    """A folder's configuration, without running any code of its own."""
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(folder)
    except CompressError:
        raise
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, … for a bad config.json
        raise CompressError(f"{folder}: config.json cannot be used ({_first_line(error)}).") from error
    return config


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _compress(settings: Recipe, source: Source, work: Workspace, target: Path, log: _Log) -> None:
    passes: list[Pass[Any]] = [pass_class(config.kind)(config) for config in settings.passes]
    device = pick_device(settings.device)
    context = make_context(source, device, settings.seed)
    check_order(passes, settings, context)
    samples = None
    if any(step.needs().calibration for step in passes):
        assert settings.calibration is not None  # check_order has refused this
        limit = getattr(source.state.config, "max_position_embeddings", None)
        samples = draw_samples(settings.calibration, source.tokenizer, limit)
    state, history = source.state, []
    for step in passes:
        runner = _Runner(step, state, samples, context, work, log)
        state, units = runner.run()
        history.append({"config": step.config.model_dump(mode="json"), "units": units})
    log.progress("writing", 0, 1)
    writer.write_checkpoint(
        state, source.folder, target,
        manifest={
            "recipe": settings.model_dump(mode="json", exclude={"output"}),
            "model_sha256": source.sha256,
            "calibration": samples.source if samples else None,
            "passes": history,
        },
        probe_tokens=source.tokenizer("def compress(model):\n    return", add_special_tokens=False)["input_ids"],
        device=device,
    )  # fmt: skip
    log.progress("writing", 1, 1)


def pick_device(name: str) -> torch.device:
    """The device of a recipe.

    Raises:
        CompressError: this machine or this build of torch does not have it.
    """
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise CompressError(f"device {name!r} cannot be used here: {_first_line(error)}.") from error
    return device


def make_context(source: Source, device: torch.device, seed: int) -> Context:
    """What passes may know of the model before any weight is read."""
    model = StreamedModel(source.state, torch.device("meta"))
    inside = {name: linear.shape for i in range(len(model.blocks)) for name, linear in model.linears(i).items()}
    outside = {name: linear.shape for name, linear in model.outside().items()}
    tied = bool(source.state.config.tie_word_embeddings)
    return Context(model.structure, device, seed, inside, outside, model.head, tied)


def check_order(passes: Sequence[Pass[Any]], settings: Recipe, context: Context) -> None:
    """Refuse what cannot work before any work is done.

    Raises:
        CompressError: a pass after a packing one, no calibration text, or settings that do not fit the model.
    """
    packed_by = None
    for index, step in enumerate(passes):
        if packed_by is not None:
            raise CompressError(
                f"passes.{index} ({step.config.kind}) works on dense weights, but {packed_by} before it has packed "
                "them; put it earlier."
            )
        if step.needs().calibration and settings.calibration is None:
            raise CompressError(
                f"passes.{index} ({step.config.kind}) looks at text, but the recipe has no calibration."
            )
        if step.needs().packs:
            packed_by = f"passes.{index} ({step.config.kind})"
        step.check(context)


class _Runner:
    """One pass over all blocks."""

    def __init__(
        self, step: Pass[Any], state: State, samples: Samples | None,
        context: Context, work: Workspace, log: _Log,
    ) -> None:  # fmt: skip
        self.step, self.state, self.context, self.log = step, state, context, log
        self.kind, self.needs = step.config.kind, step.needs()
        self.samples = samples if self.needs.calibration else None
        # pydantic leaves out nothing: the resolved settings, defaults included, decide the key.
        text = self.samples.key if self.samples else None
        settings = step.config.model_dump(mode="json")
        self.stage: Stage = work.stage(
            self.kind, state.key, settings, text, context.seed, str(context.device), __version__
        )
        self.outside = step.outside(context)
        self.fisher = work.stage("fisher", state.key, text, self.outside, str(context.device), __version__)
        self.surveys: list[list[Record]] = []
        self._model: StreamedModel | None = None

    @property
    def model(self) -> StreamedModel:
        """Opened when first needed: a pass that is finished needs none."""
        if self._model is None:
            self._model = StreamedModel(self.state, self.context.device)
        return self._model

    def run(self) -> tuple[State, dict[str, Record]]:
        """Do what is not done yet; return the state after the pass and its units' records."""
        count = self._block_count()
        units = [f"block-{i}" for i in range(count)] + (["outside"] if self.outside else [])
        if any(self.stage.record(unit) is None for unit in units):
            if self.needs.squared_gradients:
                assert self.samples is not None
                started = time.perf_counter()
                squared_gradients(self.model, self.samples, self.fisher, self.outside, self._report)
                self.log.unit(self.kind, "squared gradients", time.perf_counter() - started, {})
            self._survey(count)
            self._walk("block", "inputs", count, self._block)
            if self.outside and self.stage.record("outside") is None:
                self._outside()
        self._report("done", len(units), len(units))
        return self._after(units)

    def _survey(self, count: int) -> None:
        """Rounds over all blocks before any is changed, for as long as the pass wants another."""
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
        samples, original = self._samples(i, inputs)
        return Block(i, name, module, self.model.linears(i), self._fisher(i), samples, original, self.surveys)

    def _survey_block(self, i: int, unit: str, inputs: str) -> None:
        started = time.perf_counter()
        with self.model.block(i) as module:
            block = self._open(i, module, inputs)
            outputs = self._outputs(module, block.original, _ORIGINAL)
            record = self.step.survey_block(block, self.context)
            self._carry(i, inputs, outputs | self._outputs(module, block.samples))
        self.stage.save(unit, {}, record)
        self.log.unit(self.kind, unit, time.perf_counter() - started, record)

    def _block(self, i: int, unit: str, inputs: str) -> None:
        started = time.perf_counter()
        with self.model.block(i) as module:
            block = self._open(i, module, inputs)
            unchanged = self.needs.inputs == "original"
            outputs = self._outputs(module, block.original, _ORIGINAL)
            outputs |= self._outputs(module, block.samples if unchanged else ())
            record = self.step.run_block(block, self.context)
            tensors = self._collect(block)
            if block.samples and not unchanged:
                self._restore(module, tensors, block.name)
                outputs |= self._outputs(module, block.samples)
            self._carry(i, inputs, outputs)
            self._finish(unit, block, tensors, record, started)

    def _fisher(self, i: int) -> dict[str, Tensor]:
        return self.fisher.load(f"fisher-{i}") if self.needs.squared_gradients else {}

    def _samples(self, i: int, inputs: str) -> tuple[list[Run], list[Run]]:
        """The block's calls on the calibration samples, and those on original inputs if both kinds are needed.

        ``inputs`` is the name under which a walk over the blocks keeps its carried activations; the first are made here.
        """
        if self.needs.inputs is None:
            return [], []
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

        samples = [call(n, str(n)) for n in range(len(tokens))]
        if self.needs.inputs != "both":
            return samples, []
        keys = [str(n) if i == 0 else f"{_ORIGINAL}{n}" for n in range(len(tokens))]
        return samples, [call(n, key) for n, key in enumerate(keys)]

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
        block = Block(-1, "", self.model.model, linears, self._fisher(-1), surveys=self.surveys)
        record = self.step.run_block(block, self.context)
        self._finish("outside", block, {}, record, started)

    def _collect(self, block: Block) -> dict[str, Tensor]:
        """The block's dense tensors as they will be stored, in the dtype they came in."""
        stored = self.state.source.info()
        dense = {f"{block.name}.{name}": tensor for name, tensor in block.module.state_dict().items()}
        packed = {f"{name}.weight" for name in block.packed}
        return {name: tensor.to("cpu", stored[name].dtype) for name, tensor in dense.items() if name not in packed}

    def _restore(self, module: nn.Module, tensors: Mapping[str, Tensor], prefix: str) -> None:
        """Go on with exactly what was stored."""
        inner = {name.removeprefix(prefix + "."): tensor for name, tensor in tensors.items()}
        module.load_state_dict({name: value.float() for name, value in inner.items()}, strict=False)

    def _finish(self, unit: str, block: Block, tensors: dict[str, Tensor], record: Record, started: float) -> None:
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise CompressError(f"{name}: {self.kind} left values that are not finite.")
        shapes, storage = {}, {}
        for name, packed in block.packed.items():
            shape, stored, note = smaller_form(packed.shape, packed.tensors)
            tensors |= {f"{name}.{inner}": tensor for inner, tensor in stored.items()}
            shapes[name], storage[name] = vars(shape), note
        whole = {**record, "packed": shapes, "skipped": block.skipped}
        if any(storage.values()):  # units without a pruned weight are as they always were
            whole["storage"] = {name: note for name, note in storage.items() if note}
        self.stage.save(unit, tensors, whole)
        self.log.unit(self.kind, block.name or unit, time.perf_counter() - started, record)

    def _after(self, units: Sequence[str]) -> tuple[State, dict[str, Record]]:
        records = {unit: self.stage.record(unit) or {} for unit in units}
        packed = dict(self.state.packed)
        for record in records.values():
            packed |= {name: shape_of(fields) for name, fields in record.pop("packed").items()}
        config = self.state.config
        if self.context.head in packed and config.tie_word_embeddings:
            config = type(config).from_dict({**config.to_dict(), "tie_word_embeddings": False})
        removed = [f"{name}.weight" for name in packed]
        source = Overlay(self.state.source, [self.stage.path(unit) for unit in units], removed)
        return State(source, config, packed, self.stage.key), records
