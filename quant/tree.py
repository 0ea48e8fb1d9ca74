"""Nested codes that minimise the error of a layer's output, ``(q - w) H (q - w)^T`` per row, at several widths at once.

Any-precision's own clustering minimises a sum of weighted squared errors, one per weight. Here errors of different
weights of a row may cancel on the inputs that occur: ``H`` is the mean of ``x x^T`` over them. Given the codes, the
best table of a row is a least-squares problem; given the tables, codes are improved one column at a time (coordinate
descent, as LNQ of GuidedQuant, arXiv 2505.07004, does for one width). What is new is that a weight's whole path through the
tree is chosen at once, against the sum of the errors of all widths: the b-bit code stays the top b bits of the
parent's, and no width's choice is taken before another's.

Everything is torch on whole columns of rows, on any device, but for one compiled loop on a CPU; deterministic.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from compress.quant.descent import descend_columns
from compress.quant.kmeans import nested_codebooks

CARRIED = 5  # widths up to here see the errors of the layers before; above, correcting for them adds more than it takes
TOGETHER = 6  # widths up to here are optimised together; above, errors are so small that splitting cells suffices
# A sweep's weight for a width is its error (4**-bits, say) to the power of minus this: first all widths count by how far they
# could still come, in the end nearly by what they cost.
_POWERS = (0.5, 0.35, 0.2, 0.05)
_ROWS = 1024  # in float64 at a time
_COLUMNS = 128  # between two updates of the columns further right by one matrix product
_LEADING = 16  # directions of the metric that the least-squares fits are preconditioned with
_STEPS = 12  # of conjugate gradients at most
# A fit ends when its error is about this share from the least possible: between sweeps, and in the end.
_NEAR, _NEAREST = 1e-2, 1e-3
_SPLIT_STEPS = 6


class Tree:
    """Codes and tables of N rows that share one metric.

    Args:
        target: float32 [N, K], the dense rows.
        metrics: width -> float32 [K, K], symmetric and positive definite.
        codes: integer [N, K], codes at the largest width of ``tables``.
        tables: width -> float32 [N, 2**width], for consecutive widths.
        zeros: bool [N, K], weights whose path is fixed, and whose entries are 0 at every width; None for none.
    """

    def __init__(
        self, target: Tensor, metrics: Mapping[int, Tensor], codes: Tensor, tables: Mapping[int, Tensor],
        zeros: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.target, self.metrics, self.zeros = target, metrics, zeros
        self.codes, self.tables = codes.long(), dict(tables)
        leading, rest = leading_directions(metrics[max(metrics)], _LEADING)
        self._spread = torch.cat([leading, rest[:, None]], dim=1)
        self._gathered: Tensor | None = None

    @property
    def parent(self) -> int:
        """The largest width so far."""
        return max(self.tables)

    def codes_at(self, bits: int) -> Tensor:
        """int64 [N, K], codes at one width."""
        return self.codes >> (self.parent - bits)

    def dense(self, bits: int) -> Tensor:
        """float32 [N, K], the weights at one width."""
        return self.tables[bits].gather(1, self.codes_at(bits))

    def error(self, bits: int) -> float:
        """Sum over rows of ``(q - w) H (q - w)^T``."""
        error = self.dense(bits) - self.target
        return float(((error @ self.metrics[bits]) * error).sum(dtype=torch.float64))

    def fit(self, bits: int, target: Tensor | None = None, near: float = _NEAR) -> None:
        """Improve one width's tables given its codes: conjugate gradients on each row's least-squares problem.

        Args:
            bits: the width.
            target: float32 [N, K], what the rows should be at this width; the dense ones if None.
            near: share of the error that may be left to gain.
        """
        codes, table, metric = self.codes_at(bits), self.tables[bits], self.metrics[bits]
        target = self.target if target is None else target

        def summed(values: Tensor) -> Tensor:
            return torch.zeros_like(table).scatter_add_(1, codes, values)

        free = (summed(torch.ones_like(target)) > 0) & ~self._held(codes, table)
        solve = self._preconditioner(free)
        error = self.dense(bits) - target
        gradient = error @ metric
        enough = near * (error * gradient).sum()
        residual, direction, before = -summed(gradient) * free, torch.zeros_like(table), torch.ones_like(table[:, :1])
        for _ in range(_STEPS):
            conditioned = solve(residual)
            power = (residual * conditioned).sum(1, keepdim=True)  # about what is left to gain
            if power.sum() <= enough:
                break
            direction = conditioned + torch.where(before > 0, power / before.clamp_min(1e-30), 0.0) * direction
            image = summed(direction.gather(1, codes) @ metric) * free
            curvature = (direction * image).sum(1, keepdim=True)
            length = torch.where(curvature > 0, power / curvature.clamp_min(1e-30), 0.0)
            table, residual, before = table + length * direction, residual - length * image, power
        self.tables[bits] = table

    def _preconditioner(self, free: Tensor) -> Callable[[Tensor], Tensor]:
        """What solves every row's problem for a metric of its leading directions and a diagonal (Woodbury)."""
        if self._gathered is None:
            spread = self._spread.expand(len(self.codes), -1, -1)
            empty = torch.zeros(len(self.codes), 2**self.parent, spread.shape[2], device=self.codes.device)
            self._gathered = empty.scatter_add_(1, self.codes[..., None].expand_as(spread), spread)
        apart = self._gathered.view(len(free), free.shape[1], -1, self._gathered.shape[2])
        gathered = apart.sum(2) * free[..., None]
        gathered, diagonal = gathered[..., :-1], gathered[..., -1]
        inverse = free / diagonal.clamp_min(1e-30)
        scaled = gathered * inverse[..., None]
        # In float64, as inputs with a few very large directions leave nothing of the identity in float32.
        parts = [slice(start, start + _ROWS) for start in range(0, len(free), _ROWS)]
        inner = torch.cat([gathered[part].mT.double() @ scaled[part].double() for part in parts])
        factor = torch.linalg.cholesky(inner + torch.eye(inner.shape[1], device=free.device))

        def solve(values: Tensor) -> Tensor:
            values = values * inverse
            inside: Tensor = torch.cholesky_solve((gathered.mT @ values[..., None]).double(), factor)
            return values - (scaled @ inside.float())[..., 0]

        return solve

    def descend(self, share: Mapping[int, float], below: int | None = None) -> None:
        """Choose every weight's path anew, column by column, given the tables and all other weights.

        Args:
            share: width -> what its error counts; the largest is the parent's.
            below: keep the codes of this width, so that only the bits under it are chosen.
        """
        self._gathered = None
        widths = sorted(share)
        dense = torch.stack([self.dense(bits) for bits in widths])
        metric = torch.stack([self.metrics[bits] for bits in widths])
        gradient = (dense - self.target) @ metric
        for start in range(0, self.codes.shape[1], _COLUMNS):
            part = slice(start, start + _COLUMNS)
            views = dense[..., part], gradient[..., part], metric[:, part, part]
            change = torch.zeros_like(views[0])
            columns = self._columns_compiled if self.codes.device.type == "cpu" else self._columns
            columns(part, share, below, *views, change)
            # The columns further right wait for the whole block, as in GPTQ.
            gradient[..., part.stop :] += change @ metric[:, part, part.stop :]

    def _columns_compiled(
        self, part: slice, share: Mapping[int, float], below: int | None,
        dense: Tensor, gradient: Tensor, metric: Tensor, change: Tensor,
    ) -> None:  # fmt: skip
        """Same as :meth:`_columns`, without a dozen small operations per column."""
        tables = torch.cat([self.tables[bits] for bits in sorted(self.tables)], dim=1)
        room = torch.zeros(len(tables), 2 ** min(self.tables))
        fixed = torch.zeros_like(self.codes, dtype=torch.bool) if self.zeros is None else self.zeros
        descend_columns(
            self.codes[:, part].numpy(), torch.cat([room, tables], dim=1).numpy(), np.array(sorted(share)),
            np.array([share[bits] for bits in sorted(share)], np.float32), -1 if below is None else below,
            dense.numpy(), gradient.numpy(), metric.numpy(), change.numpy(), fixed[:, part].numpy(),
            torch.get_num_threads(),
        )  # fmt: skip

    def _columns(
        self, part: slice, share: Mapping[int, float], below: int | None,
        dense: Tensor, gradient: Tensor, metric: Tensor, change: Tensor,
    ) -> None:  # fmt: skip
        """A block of columns, one after another, all rows at once.

        Args:
            part: the columns.
            share: as for :meth:`descend`.
            below: as for :meth:`descend`.
            dense: [W, N, B], weights at each of W widths; changed.
            gradient: [W, N, B], half the gradient of the errors; changed.
            metric: [W, B, B].
            change: [W, N, B], is given what was added to the weights.
        """
        for column in range(dense.shape[2]):
            old = self.codes[:, part][:, column, None]
            path = self._best_path(
                old, share, below, dense[..., column], gradient[..., column], metric[:, column, column]
            )
            if self.zeros is not None:
                path = torch.where(self.zeros[:, part][:, column, None], old, path)
            old.copy_(path)
            for w, bits in enumerate(sorted(share)):
                value = self.tables[bits].gather(1, path >> (self.parent - bits))[:, 0]
                change[w, :, column] = value - dense[w, :, column]
                dense[w, :, column] = value
            gradient += change[..., column, None] * metric[:, None, column]

    def _best_path(
        self, old: Tensor, share: Mapping[int, float], below: int | None,
        dense: Tensor, gradient: Tensor, curvature: Tensor,
    ) -> Tensor:  # fmt: skip
        """int64 [N, 1]: the codes that lower the summed error most, by dynamic programming from the leaves up."""
        codes = costs = old  # of the best leaf under every node of the width at hand
        for w, bits in reversed(list(enumerate(sorted(share)))):
            entries = self.tables[bits]
            if below is not None:
                first = old >> (self.parent - below) << (bits - below)
                entries = entries.gather(1, first + torch.arange(2 ** (bits - below), device=old.device))
            moved = entries - dense[w, :, None]
            cost = share[bits] * moved * (curvature[w] * moved + 2 * gradient[w, :, None])
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
        bits = self.parent + 1
        target = self.target
        weight = self.metrics[bits].diagonal().expand_as(target)
        entry = self.tables[self.parent]
        inherited = entry.repeat_interleave(2, dim=1)
        upper, table = target > entry.gather(1, self.codes), inherited
        for _ in range(_SPLIT_STEPS):
            codes = 2 * self.codes + (upper if self.zeros is None else upper & ~self.zeros)
            mass = torch.zeros_like(inherited).scatter_add_(1, codes, weight)
            total = torch.zeros_like(inherited).scatter_add_(1, codes, weight * target)
            table = torch.where(mass > 0, total / mass.clamp_min(1e-30), inherited)
            table = table.masked_fill(self._held(codes, table), 0.0)
            low, high = table.gather(1, 2 * self.codes), table.gather(1, 2 * self.codes + 1)
            upper = (target - high).abs() < (target - low).abs()
        self.codes, self.tables[bits], self._gathered = codes, table, None

    def _held(self, codes: Tensor, table: Tensor) -> Tensor:
        """Bool like ``table``: the entries that must stay 0."""
        if self.zeros is None:
            return torch.zeros_like(table, dtype=torch.bool)
        return torch.zeros_like(table).scatter_add_(1, codes, self.zeros.to(table.dtype)) > 0


