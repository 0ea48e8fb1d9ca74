"""Measure gradients by backpropagation with one block in memory: the diagonal Fisher information, or what a divergence is made of.

``F = sum over samples of (dL/dW)^2``, L the mean next-token loss of one sample: the sensitivity of SqueezeLLM and Any-Precision
LLM (arXiv 2402.10517, section 3). The forward pass leaves every block's input on disk; the backward pass walks the blocks in
reverse, recomputes one, and hands the gradient of its input on. For :mod:`compress.divergence` labels are drawn from what the model
itself says, and the gradients of the blocks' outputs are what is kept.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from compress.calibration import Samples
from compress.errors import CompressError
from compress.passes import OUTSIDE, Progress, derived_generator
from compress.ranks import Ranks, Sums
from compress.streaming import StreamedModel
from compress.workspace import Stage

HESSIAN = "hessian of "
"""What the name of a matrix follows, in the unit outside the blocks, where the tensor is the Hessian of its inputs."""
_HEAD_ROWS = 1 << 13  # of the head's gradient at a time


def unit_of(block: int) -> str:
    """Return the name of the unit that has the Fisher information of a block, or of what is :data:`OUTSIDE` of them."""
    return f"fisher-{block}"


def take_hessians(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take the Hessians out of what is known of the matrices :data:`OUTSIDE` of the blocks, by the matrices' names."""
    return {name.removeprefix(HESSIAN): found.pop(name) for name in [*found] if HESSIAN in name}


def squared_gradients(
    model: StreamedModel, samples: Samples, stage: Stage, outside: list[str], progress: Progress
) -> None:
    """Leave the diagonal Fisher information of every block in a stage, a unit each (:func:`unit_of`).

    Each sample's gradient is squared on its own, in the process of the stage that has the sample. Finished units are kept;
    ``outside`` names modules among :meth:`StreamedModel.outside`. A loss or gradient that is not finite is refused.
    """
    _backpropagate(model, samples, stage, outside, progress, drawn=False)


def drawn_gradients(
    model: StreamedModel, samples: Samples, stage: Stage, outside: list[str], progress: Progress
) -> None:
    """Leave the gradients of every block's outputs in a stage, [1, T, hidden] by the sample's place, for labels drawn from the model.

    The loss is that of :func:`drawn_loss`. With ``outside`` its unit has the head's Hessian, and of every sample the last block's
    output (``"hidden-3"``) and the gradient of the first one's input (``"gradient-3"``). Else as :func:`squared_gradients`.
    """
    _backpropagate(model, samples, stage, outside, progress, drawn=True)


def drawn_loss(logits: Tensor, place: int, predicted: int) -> Tensor:
    """Return the loss, by labels drawn from them, of one sample's logits [T, vocabulary], summed over tokens, over the root of ``predicted``.

    That many tokens of all samples are predicted. The labels depend on the logits and on the sample's place alone.
    """
    chances = torch.softmax(logits.detach().float().cpu(), dim=-1).cumsum(-1, dtype=torch.float64)
    drawn = torch.rand(len(chances), 1, generator=derived_generator(0, place), dtype=torch.float64) * chances[:, -1:]
    labels = torch.searchsorted(chances, drawn, right=True)[:, 0].clamp_max(chances.shape[1] - 1)
    loss: Tensor = cross_entropy(logits, labels.to(logits.device), reduction="sum") / predicted**0.5
    return loss


def predicted_tokens(samples: Samples) -> int:
    """Count the tokens of all samples that are predicted."""
    return sum(len(tokens) - 1 for tokens in samples.tokens)


def _backpropagate(
    model: StreamedModel, samples: Samples, stage: Stage, outside: list[str], progress: Progress, drawn: bool
) -> None:
    count = len(model.blocks)
    total = 2 * count + 1
    open_blocks = [index for index in range(count) if stage.record(unit_of(index)) is None]
    outside_open = bool(outside) and stage.record(unit_of(OUTSIDE)) is None
    # The gradient that the next open block (or the embedding) begins with is not there before the forward pass has ended,
    # nor where a finished unit was damaged after what led to it was cleared away.
    stage.ranks.wait()  # before any is finished: all must see the same
    first = max(open_blocks, default=-1) + 1
    if (open_blocks or outside_open) and stage.record(f"gradient-{first}") is None:
        for index in range(count):
            stage.discard(unit_of(index))
        for index in range(count):
            progress("forward", index, total)
            _forward(model, samples, stage, index)
        _loss(model, samples, stage, outside, drawn)
    for index in reversed(range(count)):
        if stage.record(unit_of(index)) is None:
            progress("backward", 2 * count - index, total)
            _backward(model, samples, stage, index, drawn)
        if index + 1 < count:
            stage.discard(f"hidden-{index + 1}")
        stage.discard(f"gradient-{index + 1}")
    if outside_open:
        _finish_outside(model, samples, stage, outside, drawn)
    for unit in (f"hidden-{count}", "hidden-0", "gradient-0", "head"):
        stage.discard(unit)


