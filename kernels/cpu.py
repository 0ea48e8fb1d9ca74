"""The C library behind :mod:`compress.kernels.bitplane` on a CPU, and the int8 mode that only it has.

The library (``kernels/cpu/*.c``) has a plain C interface and links neither torch nor an OpenMP runtime. It reads the planes
where they are: its only layout is the stored one, so a narrower width is fewer pointers and a model in memory is
as large as the planes and tables it holds. Threads are those of torch: the team is started through the entry
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

ISAS = ("portable", "avx2", "avx512")
FUSED_ROWS = 16  # rows of activations in one pass over the packed weights; above, weights are looked up for torch
_ABI = 1
_MATRIX = struct.Struct("=16q")
_TABLES = {torch.float16: 2, torch.float32: 4}
_TILE_BYTES = 4 << 20  # of looked-up weights at a time above FUSED_ROWS
_WORTH_A_TEAM = 1 << 19  # products below which starting threads costs more than they save


@dataclass(frozen=True)
class Library:
    """The loaded library.

    Attributes:
        calls: its functions.
        isa: index in ``ISAS`` of the best kernels that this processor can run.
        team: address of ``GOMP_parallel`` in the process, or 0: then one thread does all the work.
    """

    calls: ctypes.CDLL
    isa: int
    team: int

    def threads(self, products: int) -> int:
        """How many threads ``products`` multiplications are worth, at most what torch would use."""
        return torch.get_num_threads() if products >= _WORTH_A_TEAM else 1


@functools.cache
def library() -> Library | str:
    """The C library, or one sentence saying why there is none."""
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
    for name in ("compress_exact", "compress_int8"):
        getattr(calls, name).argtypes = [ctypes.c_char_p, address, number, address, address, number]
    calls.compress_look_up.argtypes = [ctypes.c_char_p, address, address, number]
    return Library(calls, calls.compress_best_isa(), _openmp())


def _openmp() -> int:
    """Address of the function that starts a team of threads in the runtime that torch brought, 0 if there is none."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value or 0
    except (OSError, AttributeError, TypeError):
        return 0


def describe() -> str:
    """What serves packed layers on a CPU, and why."""
    found = library()
    if isinstance(found, str):
        return f"torch: reference look-up, because {found}"
    team = "on torch's threads" if found.team else "on one thread, as no OpenMP runtime with GOMP_parallel is loaded"
    return f"c: {ISAS[found.isa]} kernels, the best this processor has, {team}; other devices: torch reference look-up"


def serves(*tensors: Tensor) -> bool:
    """Whether there is a library and every tensor is in this processor's memory."""
    return not isinstance(library(), str) and all(tensor.device.type == "cpu" for tensor in tensors)


def _library() -> Library:
    found = library()
    if isinstance(found, str):
        raise RuntimeError(found)
    return found


def _address(planes: Sequence[Tensor], table: Tensor, affine: Tensor | None, columns: int, isa: int) -> bytes:
    """The C structure ``Matrix``. The tensors must outlive its use."""
    stride = planes[0].stride(0) * 4 if table.shape[0] > 1 else planes[0].shape[1] * 4
    addresses = [plane.data_ptr() for plane in planes] + [0] * (8 - len(planes))
    width = 1 if affine is not None else table.element_size()
    return _MATRIX.pack(
        *addresses, table.data_ptr(), 0 if affine is None else affine.data_ptr(),
        stride, table.shape[0], columns, len(planes), isa, width,
    )  # fmt: skip


def _regular(planes: Sequence[Tensor]) -> Sequence[Tensor]:
    """Planes whose rows are contiguous and equally far apart in all of them."""
    strides = planes[0].stride()
    regular = strides[1] == 1 and all(plane.stride() == strides for plane in planes)
    return planes if regular else [plane.contiguous() for plane in planes]


def _rows(x: Tensor) -> Tensor:
    """[..., K] as contiguous float32 [M, K]."""
    return x.detach().reshape(-1, x.shape[-1]).float().contiguous()


