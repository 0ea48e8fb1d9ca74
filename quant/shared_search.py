"""Nested codes with shared codebooks (:mod:`compress.quant.shared`) that minimise the error of a layer's output.

It begins with a free codebook per row and number of bits (:mod:`compress.quant.nested`), replaces these by the nearest shared
ones, and chooses codes again, which then make up for most of what the rows lost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from compress.quant.format import Codes
from compress.quant.hessian import Buffers, Hessian
from compress.quant.nested import (
    TOGETHER,
    Objective,
    Tree,
    below_objectives,
    joint_objectives,
    row_parts,
    start_tree,
)
from compress.quant.shared import Shared
from compress.quant.shared_fit import column_factors, fit_shared, from_coefficients, solved, with_places
from compress.ranks import ALONE, Ranks

_POWER = 0.5  # of 4 per bit: what errors at more bits count in codebooks and coefficients common to all
_ABOVE = 0.5, 0.0  # the same for the bits after the last basis, which are chosen together
_SAMPLED, _ROUNDS = 128, 2  # rows that places are fitted on, and how often


def shared_output_codebooks(
    targets: Mapping[int, Tensor],
    hessian: Tensor,
    rank: int,
    focus: Mapping[int, float] | None = None,
    sizes: Sequence[int] = (),
    ranks: Ranks = ALONE,
) -> list[Codes]:
    """Find nested codes and shared codebooks of matrices that share their inputs, and so the factors of their columns.

    Args:
        targets: bits -> float32 [N, K], finite: what the rows should be, for all from the seed's to the parent's.
        hessian: float32 [K, K], mean of ``x x^T`` over the inputs, positive definite.
        rank: coefficients of every row, at most as many as there are entries of all stored numbers of bits.
        focus: bits -> how much their error counts, 1 where not given.
        sizes: rows of each matrix; one of all rows if not given.
        ranks: the processes that share the rows; all get the result.

    Returns:
        For each matrix codes and float32 codebooks, on the device of the targets.
    """
    columns = column_factors(targets[max(targets)], hessian.diagonal())
    prepared, found, start = Hessian(hessian * columns[:, None] * columns), [], 0
    for size in sizes or [len(targets[max(targets)])]:
        wanted = {bits: target[start : start + size] / columns for bits, target in targets.items()}
        search = _Search(wanted, prepared, focus or {}, ranks)
        shared = search.shared(columns, rank)
        codes = search.finished(shared)
        found.append(Codes(codes, {bits: shared.codebook(bits) for bits in sorted(targets)}, shared=shared))
        start += size
    return found


class _Search:
    """Hold the rows while their codebooks become shared; ``codes`` are those of ``together`` bits."""

    def __init__(
        self, targets: Mapping[int, Tensor], hessian: Hessian, focus: Mapping[int, float], ranks: Ranks
    ) -> None:
        self.targets, self.hessian, self.focus, self.ranks = targets, hessian, focus, ranks
        self.together = max(min(targets), min(max(targets), TOGETHER))
        device = hessian.matrix.device
        self.buffers, self.parts = Buffers(device), row_parts(len(targets[self.together]), device, ranks)
        self.bits = range(min(targets), self.together + 1)
        self.codes = torch.empty(0)  # of all rows, once there are some

    def _counts(self, bits: int) -> float:
        return self.focus.get(bits, 1.0) * 4 ** (_POWER * (bits - self.bits[0]))

    def _over(self, work: Callable[[slice], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Do some work on all parts, each in one process; return its results, one below the other."""
        found = self.ranks.over(self.parts, work)
        return {name: torch.cat([part[name] for part in found]) for name in found[0]}

    def _free(self, part: slice) -> dict[str, Tensor]:
        """Find codes and a codebook per row and number of bits, and what errors of their entries cost."""
        wanted = {bits: self.targets[bits][part] for bits in self.bits}
        tree = start_tree(wanted, self.hessian, None, self.buffers)
        for passes in joint_objectives(tree, self.focus):
            tree.descend(passes, {bits: tree.step(bits) for bits in passes[0].share})
        for bits in self.bits:
            tree.fit_and_step(bits)
        cost = self.hessian.matrix.diagonal().expand_as(tree.codes)
        masses = {f"mass {bits}": tree.summed(cost, bits) * self._counts(bits) for bits in self.bits}
        codebooks = {f"codebook {bits}": codebook for bits, codebook in tree.codebooks.items()}
        return {"codes": tree.codes.to(torch.uint8), **codebooks, **masses}

    def shared(self, columns: Tensor, rank: int) -> Shared:
        """Find shared codebooks, and codes of ``together`` bits for them."""
        found = self._over(self._free)
        self.codes = found["codes"]
        codebooks, masses = ({b: found[f"{kind} {b}"] for b in self.bits} for kind in ("codebook", "mass"))
        shared = self._placed(fit_shared(codebooks, masses, columns, rank))
        for last in (False, True):
            found = self._over(partial(self._settled, shared, last))
            self.codes = found["codes"]
            shared = self._placed(from_coefficients(columns, found["rows"], shared.basis))
        return shared

    def _placed(self, shared: Shared) -> Shared:
        """Find places for the bits that have no basis: by clustering, then by what some rows' outputs lose."""
        parent, last = max(self.targets), shared.last
        shared = with_places(shared, self.codes >> (self.together - last), self.targets[parent], parent)
        some = slice(None, None, max(1, len(self.codes) // _SAMPLED))
        for _ in range(_ROUNDS if parent > last else 0):
            tree = self._below(some, shared)
            assert shared.place is not None
            place = {bits: self._refitted(tree, shared.part(some), bits) for bits in shared.place}
            shared = replace(shared, place=place)
        return shared

    def _refitted(self, tree: Tree, shared: Shared, bits: int) -> Tensor:
        """Solve the least-squares problem for the places of a number of bits, common to the rows of a tree."""
        assert shared.width is not None
        last, more = shared.last, bits - shared.last
        codes = tree.codes >> (tree.parent - bits)
        cells = codes >> more
        width = (shared.coefficients().float() @ shared.width).gather(1, cells)
        left = tree.targets[bits] - shared.codebook(last).gather(1, cells)
        values = [width * (codes & (2**more - 1) == place) for place in range(2**more)]
        images = [self.hessian.times(value) for value in values]
        inner = torch.stack([torch.stack([(image * value).sum() for value in values]) for image in images])
        right = torch.stack([(image * left).sum() for image in images])
        return solved(inner[None], right[None])[0]

    def _below(self, part: slice, shared: Shared) -> Tree:
        """Choose the bits of some rows that have no basis, given those that have."""
        last, parent = shared.last, max(self.targets)
        tree = self._tree(part, shared, min(last, self.together))
        held = shared.part(part)
        for bits in range(last + 1, parent + 1):
            tree.extend(held.codebook(bits))
        if parent > last:
            for power in _ABOVE:
                share = {bits: 4.0 ** (power * (bits - last)) for bits in range(last + 1, parent + 1)}
                tree.descend([Objective(share, last)])
        return tree

    def _tree(self, part: slice, shared: Shared, together: int) -> Tree:
        held = shared.part(part)
        codebooks = {bits: held.codebook(bits) for bits in range(self.bits[0], together + 1)}
        wanted = {bits: target[part].contiguous() for bits, target in self.targets.items()}
        codes = self.codes[part] >> (self.together - together)
        return Tree(wanted, self.hessian, codes, codebooks, None, self.buffers)

    def _settled(self, shared: Shared, last: bool, part: slice) -> dict[str, Tensor]:
        """Choose codes of some rows, given the codebooks; find their best coefficients then, float32 [rows, rank]."""
        tree = self._tree(part, shared, self.together)
        for passes in below_objectives(tree, self.focus) if last else joint_objectives(tree, self.focus)[-1:]:
            tree.descend(passes)
        return {"codes": tree.codes.to(torch.uint8), "rows": self._coefficients(tree, shared)}

    def _coefficients(self, tree: Tree, shared: Shared) -> Tensor:
        """Solve every row's least-squares problem for its coefficients, all stored numbers of bits together."""
        rank = len(shared.basis[self.bits[0]])
        inner = torch.zeros(len(tree.codes), rank, rank, device=tree.codes.device)
        right = torch.zeros(len(tree.codes), rank, device=tree.codes.device)
        for bits, basis in shared.basis.items():
            codes = tree.codes >> (self.together - bits)
            values = [entries[codes] for entries in basis]
            for i, value in enumerate(values):
                image = self.hessian.times(value) * self._counts(bits)
                inner[:, i] += torch.stack([(image * other).sum(1) for other in values], 1)
                right[:, i] += (image * tree.targets[bits]).sum(1)
        return solved(inner, right)

    def finished(self, shared: Shared) -> Tensor:
        """Choose the bits below the last basis anew, together; return parent codes of all rows, uint8."""
        return self._over(lambda part: {"codes": self._below(part, shared).codes.to(torch.uint8)})["codes"]
