"""How a packed matrix lies in a GPU's memory: made once from the canonical planes, and back, bit for bit.

Codes are int32 [p, ceil(N / 32), ceil(K / 32), 32]: word by word of every plane, and in each word 32 neighbouring rows side by
side, so that a warp reads whole lines and a lane stays with its row. Products with b bits read the first b of the p words of every
32 columns, so changing the number of bits moves nothing. The bits of a word are in the order in which the kernels take them out: the
columns of 8 neighbouring nibbles come out in their natural order, and activations need none.

The first ``head`` planes may lie together: as crumbs (2 planes) or nibbles (4), ready to look up, where the seed has at least
so many bits. A code's bit t, from the least significant, is plane t; tables are in that order of codes.

On request the tables of 4 bits are read with entries of 8 bits (:func:`rounded`). At 3 bits and less that would save the kernels
nothing they wait for, and above 4 a table is small beside its planes, or one bit less is the better bargain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from compress.kernels.packing import GROUP, scale_groups, unpack_planes, words

ROWS = 32  # of one tile
ROUNDED = 4  # bits whose entries can be read with 8 bits
_AT_ONCE = 1 << 22  # codes in one go: their single bits are p times as many bytes


def head_for(seed_bits: int) -> int:
    """Return how many first planes lie together: 1, 2 or 4. Three fill no word evenly, and gain nothing as 2 and 1."""
    return 4 if seed_bits >= 4 else 2 if seed_bits == 2 else 1


@cache
def _order(planes: int, head: int) -> tuple[int, ...]:
    """Return where bit k of word t comes from, at 32 t + k: plane s and column c as 32 s + c."""
    order = [0] * (32 * planes)
    for plane in range(planes):
        for column in range(32):
            block, place = divmod(column, 8)
            word, bit = plane, 4 * place + block
            if head == 2 and plane < 2:
                word, bit = block % 2, 4 * place + 2 * (block // 2) + plane
            if head == 4 and plane < 4:
                word, bit = block, 4 * place + plane
            order[32 * word + bit] = 32 * plane + column
    return tuple(order)


@cache
def _reversed(bits: int) -> tuple[int, ...]:
    """Return the codes of so many bits with their bits in the opposite order."""
    return tuple(int(f"{code:0{bits}b}"[::-1], 2) for code in range(1 << bits))


def _to_words(bits: Tensor) -> Tensor:
    """Pack uint8 [..., 32] of single bits to int32 [...]."""
    place = torch.arange(8, dtype=torch.uint8, device=bits.device)
    octets: Tensor = (bits.view(*bits.shape[:-1], 4, 8) << place).sum(-1, dtype=torch.uint8)
    return octets.view(torch.int32).squeeze(-1)


def _to_bits(tensor: Tensor) -> Tensor:
    """Unpack int32 [...] to uint8 [..., 32] of single bits."""
    place = torch.arange(8, dtype=torch.uint8, device=tensor.device)
    octets = tensor.contiguous().unsqueeze(-1).view(torch.uint8)
    return ((octets.unsqueeze(-1) >> place) & 1).flatten(-2)


def _tile_codes(planes: Sequence[Tensor], columns: int, head: int) -> Tensor:
    """Bring canonical planes, p of int32 [N, W], into the layout, int32 [p, tiles, W, 32]."""
    rows, span, count = planes[0].shape[0], words(columns), len(planes)
    tiles = -(-rows // ROWS)
    tiled = torch.zeros(count, tiles, span, ROWS, dtype=torch.int32, device=planes[0].device)
    order = torch.tensor(_order(count, head), device=tiled.device)
    step = max(1, _AT_ONCE // (ROWS * span * 32))
    for first in range(0, tiles, step):
        part = slice(first * ROWS, min((first + step) * ROWS, rows))
        bits = torch.stack([_to_bits(plane[part]) for plane in planes], 2)  # [rows, W, p, 32]
        tile = _to_words(bits.flatten(2)[..., order].view(-1, span, count, 32))  # [rows, W, p]
        whole = torch.zeros(-(-tile.shape[0] // ROWS) * ROWS, span, count, dtype=torch.int32, device=tile.device)
        whole[: tile.shape[0]] = tile
        tiled[:, first : first + step] = whole.view(-1, ROWS, span, count).permute(3, 0, 2, 1)
    return tiled


def _untile_codes(tiled: Tensor, rows: int, head: int) -> Tensor:
    """Undo :func:`_tile_codes`: int32 [p, N, W]."""
    count, tiles, span, _ = tiled.shape
    planes = torch.empty(count, tiles * ROWS, span, dtype=torch.int32, device=tiled.device)
    back = torch.empty(32 * count, dtype=torch.long, device=tiled.device)
    back[torch.tensor(_order(count, head), device=tiled.device)] = torch.arange(32 * count, device=tiled.device)
    step = max(1, _AT_ONCE // (ROWS * span * 32))
    for first in range(0, tiles, step):
        some = tiled[:, first : first + step].permute(1, 3, 2, 0)  # [tiles, 32, W, p]
        bits = _to_bits(some).flatten(-2)[..., back].view(-1, ROWS, span, count, 32)
        whole = _to_words(bits).flatten(0, 1)  # [rows, W, p]
        planes[:, first * ROWS : (first + step) * ROWS] = whole.permute(2, 0, 1)
    return planes[:, :rows].contiguous()


def _padded(codebook: Tensor) -> Tensor:
    """Bring a codebook [N, 2**b] into the kernels' order of codes, with rows of zeros up to whole tiles: [tiles * 32, 2**b]."""
    order = torch.tensor(_reversed(codebook.shape[1].bit_length() - 1), device=codebook.device)
    return pad(codebook.detach()[:, order], (0, 0, 0, -codebook.shape[0] % ROWS))


