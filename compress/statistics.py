"""Measure what linear layers are given on calibration text: watch them, tell shared inputs, and sum statistics up."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from compress.errors import CompressError
from compress.ranks import ALONE, Ranks, Sums
from compress.structure import Architecture, block_of

_FOLDED_FROM = 256  # columns: below, half of a symmetric sum gains nothing
_STRIPES = 0, 4, 7, 9  # where each quarter of its rows begins in a folded sum, in quarters of the columns


class Enough(Exception):
    """Raised once the inputs asked for are there: the rest of a block need not run."""


@contextmanager
def watch(modules: Mapping[str, nn.Module], visit: Callable[[str, Tensor], object]) -> Iterator[None]:
    """Call ``visit(name, x)`` with the first argument of every call of some modules, for the length of a ``with``."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def seen(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            visit(name, inputs[0])  # what a hook returns would take the inputs' place

        return seen

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class SharedInputs:
    """Find linears that are called one after another with the same tensor: query, key and value, or gate and up.

    It must be the same memory in the same order, not written to since: whoever writes to a tensor, or to a view of it, raises
    the version of both. The last one is held, so that its memory cannot be given to another.
    """

    def __init__(self) -> None:
        self._last: tuple[str, str, Tensor, int] | None = None

    def owner(self, name: str, x: Tensor) -> str:
        """Return the first of the linears in a row that were given ``x``: ``name`` itself, or one called before it."""
        owner = name
        if self._last is not None:
            before, shared, held, version = self._last
            same = held.data_ptr() == x.data_ptr() and held.shape == x.shape and held.stride() == x.stride()
            if same and version == x._version and before != name:
                owner = shared
        self._last = name, owner, x, x._version
        return owner


class Moments:
    """Second moments of the inputs of linears, summed in float32; linears that share an input share its entry.

    Args:
        full: sum ``x x^T``, [K, K], instead of the square of each input alone, [K].
        even: take inputs :func:`evened`.
        ranks: the processes that share the samples; each then calls :meth:`end_lot` after every lot, and all ask for results.
    """

    def __init__(self, full: bool = False, ranks: Ranks = ALONE, even: bool = False) -> None:
        self._even = even
        self._full, self._shared, self._sums = full, SharedInputs(), Sums(ranks)
        self._lot: tuple[dict[str, str], dict[str, int]] = {}, {}
        self._found: tuple[dict[str, str], dict[str, int]] | None = None

    @property
    def owner(self) -> dict[str, str]:
        """Return linear -> the linear under whose name its input is kept."""
        return self._finished()[0]

    @property
    def tokens(self) -> dict[str, int]:
        """Return owner -> how many tokens there were."""
        return self._finished()[1]

    @property
    def sums(self) -> dict[str, Tensor]:
        """Return owner -> float32 [K], or what :func:`no_products` describes: :meth:`mean` returns whole matrices."""
        self._finished()
        return self._sums.total

    def _finished(self) -> tuple[dict[str, str], dict[str, int]]:
        """Add up all lots; one that was not ended is the last."""
        if self._found is None:
            if self._sums.lot:
                self.end_lot()
            owners, tokens = self._found = {}, {}
            for owner, counts in self._sums.notes:
                owners |= {name: first for name, first in owner.items() if name not in owners}
                for name, count in counts.items():
                    tokens[name] = tokens.get(name, 0) + count
        return self._found

    def add(self, name: str, x: Tensor) -> str:
        """Add inputs of one linear, [tokens, K], in the order in which linears are called; return its owner."""
        owners, tokens = self._lot
        owner = owners[name] = self._shared.owner(name, x)
        if owner != name:
            return owner
        x = evened(x.float()) if self._even else x.float()
        if name not in self._sums.lot:
            self._sums.lot[name] = no_products(x) if self._full else x.new_zeros(x.shape[1])
        if self._full:
            add_products(self._sums.lot[name], x)
        else:
            self._sums.lot[name] += x.square().sum(0)
        tokens[name] = tokens.get(name, 0) + x.shape[0]
        return owner

    def end_lot(self) -> None:
        """End a lot of samples; all processes are to call it as often."""
        self._sums.end_lot(self._lot)
        self._lot = {}, {}

    def assume(self, name: str, weight: Tensor) -> None:
        """Take the inputs of a linear that no sample has come to, weight [N, K], for alike and unrelated."""
        columns = weight.shape[1]
        self.owner[name], self.tokens[name] = name, 1
        if not self._full:
            self.sums[name] = torch.ones(columns, device=weight.device)
            return
        alike = torch.eye(columns, device=weight.device)
        self.sums[name] = no_products(alike)
        add_products(self.sums[name], alike)

    def mean(self, name: str) -> Tensor:
        """Return the mean over tokens for the input of one linear, float32 [K] or [K, K], and refuse one that is not finite."""
        owner = self.owner[name]
        total = self.sums[owner]
        mean = total / self.tokens[owner]
        check_inputs(name, mean)
        return unfolded(mean) if self._full else mean

    def take(self, name: str) -> Tensor:
        """Return what :meth:`mean` does, and let the sum go."""
        mean = self.mean(name)
        del self.sums[self.owner[name]]
        return mean


