"""Score and price groups, and refit what stays: scores, prices, and the least-squares error that is left when a group goes.

Scores add up what single weights are worth; the lowest go first. F1 to F3 are readings of Feature Map Sensitivity (MINI-LLM,
arXiv 2407.11681), whose formula mixes weight, activation and gradient.

The score ``output`` is an error instead. With H the Hessian, the mean of ``x x^T``, the output error of ``W - W'`` is
``tr((W - W') H (W - W')^T)``. The best W' without the columns S costs ``tr(W_S (H^-1_SS)^-1 W_S^T)``: the optimal brain surgeon
for columns of a matrix (as in SparseGPT, arXiv 2301.00774, which does it for weights, and ZipLM, arXiv 2302.04089, for
structures). Columns are removed one group after the other, each the cheapest given those that have gone.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from compress.passes import Block, Context
from compress.pruning.scores import wanda
from compress.pruning.settings import WHOLE_MODEL, Aggregate, Formula, ScoreSettings
from compress.pruning.structured.groups import Kind, Part, last_linear
from compress.ranks import ALONE, Ranks, Sums
from compress.statistics import Moments, add_products, check_inputs, no_products, unfolded
from compress.structure import Linear

DAMPING = 0.01
"""Added to the diagonal of H, as a share of its mean."""
ITERATIONS = 64
"""Steps of conjugate gradients where zeros are kept."""
STEPS = 256
"""Removals after which costs are computed anew; more groups than that go several at a time."""


def element_scores(weight: Tensor, norm: Tensor, mean: Tensor, gradient: Tensor, formula: Formula) -> Tensor:
    """Score every weight of a matrix, [N, K], by its gradient, [N, K], and its inputs' root mean square and signed mean, [K].

    F1 is ``|W_ij| ||X_j|| |g_ij|``; F2 ``|W_ij mean(X_j) g_ij|``; F3 ``|W_ij g_ij|``, first-order Taylor; ``vector`` is F3 with
    its sign, so that a group's sum is the derivative of the loss by scaling the group.
    """
    if formula == "F1":
        return weight.abs() * norm * gradient.abs()
    if formula == "F2":
        return (weight * mean * gradient).abs()
    return (weight * gradient).abs() if formula == "F3" else weight * gradient


def group_scores(part: Part, elements: Mapping[str, Tensor], aggregate: Aggregate) -> Tensor:
    """Score a part's groups, float32 [G], from the scores of every weight of its members, [N, K] by name within the block.

    ``aggregate`` says how the sums over a group's rows or columns in each member become one number.
    """
    sums = []
    for name, scores in elements.items():
        lines = scores.sum(0) if name == part.last else scores.sum(1)
        index = part.columns if name == part.last else part.rows[name]
        sums.append(lines[index.to(lines.device)].sum(1))
    stacked = torch.stack(sums).float()
    return stacked.sum(0).abs() if aggregate == "sum" else stacked.abs().amax(0)


def lowest(scores: Tensor, classes: Tensor, count: int) -> list[int]:
    """Choose the groups to remove, lowest score first; every class loses ``count / classes``."""
    quota = [count // (int(classes.max()) + 1)] * (int(classes.max()) + 1)
    chosen = []
    for group in scores.cpu().argsort(stable=True).tolist():
        if quota[int(classes[group])]:
            quota[int(classes[group])] -= 1
            chosen.append(group)
    return chosen


class BlockScores:
    """Score the groups of one block in memory, by its samples or by the calibration statistics of the whole model."""

    def __init__(self, settings: ScoreSettings, block: Block, context: Context) -> None:
        self.settings, self.block, self.context = settings, block, context

    def scores(self, part: Part) -> Tensor:
        """Score a part's groups, [G]; not for ``output``, which finds an order instead."""
        settings, block = self.settings, self.block
        generator = self.context.generator(block.index, part.kind == "mlp")
        if settings.score == "random":
            return torch.rand(part.count, generator=generator)
        if settings.score in WHOLE_MODEL:
            return block.model_statistics[f"{block.index}.{part.kind}"]
        members = {name: Linear(name, block.module.get_submodule(name)).weight for name in part.members}
        if settings.score == "magnitude":
            elements = {name: weight.square() for name, weight in members.items()}
            return group_scores(part, elements, settings.aggregate)
        inputs, elements = Moments(ranks=block.ranks), {}
        modules = {name: block.module.get_submodule(name) for name in members}
        block.for_each_input(inputs.add, modules, end_lot=inputs.end_lot)
        for name, weight in members.items():
            elements[name] = wanda(weight, inputs.mean(name))
            if settings.score == "noise":
                elements[name] *= torch.randn(weight.shape, generator=generator).abs().to(weight.device)
        return group_scores(part, elements, settings.aggregate)

    def moments(self, part: Part) -> OutputMoments:
        """Measure the Hessian of a part's last linear, with the block as it is now.

        Raises:
            CompressError: inputs that are not finite.
        """
        block, last = self.block, last_linear(self.block, part)
        biased = getattr(last.module, "bias", None) is not None  # and will then take up the means
        moments = OutputMoments(last.shape[1], self.settings.compensate and biased, last.weight.device, block.ranks)
        block.for_each_input(lambda _name, x: moments.add(x), {part.last: last.module}, end_lot=moments.end_lot)
        moments.finish()
        check_inputs(f"{block.name}.{part.last}", moments.hessian)
        return moments

    def prices(self, part: Part) -> list[float]:
        """Price each further group, in the order in which groups go; prices of all blocks and parts compare.

        An output error counts in proportion to the energy of the residual stream that the block leaves.
        """
        if self.settings.score == "output":
            weight, moments = last_linear(self.block, part).weight, self.moments(part)
            _, errors = removal_order(weight, moments, part.columns, part.classes, part.count - part.step)
            scale = _stream_energy(self.block)
            return [(after - before) / scale for before, after in zip([0.0, *errors], errors, strict=False)]
        scores = self.scores(part)
        return [float(scores[group]) for group in lowest(scores, part.classes, part.count)]

    def price(self, parts: Mapping[Kind, Part]) -> float:
        """Price the whole block: how far it turns the stream (ShortGPT, arXiv 2403.03853), or the sum of its groups' scores."""
        if self.settings.score == "random":
            return float(torch.rand(1, generator=self.context.generator(self.block.index)))
        if self.settings.score == "output":
            return _turn(self.block)
        return sum(float(self.scores(part).sum()) for part in parts.values())


