"""Score groups by the whole model in memory: gradients of weights and of gates on groups, by forward passes or backpropagation.

Nothing here writes a weight. A perturbed weight is a forward pass with ``x (W + e Z)^T`` computed as two products, Z
drawn again from its seed each time, so the model is restored exactly because it was never changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from compress.errors import CompressError
from compress.logits import run_inside, token_losses
from compress.passes import Context, Progress
from compress.pruning.settings import GradientSettings
from compress.pruning.structured.groups import Kind, Part
from compress.pruning.structured.scores import element_scores, group_scores, lowest
from compress.pruning.structured.sizes import Counts
from compress.statistics import Moments, watch
from compress.structure import Linear, block_prefix

STATISTICS_TOKENS = 4096
"""Tokens that are run through the whole model at once."""
Steps = Callable[[int, int], None]
Parts = Mapping[str, tuple[str, Part]]
"""``<block>.<part>`` -> the block's name and the part."""
Gated = Mapping[str, tuple[Linear, Tensor]]
"""``<block>.<part>`` -> the linear that leads back to the residual stream, and the group of each of its columns, int64 [K]."""


def whole_model_scores(
    settings: GradientSettings,
    model: PreTrainedModel,
    samples: Sequence[Tensor],
    context: Context,
    blocks: Sequence[Mapping[Kind, Part]],
    counts: Sequence[Counts],
    progress: Progress,
) -> dict[str, Tensor]:
    """Score every group of every part; with several rounds, again each time an equal share of them is gated off.

    ``counts`` says how many groups each block loses in the end, for several rounds. Returns ``<block>.<part>`` -> float32 [G]
    on the CPU; groups that went in an earlier round have a score below all others, in the order in which they went.
    """
    parts = {
        f"{index}.{kind}": (block_prefix(context.structure, index), part)
        for index, found in enumerate(blocks)
        for kind, part in found.items()
    }
    wanted = {f"{index}.{kind}": count for index, lost in enumerate(counts) for kind, count in lost.items()}
    gone: dict[str, list[int]] = {label: [] for label in parts}
    gated = _gated(model, parts)
    scores: dict[str, Tensor] = {}
    for turn in range(settings.rounds):
        off = {label: torch.ones(1, parts[label][1].count, device=model.device) for label in parts if gone[label]}
        for label, mask in off.items():
            mask[0, gone[label]] = 0.0
        told = partial(progress, f"scoring, round {turn + 1}")
        with gates(gated, off):
            found = _scores(settings, model, samples, context, parts, gated, told)
        for label, (_, part) in parts.items():
            ranked = found[label].float().cpu()
            for place, group in enumerate(gone[label]):
                ranked[group] = float(place - len(gone[label]))
            scores[label] = ranked
            share = round(wanted.get(label, 0) * (turn + 1) / settings.rounds / part.step) * part.step
            gone[label] = lowest(ranked, part.classes, share)
    return scores


def _gated(model: PreTrainedModel, parts: Parts) -> Gated:
    found = {}
    for label, (block, part) in parts.items():
        name = f"{block}.{part.last}"
        group = torch.empty(part.columns.numel(), dtype=torch.long)
        group[part.columns.flatten()] = torch.arange(part.count).repeat_interleave(part.columns.shape[1])
        found[label] = (Linear(name, model.get_submodule(name)), group.to(model.device))
    return found


