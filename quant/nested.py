"""Nested codes that minimise the error of a layer's output, ``(q - w) H (q - w)^T`` per row, at several numbers of bits at once.

Any-precision's own clustering minimises a sum of weighted squared errors, one per weight. Here errors of different
weights of a row may cancel on the inputs that occur: ``H`` is the mean of ``x x^T`` over them. Given the codes, the
best codebook of a row is a least-squares problem; given the codebooks, codes are improved one column at a time (coordinate
descent, as LNQ of GuidedQuant, arXiv 2505.07004, does for one number of bits). What is new is that a weight's whole path
through the tree is chosen at once, against the sum of the errors at all numbers of bits: the b-bit code stays the top b bits
of the parent's, and no bit is chosen before another. In the end the bits below each number of bits are chosen once more.

Everything is torch on whole columns of rows, on any device, but for three compiled loops on a CPU and two kernels
on a GPU; deterministic on both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from compress.kernels import gpu
from compress.quant.descent import Descent, GpuDescent, gather_columns, split_cells, sums_by_code
from compress.quant.format import Codes
from compress.quant.hessian import Buffers, Follower, Hessian
from compress.quant.kmeans import nested_codebooks
from compress.ranks import ALONE, Ranks, even_parts

CARRIED = (
    5  # bits; up to here codes see the errors of the layers before; above, correcting for them adds more than it takes
)
TOGETHER = (
    6  # bits; codebooks up to here are optimised together; above, errors are so small that splitting cells suffices
)
# An error shrinks about fourfold per bit. The objective sums the errors at all numbers of bits, each times 4**(power * bits), so
# that many bits count too: with power 1 all would count alike, with 0 nearly the fewest bits alone. Powers fall from pass to pass.
# In the end the bits below each number of bits are chosen once more, and the codes above are kept.
_POWERS = ((0.5, 0.5), (0.25, 0.14))  # two sweeps, each with two passes over every block
_POWERS_BELOW_3 = ((0.5, 0.5), (0.5, 0.28))  # an error at 2 bits is so large that others counted for too little
_BELOW = 0.3
_ROWS = 1024  # at a time on a CPU, whose cache then holds what is at hand
_COLUMNS = 128  # in a block: the columns after it learn of its changes in matrix products, as in GPTQ
_STEPS = 12  # of conjugate gradients at most
# The last fit of a codebook stops where about this share of its error is left to gain; one step, which needs no product with the
# Hessian, ends it. Before a sweep codebooks take that step only: measured, a better fit is lost as soon as codes change.
_NEAR = 4e-2
_SAMPLED, _SAFE = 64, 0.9  # rows that tell how long a step is best, and how much of that is taken
_SPLIT_STEPS = 3

Choice = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]


@dataclass(frozen=True)
class Objective:
    """Name the errors that one pass over the columns lowers, and the part of every weight's path that it may choose."""

    share: Mapping[int, float]  # bits -> what their error counts, for consecutive numbers of bits up to the parent's
    below: int | None = None  # keep the codes of so many bits, and choose only the bits under them; None to choose all


