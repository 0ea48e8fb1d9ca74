"""From a recipe to a checkpoint: every pass on every block, each step on disk before the next begins."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerBase

from compress import writer
from compress.calibration import draw_samples
from compress.errors import CompressError, first_line
from compress.loading import load_tokenizer
from compress.passes import Context, Pass, Report, pass_class
from compress.processes import processes
from compress.quant.format import PackedShape
from compress.recipe import Calibration, Overrides, Recipe, load_recipe
from compress.runner import Log, Runner
from compress.streaming import State, StreamedModel, empty_model, foreseen, tensor_names
from compress.structure import architecture
from compress.weights import Checkpoint
from compress.workspace import Workspace, digest


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

    Run again after an interruption, it continues where it was and ends with the same bytes. Under ``torchrun`` or ``accelerate
    launch`` the main process compresses, and all share the samples of passes that train.

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
    team = processes(pick_device(settings.device))
    main = team.is_main_process
    with _disk_errors(work.folder), work.locked() if main else nullcontext():
        source = open_source(settings.model, settings.revision)
        log = Log(target.with_name(target.name + ".log.jsonl"), report if main else None)
        _compress(settings, source, work, target, log)
    team.wait_for_everyone()
    if workspace is None and main:
        work.remove()
    return target


def _target(output: str | Path | None) -> Path:
    if output is None:
        raise CompressError("no output folder: give -o, or output in the recipe.")
    target = Path(output)
    if not target.name:
        raise CompressError(f"output {target}: give the name of a folder to create.")
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
    tokenizer = load_tokenizer(folder)
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
            f"model {model!r}: there is no such folder, and the hub did not deliver it ({first_line(error)})."
        ) from error


def read_config(folder: Path) -> PretrainedConfig:
    """A folder's configuration, without running any code of its own."""
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(folder)
    except CompressError:
        raise
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, … for a bad config.json
        raise CompressError(f"{folder}: config.json cannot be used ({first_line(error)}).") from error
    return config


def _compress(settings: Recipe, source: Source, work: Workspace, target: Path, log: Log) -> None:
    passes: list[Pass[Any]] = [pass_class(config.kind)(config) for config in settings.passes]
    device = pick_device(settings.device)
    (_, context), *_ = check_order(passes, settings, source, device)
    texts = [text_of(step, settings) for step in passes]
    drawn = {
        text: draw_samples(text, source.tokenizer, context.context_length) for text in dict.fromkeys(texts) if text
    }
    for samples in drawn.values():
        _check_tokens(samples.tokens, source)
    state, history, beside = source.state, [], []
    for step, text in zip(passes, texts, strict=True):
        context = make_context(source, device, settings.seed, state)
        runner = Runner(step, state, source.state, drawn[text] if text else None, context, work, log)
        state, units = runner.run()
        own = {"text": drawn[text].source} if text and step.needs().text else {}
        described = {name: unit.described() for name, unit in units.items()}
        history.append({"config": step.config.model_dump(mode="json"), **own, "units": described})
        beside.append((step, runner.beside, {name: unit.figures for name, unit in units.items()}))
    if not processes(device).is_main_process:
        return
    calibration = drawn.get(settings.calibration) if settings.calibration else None

    def write_beside(folder: Path) -> None:
        for step, tensors, records in beside:
            step.write_files(folder, tensors, records)

    log.progress("writing", 0, 1)
    writer.write_checkpoint(
        state, source.folder, target,
        manifest={
            "recipe": settings.model_dump(mode="json", exclude={"output"}),
            "model_sha256": source.sha256,
            "calibration": calibration.source if calibration else None,
            "passes": history,
        },
        probe_tokens=source.tokenizer("def compress(model):\n    return", add_special_tokens=False)["input_ids"],
        device=device,
        write_beside=write_beside,
    )  # fmt: skip
    log.progress("writing", 1, 1)