def _scores(
    settings: GradientSettings,
    model: PreTrainedModel,
    samples: Sequence[Tensor],
    context: Context,
    parts: Parts,
    gated: Gated,
    progress: Steps,
) -> dict[str, Tensor]:
    """Score every group once."""
    seed = int(torch.randint(1 << 40, (), generator=context.generator(7)))
    if settings.score == "gates":
        if settings.estimator == "backprop":
            return gates_backprop(model, gated, samples, progress)
        if settings.estimator == "spsa":
            return gates_spsa(model, gated, samples, settings.draws, settings.step, seed, progress)
        last = model.get_submodule(block_prefix(context.structure, context.structure.depth - 1))
        return gates_residual(model, last, gated, samples, progress)
    names = [f"{block}.{name}" for block, part in parts.values() for name in part.members]
    members = {name: Linear(name, model.get_submodule(name)) for name in names}
    norms, means = _inputs(model, members, samples) if settings.formula in ("F1", "F2") else ({}, {})
    if settings.estimator == "backprop":
        gradient = weight_gradients(model, members, samples, progress).__getitem__
    else:
        draws = spsa(model, members, samples, settings.draws, settings.step, seed, progress)

        def estimated(name: str) -> Tensor:  # put together when it is asked for, one matrix at a time
            return spsa_gradient(draws, names.index(name), torch.Size(members[name].shape), model.device)

        gradient = estimated
    found, nothing = {}, torch.empty(0)
    for label, (block, part) in parts.items():
        elements = {}
        for name in part.members:
            whole = f"{block}.{name}"
            inputs = norms.get(whole, nothing), means.get(whole, nothing)
            elements[name] = element_scores(members[whole].weight, *inputs, gradient(whole), settings.formula)
        found[label] = group_scores(part, elements, settings.aggregate)
    return found


@contextmanager
def _hooked(handles: Sequence[RemovableHandle]) -> Iterator[None]:
    """Remove hooks at the end of a ``with``."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _inputs(
    model: PreTrainedModel, members: Mapping[str, Linear], samples: Sequence[Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Measure the root mean square and the mean of every linear's inputs, [K] each; padding does not count."""
    moments, sums, real = Moments(), dict[str, Tensor](), torch.empty(0)

    def visit(name: str, x: Tensor) -> None:
        x = x.reshape(-1, x.shape[-1])[real].float()
        moments.add(name, x)
        sums[name] = sums.get(name, torch.zeros(x.shape[1], device=x.device)) + x.sum(0)

    with watch({name: linear.module for name, linear in members.items()}, visit):
        for chosen, scored in batches(samples, model.device):
            first = torch.ones(len(chosen), 1, dtype=torch.bool, device=chosen.device)
            real = torch.cat([first, scored], dim=1).flatten()
            run_inside(model, chosen)
    means = {name: total / moments.tokens[name] for name, total in sums.items()}
    return {name: moments.mean(name).sqrt() for name in sums}, means


