"""Pack the keys and values of attention into bit planes, and attend to them a chunk of tokens at a time.

States are [B, H, T, D]: rows of a batch, heads, tokens, channels. A *group* of them, ``group`` tokens of one channel or ``group``
channels of one token (KIVI, arXiv 2402.02750), shares its smallest value and its span. The span is cut into ``2**bits`` equal cells and a
value becomes the number of its cell, which stands for the middle of it. Cells at fewer bits are unions of cells at more, so the leading
planes of a code are the code at fewer bits, bit for bit. The span is a fifteenth wider than the values, so that at 4 bits the largest and
the smallest are middles of cells: else those of every group would always shrink by half a cell. Groups that lie
about zero anyway, channels of a token after a rotation, are *centred*: the smallest value is minus half the span, which takes a byte.
Keys are packed less their mean (:mod:`compress.kernels.kv_mean`) and scaled (:func:`scale_for`). KIVI's own grid, whose end points are
the group's smallest and largest value, is here as a control: its codes do not nest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from compress.kernels.kv_mean import Mean

Along = Literal["channel", "token"]
MOST_BITS = 8
CHUNK = 512  # tokens that are dense at a time
_LARGEST = torch.finfo(torch.float16).max
_WIDER = 1 / 15  # by how much the span of a nested group is wider than its values
_FAR = math.log(1e6)  # a channel's power or variance from their geometric mean
_TRUST = 0.15
_LARGEST_BYTE = 247  # of a centred group's span: 61,440; the next is infinity


@dataclass(frozen=True)
class Grid:
    """Say how states are rounded.

    Attributes:
        bits: of a code, 1 to 8.
        group: values that share a smallest value and a span.
        along: ``channel``: they are tokens of one channel; ``token``: channels of one token.
        nested: cells that nest; or KIVI's end points.
        rotated: states are rounded after a rotation of their channels (:func:`rotate`), which spreads what is loud over all.
        centred: the span lies about zero, so no smallest value is stored.
    """

    bits: int
    group: int
    along: Along
    nested: bool = True
    rotated: bool = False
    centred: bool = False

    def grouped(self, states: Tensor) -> Tensor:
        """View [B, H, T, D] as groups: [B, H, T / group, group, D], or [B, H, T, D / group, group]."""
        return torch.unflatten(states, self.axis - 1, (-1, self.group))

    @property
    def axis(self) -> int:
        """Return the dimension of a group's members in what :meth:`grouped` returns."""
        return 3 if self.along == "channel" else 4


@dataclass(frozen=True)
class Packed:
    """Hold packed states [B, H, T, D].

    Attributes:
        planes: one uint8 [B, H, T, ceil(D / 8)] per bit, most significant first; channel d is bit d % 8 of byte d // 8.
        low: float16, a group's smallest value: [B, H, T / group, D] or [B, H, T, D / group]; None where groups are centred.
        span: the same of the largest value less the smallest; where groups are centred, uint8: exponent and first three bits of the
            fraction of a float16, rounded up.
        channels: D.
        grid: how they were rounded; ``bits`` as there are planes.
        scale: float32 [B, H, 1, D], by which channels were multiplied before they were rotated; None for ones.
        mean: what was subtracted before that; None for nothing.
    """

    planes: tuple[Tensor, ...]
    low: Tensor | None
    span: Tensor
    channels: int
    grid: Grid
    scale: Tensor | None = None
    mean: Mean | None = None

    @property
    def tokens(self) -> int:
        """Return T."""
        return self.planes[0].shape[2]

    def tensors(self) -> tuple[Tensor, ...]:
        """Return all there is in memory."""
        mean = None if self.mean is None else self.mean.key
        return (*self.planes, self.span, *(part for part in (self.low, self.scale, mean) if part is not None))

    def map(self, change: Callable[[Tensor], Tensor]) -> Packed:
        """Return it with every tensor changed."""
        planes = tuple(map(change, self.planes))
        low, scale = (None if part is None else change(part) for part in (self.low, self.scale))
        mean = None if self.mean is None else self.mean.map(change)
        return replace(self, planes=planes, low=low, span=change(self.span), scale=scale, mean=mean)

    def at_bits(self, bits: int) -> Packed:
        """Return it at fewer bits: the leading planes."""
        return replace(self, planes=self.planes[:bits], grid=replace(self.grid, bits=bits))

    def part(self, start: int, stop: int) -> Packed:
        """Return tokens ``start`` to ``stop``, as views; both bound groups."""
        scale = self.grid.group if self.grid.along == "channel" else 1
        tokens, groups = slice(start, stop), slice(start // scale, stop // scale)
        planes = tuple(plane[:, :, tokens] for plane in self.planes)
        low = None if self.low is None else self.low[:, :, groups]
        mean = None if self.mean is None else self.mean.behind(start)
        return replace(self, planes=planes, low=low, span=self.span[:, :, groups], mean=mean)

    def affine(self) -> tuple[Tensor, Tensor]:
        """Return what code 0 stands for and the step from a code to the next, float32, by group."""
        (low, span), count = _widened(self.low, self.span), 1 << self.grid.bits
        if not self.grid.nested:
            return low, span / (count - 1)
        step = span / count
        return low + step / 2, step


def rotate(states: Tensor) -> Tensor:
    """Multiply channels, floating [..., D], by a Hadamard matrix of the largest power of two that divides D.

    The matrix is symmetric and orthogonal: products of two rotated vectors are those of the vectors, and rotating again undoes it.
    """
    size = states.shape[-1] & -states.shape[-1]
    matrix = torch.ones(1, 1, dtype=states.dtype, device=states.device)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)]) * 0.5**0.5
    return (torch.unflatten(states, -1, (-1, size)) @ matrix).flatten(-2)