def _byte_tables(codebook: Tensor, kind: torch.dtype) -> Tensor:
    """Return the low bytes of 16-bit entries, then the high bytes, four to a word: int32 [2**b / 2, tiles * 32]."""
    octets = _padded(codebook).to(kind).view(torch.uint8).view(-1, codebook.shape[1], 2)
    halves = [octets[..., byte].contiguous().view(torch.int32) for byte in range(2)]
    return torch.cat(halves, 1).t().contiguous()


def _eight_bits(codebook: Tensor) -> tuple[Tensor, ...]:
    """Write entries as (byte - zero) * unit * factor: bytes [N, 2**b]; zero, unit and factor [N, 1], all float64.

    The bytes of a row are spread evenly from its smallest entry or zero to its largest or zero, so that zero stays zero (the
    other way, around zero alike on both sides, has a coarser step unless both ends are equally far). Units are powers of
    two and factors have 11 bits, so every step of the kernels but the sums is exact in float16.
    """
    table = codebook.detach().double()
    low, high = table.amin(1, keepdim=True).clamp(max=0), table.amax(1, keepdim=True).clamp(min=0)
    step = ((high - low) / 254.9).clamp(min=2.0**-38)  # not quite 255, so that no rounding leads above it
    exponent = step.log2().floor().clamp(-24, 5)
    unit = exponent.exp2()
    factor = (step / unit).half().double()
    zero = (-low / (unit * factor)).round()
    return (table / (unit * factor) + zero).round().clamp(0, 255), zero, unit, factor


def rounded(codebook: Tensor) -> Tensor:
    """Round a codebook [N, 2**b] to entries of 8 bits, as float32: exactly what the kernels then compute with."""
    byte, zero, unit, factor = _eight_bits(codebook)
    return ((byte - zero) * unit * factor).float()


def _twice(values: Tensor) -> Tensor:
    """Return float64 [N, 1] as words of the same float16 twice: int32 [1, tiles * 32]."""
    pairs = pad(values.half().expand(-1, 2), (0, 0, 0, -len(values) % ROWS))
    return pairs.contiguous().view(torch.int32).t()


