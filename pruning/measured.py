"""What one block in memory tells of its groups: inputs, scores, and the prices at which groups go."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from compress.passes import Block, Context
from compress.pruning.criteria import element_scores, group_scores, lowest
from compress.pruning.groups import Kind, Part
from compress.pruning.least_squares import Moments as OutputMoments
from compress.pruning.least_squares import removal_order
from compress.pruning.settings import WHOLE_MODEL, MiniLlmConfig
from compress.statistics import Moments, check_inputs
from compress.structure import Linear


def last_linear(block: Block, part: Part) -> Linear:
    """The linear that leads a part back to the residual stream."""
    return Linear(part.last, block.module.get_submodule(part.last))


def moments_of(block: Block, part: Part, centred: bool) -> OutputMoments:
    """Second moments of the inputs of a part's last linear, as the block is now.

    Args:
        block: with samples.
        part: of it.
        centred: whether a bias, if there is one, will take up the means.

    Raises:
        CompressError: inputs that are not finite.
    """
    last = last_linear(block, part)
    biased = getattr(last.module, "bias", None) is not None
    moments = OutputMoments.empty(last.shape[1], centred and biased, last.weight.device)
    block.for_each_input(lambda _name, x: moments.add(x), {part.last: last.module})
    moments.finish()
    check_inputs(f"{block.name}.{part.last}", moments.gram)
    return moments


def prices(block: Block, part: Part, config: MiniLlmConfig, context: Context) -> list[float]:
    """What each further unit costs, in the order in which units go: sums over blocks and parts may be compared.

    An output error counts in proportion to the energy of the residual stream that the block leaves.
    """
    if config.score == "output":
        weight = last_linear(block, part).weight
        moments = moments_of(block, part, config.compensate)
        _, errors = removal_order(weight, moments, part.columns, part.classes, part.units - part.step)
        scale = stream_energy(block)
        return [(after - before) / scale for before, after in zip([0.0, *errors], errors, strict=False)]
    scores = block_scores(block, part, config, context)
    return [float(scores[unit]) for unit in lowest(scores, part.classes, part.units)]


@torch.no_grad()
def stream_energy(block: Block) -> float:
    """Mean square, summed over the hidden size, of what the block leaves in the residual stream."""
    outputs = [run(block.module).flatten(0, -2) for run in block.samples]
    total = sum(float(output.double().square().sum()) for output in outputs)
    return total / sum(len(output) for output in outputs) or 1.0


def block_price(block: Block, parts: Mapping[Kind, Part], config: MiniLlmConfig, context: Context) -> float:
    """Of a whole block: how far it turns the stream (ShortGPT, arXiv 2403.03853), or the sum of its groups' scores."""
    if config.score == "random":
        return float(torch.rand(1, generator=context.generator(block.index)))
    if config.score == "output":
        return _turn(block)
    return sum(float(block_scores(block, part, config, context).sum()) for part in parts.values())


@torch.no_grad()
def _turn(block: Block) -> float:
    """One minus the mean cosine between what enters a block and what leaves it."""
    inputs: list[Tensor] = []
    handle = block.module.register_forward_pre_hook(
        lambda _module, args, kwargs: inputs.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    try:
        turns = [_cosine(run(block.module), inputs.pop()) for run in block.samples]
    finally:
        handle.remove()
    return 1 - sum(turns) / len(turns)


def _cosine(left: Tensor, right: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(left.float(), right.float(), dim=-1).mean())


def block_scores(block: Block, part: Part, config: MiniLlmConfig, context: Context) -> Tensor:
    """Scores of a part's units, [U]; not for ``output``, where an order is found instead."""
    generator = context.generator(block.index, part.kind == "mlp")
    if config.score == "random":
        return torch.rand(part.units, generator=generator)
    if config.score in WHOLE_MODEL:
        return block.findings[f"{block.index}.{part.kind}"]
    members = {name: Linear(name, block.module.get_submodule(name)).weight for name in part.members}
    if config.score == "magnitude":
        return group_scores(part, {name: weight.square() for name, weight in members.items()}, config.aggregate)
    norms = _input_norms(block, part)
    elements = {}
    for name, weight in members.items():
        elements[name] = element_scores(weight, norms[name], norms[name], None, "F1")
        if config.score == "noise":
            elements[name] *= torch.randn(weight.shape, generator=generator).abs().to(weight.device)
    return group_scores(part, elements, config.aggregate)


def _input_norms(block: Block, part: Part) -> dict[str, Tensor]:
    """Root mean square of every member's inputs, [K]."""
    moments = Moments()
    block.for_each_input(moments.add, {name: block.module.get_submodule(name) for name in part.members})
    return {name: moments.mean(name).sqrt() for name in part.members}
