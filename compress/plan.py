"""Foresee what a recipe will need and give, from headers alone: no weight is read."""

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from compress.defaults import usual_defaults
from compress.models import text_config
from compress.passes import Context, Pass, Sizes, pass_class
from compress.pipeline import check_order, text_of
from compress.quant.records import PackedShape, bits_range, model_bytes, packed_bytes
from compress.recipe import Overrides, Recipe, load_recipe
from compress.source import open_source
from compress.streaming import State
from compress.structure import block_of

_FLOAT = 4
_LATE_CODE = 200 << 20  # measured: compiled kernels, modelling code and allocator slack, loaded as a run proceeds


@usual_defaults()
def plan(
    recipe: str | Path | Mapping[str, Any] | Recipe, overrides: Overrides = (), seconds: bool = False
) -> dict[str, Any]:
    """Estimate the sizes on disk and the peak memory of a run, and, by rehearsing a little of it, its processor time.

    Returns:
        ``{"model", "blocks", "parameters", "parameters_after", "dense_bytes", "checkpoint_bytes", "bytes_at_bits", "passes": [{"kind",
        "memory_bytes", "workspace_bytes"}]}``, with ``seconds`` also ``"processor_seconds"``
        (:func:`compress.rehearsal.foreseen_seconds`). Bytes on disk are those of the tensors, exact if codebooks fit float16
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
    foreseen = [
        _needs(step, *before, settings, packed) | (_time(step, *before, settings) if seconds else {})
        for step, before in zip(steps, found, strict=False)
    ]
    last, context = found[-1]
    tied = context.tied and context.structure.embedding in packed
    gone = {*packed, context.head} if tied else {*packed}
    rest = sum(item.nbytes for name, item in last.source.info().items() if name.removesuffix(".weight") not in gone)
    at = {str(bits): rest + model_bytes(packed.values(), bits) for bits in bits_range(packed.values())}
    return {
        "model": str(source.folder),
        "blocks": source.state.structure.depth,
        "parameters": found[0][1].parameters,
        "parameters_after": context.parameters,
        "dense_bytes": sum(item.nbytes for item in source.state.source.info().values()),
        "checkpoint_bytes": max(at.values(), default=rest),
        "bytes_at_bits": at,
        "passes": [{"kind": step.config.kind, **needs} for step, needs in zip(steps, foreseen, strict=True)],
    }


def _time(step: Pass[Any], state: State, context: Context, settings: Recipe) -> dict[str, float | None]:
    from compress.rehearsal import foreseen_seconds

    found = foreseen_seconds(step, state, context, text_of(step, settings), context.device)
    return {"processor_seconds": found}


def _needs(
    step: Pass[Any], state: State, context: Context, settings: Recipe, packed: Mapping[str, PackedShape]
) -> dict[str, float | None]:
    """Estimate memory and workspace of one pass: what the pipeline holds for it, and what it says of itself."""
    needs, text = step.needs(), settings.calibration
    held = {name: math.prod(item.shape) * _FLOAT for name, item in state.source.info().items()}
    blocks = Counter[int | None]()
    for name, size in held.items():
        blocks[block_of(name, context.structure)] += size
    outside = blocks.pop(None, 0)
    block, inside = max(blocks.values()), sum(blocks.values())
    whole, all_packed = outside + inside, sum(packed_bytes(shape, shape.parent_bits) for shape in packed.values())
    samples, length = (text.samples, text.length) if text else (0, 0)
    language = text_config(state.config)
    hidden = samples * length * int(getattr(language, "hidden_size", 0)) * _FLOAT if needs.calibration else 0
    varied = len(needs.variants) * min(1.0, (needs.variant_length or length) / max(length, 1))
    shown = round((1 + varied) * hidden)  # what goes into a block, the variants included
    # Measured by the memory bench: a block in float32, as read, and as written.
    memory, units, carried = outside + 3 * block + hidden, inside, 2 * shown
    if needs.squared_gradients:  # their sum for a block, those of hidden states, one sample's logits and gradient
        some = round(hidden * min(1.0, (needs.gradient_samples or samples) / max(samples, 1)))
        memory += block + some + 2 * length * int(getattr(language, "vocab_size", 0)) * _FLOAT
        units, carried = 2 * inside, max(carried, some * (len(blocks) + 3))
    if needs.packs:
        units += all_packed - inside
    if needs.model_statistics:  # the model and one forward pass
        memory = 2 * whole
    elif needs.whole_model and needs.teacher:  # both models and, in a step, a dense weight per packed one
        memory = 3 * whole
    elif needs.whole_model:  # as it is, in float32 or packed; activations come on top
        memory = whole - sum(held.get(f"{name}.weight", 0) for name in packed) + all_packed
    memory += shown - hidden + (shown if needs.outputs else 0)  # and what comes out
    sizes = Sizes(samples, length, block, whole)
    return {"memory_bytes": _LATE_CODE + memory + step.memory(sizes, context), "workspace_bytes": units + carried}