def batches(samples: Sequence[Tensor], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (tokens [B, T], which of ``tokens[:, 1:]`` count [B, T - 1]), samples of like length together."""
    ordered = sorted(samples, key=len, reverse=True)
    while ordered:
        count = max(1, STATISTICS_TOKENS // len(ordered[0]))
        chosen, ordered = ordered[:count], ordered[count:]
        scored = pad_sequence([torch.ones(len(sample) - 1, dtype=torch.bool) for sample in chosen], batch_first=True)
        yield pad_sequence(list(chosen), batch_first=True).to(device), scored.to(device)


def sample_losses(model: PreTrainedModel, tokens: Tensor, scored: Tensor) -> Tensor:
    """Measure the mean next-token loss of every sample, [B], in nats and float32."""
    return (token_losses(model, tokens) * scored).sum(1) / scored.sum(1)


def noise(shape: torch.Size, seed: int, place: int, device: torch.device) -> Tensor:
    """Draw the standard normal perturbation of one matrix: a function of the seed, never kept."""
    generator = torch.Generator(device).manual_seed((seed * 1_000_003 + place) % (1 << 63))
    return torch.randn(shape, generator=generator, device=device)


@contextmanager
def perturbed(linears: Mapping[str, Linear], seed: int, size: float) -> Iterator[None]:
    """Make linears compute with ``W + size * Z``; their weights stay as they are."""

    def hook(place: int, linear: Linear) -> Callable[..., Tensor]:
        def add(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            z = noise(torch.Size(linear.shape), seed, place, output.device)
            return output + size * nn.functional.linear(inputs[0], z)

        return add

    hooks = [linear.module.register_forward_hook(hook(place, linear)) for place, linear in enumerate(linears.values())]
    with _hooked(hooks):
        yield


@torch.no_grad()
def spsa(
    model: PreTrainedModel,
    linears: Mapping[str, Linear],
    samples: Sequence[Tensor],
    draws: int,
    size: float,
    seed: int,
    progress: Steps,
) -> list[tuple[int, float]]:
    """Estimate slopes by two-sided simultaneous perturbation of all weights, both sides on the same text (MeZO, arXiv 2305.17333).

    Returns (seed, c) of every draw: the mean of ``c * noise(seed, i)`` estimates the gradient of matrix number i.
    """
    found = []
    for draw in range(draws):
        progress(draw, draws)
        sides = []
        for sign in (1.0, -1.0):
            with perturbed(linears, seed + draw, sign * size):
                losses = [sample_losses(model, tokens, scored) for tokens, scored in batches(samples, model.device)]
            sides.append(torch.cat(losses).double().mean())
        slope = float(sides[0] - sides[1]) / (2 * size)
        if not abs(slope) < float("inf"):
            raise CompressError("mini_llm: the loss on the calibration text is not finite; check the model's weights.")
        found.append((seed + draw, slope))
    return found


def spsa_gradient(draws: Sequence[tuple[int, float]], place: int, shape: torch.Size, device: torch.device) -> Tensor:
    """Put the estimated gradient of one matrix together from its seeds."""
    total = torch.zeros(shape, device=device)
    for seed, slope in draws:
        total += slope / len(draws) * noise(shape, seed, place, device)
    return total


def weight_gradients(
    model: PreTrainedModel, linears: Mapping[str, Linear], samples: Sequence[Tensor], progress: Steps
) -> dict[str, Tensor]:
    """Compute the true gradient of the mean loss by every matrix, [N, K] each, by backpropagation."""
    weights = {name: linear.module.get_parameter("weight") for name, linear in linears.items()}
    for weight in weights.values():
        weight.requires_grad_(True)
    try:
        for done, (tokens, scored) in enumerate(batches(samples, model.device)):
            progress(done, len(samples))
            loss = sample_losses(model, tokens, scored).sum() / len(samples)
            loss.backward()  # type: ignore[no-untyped-call]
        found = {}
        for name, weight in weights.items():
            assert weight.grad is not None
            found[name] = weight.grad.t() if linears[name].transposed else weight.grad
        return found
    finally:
        for weight in weights.values():
            weight.grad = None
            weight.requires_grad_(False)


@contextmanager
def gates(gated: Gated, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Multiply the inputs of linears by gates [B, G], one per sample and group, or [1, G] for all samples alike."""

    def hook(values: Tensor, group: Tensor) -> Callable[..., tuple[Tensor, ...]]:
        return lambda _module, inputs: (_gate(inputs[0], values[:, group]), *inputs[1:])

    chosen = [(*gated[label], value) for label, value in values.items()]
    with _hooked([linear.module.register_forward_pre_hook(hook(value, group)) for linear, group, value in chosen]):
        yield


def _gate(x: Tensor, values: Tensor) -> Tensor:
    """Multiply [B, T, K] (or [B * T, K], as OPT's MLP sees it) by [B, K] or [1, K]."""
    return (x.view(values.shape[0], -1, x.shape[-1]) * values[:, None]).view(x.shape)


def gates_backprop(
    model: PreTrainedModel, gated: Gated, samples: Sequence[Tensor], progress: Steps
) -> dict[str, Tensor]:
    """Compute the gate Fisher, [G] each: the mean over samples of the squared derivative of a sample's loss by a gate."""
    found = _zeros(model, gated)
    for done, (tokens, scored) in enumerate(batches(samples, model.device)):
        progress(done, len(samples))
        ones = {label: torch.ones(len(tokens), len(sums)).to(sums).requires_grad_() for label, sums in found.items()}
        with torch.enable_grad(), gates(gated, ones):
            loss = sample_losses(model, tokens, scored).sum()
            slopes = torch.autograd.grad(loss, list(ones.values()))
        for label, slope in zip(ones, slopes, strict=True):
            found[label] += slope.square().sum(0) / len(samples)
    return found


@torch.no_grad()
def gates_spsa(
    model: PreTrainedModel,
    gated: Gated,
    samples: Sequence[Tensor],
    draws: int,
    size: float,
    seed: int,
    progress: Steps,
) -> dict[str, Tensor]:
    """Estimate the gate Fisher from antithetic pairs of forward passes: one part's gates at a time, signs drawn per sample.

    Every sample's derivative is estimated by the mean over draws of ``c * z``, and squared. The squares are too large by
    the same amount for all gates of a part, which leaves their order alone. ``2 * draws * parts`` forward passes.
    """
    found = _zeros(model, gated)
    for done, (label, total) in enumerate(found.items()):
        progress(done, len(gated))
        generator = torch.Generator(model.device).manual_seed(seed + done)
        for tokens, scored in batches(samples, model.device):
            mean = total.new_zeros(len(tokens), len(total))
            for _ in range(draws):
                z = torch.randint(0, 2, mean.shape, generator=generator, device=model.device) * 2.0 - 1.0
                sides = []
                for sign in (size, -size):
                    with gates(gated, {label: 1 + sign * z}):
                        sides.append(sample_losses(model, tokens, scored))
                mean += (sides[0] - sides[1])[:, None] / (2 * size * draws) * z
            total += mean.square().sum(0)
        total /= len(samples)
    return found


def gates_residual(
    model: PreTrainedModel, last_block: nn.Module, gated: Gated, samples: Sequence[Tensor], progress: Steps
) -> dict[str, Tensor]:
    """Estimate the gate Fisher from two forward passes, taking the residual stream for the only way to the loss.

    The derivative of a sample's loss by the last block's output is exact: final norm and head are differentiated, no
    block is. What a block adds to the stream reaches that output along the skip connection unchanged, so the same
    derivative d stands for its own: a gate on the columns S has the slope ``sum_t x_tS . (W_S^T d_t)``. Ways through later
    blocks are left out; in the last MLP there are none, and it is exact.
    """
    found = _zeros(model, gated)
    for done, (tokens, scored) in enumerate(batches(samples, model.device)):
        progress(done, len(samples))
        slope = _stream_slope(model, last_block, tokens, scored)

        def add(label: str, x: Tensor, slope: Tensor = slope) -> None:
            linear, group = gated[label]
            each = (x.view(*slope.shape[:2], -1) * (slope @ linear.weight)).sum(1)  # [B, K]
            summed = each.new_zeros(len(each), len(found[label])).index_add_(1, group, each)
            found[label] += summed.square().sum(0) / len(samples)

        with torch.no_grad(), watch({label: linear.module for label, (linear, _) in gated.items()}, add):
            run_inside(model, tokens)
    return found


def _zeros(model: PreTrainedModel, gated: Gated) -> dict[str, Tensor]:
    """Return a zero for every gate, [G] each."""
    return {label: torch.zeros(int(group.max()) + 1, device=model.device) for label, (_, group) in gated.items()}


def _stream_slope(model: PreTrainedModel, last_block: nn.Module, tokens: Tensor, scored: Tensor) -> Tensor:
    """Differentiate each sample's loss by the last block's output, [B, T, hidden]."""
    leaf: list[Tensor] = []

    def cut(_module: nn.Module, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
        leaf.append((output if isinstance(output, Tensor) else output[0]).detach().requires_grad_())
        return leaf[0] if isinstance(output, Tensor) else (leaf[0], *output[1:])

    # No weight requires a gradient, so nothing before the leaf is recorded.
    with torch.enable_grad(), _hooked([last_block.register_forward_hook(cut)]):
        loss = sample_losses(model, tokens, scored).sum()
        (slope,) = torch.autograd.grad(loss, leaf[0])  # the block also runs where the head is run in parts
    return slope
