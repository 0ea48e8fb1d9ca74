"""Attention to packed keys and values by the C library (``kernels/c/attention.c``), where few queries ask."""

from __future__ import annotations

import functools
import struct
from ctypes import CDLL, c_char_p, c_int, c_int64, c_void_p

import torch
from torch import Tensor
from torch.nn.functional import pad

from compress.kernels.cpu import WORTH_A_TEAM, Library, library, serves
from compress.kernels.kv import Packed, States, masked, rotate

MOST_ROWS = 16  # of queries that share a head; above, states are dense a chunk at a time, for torch's product
_CHANNELS = 1024
_LANES = 64
_KV = struct.Struct("=18q")


@functools.cache
def _call(calls: CDLL) -> object:
    """Declare the entry point, once."""
    function = calls.compress_attention
    function.argtypes = [c_char_p, c_void_p, c_int64, c_void_p, c_int64, c_int64, c_int, c_void_p, c_int]
    return function


def serves_attention(query: Tensor, states: States) -> bool:
    """Tell whether the C library takes this: on the CPU, with few rows of queries for a head, no gradient, and heads that are not huge."""
    heads, channels = states.keys.low.shape[1], max(states.keys.channels, states.values.channels)
    rows = query.shape[1] // heads * query.shape[2]
    plain = serves(query) and not (torch.is_grad_enabled() and query.requires_grad)
    return plain and states.keys.low.device.type == "cpu" and 0 < rows <= MOST_ROWS and channels <= _CHANNELS


def attend_packed(query: Tensor, states: States, mask: Tensor | None, scale: float, isa: int | None = None) -> Tensor:
    """Attend as :func:`compress.kernels.kv.attend` does, never with dense keys or values; ``isa`` is for tests."""
    keys, values = states.keys, states.values
    batch, heads = keys.low.shape[:2]
    asked = (query.float() * scale).view(batch, heads, -1, query.shape[-1])  # [B, H, rows, D]
    sizes = [states.whole_keys[0].shape[2], keys.tokens, states.whole_keys[1].shape[2]]
    products = torch.empty(*asked.shape[:3], states.tokens)
    before, packed, behind = products.split(sizes, -1)
    before.copy_(asked @ states.whole_keys[0].float().mT)
    behind.copy_(asked @ states.whole_keys[1].float().mT)
    _run(keys, _padded(rotate(asked) if keys.grid.rotated else asked), packed, False, isa)
    if mask is not None:
        products = masked(products.view(batch, heads, -1, query.shape[2], states.tokens), mask).view_as(products)
    before, packed, behind = products.softmax(-1).nan_to_num_(0.0).split(sizes, -1)
    mixed = _padded(torch.zeros(*asked.shape[:3], values.channels))
    _run(values, mixed, packed, True, isa)
    mixed = mixed[..., : values.channels]
    mixed = rotate(mixed) if values.grid.rotated else mixed
    first, last = states.whole_values
    mixed = mixed + before @ first.float() + behind @ last.float()
    return mixed.view(*query.shape[:3], values.channels).to(query.dtype)


def _padded(vectors: Tensor) -> Tensor:
    return pad(vectors, (0, -vectors.shape[-1] % _LANES)).contiguous()


def _run(packed: Packed, vectors: Tensor, weights: Tensor, mix: bool, isa: int | None) -> None:
    """Write products of vectors, [B, H, rows, padded D], with states to ``weights`` [B, H, rows, T], or add to vectors what weights make."""
    found = library()
    assert isinstance(found, Library)
    packed = packed.map(Tensor.contiguous)
    grid, (batch, heads, rows) = packed.grid, vectors.shape[:3]
    addresses = [plane.data_ptr() for plane in packed.planes] + [0] * (8 - grid.bits)
    addresses += [packed.low.data_ptr(), packed.span.data_ptr()]
    sizes = (
        batch * heads,
        packed.tokens,
        packed.channels,
        grid.bits,
        grid.group,
        int(grid.along == "channel"),
        int(grid.nested),
    )
    kv = _KV.pack(*addresses, *sizes, found.isa if isa is None else isa)
    products = batch * heads * rows * packed.tokens * packed.channels
    threads = torch.get_num_threads() if products >= WORTH_A_TEAM else 1
    arguments = (
        vectors.data_ptr(),
        vectors.shape[-1],
        weights.data_ptr(),
        weights.stride(2),
        rows,
        int(mix),
        found.team,
        threads,
    )
    if _call(found.calls)(kv, *arguments):  # type: ignore[operator]
        raise RuntimeError("this processor cannot run the kernels asked for")
