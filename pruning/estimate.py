"""What a group's removal does to the loss, estimated from the whole model: forward passes only, or backpropagation.

Nothing here writes a weight. A perturbed weight is a forward pass with ``x (W + e Z)^T`` computed as two products, Z
drawn again from its seed each time, so the model is restored exactly because it was never changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from compress.errors import CompressError
from compress.structure import Linear

Progress = Callable[[int, int], None]

SURVEY_TOKENS = 4096
"""Tokens that are run through the whole model at once."""


def batches(samples: Sequence[Tensor], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """(tokens [B, T], which of ``tokens[:, 1:]`` count [B, T - 1]); samples of like length together."""
    ordered = sorted(samples, key=len, reverse=True)
    while ordered:
        count = max(1, SURVEY_TOKENS // len(ordered[0]))
        chosen, ordered = ordered[:count], ordered[count:]
        scored = pad_sequence([torch.ones(len(sample) - 1, dtype=torch.bool) for sample in chosen], batch_first=True)
        yield pad_sequence(list(chosen), batch_first=True).to(device), scored.to(device)


def sample_losses(model: PreTrainedModel, tokens: Tensor, scored: Tensor) -> Tensor:
    """Mean next-token loss of every sample, [B], in nats and float32."""
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].float()
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
    return (losses * scored).sum(1) / scored.sum(1)


def noise(shape: torch.Size, seed: int, place: int, device: torch.device) -> Tensor:
    """The standard normal perturbation of one matrix in one draw: a function of the seed, never kept."""
    generator = torch.Generator(device).manual_seed((seed * 1_000_003 + place) % (1 << 63))
    return torch.randn(shape, generator=generator, device=device)


@contextmanager
def perturbed(linears: Mapping[str, Linear], seed: int, size: float) -> Iterator[None]:
    """Let linears compute with ``W + size * Z``; their weights stay as they are."""

    def hook(place: int, linear: Linear) -> Callable[..., Tensor]:
        def add(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            z = noise(torch.Size(linear.shape), seed, place, output.device)
            return output + size * nn.functional.linear(inputs[0], z)

        return add

    handles = [
        linear.module.register_forward_hook(hook(place, linear)) for place, linear in enumerate(linears.values())
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def spsa(
    model: PreTrainedModel, linears: Mapping[str, Linear], samples: Sequence[Tensor], draws: int, size: float, seed: int,
    report: Progress,
) -> list[tuple[int, float]]:  # fmt: skip
    """Two-sided simultaneous perturbation of all weights, both sides on the same text (MeZO, arXiv 2305.17333).

    Returns:
        (seed, c) of every draw; the gradient of matrix number i is estimated by the mean of ``c * noise(seed, i)``.
    """
    found = []
    for draw in range(draws):
        report(draw, draws)
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
    """The estimated gradient of one matrix, put together from its seeds."""
    total = torch.zeros(shape, device=device)
    for seed, slope in draws:
        total += slope / len(draws) * noise(shape, seed, place, device)
    return total


def weight_gradients(
    model: PreTrainedModel, linears: Mapping[str, Linear], samples: Sequence[Tensor], report: Progress
) -> dict[str, Tensor]:
    """The true gradient of the mean loss by every matrix, [N, K] each, by backpropagation."""
    weights = {name: linear.module.get_parameter("weight") for name, linear in linears.items()}
    for weight in weights.values():
        weight.requires_grad_(True)
    try:
        for done, (tokens, scored) in enumerate(batches(samples, model.device)):
            report(done, len(samples))
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


Gated = Mapping[str, tuple[Linear, Tensor]]
"""Label -> the linear that leads back to the residual stream, and the unit of each of its columns, int64 [K]."""


@contextmanager
def gates(gated: Gated, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Multiply the inputs of linears by gates [B, U], one per sample and unit."""

    def hook(values: Tensor, unit: Tensor) -> Callable[..., tuple[Tensor, ...]]:
        return lambda _module, inputs: (_gate(inputs[0], values[:, unit]), *inputs[1:])

    handles = [
        gated[label][0].module.register_forward_pre_hook(hook(value, gated[label][1]))
        for label, value in values.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _gate(x: Tensor, values: Tensor) -> Tensor:
    """[B, T, K] (or [B * T, K], as OPT's MLP sees it) times [B, K]."""
    return (x.view(values.shape[0], -1, x.shape[-1]) * values[:, None]).view(x.shape)


def _units(unit: Tensor) -> int:
    return int(unit.max()) + 1


def gates_backprop(
    model: PreTrainedModel, gated: Gated, samples: Sequence[Tensor], report: Progress
) -> dict[str, Tensor]:
    """Gate Fisher: the mean over samples of the squared derivative of a sample's loss by a gate, [U] each."""
    found = {label: torch.zeros(_units(unit), device=model.device) for label, (_, unit) in gated.items()}
    for done, (tokens, scored) in enumerate(batches(samples, model.device)):
        report(done, len(samples))
        ones = {
            label: torch.ones(len(tokens), _units(unit), device=model.device, requires_grad=True)
            for label, (_, unit) in gated.items()
        }
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
    report: Progress,
) -> dict[str, Tensor]:
    """The same from antithetic pairs of forward passes: one part's gates at a time, signs drawn for each sample.

    Every sample's derivative is estimated by the mean over draws of ``c * z``, and squared. The squares are too large by
    the same amount for all gates of a part, which leaves their order alone. ``2 * draws * parts`` forward passes.
    """
    found = {}
    for done, (label, (_, unit)) in enumerate(gated.items()):
        report(done, len(gated))
        total = torch.zeros(_units(unit), device=model.device)
        generator = torch.Generator(model.device).manual_seed(seed + done)
        for tokens, scored in batches(samples, model.device):
            mean = torch.zeros(len(tokens), _units(unit), device=model.device)
            for _ in range(draws):
                z = torch.randint(0, 2, mean.shape, generator=generator, device=model.device) * 2.0 - 1.0
                sides = []
                for sign in (size, -size):
                    with gates(gated, {label: 1 + sign * z}):
                        sides.append(sample_losses(model, tokens, scored))
                mean += (sides[0] - sides[1])[:, None] / (2 * size * draws) * z
            total += mean.square().sum(0)
        found[label] = total / len(samples)
    return found


