"""Nested codes that minimise the error of a layer's output, ``(q - w) H (q - w)^T`` per row, at several widths at once.

Any-precision's own clustering minimises a sum of weighted squared errors, one per weight. Here errors of different
weights of a row may cancel on the inputs that occur: ``H`` is the mean of ``x x^T`` over them. Given the codes, the
best table of a row is a least-squares problem; given the tables, codes are improved one column at a time (coordinate
descent, as LNQ of GuidedQuant, arXiv 2505.07004, does for one width). What is new is that a weight's whole path through the
tree is chosen at once, against the sum of the errors of all widths: the b-bit code stays the top b bits of the
parent's, and no width's choice is taken before another's. In the end the bits below each width are chosen once more.

Everything is torch on whole columns of rows, on any device, but for one compiled loop on a CPU; deterministic.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from compress.quant.descent import descend_columns
from compress.quant.kmeans import nested_codebooks
from compress.quant.metric import Follower, Metric

CARRIED = 5  # widths up to here see the errors of the layers before; above, correcting for them adds more than it takes
TOGETHER = 6  # widths up to here are optimised together; above, errors are so small that splitting cells suffices
# A sweep's weight for a width is its error (4**-bits, say) to the power of minus this: first all widths count by how far they
# could still come, in the end nearly by what they cost. The bits below every width are then chosen once more given that width's.
_POWERS = (0.5, 0.25, 0.08)
_BELOW = 0.3
_ROWS = 1024  # at a time on a CPU, whose cache then holds what is at hand
_COLUMNS = 128  # in a block: the columns after it learn of its changes in matrix products, as in GPTQ
_STEPS = 12  # of conjugate gradients at most
# The last fit of a width ends when its error is about this share from the least possible; above TOGETHER, where errors are small,
# less will do. Fits between sweeps take one step: more are worth nothing, measured, as the sweep changes the problem.
_NEAR, _NEAR_ABOVE = 3e-3, 3e-2
_SPLIT_STEPS = 3


class Tree:
    """Codes and tables of N rows that share one metric.

    Args:
        targets: width -> float32 [N, K], what the rows should be.
        metrics: width -> of [K, K].
        codes: integer [N, K], codes at the largest width of ``tables``.
        tables: width -> float32 [N, 2**width], for consecutive widths.
        zeros: bool [N, K], weights whose path is fixed, and whose entries are 0 at every width; None for none.
    """

    def __init__(
        self, targets: Mapping[int, Tensor], metrics: Mapping[int, Metric], codes: Tensor, tables: Mapping[int, Tensor],
        zeros: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.targets, self.metrics, self.zeros = targets, metrics, zeros
        self.codes, self.tables = codes.long(), dict(tables)
        widest = metrics[max(metrics)]
        self._spread = torch.cat([widest.leading, widest.diagonal[:, None]], dim=1)
        self._gathered: Tensor | None = None
        self._gradients: dict[int, Tensor] = {}

    @property
    def parent(self) -> int:
        """The largest width so far."""
        return max(self.tables)

    def dense(self, bits: int) -> Tensor:
        """float32 [N, K], the weights at one width."""
        return self._looked_up(self.tables[bits], self.codes)

    def _looked_up(self, table: Tensor, codes: Tensor) -> Tensor:
        """Entries, of a table of any width, of parent codes."""
        return table.repeat_interleave(2**self.parent // table.shape[1], dim=1).gather(1, codes)

    def _summed(self, values: Tensor, bits: int) -> Tensor:
        """[N, 2**bits], sums of [N, K] over the weights of each entry."""
        sums = torch.zeros(len(values), 2**self.parent, dtype=values.dtype, device=values.device)
        return sums.scatter_add_(1, self.codes, values).view(len(values), 2**bits, -1).sum(2)

    def gradient(self, bits: int) -> Tensor:
        """float32 [N, K], half the gradient of one width's error; kept up to date from one change to the next."""
        if bits not in self._gradients:
            self._gradients[bits] = self.metrics[bits].times(self.dense(bits) - self.targets[bits])
        return self._gradients[bits]

    def error(self, bits: int) -> float:
        """Sum over rows of ``(q - w) H (q - w)^T``."""
        error = self.dense(bits) - self.targets[bits]
        return float(((error @ self.metrics[bits].matrix) * error).sum(dtype=torch.float64))

    def fit(self, bits: int, near: float | None = None) -> None:
        """Improve one width's tables given its codes: conjugate gradients on each row's least-squares problem.

        Args:
            bits: the width.
            near: share of the error that may be left to gain; None for one step.
        """
        table, gradient = self.tables[bits], self.gradient(bits)
        free, solve = self._preconditioner(bits)
        enough = 0.0 if near is None else near * float(((self.dense(bits) - self.targets[bits]) * gradient).sum())
        residual, direction = -self._summed(gradient, bits) * free, torch.zeros_like(table)
        before = torch.ones_like(table[:, :1])
        for _ in range(1 if near is None else _STEPS):
            conditioned = solve(residual)
            power = (residual * conditioned).sum(1, keepdim=True)  # about what is left to gain
            if power.sum() <= enough:
                break
            direction = conditioned + torch.where(before > 0, power / before.clamp_min(1e-30), 0.0) * direction
            change = self.metrics[bits].times(self._looked_up(direction, self.codes))
            image = self._summed(change, bits) * free
            curvature = (direction * image).sum(1, keepdim=True)
            length = torch.where(curvature > 0, power / curvature.clamp_min(1e-30), 0.0)
            table, residual, before = table + length * direction, residual - length * image, power
            gradient.addcmul_(length, change)
        self.tables[bits] = table

    def _preconditioner(self, bits: int) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Which entries are free, and what solves every row's problem for leading directions and a diagonal (Woodbury)."""
        if self._gathered is None:
            spread = self._spread.expand(len(self.codes), -1, -1)
            empty = torch.zeros(len(self.codes), 2**self.parent, spread.shape[2], device=self.codes.device)
            self._gathered = empty.scatter_add_(1, self.codes[..., None].expand_as(spread), spread)
        gathered = self._gathered.view(len(self.codes), 2**bits, -1, self._gathered.shape[2]).sum(2)
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

    def descend(self, share: Mapping[int, float], below: int | None = None) -> None:
        """Choose every weight's path anew, column by column, given the tables and all other weights.

        Args:
            share: width -> what its error counts, for consecutive widths up to the parent's.
            below: keep the codes of this width, so that only the bits under it are chosen.
        """
        columns = self._columns_compiled if self.codes.device.type == "cpu" else self._columns
        followers = {bits: Follower(self.metrics[bits], self.gradient(bits)) for bits in sorted(share)}
        for start in range(0, self.codes.shape[1], _COLUMNS):
            part = slice(start, start + _COLUMNS)
            old = self.codes[:, part].contiguous()
            fixed = torch.zeros_like(old, dtype=torch.bool) if self.zeros is None else self.zeros[:, part]
            gradient = torch.stack([follower.enter(part) for follower in followers.values()], dim=1)
            metric = torch.stack([self.metrics[bits].matrix[part, part] for bits in followers])
            new = columns(old, fixed, share, below, gradient, metric)
            for bits, follower in followers.items():
                follower.leave(part, self._looked_up(self.tables[bits], new) - self._looked_up(self.tables[bits], old))
            self.codes[:, part] = new
        for follower in followers.values():
            follower.finish()
        # Codes of the width that is kept, and of those above it, are what they were.
        self._gradients = {
            bits: found for bits, found in self._gradients.items() if bits in share or bits <= (below or 0)
        }
        self._gathered = None

    def _columns_compiled(
        self, codes: Tensor, fixed: Tensor, share: Mapping[int, float], below: int | None,
        gradient: Tensor, metric: Tensor,
    ) -> Tensor:  # fmt: skip
        """Same as :meth:`_columns`, without a dozen small operations per column."""
        tables = {bits: self.tables[bits].numpy() for bits in sorted(share)}
        found = codes.clone()
        descend_columns(
            found.numpy(), fixed.contiguous().numpy(), tables,
            np.array([share[bits] for bits in sorted(share)], np.float32), 0 if below is None else below,
            gradient.numpy(), metric.numpy(), torch.get_num_threads(),
        )  # fmt: skip
        return found

    def _columns(
        self, codes: Tensor, fixed: Tensor, share: Mapping[int, float], below: int | None,
        gradient: Tensor, metric: Tensor,
    ) -> Tensor:  # fmt: skip
        """A block of columns, one after another, all rows at once.

        Args:
            codes: int64 [N, B], parent codes.
            fixed: bool [N, B], weights that stay.
            share: as for :meth:`descend`, for W consecutive widths.
            below: as for :meth:`descend`.
            gradient: float32 [N, W, B], half the gradient of the errors; changed.
            metric: float32 [W, B, B].

        Returns:
            The new codes.
        """
        found = []
        for column in range(codes.shape[1]):
            old = codes[:, column, None]
            dense = torch.cat([self._looked_up(self.tables[bits], old) for bits in sorted(share)], dim=1)
            path = self._best_path(old, share, below, dense, gradient[..., column], metric[:, column, column])
            path = torch.where(fixed[:, column, None], old, path)
            after = torch.cat([self._looked_up(self.tables[bits], path) for bits in sorted(share)], dim=1)
            gradient += (after - dense)[..., None] * metric[:, column]
            found.append(path)
        return torch.cat(found, dim=1)

    def _best_path(
        self, old: Tensor, share: Mapping[int, float], below: int | None,
        dense: Tensor, gradient: Tensor, curvature: Tensor,
    ) -> Tensor:  # fmt: skip
        """int64 [N, 1]: the codes that lower the summed error most, by dynamic programming from the leaves up.

        Args:
            old: int64 [N, 1].
            share: as for :meth:`descend`.
            below: as for :meth:`descend`.
            dense: float32 [N, W], the weights.
            gradient: float32 [N, W].
            curvature: float32 [W].
        """
        codes = costs = old  # of the best leaf under every node of the width at hand
        for w, bits in reversed(list(enumerate(sorted(share)))):
            entries = self.tables[bits]
            if below is not None:
                first = old >> (self.parent - below) << (bits - below)
                entries = entries.gather(1, first + torch.arange(2 ** (bits - below), device=old.device))
            moved = entries - dense[:, w, None]
            cost = share[bits] * moved * (curvature[w] * moved + 2 * gradient[:, w, None])
            if bits == self.parent:
                codes, costs = torch.arange(cost.shape[1], device=old.device).expand_as(cost), cost
            else:
                best = costs.view(len(costs), -1, 2).min(2)
                codes = codes.reshape(len(codes), -1, 2).gather(2, best.indices[..., None])[..., 0]
                costs = best.values + cost
        path = codes.gather(1, costs.argmin(1, keepdim=True))
        return path if below is None else path + (old >> (self.parent - below) << (self.parent - below))

    def split(self) -> None:
        """Add a width: every cell in two around its entry, by two-means weighted with the metric's diagonal."""
        bits, old = self.parent + 1, self.codes
        target = self.targets[bits]
        weight = self.metrics[bits].matrix.diagonal().expand_as(target)
        inherited = self.tables[self.parent].repeat_interleave(2, dim=1)
        border = self.tables[self.parent]
        self.tables[bits] = inherited
        for _ in range(_SPLIT_STEPS):
            upper = target > border.gather(1, old)
            self.codes = 2 * old + (upper if self.zeros is None else upper & ~self.zeros)
            mass, total = self._summed(weight, bits), self._summed(weight * target, bits)
            table = torch.where(mass > 0, total / mass.clamp_min(1e-30), inherited)
            self.tables[bits] = table = table.masked_fill(self._held(bits), 0.0)
            border = table.view(len(table), -1, 2).mean(2)
        self._gathered, self._gradients = None, {}

    def _held(self, bits: int) -> Tensor:
        """Bool [N, 2**bits]: the entries that must stay 0."""
        if self.zeros is None:
            return torch.zeros_like(self.tables[bits], dtype=torch.bool)
        return self._summed(self.zeros.float(), bits) > 0


