"""The C library behind :mod:`compress.kernels.bitplane` on a CPU, and the int8 mode that only it has.

The library (``kernels/c/*.c``) has a plain C interface and links neither torch nor an OpenMP runtime. It reads the planes
where they are: its only layout is the stored one, so fewer bits are fewer pointers and a model in memory is
as large as the planes and codebooks it holds. Threads are those of torch: the team is started through the entry
point of the OpenMP runtime that torch has already brought into the process, because a second pool of threads
would fight the first one's spinning workers for the cores.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from compress.kernels.packing import GROUP, GROUP_UNIT

ISAS = ("portable", "avx2", "avx512")
FUSED_ROWS = 16  # rows of activations in one pass over the packed weights; above, weights are looked up for torch
_QUICK_ROWS = 6, 12  # the same where sums may differ, by AVX-512 for bfloat16: exact, and rounded
_ABI = 8
_MATRIX = struct.Struct("=23q")
_CHUNK = 512  # columns, as in kernels/c/bitplane.h
_TABLES = {torch.float16: 2, torch.float32: 4}
_TILE_BYTES, _TILE_ROWS = 2 << 20, 256  # of looked-up weights at a time above FUSED_ROWS: at least so many of either
WORTH_A_TEAM = 1 << 19  # products; with fewer, starting threads costs more than they save


@dataclass(frozen=True)
class Library:
    """Hold the loaded library and its functions."""

    calls: ctypes.CDLL
    isa: int  # index in ``ISAS`` of the best kernels that this processor can run
    team: int  # address of ``GOMP_parallel`` in the process, or 0: then one thread does all the work
    team_size: int  # that of ``omp_get_num_threads``


@functools.cache
def library() -> Library | str:
    """Load the C library, or return one sentence saying why there is none."""
    path = Path(__file__).with_name("_bitplane.so")
    if not path.exists():
        return "the C library was not built: install again where a C compiler works"
    try:
        calls = ctypes.CDLL(str(path))
        found = calls.compress_abi()
    except (OSError, AttributeError) as error:
        return f"the C library cannot be loaded ({error})"
    if found != _ABI:
        return f"the C library is of another version ({found}, not {_ABI}): install again"
    number, address = ctypes.c_int, ctypes.c_void_p
    calls.compress_product.argtypes = [ctypes.c_char_p, address, number, address, address, number]
    calls.compress_order.argtypes = [ctypes.c_char_p, address]
    size = ctypes.c_int64
    calls.compress_look_up.argtypes = [ctypes.c_char_p, address, size, size, address, size, address, number]
    calls.compress_steps.argtypes = [address, size, address, address, number]
    return Library(calls, calls.compress_best_isa(), _openmp("GOMP_parallel"), _openmp("omp_get_num_threads"))


def _openmp(name: str) -> int:
    """Return the address of a function in the OpenMP runtime that torch brought, which starts a team of threads; 0 if there is none."""
    try:
        return ctypes.cast(getattr(ctypes.CDLL(None), name), ctypes.c_void_p).value or 0
    except (OSError, AttributeError, TypeError):
        return 0


def describe() -> str:
    """Say what serves packed layers on a CPU, and why."""
    found = library()
    if isinstance(found, str):
        return f"torch: reference look-up, because {found}"
    team = "on torch's threads" if found.team else "on one thread, as no OpenMP runtime with GOMP_parallel is loaded"
    return f"c: {ISAS[found.isa]} kernels, the best this processor has, {team}"


@torch.compiler.assume_constant_result
def built() -> bool:
    """Tell whether there is a library; compiled code takes the answer for a constant."""
    return not isinstance(library(), str)


def serves(*tensors: Tensor) -> bool:
    """Tell whether there is a library and every tensor is in this processor's memory, not a stand-in for tracing.

    A parameter is served where no gradient is asked for.
    """
    plain = all(type(tensor) in (Tensor, torch.nn.Parameter) and tensor.device.type == "cpu" for tensor in tensors)
    wanted = torch.is_grad_enabled() and any(type(t) is torch.nn.Parameter and t.requires_grad for t in tensors)
    return plain and not wanted and built()


def _library() -> Library:
    found = library()
    if isinstance(found, str):
        raise RuntimeError(found)
    return found


def int8_codebook(codebook: Tensor) -> tuple[Tensor, Tensor]:
    """Round every row of a codebook, floating [N, 2**b], to 255 equal steps between its least and its largest entry.

    Returns bytes, uint8 [N, 2**b], 1 to 255, and float32 [N, 2]: ``entry = byte * affine[n, 0] + affine[n, 1]``.
    """
    places = torch.empty_like(codebook, dtype=torch.uint8)
    affine = torch.empty(codebook.shape[0], 2, dtype=torch.float32, device=codebook.device)
    at_once = max(1, (1 << 18) // codebook.shape[1])  # rows: float64 copies stay small
    for rows, place, line in zip(
        torch.split(codebook.detach(), at_once), torch.split(places, at_once), torch.split(affine, at_once), strict=True
    ):
        table = rows.double()
        low, high = table.amin(1, keepdim=True), table.amax(1, keepdim=True)
        step = (high - low) / 254
        step = torch.where(step > 0, step, low.abs().clamp(min=1e-30))  # kernels divide by it
        place.copy_(((table - low) / step).round() + 1)
        line.copy_(torch.cat([step, low - step], 1))
    return places, affine


@functools.cache
def _order(bits: int, int8: bool, isa: int) -> Tensor:
    """Return the order in which kernels want activations, int16 of any meaning to the library alone."""
    order = torch.empty(_CHUNK + GROUP, dtype=torch.int16, device="cpu")
    # Of a matrix without rows; the address of its codebook's steps says that it is of the int8 mode.
    matrix = _MATRIX.pack(*[0] * 9, int(int8), *[0] * 5, 0, 0, 0, bits, isa, 0, 0, 0)
    if _library().calls.compress_order(matrix, order.data_ptr()):
        raise RuntimeError("this processor cannot run the kernels asked for")
    return order


def _held(tensor: Tensor | None) -> Tensor | None:
    """Return a vector as the library reads it."""
    return None if tensor is None else tensor.detach().float().contiguous().view(-1)


def _groups(groups: Tensor, factors: Tensor | None, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Return sizes of groups as the library reads them, and the factors of rows with what they are divided by."""
    if groups.dtype != torch.uint8 or groups.shape != (rows, -(-columns // GROUP)):
        raise ValueError(f"groups, {groups.dtype} {tuple(groups.shape)}, are not those of {rows} x {columns}")
    shares = torch.full((rows,), 1 / GROUP_UNIT, dtype=torch.float64, device=groups.device)
    return groups.contiguous(), shares if factors is None else shares * factors.detach().double().view(-1)


class Prepared:
    """Hold a packed matrix as the C library takes it: addresses of tensors, which are kept alive, and no plane copied.

    Args:
        planes: b int32 tensors [N, ceil(K / 32)] on the CPU, most significant first.
        codebook: floating [N, 2**b], or [1, 2**b] for all rows.
        columns: K.
        int8: round activations to 8 bits, 64 at a time, and codebook entries to 8 bits: faster, and less exact.
        isa: index in ``ISAS``, for tests; the best one if None.
        inputs: [K], what activations are multiplied by first.
        factors: [N] or [N, 1], what sums are multiplied by.
        bias: [N], what is added then.
        groups: uint8 [N, ceil(K / 64)], what entries are multiplied by, divided by 255.
        same_sums: up to ``FUSED_ROWS`` rows of activations are each added up as one alone is, to the last bit, as what drafts
            guess needs; if False, weights are looked up for fewer, where that is faster.

    Raises:
        ValueError: shapes or types that do not belong together.
        RuntimeError: there is no library, or it has no kernels for this processor.
    """

    def __init__(
        self,
        planes: Sequence[Tensor],
        codebook: Tensor,
        columns: int,
        int8: bool = False,
        isa: int | None = None,
        inputs: Tensor | None = None,
        factors: Tensor | None = None,
        bias: Tensor | None = None,
        groups: Tensor | None = None,
        same_sums: bool = True,
    ) -> None:
        found = _library()
        strides = planes[0].stride()
        if strides[1] != 1 or any(plane.stride() != strides for plane in planes):
            planes = [plane.contiguous() for plane in planes]
        table = (codebook if codebook.dtype in _TABLES else codebook.float()).detach().contiguous()
        rows, bits, words = planes[0].shape[0], len(planes), -(-columns // 32)
        sizes_fit = table.shape in ((rows, 1 << bits), (1, 1 << bits))
        if not sizes_fit or any(p.shape != (rows, words) or p.dtype != torch.int32 for p in planes):
            shapes = [tuple(plane.shape) for plane in planes]
            raise ValueError(f"planes {shapes} and codebook {tuple(table.shape)} are not {rows} x {columns} packed")
        row_factors = _held(factors)
        if groups is not None:
            groups, factors = _groups(groups, factors, rows, columns)
        entries, affine = int8_codebook(table) if int8 else (table, None)
        isa = found.isa if isa is None else isa
        quick = not same_sums and ISAS[isa] == "avx512"
        self._most = {torch.bfloat16: _QUICK_ROWS[int8]} if quick else {}
        vectors = [affine, _held(inputs), _held(factors), _held(bias), _order(bits, int8, isa)]
        self.planes, self.codebook, self.rows, self.columns = planes, table, rows, columns
        self._inputs, _, self._bias = vectors[1:4]
        self._groups, self._factors = groups, row_factors
        self._kept_alive = entries, vectors
        self._to_look_up: dict[torch.dtype, tuple[Tensor, bytes]] = {}
        stride = planes[0].stride(0) * 4 if rows > 1 else words * 4  # of a single row the stride may be anything
        self._sizes = stride, rows, columns, bits, isa
        self.matrix = self._matrix(entries, vectors)
        self._library = found

    def _matrix(self, table: Tensor, vectors: Sequence[Tensor | None]) -> bytes:
        """Pack the matrix with a table for the library."""
        addresses = [plane.data_ptr() for plane in self.planes] + [0] * (8 - len(self.planes)) + [table.data_ptr()]
        addresses += [0 if vector is None else vector.data_ptr() for vector in (*vectors, self._groups)]
        sizes = table.element_size(), int(len(table) < self.rows), -(-self.columns // GROUP)
        return _MATRIX.pack(*addresses, *self._sizes, *sizes)

    def matrix_to_look_up(self, table: Tensor) -> bytes:
        """Pack the matrix with a table, and what a look-up multiplies by."""
        return self._matrix(table, (None, self._inputs, self._factors, None, None))

    def __call__(self, x: Tensor) -> Tensor:
        """Return ``x @ W.T``: floating [..., K] to [..., N] in the same dtype, added in float32; no gradient.

        Raises:
            ValueError: the last dimension is not K.
            RuntimeError: no memory, or kernels that this processor cannot run.
        """
        shape, dtype = x.shape, x.dtype
        if shape[-1] != self.columns:
            raise ValueError(f"an input of {shape[-1]} values for a layer of {self.columns}")
        count = x.numel() // self.columns
        if not self.direct(x):
            return self._tiled(x)
        y = torch.empty((*shape[:-1], self.rows), dtype=torch.float32, device=x.device)
        if count == 0:
            return y.to(dtype)
        rows, found = x.to(torch.float32).contiguous(), self._library
        threads = torch.get_num_threads() if self.products(count) >= WORTH_A_TEAM else 1
        if found.calls.compress_product(self.matrix, rows.data_ptr(), count, y.data_ptr(), found.team, threads):
            raise RuntimeError("the C library had no memory, or this processor cannot run the kernels asked for")
        return y if dtype == torch.float32 else y.to(dtype)

    def direct(self, x: Tensor) -> bool:
        """Tell whether these are few enough rows of activations to multiply the planes by, in float32."""
        return x.numel() <= self._most.get(x.dtype, FUSED_ROWS) * self.columns

    def products(self, count: int) -> int:
        """Count the multiplications for ``count`` rows of activations."""
        return count * self.rows * self.columns

    def _tiled(self, x: Tensor) -> Tensor:
        """Return the product by torch, some rows of looked-up weights at a time, in the same memory: fresh pages cost more than the look-up."""
        dtype = torch.float32 if x.dtype == torch.float16 else x.dtype  # torch's products of halves are slow here
        rows = x.detach().reshape(-1, self.columns).to(dtype)
        step = max(_TILE_ROWS, _TILE_BYTES // (self.columns * rows.element_size()) // 64 * 64)
        tile = torch.empty(min(step, self.rows), self.columns, dtype=dtype, device=x.device)
        y = torch.empty(*x.shape[:-1], self.rows, dtype=dtype, device=x.device)  # no view: models add to it in place
        flat = y.view(-1, self.rows)
        scaled = any(held is not None for held in (self._inputs, self._factors, self._groups))
        kind = torch.float32 if scaled else dtype
        if kind not in self._to_look_up:
            table = self.codebook.to(kind).contiguous()
            self._to_look_up[kind] = table, self.matrix_to_look_up(table)
        matrix = self._to_look_up[kind][1]
        for start in range(0, self.rows, step):
            weight = tile[: self.rows - start]
            _look_up(matrix, weight, start)
            torch.mm(rows, weight.t(), out=flat[:, start : start + step])
        if self._bias is not None:
            y += self._bias
        return y.to(x.dtype)


def _look_up(matrix: bytes, out: Tensor, first: int = 0, places: Tensor | None = None) -> None:
    """Look rows of weights up into ``out``: those at ``places``, or those from ``first`` on."""
    found, where = _library(), 0 if places is None else places.data_ptr()
    threads = torch.get_num_threads() if out.numel() >= WORTH_A_TEAM else 1
    sizes = first, len(out), out.data_ptr(), out.element_size()
    if len(out) and found.calls.compress_look_up(matrix, where, *sizes, found.team, threads):
        raise RuntimeError("this processor cannot run the kernels asked for")


def look_up(
    planes: Sequence[Tensor], table: Tensor, columns: int, isa: int | None = None, places: Tensor | None = None
) -> Tensor:
    """Look every weight up, not rounded: [N, K] entries of ``table``, floating [N, 2**b] or [1, 2**b] for all rows.

    Entries have two or four bytes each. With ``places``, int64 [T], those rows alone are looked up: [T, K].

    Raises:
        ValueError: shapes or types that do not belong together, a place that is no row.
        RuntimeError: there is no library, or this processor cannot run the kernels asked for.
    """
    # The library copies words of this size, whatever they mean.
    words = table.detach().contiguous().view({2: torch.float16, 4: torch.float32}[table.element_size()])
    return _looked_up(Prepared(planes, words, columns, isa=isa), table.dtype, places)


def scaled_look_up(
    planes: Sequence[Tensor],
    table: Tensor,
    groups: Tensor,
    columns: int,
    dtype: torch.dtype,
    isa: int | None = None,
    places: Tensor | None = None,
) -> Tensor:
    """Look every weight up, multiplied by its group's size in 255ths: [N, K] in ``dtype``, float32 or bfloat16.

    As :func:`look_up`, with entries brought to float32 and ``groups``, uint8 [N, ceil(K / 64)].
    """
    return _looked_up(Prepared(planes, table.float(), columns, isa=isa, groups=groups), dtype, places)


def _looked_up(matrix: Prepared, dtype: torch.dtype, places: Tensor | None) -> Tensor:
    rows = matrix.rows
    if places is not None:
        places = places.contiguous()
        if places.numel() and not 0 <= int(places.min()) <= int(places.max()) < rows:
            raise ValueError(f"places {int(places.min())} to {int(places.max())} are not all among {rows} rows")
    count = rows if places is None else len(places)
    out = torch.empty(count, matrix.columns, dtype=dtype, device=matrix.codebook.device)
    _look_up(matrix.matrix_to_look_up(matrix.codebook), out, places=places)
    return out
