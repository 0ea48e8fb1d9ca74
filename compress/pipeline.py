"""Turn a recipe into a checkpoint: every pass on every block, each step on disk before the next begins."""

import errno
import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from compress import writer
from compress.calibration import Samples, draw_samples
from compress.defaults import usual_defaults
from compress.errors import CompressError, refuse_existing
from compress.experts import stacked_shapes
from compress.manifest import read_manifest
from compress.mixtures import with_fewer
from compress.passes import Context, Pass, Progress, pass_class
from compress.quant.records import PackedShape
from compress.ranks import Ranks
from compress.recipe import Overrides, Recipe, load_recipe
from compress.runner import Log, Runner, figures_of
from compress.settings import Calibration, config_class
from compress.source import Source, check_source, make_context, open_source, pick_device
from compress.streaming import State, foreseen, reshaped
from compress.workspace import Record, Workspace

_log = logging.getLogger(__name__)
_PROBE = "def compress(model):\n    return"
"""What the model is asked before work, and by ``verify`` after it."""


@usual_defaults()
def run(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    output: str | Path | None = None,
    overrides: Overrides = (),
    workspace: str | Path | None = None,
    progress: Progress | None = None,
) -> Path:
    """Compress a model.

    Run again after an interruption, it continues where it was and ends with the same bytes. Under ``torchrun`` or ``accelerate
    launch`` all processes share the work (:mod:`compress.ranks`), on a file system that all can see; the main one writes.

    Args:
        recipe: YAML file, mapping or :class:`Recipe`.
        output: folder to create; the recipe's own ``output`` otherwise.
        overrides: ``key.0.key=value`` assignments on the recipe, or a mapping of paths to values.
        workspace: where finished units are kept; ``<output>.work`` otherwise, which is deleted at the end. One
            that is given stays, and recipes that share a beginning share its units.
        progress: called as work proceeds.

    Returns:
        The checkpoint folder. Beside it, ``<output>.log.jsonl`` has one line per unit, with seconds.

    Raises:
        CompressError: anything a user can put right; nothing half-written is left at ``output``.
    """
    settings = load_recipe(recipe, overrides)
    if not (output or settings.output):
        raise CompressError("no output folder: give -o, or output in the recipe.")
    target = Path(output or settings.output or "")
    if not target.name:
        raise CompressError(f"output {target}: give the name of a folder to create.")
    refuse_existing(target)
    work = Workspace(Path(workspace) if workspace else target.with_name(target.name + ".work"))
    ranks = Ranks.at_work(pick_device(settings.device))
    try:
        with work.locked() if ranks.main else nullcontext():
            source = open_source(settings.source)
            log = Log(target.with_name(target.name + ".log.jsonl"), progress, ranks.main)
            _compress(settings, source, work, target, log)
    except (OSError, SafetensorError) as error:
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
            raise CompressError(
                f"{work.folder}: the disk is full; what is finished is kept: free space and run again."
            ) from error
        if isinstance(error, OSError) and error.filename:
            raise CompressError(f"{error.filename}: {error.strerror}.") from error
        raise
    ranks.wait()
    if workspace is None and ranks.main:
        work.remove()
    return target


def _compress(settings: Recipe, source: Source, work: Workspace, target: Path, log: Log) -> None:
    passes: list[Pass[Any]] = [pass_class(config.kind)(config) for config in settings.passes]
    device = pick_device(settings.device)
    (_, context), *_ = check_order(passes, settings, source, device)
    texts = [text_of(step, settings) for step in passes]
    drawn = {one: draw_samples(one, source.tokenizer, context.context_length) for one in dict.fromkeys(texts) if one}
    for samples in drawn.values():
        largest = max(int(tokens.max()) for tokens in samples.tokens)
        if largest >= context.vocabulary:
            raise CompressError(
                f"{source.folder}: its tokenizer makes token {largest} of the text, but the model has an embedding for "
                f"{context.vocabulary} tokens; the two do not belong together."
            )
    probe = torch.tensor(source.tokenizer(_PROBE, add_special_tokens=False)["input_ids"] or [0, 1])
    with context.ranks.together(work.folder):
        _check_once(source, probe[:8], work, log)
        _work(passes, texts, drawn, settings, source, probe.tolist(), work, target, log)


