"""Nested codes with shared codebooks (:mod:`compress.quant.shared`) that minimise the error of a layer's output.

It begins with codes by error feedback (:mod:`compress.quant.feedback`), chooses whole paths anew given all others
(:mod:`compress.quant.nested`), solves for the sizes of groups and for the entries that are best then, and does both once more.
More bits than are chosen together split every cell; their entries and codes are found in turn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from compress.quant.feedback import codes_by_feedback, inverse_factor
from compress.quant.format import Codes
from compress.quant.hessian import Buffers, Hessian
from compress.quant.nested import Objective, Tree, below_objectives, joint_objectives, row_parts
from compress.quant.records import GROUP
from compress.quant.shared import Shared, Tables
from compress.quant.shared_fit import (
    Work,
    by_group,
    column_factors,
    fit_shared,
    halved,
    sized,
    solved,
    sums_by_codes,
)
from compress.ranks import ALONE, Ranks

TOGETHER = 7  # bits that are chosen together at most; what one more or fewer is worth: docs/quantisation.md
_POWER = 1.0  # of 4 per bit: what errors at more bits count in error feedback, and in sizes common to all
# The same in the sweeps; with smaller ones 3 bits are better, and 4 and more are worse.
_POWERS = ((1.0, 1.0), (0.75, 0.75))
_ABOVE = 0.5, 0.0  # the same for the bits above those that are chosen first
_SAMPLED = 1 << 18  # weights that entries are fitted on
_REFITTED = 2  # times that entries above are solved for, and codes chosen for them
_FARTHEST = 2.0  # that a size may move at once
_SOLVED = 512  # rows whose sizes are solved for at a time


def shared_output_codebooks(
    targets: Mapping[int, Tensor],
    hessian: Tensor,
    focus: Mapping[int, float] | None = None,
    sizes: Sequence[int] = (),
    ranks: Ranks = ALONE,
) -> list[Codes]:
    """Find nested codes and shared codebooks of matrices that share their inputs, and so the factors of their columns.

    Args:
        targets: bits -> float32 [N, K], finite: what the rows should be, for all from the seed's to the parent's.
        hessian: float32 [K, K], mean of ``x x^T`` over the inputs, positive definite.
        focus: bits -> how much their error counts, 1 where not given.
        sizes: rows of each matrix; one of all rows if not given.
        ranks: the processes that share the rows; all get the result.

    Returns:
        For each matrix codes and float32 codebooks, on the device of the targets.
    """
    columns = column_factors(targets[max(targets)], hessian.diagonal())
    prepared, found, start = Hessian(hessian * columns[:, None] * columns), [], 0
    factor = inverse_factor(prepared.matrix)
    for size in sizes or [len(targets[max(targets)])]:
        scaled = {id(target): target[start : start + size] / columns for target in targets.values()}  # mostly one
        wanted = {bits: scaled[id(target)] for bits, target in targets.items()}
        codes, shared = _Search(wanted, prepared, factor, focus or {}, ranks).found(columns)
        found.append(Codes(codes, Tables(shared, range(min(targets), max(targets) + 1)), shared=shared))
        start += size
    return found


class _Search:
    """Hold the rows of a matrix while its codebooks are fitted; ``codes`` are those of ``together`` bits."""

    def __init__(
        self, targets: Mapping[int, Tensor], hessian: Hessian, factor: Tensor, focus: Mapping[int, float], ranks: Ranks
    ) -> None:
        self.targets, self.hessian, self.factor, self.focus, self.ranks = targets, hessian, factor, focus, ranks
        self.together = max(min(targets), min(max(targets), TOGETHER))
        device = hessian.matrix.device
        self.buffers, self.parts = Buffers(device), row_parts(len(targets[self.together]), device, ranks)
        self.bits = range(min(targets), self.together + 1)
        self.codes = torch.empty(0)  # of all rows, once there are some

    def _counts(self, bits: int) -> float:
        return self.focus.get(bits, 1.0) * 4 ** (_POWER * (bits - self.bits[0]))

    def _over(self, work: Work) -> dict[str, Tensor]:
        """Do some work on all parts, each in one process; return its results, one below the other."""
        found = self.ranks.over(self.parts, work)
        return {name: torch.cat([part[name] for part in found]) for name in found[0]}

    def found(self, columns: Tensor) -> tuple[Tensor, Shared]:
        """Find parent codes of all rows, uint8, and the shared codebooks."""
        seed, parent = self.bits[0], max(self.targets)
        cost = self.factor.diagonal() ** -2
        shared = fit_shared(self.targets[parent], cost, columns, seed, parent, self._over)
        found = self._over(partial(self._fed, shared))
        self.codes, shared = found["codes"], sized(shared, found["sizes"])
        for last in (False, True):
            found = self._over(partial(self._settled, shared, last))
            self.codes = found["codes"]
            shared = sized(self._based(shared, self.codes, self.bits), found["sizes"])
        above = range(self.together + 1, parent + 1)
        if not above:
            return self.codes, shared
        shared = self._split(shared)
        codes = self._over(partial(self._above, shared))["codes"]
        for _ in range(_REFITTED):
            shared = self._based(shared, codes, above)
            codes = self._over(partial(self._above, shared))["codes"]
        return codes, shared

    def _fed(self, shared: Shared, part: slice) -> dict[str, Tensor]:
        """Choose codes by error feedback, uint8 [rows, K], and sizes, float32 [rows, ceil(K / 64)]."""
        tables = {b: shared.table(b)[0] for b in self.bits}
        targets = {b: self.targets[b][part] for b in tables}
        codes, sizes = codes_by_feedback(targets, tables, self.factor, {b: self._counts(b) for b in tables})
        return {"codes": codes.to(torch.uint8), "sizes": sizes}

    def _step(self) -> int:
        """Return every how many rows entries are fitted on."""
        rows = max(1, _SAMPLED // len(self.hessian.matrix))
        return max(1, len(self.codes) // rows)

    def _based(self, shared: Shared, codes: Tensor, all_bits: range) -> Shared:
        """Solve the least-squares problem for the entries of some bases, common to some rows; codes are of the largest one's bits."""
        sums, basis = self._over(partial(self._normal, shared, codes, all_bits)), dict(shared.basis)
        for bits in all_bits:
            inner, right = sums[f"inner {bits}"].sum(0), sums[f"right {bits}"].sum(0)
            found = solved(inner[None], right[None])[0]
            basis[bits] = torch.where(inner.diagonal() > 0, found, shared.basis[bits][0])[None]
        return replace(shared, basis=basis)

    def _normal(self, shared: Shared, codes: Tensor, all_bits: range, part: slice) -> dict[str, Tensor]:
        """Sum the normal equations of that problem, [1, 2**bits, 2**bits] and [1, 2**bits], over those of a part's rows."""
        step = self._step()
        some = slice(-(-part.start // step) * step, part.stop, step)
        of, sizes = codes[some], shared.part(some).sizes()
        inner, sums = sums_by_codes(of, sizes, self.hessian, 2 ** max(all_bits)), dict[str, Tensor]()
        for bits in all_bits:
            count, at_bits = 2**bits, (of >> (max(all_bits) - bits)).long().flatten()
            image = self.hessian.times(self.targets[bits][some]).mul_(sizes).flatten()
            sums[f"inner {bits}"] = inner.view(count, -1, count, len(inner) // count).sum((1, 3))[None]
            sums[f"right {bits}"] = sizes.new_zeros(1, count).index_add_(1, at_bits, image[None])
        return sums

    def _split(self, shared: Shared) -> Shared:
        """Find the bases of more bits than were chosen together: every cell is split in two."""
        some, parent = slice(None, None, self._step()), max(self.targets)
        tree, basis = self._tree(some, shared), dict(shared.basis)
        assert tree.sizes is not None
        for bits in range(self.together + 1, parent + 1):
            values, mass = tree.targets[bits] / tree.sizes, tree.sizes.square() * self.factor.diagonal() ** -2
            basis[bits] = halved(values, mass, tree.codes, basis[bits - 1][0])[None]
            tree.extend(_rows(basis[bits], tree.codes))
        return replace(shared, basis=basis)

    def _above(self, shared: Shared, part: slice) -> dict[str, Tensor]:
        """Choose the bits of some rows that were not chosen together, given those that were: parent codes, uint8."""
        tree, more = self._tree(part, shared), range(self.together + 1, max(self.targets) + 1)
        for bits in more:
            tree.extend(_rows(shared.table(bits), tree.codes))
        for power in _ABOVE:
            tree.descend([Objective({bits: 4.0 ** (power * (bits - self.together)) for bits in more}, self.together)])
        return {"codes": tree.codes.to(torch.uint8)}

    def _tree(self, part: slice, shared: Shared) -> Tree:
        codes = self.codes[part]
        codebooks = {bits: _rows(shared.table(bits), codes) for bits in self.bits}
        wanted = {bits: target[part].contiguous() for bits, target in self.targets.items()}
        return Tree(wanted, self.hessian, codes, codebooks, None, self.buffers, shared.part(part).sizes())

    def _settled(self, shared: Shared, last: bool, part: slice) -> dict[str, Tensor]:
        """Choose codes of some rows, given the codebooks; find the best sizes then, float32 [rows, ceil(K / 64)]."""
        tree = self._tree(part, shared)
        for passes in below_objectives(tree, self.focus) if last else joint_objectives(tree, self.focus, _POWERS):
            tree.descend(passes)
        return {"codes": tree.codes.to(torch.uint8), "sizes": self._sizes(tree, shared.part(part))}

    def _sizes(self, tree: Tree, shared: Shared) -> Tensor:
        """Solve every row's least-squares problem for the sizes of its groups, all numbers of bits together."""
        sizes = shared.by_group()
        best, columns = [], len(self.hessian.matrix)
        for start in range(0, len(sizes), _SOLVED):
            part, now = slice(start, start + _SOLVED), sizes[start : start + _SOLVED]
            inner = now.new_zeros(*now.shape, now.shape[1])
            right = torch.zeros_like(now)
            for bits in self.bits:
                entries, counts = shared.basis[bits][0], self._counts(bits)
                found = (tree.codes[part] >> (self.together - bits)).flatten()
                value = entries.index_select(0, found).view(-1, columns)
                right -= counts * by_group(value * tree.gradient(bits)[part]).sum(2)
                for place, first in enumerate(range(0, columns, GROUP)):
                    here, after = slice(first, first + GROUP), slice(first, None)
                    image = value[:, here] @ self.hessian.matrix[here, after]
                    inner[:, place, place:] += counts * by_group(image.mul_(value[:, after])).sum(2)
            moved = now + solved(inner + inner.triu(1).mT, right)
            best.append(torch.where(moved > 0, moved, now).clamp(now / _FARTHEST, now * _FARTHEST))
        return torch.cat(best)


def _rows(table: Tensor, codes: Tensor) -> Tensor:
    """Write one codebook, [1, 2**bits], out for every row of codes."""
    return table.expand(len(codes), -1).contiguous()