def nested_output_codebooks(
    targets: Mapping[int, Tensor], metrics: Mapping[int, Tensor], focus: Mapping[int, float] | None = None,
    zeros: Tensor | None = None,
) -> Tree:  # fmt: skip
    """Nested codes and tables of rows that share their inputs.

    Args:
        targets: for every width from the seed to the parent, float32 [N, K], finite: what the rows should be.
        metrics: for the same widths, float32 [K, K], mean of ``x x^T`` over the inputs at that width, positive definite.
        focus: width -> how much its error counts, 1 where not given; for widths up to the larger of 6 and the seed.
        zeros: bool [N, K], weights that must be exactly 0 at every width.

    Returns:
        The tree; its tables are float32.
    """
    prepared: dict[int, Metric] = {}
    for bits, metric in metrics.items():
        same = [found for found in prepared.values() if found.matrix is metric]  # widths may share one
        prepared[bits] = same[0] if same else Metric(metric)
    rows, parts = len(targets[min(targets)]), []
    step = _ROWS if targets[min(targets)].device.type == "cpu" else rows
    for start in range(0, rows, step):
        part = slice(start, start + step)
        wanted = {bits: target[part] for bits, target in targets.items()}
        parts.append(_grown(wanted, prepared, focus or {}, None if zeros is None else zeros[part]))
    tables = {bits: torch.cat([table[bits] for _, table in parts]) for bits in sorted(metrics)}
    return Tree(targets, prepared, torch.cat([codes for codes, _ in parts]), tables, zeros)


