"""From a recipe to a checkpoint: every pass on every block, each step on disk before the next begins."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from compress import writer
from compress.calibration import draw_samples
from compress.errors import CompressError, refuse_existing
from compress.manifest import read_manifest
from compress.passes import Context, Pass, Report, pass_class
from compress.processes import processes
from compress.quant.records import PackedShape
from compress.recipe import Overrides, Recipe, load_recipe
from compress.runner import Log, Runner
from compress.settings import Calibration, config_class
from compress.source import Source, make_context, open_source, pick_device
from compress.streaming import State, foreseen
from compress.workspace import Workspace


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
    refuse_existing(target)
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
        state,
        source.folder,
        target,
        manifest={
            "recipe": settings.model_dump(mode="json", exclude={"output"}),
            "model_sha256": source.sha256,
            "calibration": calibration.source if calibration else None,
            "passes": history,
        },
        probe_tokens=source.tokenizer("def compress(model):\n    return", add_special_tokens=False)["input_ids"],
        device=device,
        write_beside=write_beside,
    )
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


def _pattern_of(folder: Path) -> str | None:
    """Find what has set an n:m pattern of zeros in a model that an earlier run has written."""
    for entry in (read_manifest(folder) or {}).get("passes", []):
        with suppress(KeyError, ValueError):  # a pass, or settings, of an installation that had others
            kind = entry["config"]["kind"]
            if pass_class(kind)(config_class(kind)(**entry["config"])).needs().pattern:
                return f"the run that wrote {folder}"
    return None


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
    pattern = _pattern_of(source.folder)
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
        if step.needs().breaks_pattern and pattern:
            raise CompressError(
                f"passes.{index} ({step.config.kind}) would take columns out of the n:m pattern of zeros that {pattern} has set; "
                "put it earlier."
            )
        if step.needs().pattern:
            pattern = f"passes.{index} ({step.config.kind})"
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