def _call(name: str, x: Tensor, planes: Sequence[Tensor], table: Tensor, affine: Tensor | None, isa: int | None) -> Tensor:
    """One of the two products on at most FUSED_ROWS rows."""
    found, rows, planes = _library(), _rows(x), _regular(planes)
    count, columns, outputs = rows.shape[0], x.shape[-1], table.shape[0]
    y = torch.empty(count, outputs)
    matrix = _address(planes, table, affine, columns, found.isa if isa is None else isa)
    threads = found.threads(count * columns * outputs)
    if getattr(found.calls, name)(matrix, rows.data_ptr(), count, y.data_ptr(), found.team, threads):
        raise RuntimeError(f"the C library refused the {ISAS[isa or 0]} kernels, or there was no memory")
    return y.to(x.dtype).view(*x.shape[:-1], outputs)


def exact_linear(x: Tensor, planes: Sequence[Tensor], codebook: Tensor, columns: int, isa: int | None = None) -> Tensor:
    """``x @ W.T``, the products added in float32.

    Args:
        x: floating [..., K] on the CPU.
        planes: b int32 tensors [N, ceil(K / 32)], most significant first.
        codebook: floating [N, 2**b].
        columns: K.
        isa: index in ``ISAS``, for tests; the best one if None.

    Returns:
        [..., N] in ``x``'s dtype.
    """
    table = (codebook if codebook.dtype in _TABLES else codebook.float()).detach().contiguous()
    if x.numel() <= FUSED_ROWS * columns:
        return _call("compress_exact", x, planes, table, None, isa)
    return _tiled(x, planes, table, columns)


def _tiled(x: Tensor, planes: Sequence[Tensor], codebook: Tensor, columns: int) -> Tensor:
    """The product by torch, a few rows of looked-up weights at a time."""
    dtype = torch.float32 if x.dtype == torch.float16 else x.dtype  # torch's own products of halves are slow here
    rows, outputs = x.reshape(-1, columns).to(dtype), codebook.shape[0]
    y = torch.empty(rows.shape[0], outputs, dtype=dtype)
    step = max(1, _TILE_BYTES // (columns * rows.element_size()))
    for start in range(0, outputs, step):
        part = slice(start, start + step)
        weight = look_up([plane[part] for plane in planes], codebook[part].to(dtype), columns)
        torch.mm(rows, weight.t(), out=y[:, part])
    return y.to(x.dtype).view(*x.shape[:-1], outputs)


def look_up(planes: Sequence[Tensor], table: Tensor, columns: int, isa: int | None = None) -> Tensor:
    """Every weight: [N, K] of the entries of ``table`` ([N, 2**b], two or four bytes each), copied as they are."""
    found, planes, table = _library(), _regular(planes), table.detach().contiguous()
    out = torch.empty(table.shape[0], columns, dtype=table.dtype)
    matrix = _address(planes, table, None, columns, found.isa if isa is None else isa)
    if found.calls.compress_look_up(matrix, out.data_ptr(), found.team, found.threads(out.numel())):
        raise RuntimeError("the C library refused these kernels")
    return out


@dataclass(frozen=True)
class Int8Tables:
    """A codebook rounded for the int8 mode: ``entry = byte * affine[n, 0] + affine[n, 1]``.

    Attributes:
        bytes: uint8 [N, 2**b], 1 to 255.
        affine: float32 [N, 2].
    """

    bytes: Tensor
    affine: Tensor


def int8_tables(codebook: Tensor) -> Int8Tables:
    """Round every row of a codebook, floating [N, 2**b], to 255 equal steps between its least and its largest entry."""
    table = codebook.detach().double()
    low, high = table.amin(1, keepdim=True), table.amax(1, keepdim=True)
    step = (high - low) / 254
    place = torch.where(step > 0, (table - low) / step, 0.0).round()
    return Int8Tables((place + 1).to(torch.uint8), torch.cat([step, low - step], 1).float())


def int8_linear(x: Tensor, planes: Sequence[Tensor], tables: Int8Tables, isa: int | None = None) -> Tensor:
    """``x @ W.T`` with activations rounded to 8 bits, 64 at a time, and a table of 8-bit entries per row.

    Args:
        x: floating [..., K] on the CPU, at most FUSED_ROWS rows.
        planes: b int32 tensors [N, ceil(K / 32)], most significant first.
        tables: from :func:`int8_tables`.
        isa: index in ``ISAS``, for tests; the best one if None.

    Returns:
        [..., N] in ``x``'s dtype.
    """
    return _call("compress_int8", x, planes, tables.bytes, tables.affine, isa)
