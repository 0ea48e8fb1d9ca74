"""Measure what an error of a matrix costs: how far it takes the model's next-token distribution from the dense model's.

Let ``y`` be labels drawn from what the dense model says of a text, and ``G`` the gradient of ``-log p(y)`` by one matrix. To second
order, the divergence (Kullback-Leibler) that an error ``E`` of the matrix makes on that text is ``<G, E>^2 / 2`` on average over draws
of ``y``, as the mean of ``G G^T`` over them is the Fisher information (Amari, Natural Gradient Works Efficiently in Learning, 1998).
One draw for each sample is enough to compare matrices; errors of several matrices are taken to add up.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from compress.errors import CompressError
from compress.fisher import calls_of, drawn_loss, lookup_gradient
from compress.passes import Draw, Rows
from compress.ranks import Ranks, Sums, even_parts
from compress.streaming import StreamedModel
from compress.structure import Linear

_ROWS_AT_ONCE = 1 << 13


def block_draw(
    module: nn.Module, linears: Mapping[str, Linear], run: Callable[[nn.Module], Tensor], wanted: Tensor
) -> Draw:
    """Give the gradients by a block's linears of one sample, ``wanted`` being that by the block's output, [1, T, hidden]."""

    def draw() -> dict[str, Rows]:
        weights = [linear.module.get_parameter("weight").requires_grad_() for linear in linears.values()]
        with torch.enable_grad():
            output = run(module)
        found = torch.autograd.grad(output, weights, wanted.to(output.device), allow_unused=True)
        for weight in weights:
            weight.requires_grad_(False)
        known = zip(linears.items(), found, strict=True)
        gradients = {n: g.t() if linear.transposed else g for (n, linear), g in known if g is not None}
        return {name: gradient.__getitem__ for name, gradient in gradients.items()}

    return draw


def outside_draw(
    model: StreamedModel,
    outside: Iterable[str],
    place: int,
    tokens: Tensor,
    found: Mapping[str, Tensor],
    predicted: int,
) -> Draw:
    """Give the gradients by embedding and head, whichever are ``outside``, of the sample at a place; both uses of a tied matrix count.

    ``found`` is what :func:`compress.fisher.drawn_gradients` has left of them.
    """
    head = model.head_matrix()

    def draw() -> dict[str, Rows]:
        uses: dict[str, list[Rows]] = {name: [] for name in outside}
        if head in uses:
            state = found[f"hidden-{place}"].to(model.device).requires_grad_()
            with torch.enable_grad(), calls_of(model.model.get_submodule(model.head)) as calls:
                loss = drawn_loss(model.logits(tokens, state)[:-1], place, predicted)
            (by_logits,) = torch.autograd.grad(loss, [calls[0][1]])
            inputs, by_logits = calls[0][0].detach().flatten(0, -2).float(), by_logits.flatten(0, -2).float()
            uses[head].append(lambda part: by_logits[:, part].t() @ inputs)
        if model.structure.embedding in uses:
            given = lookup_gradient(model, tokens, found[f"gradient-{place}"]).to(model.device)

            def looked_up(part: slice) -> Tensor:
                here = (tokens >= part.start) & (tokens < part.stop)
                total = given.new_zeros(part.stop - part.start, given.shape[1])
                return total.index_add_(0, (tokens[here] - part.start).to(given.device), given[here.to(given.device)])

            uses[model.structure.embedding].append(looked_up)
        return {name: partial(_sum_of, rows) for name, rows in uses.items()}

    return draw


def _sum_of(uses: Iterable[Rows], part: slice) -> Tensor:
    return torch.stack([use(part) for use in uses]).sum(0)


@torch.no_grad()
def divergences(
    draws: Sequence[Sequence[Draw]], errors: Mapping[str, tuple[int, Rows]], ranks: Ranks
) -> dict[str, float]:
    """Estimate the divergence that each matrix's error makes alone, in nats per token.

    ``draws`` are those of this process, in lots; ``errors`` are name -> how many rows the error has, and these.

    Raises:
        CompressError: a gradient that is not finite.
    """
    sums = Sums(ranks)
    for lot in draws:
        for draw in lot:
            gradients = draw()
            for name, (rows, error) in errors.items():
                if name not in gradients:
                    continue
                parts = even_parts(rows, _ROWS_AT_ONCE)
                products = [(gradients[name](part) * error(part)).sum(dtype=torch.float64) for part in parts]
                sums.add(name, torch.stack(products).sum().square().cpu())
        sums.end_lot()
    found = {name: float(sums.total.get(name, 0.0)) / 2 for name in errors}
    for name, value in found.items():
        if not math.isfinite(value):
            raise CompressError(f"{name}: its gradient on calibration text is not finite; check the model's weights.")
    return found


def add_divergences(
    errors: Mapping[str, Mapping[str, dict[str, float]]], bits: str, measured: Mapping[str, float]
) -> None:
    """Add the divergence at every number of bits to a record of errors: measured at one, and at others as the output's error is to that.

    Both grow alike from one number of bits to the next. A matrix that no sample has come to is taken for the least sensitive.
    """
    costs = {
        name: measured[name] / by_bits[bits]["weighted"]
        for name, by_bits in errors.items()
        if measured[name] and by_bits[bits]["weighted"]
    }
    least = min(costs.values(), default=0.0)
    for name, by_bits in errors.items():
        for error in by_bits.values():
            error["divergence"] = costs.get(name, least) * error["weighted"]