def _grown(
    targets: Mapping[int, Tensor], metrics: Mapping[int, Metric], focus: Mapping[int, float], zeros: Tensor | None
) -> tuple[Tensor, dict[int, Tensor]]:
    """Parent codes, uint8, and tables of a few rows."""
    seed, parent = min(metrics), max(metrics)
    together = max(seed, min(parent, TOGETHER))
    start = targets[parent] if zeros is None else targets[parent].masked_fill(zeros, 0.0)
    weights = metrics[seed].matrix.diagonal().expand_as(start).contiguous()
    first = nested_codebooks(
        start.cpu().numpy(), weights.cpu().numpy(), seed, together, zeros is not None, torch.get_num_threads()
    )
    tables = {bits: torch.from_numpy(table).to(start.device) for bits, table in first.codebooks.items()}
    tree = Tree(targets, metrics, torch.from_numpy(first.codes).to(start.device), tables, zeros)
    sweeps: list[tuple[int | None, float]] = [(None, power) for power in _POWERS]
    for below, power in sweeps + [(below, _BELOW) for below in range(seed, together)]:
        widths = [bits for bits in tree.tables if below is None or bits > below]
        for bits in widths:
            tree.fit(bits)
        tree.descend({bits: focus.get(bits, 1.0) * 4 ** (power * (bits - widths[0])) for bits in widths}, below)
    for bits in tree.tables:
        tree.fit(bits, _NEAR)
    for bits in range(together + 1, parent + 1):
        tree.split()
        tree.fit(bits)
        tree.descend({bits: 1.0}, below=bits - 1)
        tree.fit(bits, _NEAR_ABOVE)
    return tree.codes.to(torch.uint8), tree.tables
