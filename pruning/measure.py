"""What the scores of one block need of its inputs, gathered in one run over the samples."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from compress.errors import CompressError
from compress.passes import Block
from compress.pruning.scores import magnitude, removal, wanda
from compress.pruning.settings import Score
from compress.pruning.sparsegpt import Factor, factorise


@dataclass
class Inputs:
    """Second moments of the inputs of a block's linears; linears that share an input share its entry.

    Attributes:
        owner: linear -> the linear under whose name its input is kept.
        squares: owner -> float32 [K], mean square of each input.
        hessians: owner -> float32 [K, K], twice the mean of ``x x^T``, if asked for.
    """

    owner: dict[str, str] = field(default_factory=dict)
    squares: dict[str, Tensor] = field(default_factory=dict)
    hessians: dict[str, Tensor] = field(default_factory=dict)


def gather(block: Block, hessians: bool) -> Inputs:
    """Run the block's samples once and accumulate, in float32, one entry per distinct input.

    Query, key and value (or gate and up) are called one after another with the very same tensor; that is how a shared
    input is recognised, whatever the architecture.
    """
    found, tokens = Inputs(), dict[str, int]()
    last: list[tuple[str, Tensor]] = []

    def visit(name: str, x: Tensor) -> None:
        if last and _same(last[0][1], x):
            found.owner[name] = last[0][0]
            return
        last[:] = [(name, x)]  # holding it keeps its memory from being given to another input
        found.owner[name] = name
        tokens[name] = tokens.get(name, 0) + x.shape[0]
        x = x.float()
        sums, value = (found.hessians, x.t() @ x) if hessians else (found.squares, x.square().sum(0))
        if name in sums:
            sums[name] += value
        else:
            sums[name] = value

    block.for_each_input(visit)
    for name, total in found.hessians.items():
        found.squares[name] = total.diagonal() / tokens[name]
        total *= 2 / tokens[name]
    if not hessians:
        found.squares = {name: total / tokens[name] for name, total in found.squares.items()}
    return found


def _same(left: Tensor, right: Tensor) -> bool:
    return left.data_ptr() == right.data_ptr() and left.shape == right.shape and left._version == right._version


@dataclass(frozen=True)
class Measured:
    """A block's scores.

    Attributes:
        scores: linear -> float32 [N, K].
        factors: linear -> factor of its inputs' Hessian (one object for linears that share an input); for
            ``sparsegpt`` only.
    """

    scores: dict[str, Tensor]
    factors: dict[str, Factor]


def measure(block: Block, names: Iterable[str], score: Score, damping: float) -> Measured:
    """Score some linears of a block on the samples it was given.

    Raises:
        CompressError: weights or inputs that are not finite.
    """
    weights = {name: block.linears[name].weight for name in names}
    for name, weight in weights.items():
        if not torch.isfinite(weight).all():
            row = int((~torch.isfinite(weight)).any(dim=1).nonzero()[0])
            raise CompressError(f"{name}: row {row} of its weight holds NaN or infinity; the model is damaged.")
    if score == "magnitude":
        return Measured({name: magnitude(weight) for name, weight in weights.items()}, {})
    inputs = gather(block, score == "sparsegpt")
    if score == "wanda":
        return Measured({name: wanda(w, _finite(name, inputs)) for name, w in weights.items()}, {})
    shared: dict[str, Factor] = {}
    for name in weights:
        owner = inputs.owner[name]
        if owner not in shared:
            shared[owner] = factorise(inputs.hessians.pop(owner), damping, name)
    factors = {name: shared[inputs.owner[name]] for name in weights}
    return Measured({name: removal(w, factors[name].diagonal) for name, w in weights.items()}, factors)


def _finite(name: str, inputs: Inputs) -> Tensor:
    squares = inputs.squares[inputs.owner[name]]
    if not torch.isfinite(squares).all():
        raise CompressError(f"{name}: its inputs on the calibration text are not finite; check the model's weights.")
    return squares