def _check_tokens(samples: Sequence[Tensor], source: Source) -> None:
    """The tokenizer belongs to the model: it knows no token beyond the embedding."""
    largest = max(int(tokens.max()) for tokens in samples)
    if largest >= source.state.config.vocab_size:
        raise CompressError(
            f"{source.folder}: its tokenizer makes token {largest} of the text, but the model has an embedding for "
            f"{source.state.config.vocab_size} tokens; the two do not belong together."
        )


def text_of(step: Pass[Any], settings: Recipe) -> Calibration | None:
    """What a pass learns from: its own text, else the recipe's calibration; None if it looks at none."""
    return step.needs().text or settings.calibration if step.needs().calibration else None


def pick_device(name: str) -> torch.device:
    """The device of a recipe; ``auto`` gives each process on a machine a GPU of its own.

    Raises:
        CompressError: this machine or this build of torch does not have it.
    """
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.empty(0, device=device)
        if name == "auto" and device.type == "cuda" and (team := processes(device)).num_processes > 1:
            device = team.device
    except (RuntimeError, AssertionError) as error:
        raise CompressError(f"device {name!r} cannot be used here: {first_line(error)}.") from error
    return device


def make_context(source: Source, device: torch.device, seed: int, state: State | None = None) -> Context:
    """What passes may know of the model before any weight is read; of the source's own unless a later state is given."""
    state = state or source.state
    model = StreamedModel(state, torch.device("meta"))
    inside = {name: linear.shape for i in range(len(model.blocks)) for name, linear in model.linears(i).items()}
    outside = {name: linear.shape for name, linear in model.outside().items()}
    tied = bool(state.config.tie_word_embeddings)
    biased = frozenset(name for name in inside if getattr(model.model.get_submodule(name), "bias", None) is not None)
    parameters = sum(
        torch.Size(item.shape).numel()
        for name, item in state.source.info().items()
        if not tied or name != f"{model.head}.weight"
    )
    limit = getattr(state.config, "max_position_embeddings", None)
    return Context(
        model.structure, device, seed, inside, outside, model.head, tied, state.config, state.shapes, biased, parameters,
        limit, source.tokenizer,
    )  # fmt: skip


def check_order(
    passes: Sequence[Pass[Any]], settings: Recipe, source: Source, device: torch.device
) -> list[tuple[State, Context]]:
    """Refuse what cannot work before any work is done.

    Returns:
        For every pass the model it will find, and after them the one they leave; tensors that do not exist yet can only be
        looked at.

    Raises:
        CompressError: a pass in the wrong place, no calibration text, or settings that do not fit the model.
    """
    packed_by, packed = None, dict[str, PackedShape]()
    state, context = source.state, make_context(source, device, settings.seed)
    found = [(state, context)]
    for index, step in enumerate(passes):
        if index and passes[index - 1].needs().beside:
            raise CompressError(
                f"passes.{index} ({step.config.kind}) would change the model under what passes.{index - 1} "
                f"({passes[index - 1].config.kind}) has learned for it; put {passes[index - 1].config.kind} last."
            )
        if packed_by is not None and not step.needs().whole_model:
            raise CompressError(
                f"passes.{index} ({step.config.kind}) works on dense weights, but {packed_by} before it has packed "
                "them; put it earlier."
            )
        if step.needs().calibration and text_of(step, settings) is None:
            raise CompressError(
                f"passes.{index} ({step.config.kind}) looks at text, but the recipe has no calibration."
            )
        if step.needs().packed and packed_by is None:
            raise CompressError(
                f"passes.{index} ({step.config.kind}) works on packed matrices; put a quantising pass before it."
            )
        packed |= step.packed_shapes(context)
        if step.needs().whole_model:
            step.model_units(packed)
        if step.needs().packs:
            packed_by = f"passes.{index} ({step.config.kind})"
        step.check(context)
        if step.needs().changes_shapes:
            state = foreseen(state, step.shapes_after(context))
            context = make_context(source, device, settings.seed, state)
        found.append((state, context))
    return found
