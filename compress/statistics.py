"""Measure what linear layers are given on calibration text: watch them, tell shared inputs, and sum statistics up."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from compress.errors import CompressError
from compress.ranks import ALONE, Ranks, Sums
from compress.structure import Architecture, block_of

_STRIPES, _NARROWEST = 4, 64  # a symmetric sum is added up in stripes, at least so many columns wide


@contextmanager
def watch(modules: Mapping[str, nn.Module], visit: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call ``visit(name, x)`` with the first argument of every call of some modules, for the length of a ``with``."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _module, inputs: visit(name, inputs[0])

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
        ranks: the processes that share the samples; each then calls :meth:`end_lot` after every lot.

    Attributes:
        owner: linear -> the linear under whose name its input is kept.
        sums: owner -> float32 [K], or [K, K] with the sums on and above its blocks' diagonal: :meth:`mean` and :meth:`take`
            return whole matrices.
        tokens: owner -> how many tokens there were.
    """

    def __init__(self, full: bool = False, ranks: Ranks = ALONE, even: bool = False) -> None:
        self._even = even
        self._full, self._shared, self._sums = full, SharedInputs(), Sums(ranks)
        self._lot_tokens: dict[str, int] = {}
        self._tokens: dict[str, int] = {}
        self.owner: dict[str, str] = {}

    @property
    def sums(self) -> dict[str, Tensor]:
        """Return the sums of all lots; one that was not ended is the last."""
        self._end_last()
        return self._sums.total

    @property
    def tokens(self) -> dict[str, int]:
        """Return how many tokens they are over."""
        self._end_last()
        return self._tokens

    def _end_last(self) -> None:
        if self._lot_tokens:
            self.end_lot()

    def add(self, name: str, x: Tensor) -> None:
        """Add inputs of one linear, [tokens, K]; to be called in the order in which linears are."""
        owner = self.owner[name] = self._shared.owner(name, x)
        if owner != name:
            return
        x = evened(x.float()) if self._even else x.float()
        if name not in self._sums.lot:
            self._sums.lot[name] = x.new_zeros([x.shape[1]] * (2 if self._full else 1))
        if self._full:
            add_products(self._sums.lot[name], x)
        else:
            self._sums.lot[name] += x.square().sum(0)
        self._lot_tokens[name] = self._lot_tokens.get(name, 0) + x.shape[0]

    def end_lot(self) -> None:
        """Add up what was added since the last lot, in all processes."""
        before, self.owner = self.owner, {}
        for owner, tokens in self._sums.end_lot([before, self._lot_tokens]):
            self.owner |= {name: first for name, first in owner.items() if name not in self.owner}
            for name, count in tokens.items():
                self._tokens[name] = self._tokens.get(name, 0) + count
        self._lot_tokens = {}

    def assume(self, name: str, weight: Tensor) -> None:
        """Take the inputs of a linear that no sample has come to, weight [N, K], for alike and unrelated."""
        columns = weight.shape[1]
        self.owner[name], self.tokens[name] = name, 1
        make = torch.eye if self._full else torch.ones
        self.sums[name] = make(columns, device=weight.device)

    def mean(self, name: str) -> Tensor:
        """Return the mean over tokens for the input of one linear, float32 [K] or [K, K], and refuse one that is not finite."""
        owner = self.owner[name]
        total = self.sums[owner]
        mean = total / self.tokens[owner]
        check_inputs(name, mean)
        return mirrored(mean) if self._full else mean

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


def add_products(total: Tensor, x: Tensor) -> None:
    """Add ``x^T x`` of inputs, float32 [T, K], to a matrix [K, K], but for what :func:`mirrored` fills in: half the work."""
    columns = len(total)
    step = max(_NARROWEST, -(-columns // _STRIPES))
    for start in range(0, columns, step):
        total[start : start + step, start:].addmm_(x[:, start : start + step].t(), x[:, start:])


def mirrored(total: Tensor) -> Tensor:
    """Fill in the half of a symmetric matrix [K, K] below its diagonal."""
    upper = total.triu(1)
    return total.triu_().add_(upper.t())


def check_inputs(name: str, statistic: Tensor) -> None:
    """Refuse a statistic of a linear's inputs that is not finite."""
    if not torch.isfinite(statistic).all():
        raise CompressError(f"{name}: its inputs on the calibration text are not finite; check the model's weights.")


def check_weight(name: str, weight: Tensor) -> None:
    """Refuse a weight [N, K] that is not finite, naming its first bad row."""
    finite = torch.isfinite(weight)
    if not finite.all():
        row = int((~finite).any(dim=1).nonzero()[0])
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