def evened(x: Tensor, like: Tensor | None = None) -> Tensor:
    """Divide inputs, float32 [T, K], by the root of their length, or of that of others, so that ``x^T x`` grows with it and not its square.

    A few tokens, the first of a text above all, make some layers' inputs a thousand times longer than the others': squared, nothing
    else would count. Measured on SmolLM2, with all tokens alike 3 and 4 bits are worse, and with the squares 6 and 8.
    """
    length: Tensor = torch.linalg.vector_norm(x if like is None else like, dim=1, keepdim=True)
    return x / length.clamp_min(1e-30).sqrt()


def no_products(x: Tensor) -> Tensor:
    """Return zeros to add products of inputs to, which are [T, K].

    They are [K, K], or folded where there are many columns, in fours: the rows of the matrix are four stripes, each without what
    is left of its diagonal block, side by side in [K / 4, 10 K / 4]. That is little more than half the memory, and half the work.
    """
    columns = x.shape[1]
    folded = columns >= _FOLDED_FROM and columns % 4 == 0
    return x.new_zeros(columns // 4, 10 * columns // 4) if folded else x.new_zeros(columns, columns)


def _stripes(total: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield the rows of each stripe, and what is folded of them: their columns from the first of these rows on."""
    rows = len(total)
    if rows == total.shape[1]:
        yield slice(0, rows), total
        return
    for stripe, start in enumerate(_STRIPES):
        first = stripe * rows
        yield slice(first, first + rows), total[:, start * rows : (start + 4 - stripe) * rows]


def add_products(total: Tensor, x: Tensor) -> None:
    """Add ``x^T x`` of inputs [T, K] to what :func:`no_products` began."""
    for rows, stripe in _stripes(total):
        stripe.addmm_(x[:, rows].t(), x[:, rows.start :])


def unfolded(total: Tensor) -> Tensor:
    """Return the whole symmetric matrix [K, K] of products that were added up."""
    rows, width = total.shape
    whole = total.new_empty([rows if rows == width else 4 * rows] * 2)
    for own, stripe in _stripes(total):
        whole[own, own.start :], whole[own.start :, own] = stripe, stripe.t()
        upper = stripe[:, :rows].triu()
        whole[own, own] = upper + upper.triu(1).t()
    return whole


def all_finite(tensor: Tensor) -> bool:
    """Tell whether a tensor holds neither NaN nor infinity; nothing of its size is made for it."""
    return not tensor.numel() or bool(torch.isfinite(torch.stack(tensor.aminmax())).all())


def check_inputs(name: str, statistic: Tensor) -> None:
    """Refuse a statistic of a linear's inputs that is not finite."""
    if not all_finite(statistic):
        raise CompressError(f"{name}: its inputs on the calibration text are not finite; check the model's weights.")


def check_weight(name: str, weight: Tensor) -> None:
    """Refuse a weight [N, K] that is not finite, naming its first bad row."""
    if not all_finite(weight):
        row = int((~torch.isfinite(weight)).any(dim=1).nonzero()[0])
        raise CompressError(f"{name}: row {row} of its weight holds NaN or infinity; the model is damaged.")


def hessian_bytes(structure: Architecture, linears: Mapping[str, tuple[int, int]]) -> int:
    """Estimate the bytes of one float32 [K, K] matrix for every distinct input of the largest block.

    Linears, given as full name -> (N, K), that servers fuse share their input; others are taken to have one of their own.
    """
    followers = {name for group in structure.fused for name in group[1:]}
    sizes: dict[int | None, int] = {}
    for name, (_, columns) in linears.items():
        place = block_of(name, structure)
        if name.removeprefix(f"{structure.blocks}.{place}.") not in followers:
            sizes[place] = sizes.get(place, 0) + 4 * columns**2
    return max(sizes.values())