def scale_for(keys: Tensor, power: Tensor | None) -> Tensor:
    """Return factors for the channels of keys with which rounding after a rotation disturbs products with queries least.

    The error is spread evenly over scaled channels and grows with their summed variance; divided by its factor f, that of a channel counts
    as much as queries are large there. The product of ``sum(f**2 * variance)`` and ``sum(power / f**2)`` is least at ``f**4 = power / variance``,
    but what is known of the variance is that of one group: with the exponent :data:`_TRUST` for 1/4 predictions on C4 came closer.

    Args:
        keys: floating [B, H, T, D], a group of tokens.
        power: sums of the squares of queries, [B, H, 1, D]; None if none were seen: all alike.

    Returns:
        float32 [B, H, 1, D], with a geometric mean of 1.
    """
    variance = keys.float().var(2, correction=0, keepdim=True)
    power = torch.ones_like(variance) if power is None else power
    logs = [part.clamp_min(1e-30).log() for part in (power, variance)]
    levels = [(part - part.mean(-1, keepdim=True)).clamp(-_FAR, _FAR) for part in logs]
    scale = levels[0] / 4 - levels[1] * _TRUST
    return (scale - scale.mean(-1, keepdim=True)).exp()


def pack(states: Tensor, grid: Grid, scale: Tensor | None = None, mean: Mean | None = None) -> Packed:
    """Round states, floating [B, H, T, D], of which ``grid.group`` divides T or D, less ``mean``, their channels times ``scale``."""
    states = states.detach().float()
    states = states if mean is None else states - mean.at(states.shape[2])
    states = states if scale is None else states * scale
    groups = grid.grouped(rotate(states) if grid.rotated else states)
    low, span = _ends(groups, grid)
    least, spans = _widened(low, span)
    place = torch.where(spans > 0, (groups - least) / spans, 0.0)
    if grid.nested:
        most = 1 << MOST_BITS
        codes = (place * most).floor().clamp_(0, most - 1).to(torch.uint8)
    else:
        most = (1 << grid.bits) - 1
        codes = (place * most).round().clamp_(0, most).to(torch.uint8) << (MOST_BITS - grid.bits)
    codes = codes.view(states.shape)
    planes = tuple(_plane(codes, MOST_BITS - 1 - number) for number in range(grid.bits))
    low = None if low is None else low.squeeze(grid.axis)
    return Packed(planes, low, span.squeeze(grid.axis), states.shape[-1], grid, scale, mean)


