"""An embedding held as bit planes, and the head that multiplies by the same tensors where the two are tied."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import CompressError
from compress.quant.linear import PackedModule
from compress.quant.records import PackedShape


class BitPlaneEmbedding(PackedModule):
    """Stand in for ``nn.Embedding``: a frozen embedding of N rows and K values each."""

    def __init__(self, shape: PackedShape, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> None:
        super().__init__(shape)
        self.num_embeddings, self.embedding_dim = shape.out_features, shape.in_features
        self.dtype, self.scale = dtype, scale

    def forward(self, tokens: Tensor) -> Tensor:
        """Look up the rows of tokens, int64 [...] to [..., K], and no others."""
        found = self.dense(self.dtype, places=tokens.reshape(-1))
        # The constant is rounded to the dtype first, as the dense module does.
        return (found * torch.tensor(self.scale, dtype=self.dtype, device=found.device)).view(*tokens.shape, -1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedModule:
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.device)).dtype  # rows are looked up in the model's
        return super()._apply(fn, recurse)


class BitPlaneHead(nn.Module):
    """Stand in for a head that is tied to a packed embedding: it multiplies by the embedding's tensors and has none of its own."""

    def __init__(self, embedding: BitPlaneEmbedding, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self._of = (embedding,)  # within a tuple: a submodule's tensors would be there twice
        self.in_features, self.out_features = embedding.embedding_dim, embedding.num_embeddings
        self.bias = bias

    @property
    def embedding(self) -> BitPlaneEmbedding:
        """Return the module whose matrix this is."""
        return self._of[0]

    @property
    def weight(self) -> Tensor:
        """Return the embedding's first planes, as the embedding itself has them under this name."""
        return self.embedding.weight

    @weight.setter
    def weight(self, value: Tensor) -> None:
        """Take no tensor: ``tie_weights`` would set here what the embedding holds already."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply the head: [..., K] to [..., N] in the dtype of ``x``, differentiable in ``x``."""
        place = self.embedding.device
        y = self.embedding.product(x.to(place), self.embedding.bits).to(x.device)
        return y if self.bias is None else y + self.bias

    def __deepcopy__(self, memo: dict[int, Any]) -> BitPlaneHead:
        """Copy with a model; by itself, as peft's ``modules_to_save`` does, it would be tied to nothing and lose what is loaded."""
        if not memo:
            raise CompressError(
                "the model's head is packed with its embedding, so it cannot be copied, trained or replaced by itself; call "
                "dequantize() on the model first, or compress it again with embedding_bits 0."
            )
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def extra_repr(self) -> str:
        """Say what there is to say of it where the model is printed."""
        return f"{self.in_features}, {self.out_features}, tied to the embedding"