def gates_residual(
    model: PreTrainedModel, last_block: nn.Module, gated: Gated, samples: Sequence[Tensor], report: Progress
) -> dict[str, Tensor]:
    """Gate Fisher from two forward passes, taking the residual stream for the only way to the loss.

    The derivative of a sample's loss by the last block's output is exact: final norm and head are differentiated, no
    block is. What a block adds to the stream reaches that output along the skip connection unchanged, so the same
    derivative d stands for its own: a gate on the columns S has the slope ``sum_t x_tS . (W_S^T d_t)``. Ways through later
    blocks are left out; in the last MLP there are none, and it is exact.
    """
    found = {label: torch.zeros(_units(unit), device=model.device) for label, (_, unit) in gated.items()}
    for done, (tokens, scored) in enumerate(batches(samples, model.device)):
        report(done, len(samples))
        slope = _stream_slope(model, last_block, tokens, scored)

        def add(label: str, slope: Tensor = slope) -> Callable[..., None]:
            linear, unit = gated[label]

            def visit(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                x = inputs[0].view(*slope.shape[:2], -1)
                each = (x * (slope @ linear.weight)).sum(1)  # [B, K]
                summed = torch.zeros(len(each), _units(unit), device=each.device).index_add_(1, unit, each)
                found[label] += summed.square().sum(0) / len(samples)

            return visit

        handles = [linear.module.register_forward_pre_hook(add(label)) for label, (linear, _) in gated.items()]
        try:
            with torch.no_grad():
                model(input_ids=tokens, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
    return found


def _stream_slope(model: PreTrainedModel, last_block: nn.Module, tokens: Tensor, scored: Tensor) -> Tensor:
    """Derivative of each sample's loss by the last block's output, [B, T, hidden]."""
    leaf: list[Tensor] = []

    def cut(_module: nn.Module, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
        leaf.append((output if isinstance(output, Tensor) else output[0]).detach().requires_grad_())
        return leaf[0] if isinstance(output, Tensor) else (leaf[0], *output[1:])

    handle = last_block.register_forward_hook(cut)
    try:
        with torch.enable_grad():  # no weight requires a gradient, so nothing before the leaf is recorded
            (slope,) = torch.autograd.grad(sample_losses(model, tokens, scored).sum(), leaf)
    finally:
        handle.remove()
    return slope