def _ends(groups: Tensor, grid: Grid) -> tuple[Tensor | None, Tensor]:
    """Return the smallest value and the span of groups as they are stored, their dimension kept with size 1."""
    if grid.centred:
        halves = (2 * groups.abs().amax(grid.axis, keepdim=True)).clamp(max=_LARGEST).half()
        return None, ((halves.view(torch.int16) + 127) >> 7).clamp(max=_LARGEST_BYTE).to(torch.uint8)
    least, largest = torch.aminmax(groups, dim=grid.axis, keepdim=True)
    more = (largest - least) * (_WIDER / 2) if grid.nested else 0.0
    low = (least - more).clamp(-_LARGEST, _LARGEST).half()
    return low, (largest + more - low.float()).clamp(0, _LARGEST).half()


def _widened(low: Tensor | None, span: Tensor) -> tuple[Tensor, Tensor]:
    """Return smallest values and spans as float32, of what :func:`_ends` stores."""
    if low is not None:
        return low.float(), span.float()
    wide = (span.to(torch.int16) << 7).view(torch.float16).float()
    return -wide / 2, wide


def _plane(codes: Tensor, bit: int) -> Tensor:
    ones = (codes >> bit) & 1
    ones = torch.unflatten(torch.nn.functional.pad(ones, (0, -ones.shape[-1] % 8)), -1, (-1, 8))
    return (ones << torch.arange(8, dtype=torch.uint8, device=codes.device)).sum(-1, dtype=torch.uint8)


def codes_of(packed: Packed) -> Tensor:
    """Return the codes, uint8 [B, H, T, D]."""
    places = torch.arange(8, dtype=torch.uint8, device=packed.span.device)
    codes = torch.zeros((), dtype=torch.uint8, device=packed.span.device)
    for plane in packed.planes:
        codes = (codes << 1) | ((plane[..., None] >> places) & 1)
    return codes.flatten(-2)[..., : packed.channels]


def as_rounded(packed: Packed) -> Tensor:
    """Return what the codes stand for, float32 [B, H, T, D], of scaled and rotated states still so, without the mean."""
    first, step = (part.unsqueeze(packed.grid.axis) for part in packed.affine())
    groups = packed.grid.grouped(codes_of(packed)) * step + first
    return groups.flatten(packed.grid.axis - 1, packed.grid.axis)


