"""Compute a Llama's decode step with random weights, for measuring kernels: static cache, fused projections, float16 head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress.kernels.bitplane import packed_linear
from compress.kernels.layout import random_tiled

Project = Callable[[int, int], nn.Module]  # makes a linear of (outputs, inputs)


@dataclass(frozen=True)
class Shape:
    """Give the sizes of a Llama; by default those of Llama-3.1-8B."""

    hidden: int = 4096
    intermediate: int = 14336
    layers: int = 32
    heads: int = 32
    key_heads: int = 8
    vocabulary: int = 128256
    length: int = 1024

    @property
    def head(self) -> int:
        """Return the size of one head."""
        return self.hidden // self.heads


class PackedLinear(nn.Module):
    """Multiply by random codes in the layout of the kernels."""

    def __init__(self, rows: int, columns: int, bits: int, seed_bits: int, exact: bool, device: str) -> None:
        super().__init__()
        tiled = random_tiled(rows, columns, bits, seed_bits, device, exact=exact)
        self.facts = rows, columns, bits, tiled.head
        for name, tensor in zip(("codes", "table", "registers"), tiled.tensors(bits), strict=False):
            self.register_buffer(name, tensor)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer: [..., K] to [..., N]."""
        y: Tensor = packed_linear(x, list(self.buffers()), None, None, *self.facts)
        return y


def dense(rows: int, columns: int, dtype: torch.dtype, device: str) -> nn.Linear:
    """Make a linear of random weights."""
    layer = nn.Linear(columns, rows, bias=False, dtype=dtype, device=device).requires_grad_(False)
    nn.init.normal_(layer.weight, std=0.02)
    return layer


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).to(x.dtype) * weight


def _rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Apply the rotary embedding to [heads, size], by cosines and sines [2, size / 2]."""
    low, high = x.float().chunk(2, -1)
    return torch.cat([low * turn[0] - high * turn[1], high * turn[0] + low * turn[1]], -1).to(x.dtype)


class Layer(nn.Module):
    """Compute one block, with its cache."""

    def __init__(self, shape: Shape, project: Project, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        self.shape = shape
        self.qkv = project((shape.heads + 2 * shape.key_heads) * shape.head, shape.hidden)
        self.out = project(shape.hidden, shape.heads * shape.head)
        self.gate_up = project(2 * shape.intermediate, shape.hidden)
        self.down = project(shape.hidden, shape.intermediate)
        self.register_buffer("norms", torch.ones(2, shape.hidden, dtype=dtype, device=device))
        size = 2, shape.key_heads, shape.length, shape.head
        self.register_buffer("cache", torch.zeros(size, dtype=dtype, device=device))

    def forward(self, x: Tensor, place: Tensor, turn: Tensor, mask: Tensor) -> Tensor:
        """Return the output, [hidden], of a block for ``x``, [hidden], which goes to ``place`` in the cache."""
        shape, cache, norms = self.shape, self.get_buffer("cache"), self.get_buffer("norms")
        parts = self.qkv(_norm(x, norms[0])[None])[0].view(-1, shape.head)
        query, key, value = parts.split([shape.heads, shape.key_heads, shape.key_heads])
        cache[0].index_copy_(1, place, _rotate(key, turn)[:, None])
        cache[1].index_copy_(1, place, value[:, None])
        # The query heads that share a key head are the "positions" of one attention: nothing of the cache is repeated.
        query = _rotate(query, turn).view(1, shape.key_heads, -1, shape.head)
        attended = nn.functional.scaled_dot_product_attention(query, cache[None, 0], cache[None, 1], attn_mask=mask)
        x = x + self.out(attended.reshape(1, -1))[0]
        gate, up = self.gate_up(_norm(x, norms[1])[None])[0].chunk(2)
        y: Tensor = x + self.down((nn.functional.silu(gate) * up)[None])[0]
        return y


class Decoder(nn.Module):
    """Decode a step: a token and its place to the next token (greedy)."""

    def __init__(self, shape: Shape, project: Project, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(shape, project, dtype, device) for _ in range(shape.layers))
        self.embedding = nn.Embedding(shape.vocabulary, shape.hidden, dtype=dtype, device=device).requires_grad_(False)
        self.head = dense(shape.vocabulary, shape.hidden, dtype, device)
        self.register_buffer("norm", torch.ones(shape.hidden, dtype=dtype, device=device))
        steps = 500000.0 ** -torch.linspace(0, 1, shape.head // 2 + 1, device=device)[:-1]
        angles = torch.arange(shape.length, device=device)[:, None] * steps
        self.register_buffer("turns", torch.stack([angles.cos(), angles.sin()], 1))
        self.register_buffer("places", torch.arange(shape.length, device=device))

    def forward(self, token: Tensor, place: Tensor) -> Tensor:
        """Return the next token, int64 [1], for a token and its place, int64 [1] each."""
        x = self.embedding(token)[0]
        turn = self.get_buffer("turns")[place][0]
        mask = (self.get_buffer("places") <= place)[None, None, None]
        for layer in self.layers:
            x = layer(x, place, turn, mask)
        logits: Tensor = self.head(_norm(x, self.get_buffer("norm")))
        return logits.argmax()[None]