def _rounded_words(codebook: Tensor) -> Tensor:
    """Return what the kernels read of entries of 8 bits: int32 [15, tiles * 32] at 4 bits.

    4 words of bytes; unit, -(1024 + zero) * unit, and factor, each twice; 8 words of the same entries in bfloat16, for the matrix
    instructions that want it.
    """
    byte, zero, unit, factor = _eight_bits(codebook)
    octets = _padded(byte).to(torch.uint8).view(torch.int32).t()
    facts = [_twice(values) for values in (unit, -(1024 + zero) * unit, factor)]
    return torch.cat([octets, *facts, _byte_tables(rounded(codebook), torch.bfloat16)]).contiguous()


def _tiled_table(codebook: Tensor) -> Tensor:
    """Return a codebook [N, 2**b] as [tiles, 2**b, 32]."""
    return _padded(codebook).view(-1, ROWS, codebook.shape[1]).transpose(1, 2).contiguous()


def _tiled_groups(groups: Tensor) -> Tensor:
    """Bring sizes of groups, uint8 [N, G], into the layout, [tiles, G, 32]."""
    return pad(groups, (0, 0, 0, -len(groups) % ROWS)).view(-1, ROWS, groups.shape[1]).transpose(1, 2).contiguous()


def untiled_groups(tiled: Tensor, rows: int) -> Tensor:
    """Undo it: uint8 [N, G] of so many rows."""
    return tiled.transpose(1, 2).flatten(0, 1)[:rows].contiguous()