def unpack(packed: Packed, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return what the codes stand for, [B, H, T, D]."""
    states = as_rounded(packed)
    states = rotate(states) if packed.grid.rotated else states
    states = states if packed.scale is None else states / packed.scale
    return (states if packed.mean is None else states + packed.mean.at(packed.tokens)).to(dtype)


def turned(queries: Tensor, keys: Packed) -> Tensor:
    """Return queries, float32 [B, H, Q, D], whose products with what :func:`as_rounded` returns are those of queries and keys less their mean."""
    queries = queries if keys.scale is None else queries / keys.scale
    return rotate(queries) if keys.grid.rotated else queries


def nothing(states: Tensor, grid: Grid) -> Packed:
    """Return no tokens of states [B, H, T, D]."""
    batch, heads, _, channels = states.shape
    count = channels if grid.along == "channel" else channels // grid.group
    empty = states.new_empty(batch, heads, 0, count, dtype=torch.uint8 if grid.centred else torch.float16)
    planes = states.new_empty(batch, heads, 0, -(-channels // 8), dtype=torch.uint8)
    return Packed((planes,) * grid.bits, None if grid.centred else empty, empty, channels, grid)


def join(parts: list[Packed]) -> Packed:
    """Put stretches of tokens behind one another."""
    planes = tuple(torch.cat(planes, 2) for planes in zip(*(part.planes for part in parts), strict=True))
    lows = [part.low for part in parts if part.low is not None]
    span = torch.cat([part.span for part in parts], 2)
    return replace(parts[0], planes=planes, low=torch.cat(lows, 2) if lows else None, span=span)


LookUp = Callable[[Packed], Tensor]


@dataclass(frozen=True)
class States:
    """Hold what a layer attends to: packed tokens between whole ones, [B, H, W, D], as the model made them."""

    keys: Packed
    values: Packed
    whole_keys: tuple[Tensor, Tensor]  # before the packed tokens, and behind them
    whole_values: tuple[Tensor, Tensor]
    watch: Callable[[Tensor, Tensor | None, float], None] | None = None  # is told query, mask and scale of attention

    @property
    def tokens(self) -> int:
        """Return the number of tokens, packed and whole."""
        return self.keys.tokens + sum(part.shape[2] for part in self.whole_keys)

    def dense(self) -> tuple[Tensor, Tensor]:
        """Return all keys and values, [B, H, T, D]."""
        (first, last), (first_values, last_values) = self.whole_keys, self.whole_values
        if not self.keys.tokens and not first.shape[2]:
            return last, last_values
        if not self.keys.tokens:
            return torch.cat([first, last], 2), torch.cat([first_values, last_values], 2)
        keys = torch.cat([first, unpack(self.keys, first.dtype), last], 2)
        return keys, torch.cat([first_values, unpack(self.values, first_values.dtype), last_values], 2)

    def chunks(self, look_up: LookUp) -> Iterator[tuple[Tensor, Tensor, Packed | None]]:
        """Return keys and values, dense and float32, of a stretch of tokens after the other, and its keys where they are packed."""
        first, last = (
            (keys.float(), values.float(), None)
            for keys, values in zip(self.whole_keys, self.whole_values, strict=True)
        )
        yield first
        grids = self.keys.grid, self.values.grid
        whole = math.lcm(*(grid.group for grid in grids if grid.along == "channel"))
        size = max(CHUNK // whole, 1) * whole
        for start in range(0, self.keys.tokens, size):
            stop = min(start + size, self.keys.tokens)
            keys = self.keys.part(start, stop)
            yield look_up(keys), look_up(self.values.part(start, stop)), keys
        yield last


def attend(query: Tensor, states: States, mask: Tensor | None, scale: float, look_up: LookUp = as_rounded) -> Tensor:
    """Attend to packed and whole states, of which a chunk at a time is dense; softmax and sums in float32.

    Args:
        query: floating [B, H * n, Q, D]; heads ``h * n`` to ``h * n + n - 1`` share head h of the states.
        states: of T tokens.
        mask: bool, True where a query sees a token, or floating, added to the products: broadcast to [B, H * n, Q, T].
        scale: of the products.
        look_up: does what :func:`as_rounded` does.

    Returns:
        [B, H * n, Q, values' D] in the dtype of ``query``; zeros where a query sees nothing, as torch has it.
    """
    heads = states.keys.span.shape[1]
    grouped = torch.unflatten(query.float(), 1, (heads, -1)) * scale
    shape = grouped.shape[:-1]  # [B, H, n, Q]
    rows = grouped.flatten(2, 3)
    asked = turned(rows, states.keys)
    largest, total = rows.new_full((*shape, 1), -torch.inf), rows.new_zeros((*shape, 1))
    sums, start = {packed: rows.new_zeros((*shape, states.values.channels)) for packed in (False, True)}, 0
    for keys, values, packed in states.chunks(look_up):
        stop = start + keys.shape[2]
        if start == stop:
            continue
        products = (asked if packed else rows) @ keys.mT
        if packed and packed.mean is not None:
            products += packed.mean.products(rows, packed.tokens)
        products = torch.unflatten(products, 2, shape[2:])
        if mask is not None:
            products = masked(products, mask[..., start:stop])
        start, before = stop, largest
        largest = torch.maximum(before, products.amax(-1, keepdim=True))
        # Where nothing has been seen so far the largest is -inf, and -inf less itself would be no number.
        base = largest.masked_fill(largest == -torch.inf, 0.0)
        weights, kept = (products - base).exp(), (before - base).exp()
        total = total * kept + weights.sum(-1, keepdim=True)
        sums = {which: part * kept for which, part in sums.items()}
        sums[packed is not None] += torch.unflatten(weights.flatten(2, 3) @ values, 2, shape[2:])
    mixed = sums[False] + (rotate(sums[True]) if states.values.grid.rotated else sums[True])
    return (mixed / total.clamp_min(torch.finfo(total.dtype).tiny)).flatten(1, 2).to(query.dtype)


def masked(products: Tensor, mask: Tensor) -> Tensor:
    """Apply a mask, [B or 1, heads or 1, Q or 1, T], to products [B, H, n, Q, T]."""
    mask = mask[(None,) * (4 - mask.dim())]
    mask = torch.unflatten(mask, 1, products.shape[1:3]) if mask.shape[1] > 1 else mask[:, :, None]
    return products.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else products + mask.float()
