"""Blocks of a Llama for a few tokens, by one call of the C library (``kernels/c/step.c``)."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from compress.kernels.cpu import FUSED_ROWS, WORTH_A_TEAM, Prepared, library

ACTIVATIONS = ("silu", "gelu_tanh")  # in the order of the library's numbers
MATRICES = ("query", "key", "value", "out", "gate", "up", "down")
_LAYER = struct.Struct("=16q2d")
_STEP = struct.Struct("=17q")
_CACHED = {torch.float32: 4, torch.bfloat16: 2}
_LANES = 16


@dataclass(frozen=True)
class Sizes:
    """Give what a block's tensors do not say."""

    heads: int
    key_heads: int
    channels: int  # of a head
    activation: str  # one of ``ACTIVATIONS``
    epsilon: float  # of all norms
    scale: float  # of the products of queries and keys


class Block:
    """Hold a block as the C library takes it: addresses of tensors, which are kept alive.

    Args:
        matrices: by the names in ``MATRICES``; ``gate`` and ``up`` have as many rows as ``down`` has columns.
        norms: ``before`` and ``mlp``, [hidden]; ``query`` and ``key``, [channels], where each head is normalised.
        sizes: of its heads.

    Raises:
        ValueError: sizes that do not belong together, or that the library does not serve.
    """

    def __init__(self, matrices: Mapping[str, Prepared], norms: Mapping[str, Tensor], sizes: Sizes) -> None:
        found = library()
        if isinstance(found, str):
            raise ValueError(found)
        hidden, queries, keys = (
            matrices["query"].columns,
            sizes.heads * sizes.channels,
            sizes.key_heads * sizes.channels,
        )
        inner = matrices["gate"].rows
        wanted = [
            (queries, hidden),
            (keys, hidden),
            (keys, hidden),
            (hidden, queries),
            *[(inner, hidden)] * 2,
            (hidden, inner),
        ]
        held = [(matrices[name].rows, matrices[name].columns) for name in MATRICES]
        if held != wanted or sizes.channels % _LANES or sizes.heads % sizes.key_heads:
            raise ValueError(f"matrices of {held} are not a block of {sizes} that the library serves")
        names = ("before", "mlp", "query", "key")
        vectors = [None if norms.get(name) is None else norms[name].detach().float().contiguous() for name in names]
        if [vector if vector is None else len(vector) for vector in vectors[:2]] != [hidden, hidden]:
            raise ValueError("norms are not of the block's size")
        buffers = [ctypes.create_string_buffer(matrices[name].matrix) for name in MATRICES]
        addresses = [ctypes.addressof(buffer) for buffer in buffers]
        addresses += [0 if vector is None else vector.data_ptr() for vector in vectors]
        numbers = hidden, sizes.heads, sizes.key_heads, sizes.channels, ACTIVATIONS.index(sizes.activation)
        self._layer = ctypes.create_string_buffer(_LAYER.pack(*addresses, *numbers, sizes.epsilon, sizes.scale))
        self._place, self.library, self.sizes, self.hidden = ctypes.addressof(self._layer), found, sizes, hidden
        self._kept_alive = dict(matrices), vectors, buffers
        self.products = sum(matrix.products(1) for matrix in matrices.values())

    def serves(self, x: Tensor, turns: Tensor, past: int, mask: Tensor | None) -> bool:
        """Tell whether :meth:`__call__` takes these: few tokens, types it knows, a mask where the order alone does not say what is seen."""
        batch, length = x.shape[:2]
        if batch * length > FUSED_ROWS or x.dtype not in _CACHED or turns.shape[-1] != self.sizes.channels:
            return False
        if mask is None:
            return length == 1 or past == 0
        known = mask.dtype in (torch.bool, torch.float32) and mask.shape[1] == 1 and mask.stride(-1) == 1
        return known and mask.shape[-2:] == (length, past + length)

    def packed(self, keys: Tensor, values: Tensor) -> bytes:
        """Return steps of this block behind a cache's keys and values, as the library takes them; zeros where each step differs."""
        strides = keys.stride(0), keys.stride(1), _CACHED[keys.dtype]
        return _STEP.pack(self._place, 0, 0, 0, keys.data_ptr(), values.data_ptr(), *[0] * 5, *strides, 0, 0, 0)


class Steps:
    """Compute blocks one after the other, and write keys and values behind those there are, which stay where they are; no gradient.

    Args:
        blocks: all of which serve what is given to :meth:`__call__` (:meth:`Block.serves`).
        caches: keys and values of each block, float32 or bfloat16 [B, key heads, room, channels], contiguous in the last two
            dimensions, with room for the tokens.
    """

    def __init__(self, blocks: Sequence[Block], caches: Sequence[tuple[Tensor, Tensor]]) -> None:
        self.blocks, self._kept_alive = blocks, caches
        packed = b"".join(block.packed(*cache) for block, cache in zip(blocks, caches, strict=True))
        self._steps = np.frombuffer(packed, dtype=np.int64).reshape(len(blocks), -1).copy()
        self._place = self._steps.ctypes.data

    def __call__(self, x: Tensor, turns: tuple[Tensor, Tensor], past: int, mask: Tensor | None) -> Tensor:
        """Return what the blocks make of hidden states.

        Args:
            x: float32 or bfloat16 [B, T, hidden], of at most 16 tokens; between blocks it is float32.
            turns: cosines and sines, float32 [1 or B, T, channels].
            past: tokens that are there.
            mask: bool (True is visible) or float32 (added), [1 or B, 1, T, past + T]; if None all tokens before are seen.
        """
        batch, length = x.shape[:2]
        y = x.to(torch.float32, copy=True).contiguous()
        cosine, sine = turns[0].float().contiguous(), turns[1].float().contiguous()
        several = length if cosine.shape[0] > 1 else 0
        self._steps[:, 1:4] = y.data_ptr(), cosine.data_ptr(), sine.data_ptr()
        self._steps[:, 6:11] = 0 if mask is None else mask.data_ptr(), batch, length, past, several
        if mask is not None:
            self._steps[:, 14:] = mask.element_size(), mask.stride(0) if mask.shape[0] > 1 else 0, mask.stride(2)
        blocks, found = self.blocks, self.blocks[0].library
        threads = torch.get_num_threads() if blocks[0].products * batch * length >= WORTH_A_TEAM else 1
        team = found.team if found.team_size else 0
        if found.calls.compress_steps(self._place, len(blocks), team, found.team_size, threads):
            raise RuntimeError("the C library had no memory, or this processor cannot run the kernels asked for")
        return y.to(x.dtype)
