"""Foresee what a recipe will need and give, from headers alone: no weight is read."""

import math
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from compress.defaults import usual_defaults
from compress.logits import LOGITS_BYTES
from compress.models import text_config
from compress.passes import Context, Pass, Sizes, pass_class
from compress.pipeline import check_order, text_of
from compress.quant.records import PackedShape, bits_range, model_bytes, packed_bytes
from compress.ranks import LOTS
from compress.recipe import Overrides, Recipe, load_recipe
from compress.settings import Calibration
from compress.source import open_source
from compress.streaming import State
from compress.structure import block_of

_FLOAT = 4
# Measured: compiled kernels, modelling code and allocator slack, loaded as a run proceeds; how many tensors as large as the logits are
# there, of a sample that is differentiated and of a batch that is trained on; and the share of the linears' inputs and outputs that a
# batch's gradient needs kept (some share an input, some values are kept by nobody).
_LATE_CODE, _OF_LOGITS, _OF_BATCH, _KEPT = 100 << 20, 5, 3, 0.8


@usual_defaults()
def plan(
    recipe: str | Path | Mapping[str, Any] | Recipe, overrides: Overrides = (), seconds: bool = False
) -> dict[str, Any]:
    """Estimate the sizes on disk and the peak memory of a run, and, by rehearsing a little of it, its processor time.

    Returns:
        ``{"model", "blocks", "parameters", "parameters_after", "dense_bytes", "checkpoint_bytes", "bytes_at_bits", "passes": [{"kind",
        "memory_bytes", "workspace_bytes", "processes"}], "peak_memory_bytes", "workspace_bytes", "warnings"}``, with ``seconds``
        also ``"processor_seconds"`` of each pass (:func:`compress.rehearsal.foreseen_seconds`). ``processes`` is how many at most
        can share the work, ``warnings`` what does not fit here and the settings that would. Bytes on disk are those of the tensors, exact if codebooks fit float16
        (else they take twice the room) and nothing is stored sparse (pruned weights then take less). Memory is an
        estimate, on top of what Python holds after its imports.

    Raises:
        CompressError: whatever :func:`compress.run` would refuse before any work.
    """
    settings = load_recipe(recipe, overrides)
    source = open_source(settings.source)
    steps: list[Pass[Any]] = [pass_class(config.kind)(config) for config in settings.passes]
    found = check_order(steps, settings, source, torch.device("cpu"))
    packed: dict[str, PackedShape] = {}
    for step, (_, context) in zip(steps, found, strict=False):
        packed |= step.packed_shapes(context)
    pairs = list(zip(steps, found, strict=False))
    foreseen = [
        _needs(step, *before, text_of(step, settings), packed)
        | (_time(step, *before, settings, packed) if seconds else {})
        for step, before in pairs
    ]

    def again(text: Calibration | None, micro_batch: int | None = None) -> int:
        """Return the memory with another calibration text, or with other micro-batches in every training that has them."""
        other, most = settings.model_copy(update={"calibration": text}), _writing(found[-1][0])
        for step, before in pairs:
            if micro_batch and hasattr(step.config, "micro_batch"):
                step = type(step)(step.config.model_copy(update={"micro_batch": micro_batch}))
            most = max(most, int(_needs(step, *before, text_of(step, other), packed)["memory_bytes"] or 0))
        return most

    last, context = found[-1]
    tied = context.tied and context.structure.embedding in packed
    gone = {*packed, context.head} if tied else {*packed}
    rest = sum(item.nbytes for name, item in last.source.info().items() if name.removesuffix(".weight") not in gone)
    at = {str(bits): rest + model_bytes(packed.values(), bits) for bits in bits_range(packed.values())}
    result: dict[str, Any] = {
        "model": str(source.folder),
        "blocks": source.state.structure.depth,
        "parameters": found[0][1].parameters,
        "parameters_after": context.parameters,
        "dense_bytes": sum(item.nbytes for item in source.state.source.info().values()),
        "checkpoint_bytes": max(at.values(), default=rest),
        "bytes_at_bits": at,
        "passes": [{"kind": step.config.kind, **needs} for step, needs in zip(steps, foreseen, strict=True)],
        "peak_memory_bytes": max(_writing(last), *(needs["memory_bytes"] or 0 for needs in foreseen)),
        "workspace_bytes": sum(needs["workspace_bytes"] or 0 for needs in foreseen),
    }
    place = Path(settings.output or ".").absolute()
    there = next(folder for folder in (place, *place.parents) if folder.is_dir())
    return result | {"warnings": _warnings(settings, result, there, again)}


def _time(
    step: Pass[Any], state: State, context: Context, settings: Recipe, packed: Mapping[str, PackedShape]
) -> dict[str, float | None]:
    from compress.rehearsal import foreseen_seconds

    found = foreseen_seconds(step, state, context, text_of(step, settings), context.device, packed)
    return {"processor_seconds": found}