@dataclass
class Tiled:
    """Hold a packed matrix [N, K] in the layout of the kernels.

    With entries of 8 bits, ``registers`` of 4 bits are int32 [15, 32 * ceil(N / 32)], whatever the codebooks are. Else they
    are there for 2 to 4 bits if the codebooks are float16, and hold the bytes of float16 and of bfloat16 entries.
    """

    rows: int  # N
    columns: int  # K
    head: int  # first planes that lie together, 1, 2 or 4
    codes: Tensor  # int32 [p, ceil(N / 32), ceil(K / 32), 32]
    tables: dict[int, Tensor]  # bits -> floating [ceil(N / 32), 2**bits, 32]
    registers: dict[int, Tensor]  # bits -> int32 [2, 2**bits / 2, 32 * ceil(N / 32)]
    rounded: Tensor | None = None  # float32 [ceil(N / 32), 16, 32], the worth of 8-bit entries; None if exact
    groups: Tensor | None = None  # uint8 [ceil(N / 32), ceil(K / 64), 32], what entries are multiplied by
    sizes: Tensor | None = None  # float32 [32 * ceil(N / 32)], with groups: what those of a row are multiplied by

    @classmethod
    def build(
        cls,
        planes: Sequence[Tensor],
        codebooks: Mapping[int, Tensor],
        columns: int,
        exact: bool = True,
        groups: tuple[Tensor, Tensor] | None = None,
    ) -> Tiled:
        """Make the layout on the device of the planes, int32 [N, ceil(K / 32)] each, most significant first.

        ``codebooks`` holds floating [N, 2**bits] for all bits to be read; 4-bit ones have entries of 8 bits if not ``exact``.
        ``groups``, uint8 [N, ceil(K / 64)] and floating [N, 1], are what entries of every 64 columns and of every row are
        multiplied by.
        """
        made = cls.around(_tile_codes(planes, columns, head_for(min(codebooks))), codebooks, columns, exact)
        if groups is not None:
            made.groups = _tiled_groups(groups[0])
            made.sizes = pad(groups[1].float().view(-1), (0, -len(groups[1]) % ROWS))
        return made

    @classmethod
    def around(cls, codes: Tensor, codebooks: Mapping[int, Tensor], columns: int, exact: bool = True) -> Tiled:
        """Put codes that are in the layout already together with canonical codebooks."""
        seed = min(codebooks)
        tables = {bits: _tiled_table(codebooks[bits]) for bits in sorted(codebooks)}
        registers = {
            bits: torch.stack([_byte_tables(codebooks[bits], kind) for kind in (torch.float16, torch.bfloat16)])
            for bits in tables
            if 2 <= bits <= 4 and codebooks[bits].dtype == torch.float16
        }
        made = cls(codebooks[seed].shape[0], columns, head_for(seed), codes, tables, registers)
        if not exact and ROUNDED in tables:
            registers[ROUNDED] = _rounded_words(codebooks[ROUNDED])
            made.rounded = _tiled_table(rounded(codebooks[ROUNDED]))
        return made

    def with_entries(self, exact: bool) -> Tiled:
        """Return the same codes with entries exact or of 8 bits."""
        made = Tiled.around(self.codes, {bits: self.codebook(bits) for bits in self.tables}, self.columns, exact)
        made.groups, made.sizes = self.groups, self.sizes
        return made

    def read(self, bits: int) -> Tensor:
        """Return the table that products of a number of bits are made with, in the form of ``tables``."""
        return self.rounded if bits == ROUNDED and self.rounded is not None else self.tables[bits]

    def tensors(self, bits: int) -> list[Tensor]:
        """Return what a product at a number of bits reads beside groups: codes, table, the registers' content and sizes where there are any."""
        registers = [self.registers[bits]] if bits in self.registers else []
        return [self.codes, self.read(bits), *registers, *([] if self.sizes is None else [self.sizes])]

    def canonical(self) -> tuple[Tensor, dict[int, Tensor]]:
        """Return the planes, int32 [p, N, ceil(K / 32)], and codebooks that this was made of, bit for bit."""
        planes = _untile_codes(self.codes, self.rows, self.head)
        return planes, {bits: self.codebook(bits) for bits in self.tables}

    def codebook(self, bits: int) -> Tensor:
        """Return the canonical codebook of a number of bits, [N, 2**bits]."""
        return self._untiled(self.tables[bits])

    def _untiled(self, table: Tensor) -> Tensor:
        order = torch.tensor(_reversed(table.shape[1].bit_length() - 1), device=table.device)
        return table.transpose(1, 2).flatten(0, 1)[: self.rows, order].contiguous()

    def dense(self, bits: int, dtype: torch.dtype) -> Tensor:
        """Look every weight up in plain torch, [N, K], on any device: what the kernels are measured against."""
        planes = _untile_codes(self.codes[: max(bits, self.head)], self.rows, self.head)[:bits]
        codes = unpack_planes(list(planes), self.columns)
        if self.groups is None or self.sizes is None:
            return self._untiled(self.read(bits)).to(dtype).gather(1, codes.long())
        wide = torch.promote_types(dtype, torch.float32)
        weight = self._untiled(self.read(bits)).to(wide).gather(1, codes.long())
        sizes = untiled_groups(self.groups, self.rows) * self.sizes[: self.rows, None]
        return scale_groups(weight, sizes.to(wide)).to(dtype)


def random_tiled(
    rows: int,
    columns: int,
    bits: int,
    seed_bits: int | None = None,
    device: str | torch.device = "cpu",
    seed: int = 0,
    exact: bool = True,
    groups: bool = False,
) -> Tiled:
    """Make random codes and float16 codebooks of the size of trained ones, for benchmarks and tests; padding is random too.

    On request there are random sizes of groups of columns.
    """
    generator = torch.Generator(device).manual_seed(seed)
    tiles, first = -(-rows // ROWS), bits if seed_bits is None else seed_bits
    shape = bits, tiles, words(columns), ROWS
    codes = torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32, device=device, generator=generator)
    codebooks = {
        held: (0.02 * torch.randn(rows, 2**held, dtype=torch.float32, device=device, generator=generator)).half()
        for held in range(first, bits + 1)
    }
    made = Tiled.around(codes, codebooks, columns, exact)
    if groups:
        size = tiles, -(-columns // GROUP), ROWS
        made.groups = torch.randint(1, 256, size, dtype=torch.uint8, device=device, generator=generator)
        made.sizes = torch.rand(tiles * ROWS, dtype=torch.float32, device=device, generator=generator) / 128
    return made