@torch.no_grad()
def _forward(model: StreamedModel, samples: Samples, stage: Stage, index: int) -> None:
    own = _own(samples, stage)
    if index == 0 and stage.record("hidden-0") is None:
        stage.save_joined("hidden-0", model.first_inputs(own))
    if stage.record(f"hidden-{index + 1}") is not None:
        return
    hidden = stage.load(f"hidden-{index}", own)
    with model.block(index) as block:
        for i, tokens in own.items():
            call = model.capture(tokens)[1][index]
            hidden[str(i)] = model.run(block, hidden[str(i)].to(model.device), call).cpu()
    stage.save_joined(f"hidden-{index + 1}", hidden)


def _own(samples: Samples, stage: Stage) -> dict[int, Tensor]:
    """Return the samples of this process, by their places."""
    return {i: samples.tokens[i] for lot in stage.ranks.lots(len(samples.tokens)) for i in lot}


def _loss(model: StreamedModel, samples: Samples, stage: Stage, outside: list[str], drawn: bool) -> None:
    """Find the gradient of every sample's loss by the last block's output (and what the head's matrix has to know, if wanted)."""
    count = len(model.blocks)
    hidden = stage.load(f"hidden-{count}", _own(samples, stage))
    head = model.head_matrix() if model.head_matrix() in outside else None
    measured, predicted = _HeadStatistics(stage.ranks), predicted_tokens(samples)
    gradients: dict[str, Tensor] = {}
    for lot in stage.ranks.lots(len(samples.tokens)):
        for i in lot:
            tokens, state = samples.tokens[i], hidden[str(i)].to(model.device).requires_grad_()
            with calls_of(model.model.get_submodule(model.head)) as calls:
                logits = model.logits(tokens, state)[:-1]
            # From logits that are no numbers nothing can be drawn; the plain loss of them is none either, and refused below.
            drawn_from = drawn and bool(torch.isfinite(logits.amax()))
            loss = (
                drawn_loss(logits, i, predicted) if drawn_from else cross_entropy(logits, tokens[1:].to(model.device))
            )
            if not torch.isfinite(loss):
                raise CompressError(
                    f"calibration sample {i}: the model's loss is {loss.item()}; its weights are damaged."
                )
            squared = head is not None and not drawn
            found = torch.autograd.grad(loss, [state, calls[0][1]] if squared else [state])
            gradients[str(i)] = found[0].cpu()
            if head is not None:
                measured.add(calls[0][0].detach().flatten(0, -2), found[1].flatten(0, -2) if squared else None)
        measured.end_lot()
    if head is not None:
        stage.save("head", measured.result(head))
    stage.save_joined(f"gradient-{count}", gradients)