def _needs(
    step: Pass[Any], state: State, context: Context, text: Calibration | None, packed: Mapping[str, PackedShape]
) -> dict[str, float | None]:
    """Estimate memory and workspace of one pass, what the pipeline holds for it and what it says of itself; and who can help."""
    needs, weights = step.needs(), _Weights(state)
    all_packed = sum(packed_bytes(shape, shape.parent_bits) for shape in packed.values())
    samples, length = (text.samples, text.length) if text else (0, 0)
    language = text_config(state.config)
    hidden = samples * length * int(getattr(language, "hidden_size", 0)) * _FLOAT if needs.calibration else 0
    varied = len(needs.variants) * min(1.0, (needs.variant_length or length) / max(length, 1))
    shown = round((1 + varied) * hidden)  # what goes into a block, the variants included
    own = step.memory(Sizes(samples, length, weights.block, weights.whole), context)
    # A block in float32, and in 16 bits what is read or written of it, or a variant; what goes into it, and what comes out.
    held = weights.outside + (2 * weights.block if needs.variants else 3 * weights.block // 2)
    units, carried = weights.inside, 2 * shown
    memory = held + shown + (shown if needs.outputs else 0) + own
    logits = length * int(getattr(language, "vocab_size", 0)) * _FLOAT  # of one sample
    shorter = min(1.0, (needs.gradient_length or length) / max(length, 1))
    some = round(hidden * shorter * min(1.0, (needs.gradient_samples or samples) / max(samples, 1)))
    if needs.squared_gradients:  # before that: their sums for a block, those of hidden states, a sample's logits
        memory = max(memory, held + 2 * weights.block + 2 * some + _OF_LOGITS * logits)
        units, carried = 2 * weights.inside, max(carried, some * (weights.blocks + 3))
    if (
        needs.draws
    ):  # gradients of all blocks' outputs are kept; those by matrices come when what these were found with is gone
        memory = max(memory, held + 2 * some + _OF_LOGITS * logits)
        carried += some * (weights.blocks + 3)
    if needs.packs:
        units += all_packed - weights.inside
    if needs.model_statistics:  # the model and one forward pass
        memory = max(memory, 2 * weights.whole + own)
    elif needs.whole_model:  # as it is, in float32 or packed, and what is made of the samples that are there at once
        batch = min(samples, *(int(getattr(step.config, name, samples)) for name in ("batch", "micro_batch")))
        trained = min(batch * logits, LOGITS_BYTES) * _OF_BATCH
        if hasattr(step.config, "steps"):  # a training, perhaps of pieces of samples or with a prompt before them
            values = sum(rows + columns for rows, columns in context.linears.values())
            tokens = min(length, int(getattr(step.config, "length", length))) + int(getattr(step.config, "tokens", 0))
            trained += round(_KEPT * values * batch * tokens * _FLOAT)
        memory = weights.whole - sum(weights.held.get(f"{name}.weight", 0) for name in packed) + all_packed
        memory += trained + own
        if needs.teacher:  # both models and, in a step, a dense weight per packed one
            memory = 3 * weights.whole + trained + own
    if needs.divides and needs.whole_model:
        helping = min(int(getattr(step.config, "batch", samples)), samples)
    elif needs.divides:
        helping = min(LOTS, samples) if needs.calibration else len(context.linears) // weights.blocks
    else:
        helping = 1
    return {
        "memory_bytes": _LATE_CODE + memory,
        "workspace_bytes": units + carried,
        "processes": max(helping, 1),
    }


class _Weights:
    """Count the bytes of a model's tensors in float32."""

    def __init__(self, state: State) -> None:
        self.held = {name: math.prod(item.shape) * _FLOAT for name, item in state.source.info().items()}
        blocks = Counter[int | None]()
        for name, size in self.held.items():
            blocks[block_of(name, state.structure)] += size
        self.outside = blocks.pop(None, 0)
        self.blocks, self.block, self.inside = len(blocks), max(blocks.values()), sum(blocks.values())
        self.whole = self.outside + self.inside


def _writing(state: State) -> int:
    """Estimate the memory that the checkpoint takes to write: a shard, then the model block by block at a few tokens."""
    weights = _Weights(state)
    return _LATE_CODE + max(3 * weights.outside // 2, weights.outside + 3 * weights.block // 2)


def _warnings(settings: Recipe, found: Mapping[str, Any], place: Path, again: Callable[..., int]) -> list[str]:
    """Say what does not fit into this machine, and with which settings it would; ``again`` gives the memory with others."""
    import psutil

    free, said = int(psutil.virtual_memory().available), []
    if found["peak_memory_bytes"] > free:
        said.append(
            f"memory: {_gigabytes(found['peak_memory_bytes'])} are needed, {_gigabytes(free)} are free"
            + _smaller(settings.calibration, free, again)
        )
    disk, needed = shutil.disk_usage(place).free, found["workspace_bytes"] + found["checkpoint_bytes"]
    if needed > disk:
        said.append(
            f"disk: {_gigabytes(needed)} are needed beside the output, {_gigabytes(disk)} are free; give another place with -o, or the "
            "workspace one with --workspace."
        )
    return said


def _smaller(text: Calibration | None, free: int, again: Callable[..., int]) -> str:
    """Look for what fits: one sample at a time in trainings, or a shorter text, half the tokens of a sample, half the samples, and so on."""
    if (needed := again(text, 1)) <= free:
        return f"; micro_batch 1 would take {_gigabytes(needed)}."
    while text is not None and (text.samples > 8 or text.length > 128):
        shorter = text.length > 128 and text.length >= text.samples
        changes = {"length": text.length // 2} if shorter else {"samples": text.samples // 2}
        text = text.model_copy(update=changes)
        if (needed := again(text)) <= free:
            return f"; calibration.samples {text.samples} and calibration.length {text.length} would take {_gigabytes(needed)}."
    return "; no shorter calibration text would do: it takes a machine with more memory."


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB"