class Tree:
    """Hold the codes and codebooks of N rows that share one Hessian, and improve them.

    The rows should be ``targets``, float32 [N, K] for each number of bits. The codes [N, K] are those of the largest number
    of bits in ``codebooks``, float32 [N, 2**bits] for consecutive numbers of bits. Weights of ``zeros``, bool [N, K], keep
    their path, whose entries are 0 at all bits. Entries are multiplied by ``sizes``, positive float32 [N, K], if given: then
    codebooks are not to be fitted here. One tree at a time uses ``buffers``.
    """

    def __init__(
        self,
        targets: Mapping[int, Tensor],
        hessian: Hessian,
        codes: Tensor,
        codebooks: Mapping[int, Tensor],
        zeros: Tensor | None = None,
        buffers: Buffers | None = None,
        sizes: Tensor | None = None,
    ) -> None:
        self.targets, self.hessian, self.zeros, self.sizes = targets, hessian, zeros, sizes
        self._fixed = torch.zeros_like(codes, dtype=torch.bool) if zeros is None else zeros  # weights with a fixed path
        self._buffers = buffers or Buffers(codes.device)
        self.codes, self.codebooks = codes.long().contiguous(), dict(codebooks)
        self._spread = torch.cat([hessian.leading, hessian.diagonal[:, None]], dim=1)
        self._gathered: Tensor | None = None
        self._gradients: dict[int, Tensor] = {}

    @property
    def parent(self) -> int:
        """Return the largest number of bits so far."""
        return max(self.codebooks)

    def _looked_up(self, codebook: Tensor, codes: Tensor, out: Tensor | None = None) -> Tensor:
        """Look up parent codes in a codebook of any number of bits."""
        entries = codebook.repeat_interleave(2**self.parent // codebook.shape[1], dim=1)
        return torch.gather(entries, 1, codes, out=out)

    def summed(self, values: Tensor, bits: int) -> Tensor:
        """Sum values [N, K] over the weights of each entry, [N, 2**bits]."""
        return _sums(values, self.codes, 2**self.parent).view(len(values), 2**bits, -1).sum(2)

    def _missing(self, bits: int) -> Tensor:
        """Return the error of the weights at a number of bits, float32 [N, K]; the next product overwrites it."""
        wide = self._buffers("wide", *self.codes.shape)
        found = self._looked_up(self.codebooks[bits], self.codes, wide)
        return (found if self.sizes is None else found.mul_(self.sizes)).sub_(self.targets[bits])

    def gradient(self, bits: int) -> Tensor:
        """Return half the gradient of the error at a number of bits, float32 [N, K], and keep it up to date."""
        if bits not in self._gradients:
            self._gradients[bits] = self.hessian.times(self._missing(bits), None, self._buffers, f"gradient {bits}")
        return self._gradients[bits]

    def _placed(self, codebook: Tensor, out: Tensor) -> Tensor:
        """Write a codebook's entries to the places of the weights, ``out``; return float32 [N, 16], those times U."""
        self._looked_up(codebook.to(out.dtype), self.codes, out)
        leading: Tensor = (self._by_entry(codebook.shape[1])[..., :-1].mT @ codebook[..., None])[..., 0]
        return leading

    def fit(self, bits: int, near: float) -> None:
        """Find the best codebooks of a number of bits given the codes: conjugate gradients on each row's least-squares problem.

        It stops where about the share ``near`` of the error is left to gain.
        """
        codebook, gradient = self.codebooks[bits], self.gradient(bits)
        free, solve = self._preconditioner(bits)
        enough = near * float(torch.dot(self._missing(bits).flatten(), gradient.flatten()))
        placed = self._buffers("placed", *gradient.shape, dtype=self.hessian.rest.dtype)
        residual, direction = -self.summed(gradient, bits) * free, torch.zeros_like(codebook)
        before = torch.ones_like(codebook[:, :1])
        for _ in range(_STEPS):
            conditioned = solve(residual)
            power = (residual * conditioned).sum(1, keepdim=True)  # about what is left to gain
            if power.sum() <= enough:
                break
            direction = conditioned + torch.where(before > 0, power / before.clamp_min(1e-30), 0.0) * direction
            change = self.hessian.times(placed, self._placed(direction, placed), self._buffers, "wide")
            image = self.summed(change, bits) * free
            curvature = (direction * image).sum(1, keepdim=True)
            length = torch.where(curvature > 0, power / curvature.clamp_min(1e-30), 0.0)
            codebook, residual, before = codebook + length * direction, residual - length * image, power
            gradient.addcmul_(length, change)
        self.codebooks[bits] = codebook

    def step(self, bits: int) -> Tensor:
        """Improve the codebooks of a number of bits by one step, as long as is best for a sample of rows.

        If the gradient is not known yet, that of the Hessian's leading directions and diagonal stands for it.
        Returns float32 [N, 2**bits], what has been added; :meth:`descend` then brings the gradient up to date.
        """
        free, solve = self._preconditioner(bits)
        known = self._gradients.get(bits)
        residual = -(self._rough_sums(bits) if known is None else self.summed(known, bits)) * free
        direction = solve(residual)
        some = slice(None, None, max(1, len(direction) // _SAMPLED))
        change = self._looked_up(direction[some], self.codes[some])
        curvature = float((self.hessian.times(change) * change).sum())
        length = _SAFE * float((residual[some] * direction[some]).sum()) / curvature if curvature > 0 else 0.0
        self.codebooks[bits] = self.codebooks[bits] + length * direction
        return length * direction

    def _rough_sums(self, bits: int) -> Tensor:
        """Sum by entry the gradient that the Hessian's leading directions and diagonal alone would give, [N, 2**bits]."""
        missing = self._missing(bits)
        leading = missing @ self.hessian.leading
        along: Tensor = (self._by_entry(2**bits)[..., :-1] @ leading[..., None])[..., 0]
        return along + self.summed(missing.mul_(self.hessian.diagonal), bits)

    def _preconditioner(self, bits: int) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Return which entries are free, and a solver of every row's problem for the approximate Hessian (Woodbury)."""
        gathered = self._by_entry(2**bits)
        free = (gathered[..., -1] > 0) & ~self._held(bits)
        inverse = free / gathered[..., -1].clamp_min(1e-30)
        gathered = gathered[..., :-1] * free[..., None]
        scaled = gathered * inverse[..., None]
        # In float64, as inputs with a few very large directions leave nothing of the identity in float32.
        parts = [slice(start, start + _ROWS // 8) for start in range(0, len(free), _ROWS // 8)]
        inner = torch.cat([gathered[part].mT.double() @ scaled[part].double() for part in parts])
        factor = torch.linalg.cholesky(inner + torch.eye(inner.shape[1], device=free.device))

        def solve(values: Tensor) -> Tensor:
            values = values * inverse
            inside: Tensor = torch.cholesky_solve((gathered.mT @ values[..., None]).double(), factor)
            return values - (scaled @ inside.float())[..., 0]

        return free, solve

    def _by_entry(self, entries: int) -> Tensor:
        """Sum U, and what it leaves of the diagonal, over the weights of each entry: float32 [N, entries, 17]."""
        if self._gathered is None:
            gather = gather_columns if self.codes.device.type == "cpu" else _gathered
            self._gathered = gather(self.codes, self._spread, 2**self.parent)
        gathered = self._gathered.view(len(self.codes), entries, -1, self._spread.shape[1])
        return gathered[:, :, 0] if gathered.shape[2] == 1 else gathered.sum(2)

    def descend(self, passes: Sequence[Objective], steps: Mapping[int, Tensor] = MappingProxyType({})) -> None:
        """Choose every weight's path anew, column by column, given the codebooks and all other weights.

        All passes go over a block of columns before the next; the first has all numbers of bits of those after it. ``steps``
        holds what :meth:`step` has just added to the codebooks of the first; it counts where a gradient is known.
        """
        all_bits, choices = sorted(passes[0].share), [self._choice(one) for one in passes]
        follower, fixed = self._follower(all_bits, steps), self._fixed
        for start in range(0, self.codes.shape[1], _COLUMNS):
            part = slice(start, start + _COLUMNS)
            codes, hessian = self.codes[:, part].contiguous(), self.hessian.matrix[part, part].contiguous()
            gradient, held = follower.enter(part), fixed[:, part].contiguous()
            sizes = gradient.new_empty(len(codes), 0) if self.sizes is None else self.sizes[:, part].contiguous()
            change = torch.zeros_like(gradient)
            for number, (one, choice) in enumerate(zip(passes, choices, strict=True)):
                w = len(one.share)
                now = gradient + change @ hessian if number else gradient
                moved = now[-w:].clone()
                choice(codes, held, sizes, moved, hessian)
                change[-w:] += moved
            follower.leave(part, change)
            self.codes[:, part] = codes
        follower.finish()
        known = {*all_bits, *range((passes[0].below or 0) + 1)}  # kept codes are what they were
        self._gradients = {bits: found for bits, found in self._gradients.items() if bits in known}
        self._gathered = None

    def _follower(self, all_bits: Sequence[int], steps: Mapping[int, Tensor]) -> Follower:
        """Follow the gradients at some numbers of bits, bringing in the steps just taken; unknown ones start from zero."""
        changes = self._buffers("changes", len(all_bits), *self.codes.shape, dtype=self.hessian.rest.dtype)
        leading = []
        for bits, change in zip(all_bits, changes, strict=True):
            if bits in self._gradients:
                leading.append(self._placed(steps.get(bits, torch.zeros_like(self.codebooks[bits])), change))
            else:
                missing = self._missing(bits)
                change.copy_(missing)
                leading.append(missing @ self.hessian.leading)
                self._gradients[bits] = self._buffers(f"gradient {bits}", *self.codes.shape).zero_()
        gradients = [self._gradients[bits] for bits in all_bits]
        return Follower(self.hessian, gradients, changes, torch.stack(leading), self._buffers)

    def _choice(self, one: Objective) -> Choice:
        """Return a function that chooses the codes of a block, without a dozen small operations per column where there is one."""
        codebooks, share = {bits: self.codebooks[bits] for bits in sorted(one.share)}, sorted(one.share.items())
        weights = np.array([counts for _, counts in share], np.float32)
        if gpu.serves(self.codes.device):
            return GpuDescent(codebooks, weights, one.below or 0)
        if self.codes.device.type != "cpu":
            return partial(self._columns, one)
        descent = Descent({bits: codebook.numpy() for bits, codebook in codebooks.items()}, weights, one.below or 0)
        return lambda *block: descent(*(tensor.numpy() for tensor in block))

    def _columns(
        self, one: Objective, codes: Tensor, fixed: Tensor, sizes: Tensor, gradient: Tensor, hessian: Tensor
    ) -> None:
        """Choose the codes of a block, int64 [N, B], in place but for ``fixed`` weights, column after column, all rows at once.

        ``gradient``, float32 [W, N, B], is half that of the errors; the changes of the weights overwrite it.
        """
        for column in range(codes.shape[1]):
            old = codes[:, column, None]
            dense = torch.stack([self._looked_up(self.codebooks[bits], old) for bits in sorted(one.share)])
            size = sizes[:, column, None] if sizes.numel() else 1.0
            path = self._best_path(old, one, dense, gradient[..., column, None] / size, hessian[column, column])
            path = torch.where(fixed[:, column, None], old, path)
            change = torch.stack([self._looked_up(self.codebooks[bits], path) for bits in sorted(one.share)]) - dense
            change *= size
            gradient[..., column + 1 :] += change * hessian[column, column + 1 :]
            gradient[..., column], codes[:, column] = change[..., 0], path[:, 0]

    def _best_path(self, old: Tensor, one: Objective, dense: Tensor, gradient: Tensor, curvature: Tensor) -> Tensor:
        """Find the codes, int64 [N, 1], that lower the summed error most: each path through the tree is that of one leaf.

        ``dense``, the weights, and ``gradient`` are float32 [W, N, 1] for W numbers of bits; ``curvature`` has no dimension.
        """
        below = self.parent - (one.below or 0)
        leaves = (old >> below << below) + torch.arange(2**below, device=old.device)
        cost = torch.zeros(leaves.shape, device=old.device)
        for w, bits in reversed(list(enumerate(sorted(one.share)))):
            moved = self.codebooks[bits].gather(1, leaves >> (self.parent - bits)) - dense[w]
            cost += one.share[bits] * moved * (curvature * moved + 2 * gradient[w])
        return leaves.gather(1, cost.argmin(1, keepdim=True))

    def split(self) -> None:
        """Add a bit: split every cell in two around its entry, by two-means weighted with the Hessian's diagonal."""
        split = split_cells if self.codes.device.type == "cpu" else _split
        bits, weight = self.parent + 1, self.hessian.matrix.diagonal()
        given = self.codes, self.targets[bits], weight, self.codebooks[self.parent], self._fixed
        self.codes, self.codebooks[bits] = split(*given, _SPLIT_STEPS)
        self._gathered, self._gradients = None, {}

    def extend(self, codebook: Tensor) -> None:
        """Add a bit whose codebook, float32 [N, 2**bits], is given: the nearer half of every cell."""
        bits = self.parent + 1
        middle = (codebook[:, 0::2] + codebook[:, 1::2]) / 2
        border = middle.gather(1, self.codes)
        above = self.targets[bits] > (border if self.sizes is None else border.mul_(self.sizes))
        descending = (codebook[:, 0::2] > codebook[:, 1::2]).gather(1, self.codes)
        self.codes = 2 * self.codes + (above ^ descending)
        self.codebooks[bits] = codebook
        self._gathered, self._gradients = None, {}

    def fit_and_step(self, bits: int) -> None:
        """Find the best codebooks of a number of bits given the codes, as near as is worth the time."""
        self.fit(bits, _NEAR)
        self.step(bits)

    def _held(self, bits: int) -> Tensor:
        """Return which entries must stay 0, bool [N, 2**bits]."""
        if self.zeros is None:
            return torch.zeros_like(self.codebooks[bits], dtype=torch.bool)
        return self.summed(self.zeros.float(), bits) > 0


def _sums(values: Tensor, codes: Tensor, entries: int) -> Tensor:
    """Sum values [N, K] over the columns with each code, [N, entries]."""
    if gpu.serves(codes.device):
        return sums_by_code(values[..., None], codes, entries)[..., 0]
    sums = torch.zeros(len(values), entries, dtype=values.dtype, device=values.device)
    return sums.scatter_add_(1, codes, values)


def _split(
    codes: Tensor, targets: Tensor, weight: Tensor, codebook: Tensor, zeros: Tensor, steps: int
) -> tuple[Tensor, Tensor]:
    """Do what :func:`split_cells` does, in torch on any device."""
    new, entries, border = codes, codebook.repeat_interleave(2, dim=1), codebook
    held = _sums(zeros.float(), 2 * codes, entries.shape[1]) > 0
    for _ in range(steps):
        new = 2 * codes + ((targets > border.gather(1, codes)) & ~zeros)
        mass = _sums(weight.expand_as(targets), new, entries.shape[1])
        mean = _sums(weight * targets, new, entries.shape[1]) / mass.clamp_min(1e-30)
        found = torch.where(mass > 0, mean, entries).masked_fill(held, 0.0)
        border = found.view(len(codebook), -1, 2).mean(2)
    return new, found


def _gathered(codes: Tensor, spread: Tensor, entries: int) -> Tensor:
    """Do what :func:`gather_columns` does, in torch on any device."""
    if gpu.serves(codes.device):
        by_column = spread.t().contiguous().t()  # what is read at once lies together
        return sums_by_code(by_column.expand(len(codes), -1, -1), codes, entries)
    values = spread.expand(len(codes), -1, -1)
    empty = torch.zeros(len(codes), entries, spread.shape[1], device=codes.device)
    return empty.scatter_add_(1, codes[..., None].expand_as(values), values)


def nested_output_codebooks(
    targets: Mapping[int, Tensor],
    hessian: Tensor,
    focus: Mapping[int, float] | None = None,
    zeros: Tensor | None = None,
    ranks: Ranks = ALONE,
) -> Codes:
    """Find nested codes and codebooks of rows that share their inputs.

    Args:
        targets: bits -> float32 [N, K], finite: what the rows should be, for all from the seed's to the parent's.
        hessian: float32 [K, K], mean of ``x x^T`` over the inputs, positive definite.
        focus: bits -> how much their error counts, 1 where not given; for bits up to the larger of 6 and the seed's.
        zeros: bool [N, K], weights that must be exactly 0 at every number of bits.
        ranks: the processes that share the rows; all get the result.

    Returns:
        Codes and float32 codebooks, on the device of the targets.
    """
    prepared, buffers = Hessian(hessian), Buffers(hessian.device)

    def grown(part: slice) -> dict[str, Tensor]:
        wanted = {bits: target[part] for bits, target in targets.items()}
        held = None if zeros is None else zeros[part]
        codes, codebooks = _grown(wanted, prepared, focus or {}, held, buffers)
        return {"codes": codes, **{str(bits): codebook for bits, codebook in codebooks.items()}}

    parts = ranks.over(row_parts(len(targets[min(targets)]), hessian.device, ranks), grown)
    codebooks = {bits: torch.cat([part[str(bits)] for part in parts]) for bits in sorted(targets)}
    return Codes(torch.cat([part["codes"] for part in parts]), codebooks)


def row_parts(rows: int, device: torch.device, ranks: Ranks = ALONE) -> list[slice]:
    """Divide rows into what is worked on at a time: on a CPU alike for any number of processes, as codes depend on it."""
    return even_parts(rows, _ROWS) if device.type == "cpu" else even_parts(rows, rows, ranks.size)


def start_tree(
    targets: Mapping[int, Tensor], hessian: Hessian, zeros: Tensor | None, buffers: Buffers, together: int | None = None
) -> Tree:
    """Cluster the weights themselves, each weighed by the Hessian's diagonal, up to so many bits (all there are for None)."""
    seed, parent = min(targets), max(targets)
    start = targets[parent] if zeros is None else targets[parent].masked_fill(zeros, 0.0)
    weights = hessian.matrix.diagonal().expand_as(start).contiguous()
    given = start.cpu().numpy(), weights.cpu().numpy(), seed, together or parent
    first = nested_codebooks(*given, zeros is not None, torch.get_num_threads())
    codebooks = {bits: codebook.to(start.device) for bits, codebook in first.codebooks.items()}
    return Tree(targets, hessian, first.codes.to(start.device), codebooks, zeros, buffers)


def _objective(tree: Tree, focus: Mapping[int, float], below: int | None, power: float) -> Objective:
    under = [bits for bits in tree.codebooks if below is None or bits > below]
    return Objective({bits: focus.get(bits, 1.0) * 4 ** (power * (bits - under[0])) for bits in under}, below)


def joint_objectives(tree: Tree, focus: Mapping[int, float]) -> list[list[Objective]]:
    """Return the passes of the sweeps that choose whole paths."""
    sweeps = _POWERS if min(tree.codebooks) >= 3 else _POWERS_BELOW_3
    return [[_objective(tree, focus, None, power) for power in powers] for powers in sweeps]


def below_objectives(tree: Tree, focus: Mapping[int, float]) -> list[list[Objective]]:
    """Return the passes of the last sweep, which keep the bits above each number of bits; none if there is one number only."""
    under = range(min(tree.codebooks), tree.parent)
    return [[_objective(tree, focus, bits, _BELOW) for bits in under]] if under else []


def _grown(
    targets: Mapping[int, Tensor], hessian: Hessian, focus: Mapping[int, float], zeros: Tensor | None, buffers: Buffers
) -> tuple[Tensor, dict[int, Tensor]]:
    """Find parent codes, uint8, and codebooks of a few rows."""
    seed, parent = min(targets), max(targets)
    together = max(seed, min(parent, TOGETHER))
    tree = start_tree(targets, hessian, zeros, buffers, together)
    for passes in [*joint_objectives(tree, focus), *below_objectives(tree, focus)]:
        tree.descend(passes, {bits: tree.step(bits) for bits in passes[0].share})
    for bits in tree.codebooks:
        tree.fit_and_step(bits)
    for bits in range(together + 1, parent + 1):
        tree.split()
        tree.descend([Objective({bits: 1.0}, bits - 1)], {bits: tree.step(bits)})
        tree.fit_and_step(bits)
    return tree.codes.to(torch.uint8), tree.codebooks
