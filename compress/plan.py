"""Foresee what a recipe will need and give, from headers alone: no weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from compress.passes import Context, Needs, Pass, Sizes, pass_class
from compress.pipeline import check_order, open_source
from compress.quant.format import PackedShape, bits_range, packed_bytes
from compress.recipe import Overrides, Recipe, load_recipe
from compress.streaming import State
from compress.structure import block_of

_FLOAT = 4
_LATE_CODE = 200 << 20  # measured: compiled kernels, modelling code and allocator slack, loaded as a run proceeds


def plan(recipe: str | Path | Mapping[str, Any] | Recipe, overrides: Overrides = ()) -> dict[str, Any]:
    """Estimate the sizes on disk and the peak memory of a run.

    Returns:
        ``{"model", "blocks", "parameters", "parameters_after", "dense_bytes", "checkpoint_bytes", "bytes_at_bits", "passes": [{"kind",
        "memory_bytes", "workspace_bytes"}]}``. Bytes on disk are those of the tensors, exact if tables fit float16
        (else tables take twice the room) and nothing is stored sparse (pruned weights then take less). Memory is an
        estimate, on top of what Python holds after its imports.

    Raises:
        CompressError: whatever :func:`compress.run` would refuse before any work.
    """
    settings = load_recipe(recipe, overrides)
    source = open_source(settings.model, settings.revision)
    steps: list[Pass[Any]] = [pass_class(config.kind)(config) for config in settings.passes]
    found = check_order(steps, settings, source, torch.device("cpu"))
    packed: dict[str, PackedShape] = {}
    for step, (_, context) in zip(steps, found, strict=False):
        packed |= step.packed_shapes(context)
    dense, (last, context) = source.state.source.info(), found[-1]
    kept = {
        name: item.nbytes for name, item in last.source.info().items() if name.removesuffix(".weight") not in packed
    }
    if context.tied and context.head in packed:
        kept.pop(f"{context.head}.weight", None)
    at = {bits: sum(packed_bytes(shape, bits) for shape in packed.values()) for bits in bits_range(packed.values())}
    rest = sum(kept.values())
    return {
        "model": str(source.folder),
        "blocks": found[0][0].config.num_hidden_layers,
        "parameters": found[0][1].parameters,
        "parameters_after": context.parameters,
        "dense_bytes": sum(item.nbytes for item in dense.values()),
        "checkpoint_bytes": rest + max(at.values(), default=0),
        "bytes_at_bits": {str(bits): rest + size for bits, size in at.items()},
        "passes": [
            {"kind": step.config.kind, **_needs(step, *before, settings, packed)}
            for step, before in zip(steps, found, strict=False)
        ],
    }


def _needs(
    step: Pass[Any], state: State, context: Context, settings: Recipe, packed: Mapping[str, PackedShape]
) -> dict[str, int]:
    """Estimate memory and workspace of one pass: what the pipeline holds for it, and what it says of itself."""
    needs, text = step.needs(), settings.calibration
    blocks: dict[int | None, int] = {}
    for name, item in state.source.info().items():
        place = block_of(name, context.structure)
        blocks[place] = blocks.get(place, 0) + torch.Size(item.shape).numel() * _FLOAT
    outside = blocks.pop(None, 0)
    block, inside = max(blocks.values()), sum(blocks.values())
    hidden_size = int(getattr(state.config, "hidden_size", 0))
    hidden = text.samples * text.length * hidden_size * _FLOAT if text and needs.calibration else 0
    # Measured by the memory bench: a block in float32, as read, and as written; with gradients also their sum.
    memory = outside + (4 if needs.squared_gradients else 3) * block
    memory += (2 if needs.squared_gradients else 1) * hidden
    if text and needs.squared_gradients:  # one sample's logits and gradient
        memory += 2 * text.length * int(getattr(state.config, "vocab_size", 0)) * _FLOAT
    if needs.whole_model:
        memory = _whole_bytes(needs, outside + inside, state, packed)
    if needs.model_survey:  # the model and one forward pass
        memory = 2 * (outside + inside)
    memory += len(needs.variants) * hidden
    sizes = Sizes(text.samples if text else 0, text.length if text else 0, block, outside + inside)
    units = sum(packed_bytes(shape, shape.parent_bits) for shape in packed.values()) if needs.packs else inside
    kept = inside if needs.squared_gradients else 0
    hidden_kept = hidden * (len(blocks) + 3) if needs.squared_gradients else 2 * (1 + len(needs.variants)) * hidden
    return {
        "memory_bytes": _LATE_CODE + memory + step.memory(sizes, context),
        "workspace_bytes": units + kept + hidden_kept,
    }


def _whole_bytes(needs: Needs, dense: int, state: State, packed: Mapping[str, PackedShape]) -> int:
    """Return the bytes of the model, float32 or packed, and of the dense one beside it; activations come on top."""
    if needs.teacher:  # and, in a step, a dense weight per packed one
        return 3 * dense
    info = state.source.info()
    replaced = sum(
        torch.Size(info[f"{name}.weight"].shape).numel() * _FLOAT for name in packed if f"{name}.weight" in info
    )
    return dense - replaced + sum(packed_bytes(shape, shape.parent_bits) for shape in packed.values())