@contextmanager
def calls_of(module: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Keep (input, output) of every call of a module within a ``with``."""
    calls: list[tuple[Tensor, Tensor]] = []

    def note(_module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        calls.append((given[0], output))

    handle = module.register_forward_hook(note)
    try:
        yield calls
    finally:
        handle.remove()


class _HeadStatistics:
    """Sum, without ever holding a gradient of the whole head, the squares of every row's, and ``h h^T`` of its inputs."""

    def __init__(self, ranks: Ranks) -> None:
        self._sums = Sums(ranks)

    def add(self, inputs: Tensor, gradients: Tensor | None) -> None:
        """Take one sample: inputs [T, K], gradients of the outputs [T, N] if their squares are wanted."""
        if gradients is not None:
            parts = torch.split(gradients, _HEAD_ROWS, 1)
            found = torch.cat([(part.t().float() @ inputs.float()).square().mean(1) for part in parts])
            self._sums.add("squares", found.cpu())
        self._sums.add("hessian", (inputs.float().t() @ inputs.float()).cpu())
        self._sums.add("tokens", torch.tensor(len(inputs)))

    def end_lot(self) -> None:
        """Add up the lots of all processes."""
        self._sums.end_lot()

    def result(self, name: str) -> dict[str, Tensor]:
        """Return by their names in a unit: [K, K] and, of squares, means over rows, float32 [N, 1]."""
        total = self._sums.total
        squares = {name: total["squares"][:, None].clone()} if "squares" in total else {}
        return {HESSIAN + name: total["hessian"] / total["tokens"], **squares}


def _backward(model: StreamedModel, samples: Samples, stage: Stage, index: int, drawn: bool) -> None:
    own = _own(samples, stage)
    hidden, gradients = stage.load(f"hidden-{index}", own), stage.load(f"gradient-{index + 1}", own)
    fisher, outputs = Sums(stage.ranks), dict(gradients)
    with model.block(index) as block:
        linears = {} if drawn else model.linears(index)
        weights = [linear.module.get_parameter("weight").requires_grad_() for linear in linears.values()]
        for lot in stage.ranks.lots(len(samples.tokens)):
            for i in lot:
                with torch.no_grad():
                    call = model.capture(samples.tokens[i])[1][index]
                state = hidden[str(i)].to(model.device).requires_grad_()
                output = model.run(block, state, call)
                wanted = gradients[str(i)].to(model.device)
                found = torch.autograd.grad(output, [state, *weights], wanted, allow_unused=True)
                assert found[0] is not None
                gradients[str(i)] = found[0].cpu()
                for name, gradient in zip(linears, found[1:], strict=True):
                    if gradient is not None:  # an expert that no token was sent to, or a choice that has no gradient
                        fisher.add(name, gradient.square())
            fisher.end_lot()
        result = {}
        for (name, linear), weight in zip(linears.items(), weights, strict=True):
            total = fisher.total.get(name, torch.zeros_like(weight))
            if not torch.isfinite(total).all():
                raise CompressError(
                    f"{name}: its gradient on calibration text is not finite; check the model's weights."
                )
            result[name] = (total.t() if linear.transposed else total).detach().cpu()
    stage.save_joined(f"gradient-{index}", gradients)
    if drawn:
        stage.save_joined(unit_of(index), outputs)
    else:
        stage.save(unit_of(index), result)


def _finish_outside(model: StreamedModel, samples: Samples, stage: Stage, outside: list[str], drawn: bool) -> None:
    """Finish embedding and head: what the head's matrix has was found with the loss, the looked-up rows' share comes last.

    Both uses of a tied matrix count, as the sum of their squares.
    """
    found = stage.load("head") if model.head_matrix() in outside else {}
    name = model.structure.embedding
    if drawn:
        for what, unit in {"hidden": f"hidden-{len(model.blocks)}", "gradient": "gradient-0"}.items():
            found |= {f"{what}-{i}": tensor for i, tensor in stage.load(unit).items()}
    elif name in outside:
        gradients, squares = stage.load("gradient-0"), torch.zeros(model.outside()[name].shape[0])
        for i, tokens in enumerate(samples.tokens):
            rows, place = torch.unique(tokens, return_inverse=True)
            given = lookup_gradient(model, tokens, gradients[str(i)])
            squares[rows] += torch.zeros(len(rows), given.shape[1]).index_add_(0, place, given).square().mean(1)
        found[name] = squares[:, None] + found.get(name, torch.zeros(()))
    stage.save(unit_of(OUTSIDE), found)


def lookup_gradient(model: StreamedModel, tokens: Tensor, gradient: Tensor) -> Tensor:
    """Return the gradient by the looked-up row of every token, float32 [T, K] on the CPU, given that by the first block's input."""
    module = model.model.get_submodule(model.structure.embedding)
    weight = module.get_parameter("weight").requires_grad_()
    with torch.enable_grad(), calls_of(module) as calls:
        first = model.capture(tokens)[0]
    (given,) = torch.autograd.grad(first, [calls[0][1]], gradient.to(model.device))
    weight.requires_grad_(False)
    # Gemma's embeddings multiply the looked-up rows by a constant, which the output's gradient does not have.
    return given.flatten(0, -2).float().cpu() * float(getattr(module, "scalar_embed_scale", 1.0))