@torch.no_grad()
def _stream_energy(block: Block) -> float:
    """Measure the mean square, summed over the hidden size, of what the block leaves in the residual stream."""
    sums = Sums(block.ranks)
    for lot in block.each_lot():
        for run in lot:
            output = run(block.module).flatten(0, -2)
            sums.add("energy", output.double().square().sum())
            sums.add("tokens", torch.tensor(len(output)))
        sums.end_lot()
    return float(sums.total["energy"]) / int(sums.total["tokens"]) or 1.0


@torch.no_grad()
def _turn(block: Block) -> float:
    """Measure one minus the mean cosine between what enters a block and what leaves it."""
    inputs: list[Tensor] = []
    handle = block.module.register_forward_pre_hook(
        lambda _module, args, kwargs: inputs.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    sums = Sums(block.ranks)
    try:
        for lot in block.each_lot():
            for run in lot:
                after, before = run(block.module), inputs.pop()
                sums.add("turn", cosine_similarity(after.float(), before.float(), dim=-1).mean().double())
                sums.add("samples", torch.tensor(1))
            sums.end_lot()
    finally:
        handle.remove()
    return 1 - float(sums.total["turn"]) / int(sums.total["samples"])


class OutputMoments:
    """Sum up a linear's inputs over the calibration tokens; :meth:`finish` turns the sums into means.

    ``hessian``, float64 [K, K], is of ``x x^T``, or in the end the covariance if ``centred``: the linear then has a bias,
    which absorbs the inputs' means, ``mean``, float64 [K].
    """

    def __init__(self, columns: int, centred: bool, device: torch.device, ranks: Ranks = ALONE) -> None:
        self.centred, self._sums = centred, Sums(ranks)
        self.mean = torch.zeros(columns, dtype=torch.float64, device=device)
        self.hessian = torch.zeros(columns, columns, dtype=torch.float64, device=device)

    def add(self, x: Tensor) -> None:
        """Add inputs [tokens, K]; products are made in their own precision, sums in float64."""
        products = no_products(x)
        add_products(products, x)
        for name, value in (("hessian", products), ("mean", x.sum(0))):
            self._sums.add(name, value if name in self._sums.lot else value.double())
        self._sums.add("tokens", torch.tensor(len(x)))

    def end_lot(self) -> None:
        """Add up what was added since the last lot, in all processes."""
        self._sums.end_lot()

    def finish(self) -> OutputMoments:
        """Turn the sums into means."""
        if self._sums.lot:
            self.end_lot()
        total = self._sums.total
        self.hessian = unfolded(total.pop("hessian")) / total["tokens"]
        self.mean = total["mean"] / total["tokens"]
        if self.centred:
            self.hessian -= torch.outer(self.mean, self.mean)
        return self

    def damped(self) -> Tensor:
        """Return the Hessian with damping on its diagonal, the matrix to be inverted."""
        diagonal = self.hessian.diagonal()
        added = DAMPING * diagonal.mean().clamp_min(torch.finfo(torch.float32).tiny)
        return self.hessian + torch.diag(torch.full_like(diagonal, float(added)))


def removal_order(
    weight: Tensor, moments: OutputMoments, columns: Tensor, classes: Tensor, count: int
) -> tuple[list[int], list[float]]:
    """Find the order in which ``count`` groups go, and the output error after each.

    ``columns``, int64 [G, c], holds each group's columns of a weight [N, K]; every class of ``classes``, int64 [G], loses equally
    many groups.
    """
    columns, classes = columns.to(weight.device), classes.to(weight.device)
    rest = _Rest(weight, moments, columns, count)
    quota = torch.full((int(classes.max()) + 1,), count // (int(classes.max()) + 1), device=weight.device)
    gone = torch.zeros(len(columns), dtype=torch.bool, device=weight.device)
    order: list[int] = []
    errors: list[float] = []
    total = 0.0
    at_once = 1 if len(quota) > 1 else -(-count // STEPS)
    while len(order) < count:
        cost = rest.costs().masked_fill(gone | (quota[classes] == 0), float("inf"))
        chosen = cost.argsort(stable=True)[: min(at_once, count - len(order))]
        for group in chosen.tolist():
            total += float(cost[group])
            order.append(group)
            errors.append(total)
        gone[chosen] = True
        quota -= torch.bincount(classes[chosen], minlength=len(quota))
        rest.take_out(chosen)
    return order, errors


class _Rest:
    """Hold what is left of W and of the inverse of H while groups are taken out.

    Of the inverse [K, K] only the groups' own parts are kept up to date, and the rows of those that go are found when they do:
    what was subtracted is ``taken^T factors``, each with a row for every column that has gone.
    """

    def __init__(self, weight: Tensor, moments: OutputMoments, columns: Tensor, count: int) -> None:
        self.columns, self.inverse = columns, torch.linalg.inv(moments.damped())
        self.weight = weight.double().t()[columns].contiguous()  # [G, c, N]
        self.inner = self.inverse[columns[:, :, None], columns[:, None, :]]  # [G, c, c]
        self.gone, shape = 0, (count * columns.shape[1], weight.shape[1])
        self.taken, self.factors = self.inverse.new_empty(shape), self.inverse.new_empty(shape)

    def costs(self) -> Tensor:
        """Return the least output error of removing each group alone, float64 [G]: mean squares, summed over outputs."""
        found: Tensor
        if self.inner.shape[1] == 1:
            found = torch.linalg.vector_norm(self.weight, dim=(1, 2)).square() / self.inner[:, 0, 0]
        else:
            found = (self.weight * torch.linalg.solve(self.inner, self.weight)).sum((1, 2))
        return found

    def take_out(self, groups: Tensor) -> None:
        """Remove groups: what is left of both matrices is that of the other columns."""
        lost, before = self.columns[groups].flatten(), slice(self.gone)
        taken = self.inverse[lost] - self.taken[before, lost].t() @ self.factors[before]  # [groups * c, K]
        factor = torch.linalg.solve(taken[:, lost], taken)
        now = slice(self.gone, self.gone + len(lost))
        self.taken[now], self.factors[now], self.gone = taken, factor, now.stop
        flat, lines = self.weight.view(-1, self.weight.shape[2]), factor[:, self.columns.flatten()]
        flat.addmm_(lines.t(), self.weight[groups].flatten(0, 1), alpha=-1)
        self.inner -= torch.einsum("mgi,mgj->gij", taken[:, self.columns], factor[:, self.columns])
        self.weight[groups] = 0.0
        self.inner[groups] = torch.eye(self.inner.shape[1], dtype=self.inner.dtype, device=self.inner.device)


def compensated(
    weight: Tensor, bias: Tensor | None, moments: OutputMoments, kept: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Refit the columns that stay (int64 ``kept``), so that the output is as near as possible to the whole linear's.

    Weights that are zero, an earlier pass's, stay zero: the others are then refitted by conjugate gradients.

    Returns:
        [N, kept] and the bias, in the dtypes they came in.
    """
    matrix, whole = moments.damped(), weight.double()
    # The damping pulls towards the columns as they were, not towards zero.
    target = whole @ moments.hessian[:, kept] - whole[:, kept] @ moments.hessian[kept[:, None], kept]
    matrix, there = matrix[kept[:, None], kept], whole[:, kept] != 0
    full = there.all(1)
    change = torch.zeros_like(target)
    if full.any():
        change[full] = torch.linalg.solve(matrix, target[full].t()).t()
    if not full.all():
        change[~full] = _masked_solve(matrix, target[~full], there[~full])
    result = whole[:, kept] + change
    if bias is not None and moments.centred:
        shift = whole @ moments.mean - result @ moments.mean[kept]
        bias = (bias.double() + shift).to(bias.dtype)
    return result.to(weight.dtype), bias


def _masked_solve(matrix: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Approximate the X that is 0 outside a mask and minimises ``tr(X matrix X^T) / 2 - tr(X target^T)``, [N, K]."""
    least = torch.finfo(target.dtype).tiny  # a row that is solved has no rest to divide by
    found = torch.zeros_like(target)
    rest = step = target * mask
    size = rest.square().sum(1, keepdim=True)
    for _ in range(ITERATIONS):
        image = (step @ matrix) * mask
        length = size / (step * image).sum(1, keepdim=True).clamp_min(least)
        found += length * step
        rest = rest - length * image
        before = size
        size = rest.square().sum(1, keepdim=True)
        step = rest + size / before.clamp_min(least) * step
    return found


def output_error(weight: Tensor, changed: Tensor, moments: OutputMoments, kept: Tensor) -> float:
    """Measure the mean square of the output's error by that of the output (about their means where a bias makes up for those)."""
    whole = weight.double()
    difference = whole.clone()
    difference[:, kept] -= changed.double()
    scale = float(((whole @ moments.hessian) * whole).sum())
    return float(((difference @ moments.hessian) * difference).sum()) / scale if scale > 0 else 0.0