def _work(
    passes: Sequence[Pass[Any]],
    texts: Sequence[Calibration | None],
    drawn: Mapping[Calibration, Samples],
    settings: Recipe,
    source: Source,
    probe: Sequence[int],
    work: Workspace,
    target: Path,
    log: Log,
) -> None:
    """Do what has been checked: the passes, then the checkpoint."""
    state, history, sidecars, device = source.state, [], [], pick_device(settings.device)
    for step, text in zip(passes, texts, strict=True):
        samples = drawn[text] if text else None
        state, records, tensors = _applied(
            step, state, source, samples, make_context(source, device, settings.seed, state), work, log
        )
        own = {"text": samples.source} if samples and step.needs().text else {}
        # The config says what is packed.
        units = {u: {key: r[key] for key in sorted(r) if key != "packed"} for u, r in records.items()}
        history.append({"config": step.config.model_dump(mode="json"), **own, "units": units})
        sidecars.append((step, tensors, {unit: figures_of(r) for unit, r in records.items()}))
    if not log.main:
        return
    calibration = drawn.get(settings.calibration) if settings.calibration else None

    def write_sidecars(folder: Path) -> None:
        source.write_beside(folder)
        for step, tensors, figures in sidecars:
            step.write_files(folder, tensors, figures)

    log.progress("writing", 0, 1)
    writer.write_checkpoint(
        state,
        source.folder,
        target,
        manifest={
            "recipe": settings.record(),
            "model_sha256": source.sha256,
            "calibration": calibration.source if calibration else None,
            "passes": history,
        },
        probe_tokens=probe,
        device=device,
        write_sidecars=write_sidecars,
    )
    log.progress("writing", 1, 1)


def _applied(
    step: Pass[Any], state: State, source: Source, samples: Samples | None, context: Context, work: Workspace, log: Log
) -> tuple[State, dict[str, Record], dict[str, dict[str, torch.Tensor]]]:
    """Apply one pass: the state after it, the records of its units, and what belongs beside the model; let its model go."""
    runner = Runner(step, state, source.state, samples, context, work, log)
    after, records = runner.run()
    return after, records, runner.sidecars(records)


def _check_once(source: Source, tokens: torch.Tensor, work: Workspace, log: Log) -> None:
    """Check, once for a workspace, that what is read of the model is the model."""
    stage = work.stage("source", source.state.key, *(version(package) for package in ("torch", "transformers")))
    if log.main and stage.record("logits") is None:
        if (reason := source.unchecked()) is None:
            log.progress("comparing with transformers", 0, 1)
            check_source(source, tokens)
        else:
            _log.warning("not compared with transformers, %s.", reason)
        stage.save("logits", {})


def text_of(step: Pass[Any], settings: Recipe) -> Calibration | None:
    """Return what a pass learns from: its own text, else the recipe's calibration; None if it looks at none."""
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
    """Refuse, before any work is done, passes in the wrong place, without text, or that do not fit the model.

    Return for every pass the model it will find, and after them the one they leave; its tensors can only be looked at.
    """
    packed_by, before, zeros, packed = None, None, None, dict[str, PackedShape]()
    pattern = _pattern_of(source.folder)
    state, context = source.state, make_context(source, device, settings.seed)
    found = [(state, context)]
    for index, step in enumerate(passes):
        needs, kind = step.needs(), step.config.kind
        here = f"passes.{index} ({kind})"
        beside = needs.sidecar and before is not None and kind != before.config.kind  # both leave the model as it is
        if before is not None and before.needs().sidecar and not beside:
            raise CompressError(
                f"{here} would change the model under what passes.{index - 1} ({before.config.kind}) has learned for it; "
                f"put {before.config.kind} last."
            )
        if packed_by is not None and not needs.whole_model:
            raise CompressError(f"{here} works on dense weights, but {packed_by} has packed them; put it earlier.")
        if needs.calibration and text_of(step, settings) is None:
            raise CompressError(f"{here} looks at text, but the recipe has no calibration.")
        if needs.packed and packed_by is None:
            raise CompressError(f"{here} works on packed matrices; put a quantising pass before it.")
        if needs.breaks_pattern and pattern:
            raise CompressError(
                f"{here} would take columns out of the n:m pattern of zeros that {pattern} has set; put it earlier."
            )
        if needs.loses_zeros and pattern:
            raise CompressError(
                f"{here} would give zeros of the n:m pattern that {pattern} has set other values; take any_precision or kmeans with "
                "keep_zeros: true."
            )
        if needs.loses_zeros and zeros:
            _log.warning(
                "%s: weights that %s has set to zero get other values; keep_zeros: true keeps them.", here, zeros
            )
        pattern, zeros = here if needs.pattern else pattern, here if needs.zeros else zeros
        packed |= step.packed_shapes(context)
        stacked_shapes(packed, context.structure.experts)
        if needs.whole_model:
            step.model_units(packed)
        if needs.packs:
            packed_by = here
        step.check(context)
        before = step
        if needs.changes_shapes or needs.removes_experts:
            after = with_fewer(state, step.experts_after(context)) if needs.removes_experts else None
            state = foreseen(after or reshaped(state, step.shapes_after(context)))
            context = make_context(source, device, settings.seed, state)
        found.append((state, context))
    return found
