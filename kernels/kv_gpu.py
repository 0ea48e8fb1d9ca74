"""Attention to packed keys and values by Triton (:mod:`compress.kernels.triton_kv`), where few queries ask."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compress.kernels.gpu import interpreting, missing
from compress.kernels.kv import Packed, States, masked, rotate, turned

MOST_ROWS = 64  # of queries that share a head
_BLOCK = 32  # tokens of one step of a program
_PARTS = 128  # programs that are worth starting at once


def serves_on_gpu(query: Tensor, states: States) -> bool:
    """Tell whether the kernel takes this: tensors on a GPU (or Triton's interpreter), Triton, few queries, and no gradient."""
    rows = query.shape[1] // states.keys.span.shape[1] * query.shape[2]
    small = 0 < rows <= MOST_ROWS and max(states.keys.channels, states.values.channels) <= 256
    there = query.device.type == "cuda" or interpreting()
    return small and there and missing() is None and not (torch.is_grad_enabled() and query.requires_grad)


def constants(keys: Packed, values: Packed, rows: int, has_mask: bool) -> dict[str, Any]:
    """Return the arguments of the kernel that are known when it is compiled."""
    sizes = {
        name: max(16, 1 << (size - 1).bit_length())
        for name, size in (("ROWS", rows), ("KEYS", keys.channels), ("VALUES", values.channels))
    }
    return {
        "KEY_BITS": keys.grid.bits,
        "VALUE_BITS": values.grid.bits,
        "KEY_ALONG": keys.grid.along == "channel",
        "VALUE_ALONG": values.grid.along == "channel",
        "NESTED": keys.grid.nested,
        "KEY_CENTRED": keys.grid.centred,
        "VALUE_CENTRED": values.grid.centred,
        "MASKED": has_mask,
        **sizes,
        "BLOCK": _BLOCK,
    }


def attend_on_gpu(query: Tensor, states: States, mask: Tensor | None, scale: float) -> Tensor:
    """Attend as :func:`compress.kernels.kv.attend` does, with no dense keys or values in memory."""
    from compress.kernels import triton_kv

    keys, values = (packed.map(Tensor.contiguous) for packed in (states.keys, states.values))
    batch, heads = keys.span.shape[:2]
    asked = (query.float() * scale).reshape(batch, heads, -1, query.shape[-1])
    rows, many = asked.shape[2], batch * heads
    sizes = [states.whole_keys[0].shape[2], keys.tokens, states.whole_keys[1].shape[2]]
    added = None
    if mask is not None:
        zeros = asked.new_zeros(batch, heads, query.shape[1] // heads, query.shape[2], states.tokens)
        added = (
            masked(zeros, mask).view(batch, heads, rows, -1).clamp_min(-1e30)
        )  # a part that nobody sees stays finite
    before, own, behind = (None, None, None) if added is None else torch.split(added, sizes, -1)
    if keys.mean is not None:
        means = keys.mean.products(asked, keys.tokens)
        own = means if own is None else own + means
    queries = turned(asked, keys).contiguous()
    parts = max(1, min(-(-keys.tokens // _BLOCK), _PARTS // many or 1))
    chunk = -(-keys.tokens // parts // _BLOCK) * _BLOCK
    parts = -(-keys.tokens // chunk)
    largest, total = (asked.new_empty(many, parts, rows) for _ in range(2))
    mixed = asked.new_empty(many, parts, rows, values.channels)
    given = queries if own is None else own.contiguous()
    pointers = [*_pointers(keys), *_pointers(values), given, largest, total, mixed]
    numbers = rows, keys.tokens, chunk, keys.channels, values.channels, keys.grid.group, values.grid.group
    triton_kv.attend[(many, parts)](queries, *pointers, *numbers, **constants(keys, values, rows, own is not None))
    found = [(largest[:, part], total[:, part], _turned_back(mixed[:, part], values)) for part in range(parts)]
    for place, more in ((0, before), (1, behind)):
        if states.whole_keys[place].shape[2]:
            found.append(_whole(asked, states.whole_keys[place], states.whole_values[place], more))
    result = _joined(found).view(*query.shape[:3], values.channels)
    if mask is not None:
        seen = masked(zeros, mask).amax(-1) > -1e29  # [B, H, n, Q]
        result = result * seen.view(*query.shape[:3], 1)
    return result.to(query.dtype)


def _pointers(packed: Packed) -> list[Tensor]:
    """Return the planes, eight with the last repeated, and the groups; spans twice where no smallest values are stored."""
    planes = [*packed.planes] + [packed.planes[-1]] * (8 - packed.grid.bits)
    return [*planes, packed.span if packed.low is None else packed.low, packed.span]


def _turned_back(mixed: Tensor, values: Packed) -> Tensor:
    return rotate(mixed) if values.grid.rotated else mixed


def _whole(asked: Tensor, keys: Tensor, values: Tensor, added: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Do for whole tokens what the kernel does for packed ones."""
    products = asked @ keys.float().mT
    products = products if added is None else products + added
    largest = products.amax(-1)
    weights = (products - largest[..., None]).exp()
    return largest.flatten(0, 1), weights.sum(-1).flatten(0, 1), (weights @ values.float()).flatten(0, 1)


def _joined(found: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """Bring stretches of tokens together: [heads, rows, D]."""
    largest, total, mixed = (torch.stack(part) for part in zip(*found, strict=True))
    kept = (largest - largest.amax(0)).exp()
    return (mixed * kept[..., None]).sum(0) / (total * kept).sum(0)[..., None]
