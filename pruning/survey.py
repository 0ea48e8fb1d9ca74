"""Scores that need the whole model in memory: gradients of weights and of gates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compress.passes import Context, Report
from compress.pruning.criteria import element_scores, group_scores, lowest
from compress.pruning.estimate import (
    batches,
    gates_backprop,
    gates_residual,
    gates_spsa,
    spsa,
    spsa_gradient,
    weight_gradients,
)
from compress.pruning.groups import Kind, Part
from compress.pruning.settings import MiniLlmConfig
from compress.pruning.targets import Counts
from compress.statistics import Moments, watch
from compress.structure import Linear, block_prefix

Parts = Mapping[str, tuple[str, Part]]
"""``<block>.<part>`` -> the block's name and the part."""


def whole_model_scores(
    config: MiniLlmConfig, model: PreTrainedModel, samples: Sequence[Tensor], context: Context,
    blocks: Sequence[Mapping[Kind, Part]], counts: Sequence[Counts], report: Report,
) -> dict[str, Tensor]:  # fmt: skip
    """Score every unit of every part; with several rounds, again each time an equal share of them is gated off.

    Args:
        config: of the pass.
        model: the whole, its weights without gradients.
        samples: int64 [T] each.
        context: of the run.
        blocks: their parts.
        counts: how many units each loses in the end, for rounds.
        report: progress.

    Returns:
        ``<block>.<part>`` -> float32 [U] on the CPU. Units that went in an earlier round have a score below all others, in
        the order in which they went.
    """
    parts = {
        f"{index}.{kind}": (block_prefix(context.structure, index), part)
        for index, found in enumerate(blocks)
        for kind, part in found.items()
    }
    wanted = {f"{index}.{kind}": count for index, lost in enumerate(counts) for kind, count in lost.items()}
    gone: dict[str, list[int]] = {label: [] for label in parts}
    scores: dict[str, Tensor] = {}
    for turn in range(config.rounds):
        with _off(model, parts, gone):
            found = _scores(config, model, samples, context, parts, lambda done, total, turn=turn: report(  # type: ignore[misc]
                f"scoring, round {turn + 1}", done, total
            ))  # fmt: skip
        for label, (_, part) in parts.items():
            ranked = found[label].float().cpu()
            for place, unit in enumerate(gone[label]):
                ranked[unit] = float(place - len(gone[label]))
            scores[label] = ranked
            step = part.step
            share = round(wanted.get(label, 0) * (turn + 1) / config.rounds / step) * step
            gone[label] = lowest(ranked, part.classes, share)
    return scores


def _gated(model: PreTrainedModel, parts: Parts) -> dict[str, tuple[Linear, Tensor]]:
    found = {}
    for label, (block, part) in parts.items():
        name = f"{block}.{part.last}"
        unit = torch.empty(part.columns.numel(), dtype=torch.long)
        unit[part.columns.flatten()] = torch.arange(part.units).repeat_interleave(part.columns.shape[1])
        found[label] = (Linear(name, model.get_submodule(name)), unit.to(model.device))
    return found


class _off:  # noqa: N801 - reads as the statement it is
    """Gate units off for the length of a ``with``."""

    def __init__(self, model: PreTrainedModel, parts: Parts, gone: Mapping[str, Sequence[int]]) -> None:
        values = {}
        for label, units in gone.items():
            if units:
                values[label] = torch.ones(1, parts[label][1].units, device=model.device)
                values[label][0, list(units)] = 0.0
        self.handles = []
        gated = _gated(model, parts)
        for label, value in values.items():
            linear, unit = gated[label]
            mask = value[0, unit]
            self.handles.append(
                linear.module.register_forward_pre_hook(lambda _m, inputs, mask=mask: (inputs[0] * mask, *inputs[1:]))
            )

    def __enter__(self) -> None:
        return

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()


def _scores(
    config: MiniLlmConfig, model: PreTrainedModel, samples: Sequence[Tensor], context: Context, parts: Parts,
    report: Callable[[int, int], None],
) -> dict[str, Tensor]:  # fmt: skip
    seed = int(torch.randint(1 << 40, (), generator=context.generator(7)))
    if config.score == "gates":
        gated = _gated(model, parts)
        if config.source == "backprop":
            return gates_backprop(model, gated, samples, report)
        if config.source == "spsa":
            return gates_spsa(model, gated, samples, config.draws, config.step, seed, report)
        last = model.get_submodule(block_prefix(context.structure, int(model.config.num_hidden_layers) - 1))
        return gates_residual(model, last, gated, samples, report)
    members = {
        f"{block}.{name}": Linear(f"{block}.{name}", model.get_submodule(f"{block}.{name}"))
        for block, part in parts.values()
        for name in part.members
    }
    norms, means = _inputs(model, members, samples) if config.variant in ("F1", "F2") else ({}, {})
    gradient = _gradients(config, model, members, samples, seed, report)
    found = {}
    for label, (block, part) in parts.items():
        elements = {}
        for name in part.members:
            whole = f"{block}.{name}"
            weight, nothing = members[whole].weight, torch.empty(0)
            elements[name] = element_scores(
                weight, norms.get(whole, nothing), means.get(whole, nothing), gradient(whole), config.variant
            )
        found[label] = group_scores(part, elements, config.aggregate)
    return found


def _gradients(
    config: MiniLlmConfig, model: PreTrainedModel, members: Mapping[str, Linear], samples: Sequence[Tensor], seed: int,
    report: Callable[[int, int], None],
) -> Callable[[str], Tensor]:  # fmt: skip
    """Name of a matrix -> its gradient; estimated ones are put together when asked for, one matrix at a time."""
    if config.source == "backprop":
        return weight_gradients(model, members, samples, report).__getitem__
    draws = spsa(model, members, samples, config.draws, config.step, seed, report)
    places = {name: place for place, name in enumerate(members)}

    def estimate(name: str) -> Tensor:
        return spsa_gradient(draws, places[name], torch.Size(members[name].shape), model.device)

    return estimate


@torch.no_grad()
def _inputs(
    model: PreTrainedModel, members: Mapping[str, Linear], samples: Sequence[Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Root mean square and mean of every linear's inputs over the text, [K] each; padding does not count."""
    moments, sums, real = Moments(), dict[str, Tensor](), torch.empty(0)

    def visit(name: str, x: Tensor) -> None:
        x = x.reshape(-1, x.shape[-1])[real].float()
        moments.add(name, x)
        sums[name] = sums.get(name, torch.zeros(x.shape[1], device=x.device)) + x.sum(0)

    with watch({name: linear.module for name, linear in members.items()}, visit):
        for chosen, scored in batches(samples, model.device):
            first = torch.ones(len(chosen), 1, dtype=torch.bool, device=chosen.device)
            real = torch.cat([first, scored], dim=1).flatten()
            model(input_ids=chosen, use_cache=False)
    means = {name: total / moments.tokens[name] for name, total in sums.items()}
    return {name: moments.mean(name).sqrt() for name in sums}, means
