"""Attention to packed keys and values by the C library (``kernels/c/attention.c``), where few queries ask."""

from __future__ import annotations

import functools
import struct
from ctypes import CDLL, c_char_p, c_int, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from compress.kernels.cpu import WORTH_A_TEAM, Library, library, serves
from compress.kernels.kv import Packed, States, attend, masked, rotate, turned
from compress.kernels.kv_gpu import attend_on_gpu, serves_on_gpu

MOST_ROWS = 16  # of queries that share a head; above, states are dense a chunk at a time, for torch's product
_CHANNELS = 1024
_LANES = 64
_PRODUCTS, _SUMS, _STATES = range(3)
_KV = struct.Struct("=18q")


@functools.cache
def _call(calls: CDLL) -> Any:
    """Declare the entry point, once."""
    function = calls.compress_attention
    function.argtypes = [c_char_p, c_void_p, c_int64, c_void_p, c_int64, c_int64, c_int, c_void_p, c_int]
    return function


def attention(query: Tensor, states: States, mask: Tensor | None, scale: float) -> Tensor:
    """Attend as :func:`compress.kernels.kv.attend` does, by Triton on a GPU and by the C library on a CPU where they serve."""
    if query.device.type == "cuda" and serves_on_gpu(query, states):
        return attend_on_gpu(query, states, mask, scale)
    channels = max(states.keys.channels, states.values.channels)
    if not serves(query, states.keys.span) or channels > _CHANNELS or (torch.is_grad_enabled() and query.requires_grad):
        return attend(query, states, mask, scale)
    rows = query.shape[1] // states.keys.span.shape[1] * query.shape[2]
    if 0 < rows <= MOST_ROWS:
        return attend_packed(query, states, mask, scale)
    return attend(query, states, mask, scale, as_rounded_in_c)


def attend_packed(query: Tensor, states: States, mask: Tensor | None, scale: float, isa: int | None = None) -> Tensor:
    """Attend as :func:`compress.kernels.kv.attend` does, never with dense keys or values; ``isa`` is for tests."""
    keys, values = states.keys, states.values
    batch, heads = keys.span.shape[:2]
    asked = (query.float() * scale).reshape(batch, heads, -1, query.shape[-1])  # [B, H, rows, D]
    sizes = [states.whole_keys[0].shape[2], keys.tokens, states.whole_keys[1].shape[2]]
    products = torch.empty(*asked.shape[:3], states.tokens, dtype=torch.float32, device="cpu")
    before, packed, behind = torch.split(products, sizes, -1)
    before.copy_(asked @ states.whole_keys[0].float().mT)
    behind.copy_(asked @ states.whole_keys[1].float().mT)
    _run(keys, _padded(turned(asked, keys)), packed, _PRODUCTS, isa)
    if keys.mean is not None:
        packed += keys.mean.products(asked, keys.tokens)
    if mask is not None:
        products = masked(products.view(batch, heads, -1, query.shape[2], states.tokens), mask).view_as(products)
    before, packed, behind = torch.split(products.softmax(-1).nan_to_num_(0.0), sizes, -1)
    mixed = _padded(torch.zeros(*asked.shape[:3], values.channels, dtype=torch.float32, device="cpu"))
    _run(values, mixed, packed, _SUMS, isa)
    mixed = mixed[..., : values.channels]
    mixed = rotate(mixed) if values.grid.rotated else mixed
    first, last = states.whole_values
    mixed = mixed + before @ first.float() + behind @ last.float()
    return mixed.view(*query.shape[:3], values.channels).to(query.dtype)


def as_rounded_in_c(packed: Packed) -> Tensor:
    """Do what :func:`compress.kernels.kv.as_rounded` does."""
    shape = *packed.span.shape[:2], packed.tokens
    out = torch.empty(*shape, -(-packed.channels // _LANES) * _LANES, dtype=torch.float32, device="cpu")
    _run(packed, out, None, _STATES)
    return out[..., : packed.channels]


def _padded(vectors: Tensor) -> Tensor:
    return pad(vectors, (0, -vectors.shape[-1] % _LANES)).contiguous()


def _run(packed: Packed, vectors: Tensor, weights: Tensor | None, mode: int, isa: int | None = None) -> None:
    """Write products of vectors, [B, H, rows, padded D], with states to ``weights`` [B, H, rows, T]; or add to vectors what weights make."""
    found = library()
    assert isinstance(found, Library)
    packed = packed.map(Tensor.contiguous)
    grid, heads = packed.grid, packed.span.shape[0] * packed.span.shape[1]
    rows = 0 if weights is None else vectors.shape[2]
    addresses = [plane.data_ptr() for plane in packed.planes] + [0] * (8 - grid.bits)
    addresses += [0 if packed.low is None else packed.low.data_ptr(), packed.span.data_ptr()]
    sizes = heads, packed.tokens, packed.channels, grid.bits, grid.group, int(grid.along == "channel"), int(grid.nested)
    kv = _KV.pack(*addresses, *sizes, found.isa if isa is None else isa)
    threads = torch.get_num_threads() if heads * (rows + 1) * packed.tokens * packed.channels >= WORTH_A_TEAM else 1
    place, stride = (0, 0) if weights is None else (weights.data_ptr(), weights.stride(2))
    arguments = vectors.data_ptr(), vectors.shape[-1], place, stride, rows, mode, found.team, threads
    if _call(found.calls)(kv, *arguments):
        raise RuntimeError("this processor cannot run the kernels asked for")
