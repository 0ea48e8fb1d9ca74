"""What a recipe will need and give, told from headers alone: no weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from compress.passes import SURVEY_TOKENS, Context, Needs, Pass, pass_class
from compress.pipeline import check_order, open_source
from compress.quant.format import PackedShape, packed_bytes
from compress.recipe import Overrides, Recipe, load_recipe
from compress.streaming import State
from compress.structure import block_of

_FLOAT = 4
_LATE_CODE = 200 << 20  # measured: compiled kernels, modelling code and allocator slack, loaded as a run proceeds


def plan(recipe: str | Path | Mapping[str, Any] | Recipe, overrides: Overrides = ()) -> dict[str, Any]:
    """Sizes on disk and peak memory of a run.

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
    at = _bytes_at(packed)
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


def _bytes_at(packed: Mapping[str, PackedShape]) -> dict[int, int]:
    if not packed:
        return {}
    low, high = min(s.seed_bits for s in packed.values()), max(s.parent_bits for s in packed.values())
    return {bits: sum(packed_bytes(shape, bits) for shape in packed.values()) for bits in range(low, high + 1)}


def _needs(
    step: Pass[Any], state: State, context: Context, settings: Recipe, packed: Mapping[str, PackedShape]
) -> dict[str, int]:
    """Memory and workspace of one pass, from what it declares."""
    needs, text = step.needs(), settings.calibration
    blocks: dict[int | None, int] = {}
    for name, item in state.source.info().items():
        place = block_of(name, context.structure)
        blocks[place] = blocks.get(place, 0) + torch.Size(item.shape).numel() * _FLOAT
    outside = blocks.pop(None, 0)
    block = max(blocks.values())
    config = state.config
    width = int(getattr(config, "hidden_size", 0))
    hidden = text.samples * text.length * width * _FLOAT if text and needs.calibration else 0
    # Measured by bench_memory: a block in float32, as read, and as written; with gradients also their sum.
    memory = _LATE_CODE + outside + (4 if needs.squared_gradients else 3) * block
    memory += (2 if needs.squared_gradients else 1) * hidden
    if text and needs.squared_gradients:
        memory += 2 * text.length * int(getattr(config, "vocab_size", 0)) * _FLOAT  # one sample's logits and gradient
    if needs.whole_model:
        memory = _LATE_CODE + _whole_bytes(needs, outside + sum(blocks.values()), state, packed)
    if needs.model_survey:  # the model and one forward pass; with gradients as much again, and all activations
        memory = _LATE_CODE + (3 if needs.backward else 2) * (outside + sum(blocks.values()))
        tokens = min(SURVEY_TOKENS, text.samples * text.length) if text else 0
        width = sum(rows + columns for rows, columns in context.linears.values())
        memory += tokens * width * _FLOAT if needs.backward else 0
    if needs.hessians and needs.packs and needs.inputs == "original" and text:  # codes by output errors
        memory += len(needs.variants) * hidden + block + _output_bytes(needs, text.length, context)
    elif needs.hessians:  # measured by bench_pruning: scores, and the Hessian, its inverse and factor
        double = 2 if needs.changes_shapes else 1  # which are float64 there
        memory += block + 3 * double * _hessians(context)
    units = (
        sum(packed_bytes(shape, shape.parent_bits) for shape in packed.values())
        if needs.packs
        else sum(blocks.values())
    )
    kept = sum(blocks.values()) if needs.squared_gradients else 0
    hidden_kept = hidden * (len(blocks) + 3) if needs.squared_gradients else 2 * (1 + len(needs.variants)) * hidden
    return {"memory_bytes": memory, "workspace_bytes": units + kept + hidden_kept}


def _whole_bytes(needs: Needs, dense: int, state: State, packed: Mapping[str, PackedShape]) -> int:
    """Bytes of the model in memory, float32 or packed, and of the dense one beside it; activations come on top."""
    if needs.teacher:  # and, in a step, a dense weight per packed one
        return 3 * dense
    info = state.source.info()
    replaced = sum(
        torch.Size(info[f"{name}.weight"].shape).numel() * _FLOAT for name in packed if f"{name}.weight" in info
    )
    return dense - replaced + sum(packed_bytes(shape, shape.parent_bits) for shape in packed.values())


def _output_bytes(needs: Needs, length: int, context: Context) -> int:
    """Bytes that choosing codes by output errors takes, for the linear with most inputs."""
    inputs = max(columns for _, columns in context.linears.values())
    matrices = 3 * inputs * inputs * _FLOAT  # the metric, and two more for the correction, or its split
    targets = (len(needs.variants) + 2) * max(rows * columns for rows, columns in context.linears.values()) * _FLOAT
    return matrices + targets + 4 * length * inputs * _FLOAT + 1024 * 90 * inputs  # a sample, and rows, at a time


def _hessians(context: Context) -> int:
    """Bytes of one [K, K] float32 matrix for every distinct input of the largest block.

    Linears that servers fuse share their input; others are taken to have one of their own.
    """
    followers = {name for group in context.structure.fused for name in group[1:]}
    sizes: dict[int | None, int] = {}
    for name, (_, columns) in context.linears.items():
        place = block_of(name, context.structure)
        if name.removeprefix(f"{context.structure.blocks}.{place}.") not in followers:
            sizes[place] = sizes.get(place, 0) + columns**2 * _FLOAT
    return max(sizes.values())
