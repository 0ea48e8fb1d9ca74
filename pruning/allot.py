"""From a pass's settings and a model to what every block loses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from compress.config import BlockShape
from compress.errors import CompressError
from compress.passes import Context
from compress.pruning.groups import Kind, Part, parts_of
from compress.pruning.settings import MiniLlmConfig
from compress.pruning.targets import Counts, Target, depth_count, equal_counts, protected_blocks, ranked_counts
from compress.shapes import block_shape, groups_of, ordinary_config
from compress.structure import block_prefix
from compress.workspace import Record


def block_names(context: Context) -> list[str]:
    """Of all blocks, in order."""
    return [block_prefix(context.structure, index) for index in range(int(context.config.num_hidden_layers))]


def protected(config: MiniLlmConfig, blocks: int) -> set[int]:
    """Blocks that are left whole."""
    if config.protect == "none":
        return set()
    if config.protect == "llm_pruner":
        return protected_blocks(blocks, round(4 * blocks / 32), round(2 * blocks / 32))
    return protected_blocks(blocks, *config.protect)


def all_parts(config: MiniLlmConfig, context: Context) -> list[Mapping[Kind, Part]]:
    """The parts of every block; none of a protected one, nor attention where it is to be left alone."""
    names = block_names(context)
    kept = protected(config, len(names))
    found: list[Mapping[Kind, Part]] = []
    for index, name in enumerate(names):
        shape = block_shape(context.config, context.shapes, name)
        prefix = f"{name}."
        biased = {linear.removeprefix(prefix) for linear in context.biased if linear.startswith(prefix)}
        parts = {} if index in kept else parts_of(context.structure, context.config, shape, config.unit, biased)
        if config.attention == 0:
            parts.pop("attention", None)
        found.append(parts)
    return found


def inside(context: Context) -> int:
    """Weights of all linears inside the blocks."""
    return sum(rows * columns for rows, columns in context.linears.values())


def _target(config: MiniLlmConfig, context: Context) -> Target:
    groups_of(context.structure)
    parts = all_parts(config, context)
    if not any(parts):
        raise CompressError("mini_llm: protect leaves no block from which anything may go; protect fewer.")
    if config.ratio_of != "layers":
        whole = inside(context) if config.ratio_of == "blocks" else context.parameters
        return Target(round(config.ratio * whole), parts, None, config.attention, config.multiple)
    weights = {"attention": config.attention, "mlp": 1.0}
    count = sum(weights[kind] * part.units * part.cost for block in parts for kind, part in block.items())
    return Target(round(config.ratio * count), parts, config.ratio, config.attention, config.multiple)


def block_counts(config: MiniLlmConfig, context: Context, survey: Sequence[Record] | None) -> list[Counts]:
    """What each block loses.

    Args:
        config: of the pass.
        context: of the run.
        survey: in mode global, prices of every block's units; None before there are any, for an estimate.

    Raises:
        CompressError: the target cannot be met, or not in this mode.
    """
    target = _target(config, context)
    if config.mode == "global":
        return ranked_counts(
            target, _even_prices(target) if survey is None else [record["prices"] for record in survey]
        )
    before = _common_shape(config, context)

    def allowed(units: int) -> bool:
        """Whether a config can say it, where the mode needs one to."""
        if config.mode != "uniform":
            return True
        parts = target.parts[0]
        shape = parts["attention"].shape(before, units) if units else before
        return ordinary_config(context.config, replace(shape, channels=shape.channels - 1)) is not None

    if not allowed(0):
        raise CompressError(
            f"mini_llm: the config of model type {context.config.model_type!r} cannot say how many channels an MLP has, so "
            "uniform pruning would give a model that plain transformers cannot build; use mode local."
        )
    fixed = config.mode == "uniform" and bool(kept_whole(config, context))
    hint = " Mode local can also remove heads, which this model's config cannot say in mode uniform." if fixed else ""
    return equal_counts(target, allowed, config.mode == "local", hint)


def kept_whole(config: MiniLlmConfig, context: Context) -> str:
    """Why no heads go from any block; empty where they may."""
    groups = groups_of(context.structure)
    if groups.heads_fixed or config.attention == 0:
        return groups.heads_fixed or "attention is 0"
    if config.mode == "uniform" and not groups.config_heads:
        return "mode uniform: config.json cannot say fewer heads of the same size"
    return ""


def _common_shape(config: MiniLlmConfig, context: Context) -> BlockShape:
    shapes = {block_shape(context.config, context.shapes, name) for name in block_names(context)}
    if len(shapes) > 1:
        raise CompressError(
            f"mini_llm: an earlier pass has left blocks of different sizes, so mode {config.mode} cannot take the same from each; "
            "use mode global."
        )
    return shapes.pop()


def _even_prices(target: Target) -> list[Mapping[Kind, Sequence[float]]]:
    """As if every unit's price rose with the share of its part that has gone."""
    return [
        {kind: [part.cost * (n + 1) / part.units for n in range(part.units)] for kind, part in parts.items()}
        for parts in target.parts
    ]


def depth_of(config: MiniLlmConfig, context: Context) -> int:
    """How many whole blocks go.

    Raises:
        CompressError: none or all would, or blocks depend on their position.
    """
    fixed = groups_of(context.structure).depth_fixed
    if fixed and getattr(context.config, fixed, False):
        raise CompressError(
            f"mini_llm: config.json sets {fixed}, so blocks depend on their position and none can be removed."
        )
    blocks = len(block_names(context))
    whole = context.parameters if config.ratio_of == "model" else inside(context)
    count = depth_count(config.ratio, whole, inside(context) // blocks, blocks)
    if count > blocks - len(protected(config, blocks)):
        raise CompressError(f"mini_llm: {count} blocks are to go, but protect leaves fewer; protect fewer.")
    return count


def cheapest_blocks(config: MiniLlmConfig, context: Context, prices: Sequence[float]) -> list[int]:
    """The blocks that go."""
    kept = protected(config, len(prices))
    free = [index for index in range(len(prices)) if index not in kept]
    return sorted(free, key=lambda index: (prices[index], index))[: depth_of(config, context)]