def nested_output_codebooks(
    target: Tensor, metrics: Mapping[int, Tensor], corrected: Mapping[int, Tensor] | None = None,
    focus: Mapping[int, float] | None = None, zeros: Tensor | None = None,
) -> Tree:  # fmt: skip
    """Nested codes and tables of rows that share their inputs.

    Args:
        target: float32 [N, K], finite: the dense rows.
        metrics: for every width from the seed to the parent, float32 [K, K], mean of ``x x^T`` over the inputs at that
            width, positive definite.
        corrected: width -> float32 [N, K], what its tables aim at in the end where that is not ``target``.
        focus: width -> how much its error counts, 1 where not given; for widths up to the larger of 6 and the seed.
        zeros: bool [N, K], weights that must be exactly 0 at every width.

    Returns:
        The tree; its tables are float32.
    """
    seed, parent = min(metrics), max(metrics)
    together = max(seed, min(parent, TOGETHER))
    start = target if zeros is None else target.masked_fill(zeros, 0.0)
    rows = metrics[seed].diagonal().expand_as(start).contiguous()
    first = nested_codebooks(
        start.cpu().numpy(), rows.cpu().numpy(), seed, together, zeros is not None, torch.get_num_threads()
    )
    tables = {bits: torch.from_numpy(table).to(start.device) for bits, table in first.codebooks.items()}
    tree = Tree(target, metrics, torch.from_numpy(first.codes).to(start.device), tables, zeros)
    wanted = {bits: (focus or {}).get(bits, 1.0) for bits in tree.tables}
    for power in _POWERS:
        for bits in wanted:
            tree.fit(bits)
        tree.descend({bits: share * 4 ** (power * (bits - seed)) for bits, share in wanted.items()})
    for bits in range(together + 1, parent + 1):
        tree.split()
        tree.fit(bits)
        tree.descend({bits: 1.0}, below=bits - 1)
    for bits in tree.tables:
        tree.fit(bits, (corrected or {}).get(bits), _NEAREST)
    return tree


def leading_directions(metric: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Split a metric into ``U U^T``, its largest part by subspace iteration (Nyström), and the diagonal of what remains.

    Args:
        metric: float32 [K, K], symmetric and positive definite.
        rank: columns of ``U``, K at most.

    Returns:
        float32 [K, rank] and [K], positive.
    """
    start = torch.randn(len(metric), min(rank, len(metric)), generator=torch.Generator().manual_seed(0))
    basis = start.to(metric.device)
    for _ in range(2):
        basis = torch.linalg.qr(metric @ basis).Q
    image = metric @ basis
    inner = (basis.t() @ image).double()
    inner.diagonal().add_(1e-5 * inner.diagonal().max())  # what float32 leaves uncertain
    factor = torch.linalg.cholesky(inner).float()
    leading = torch.linalg.solve_triangular(factor, image.t(), upper=False).t()
    diagonal = metric.diagonal()
    return leading, (diagonal - leading.square().sum(1)).clamp_min(1e-4 * diagonal.mean())
