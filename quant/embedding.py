"""An embedding held as bit planes, and the head that multiplies by the same tensors where the two are tied."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from compress.kernels.bitplane import dense_weight, matmul, packed_linear
from compress.quant.linear import _PackedModule
from compress.quant.records import PackedShape, SharedShape
from compress.quant.shared import read_shared

Parts = tuple[Tensor, Tensor | None, Tensor | None]
"""A table as the kernels take it, [N, 2**b] or [1, 2**b] for all rows; factors of rows, [N, 1]; of columns, [K]."""


class BitPlaneEmbedding(_PackedModule):
    """Stand in for ``nn.Embedding``: a frozen embedding of N rows and K values each."""

    def __init__(self, shape: PackedShape, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> None:
        super().__init__(shape)
        self.num_embeddings, self.embedding_dim = shape.out_features, shape.in_features
        self.dtype, self.scale = dtype, scale
        self._parts: Parts | None = None

    def _forget(self) -> None:
        super()._forget()
        self._parts = None

    def parts(self) -> Parts:
        """Return what the weights at the number of bits in use are made of.

        With shared codebooks of one coefficient per row the table stays one row, and is not written out for each.
        """
        if self._parts is None:
            self._parts = self._made()
        return self._parts

    def codebook(self) -> Tensor:
        """Return the table of the number of bits in use, [N, 2**bits] or [1, 2**bits] for all rows."""
        return self.parts()[0]

    def _made(self) -> Parts:
        if not isinstance(self.shape, SharedShape):
            return super().codebook(), None, None
        shared = read_shared(dict(self.named_buffers()))
        columns = shared.columns.float()
        if self.shape.rank > 1:
            return shared.codebook(self.bits).float(), None, columns
        return shared.table(self.bits), shared.rows.float(), columns

    def forward(self, tokens: Tensor) -> Tensor:
        """Look up the rows of tokens, int64 [...] to [..., K], and no others."""
        places = tokens.reshape(-1)
        found = self._rows(places, self.dtype)
        # The constant is rounded to the dtype first, as the dense module does.
        return (found * torch.tensor(self.scale, dtype=self.dtype, device=found.device)).view(*tokens.shape, -1)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the weight at the number of bits in use, [N, K], float32 unless told otherwise, and keep nothing."""
        return self._rows(None, dtype or torch.float32)

    def _rows(self, places: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Look up some rows, or all."""
        table, rows, columns = self.parts()
        exact = dtype if columns is None else torch.float32
        found = dense_weight(self.planes(), table, self.embedding_dim, exact, places)
        if rows is not None:
            found *= rows if places is None else rows[places]
        return found if columns is None else (found * columns).to(dtype)

    def product(self, x: Tensor) -> Tensor:
        """Multiply by the whole matrix, as a head does: [..., K] to [..., N] in the dtype of ``x``, differentiable in ``x``."""
        prepared = self._direct(x)
        dense = self._kept_dense(x.dtype) if prepared is None else None
        if dense is not None:
            return matmul(x, dense.t())
        table, rows, columns = self.parts()
        scaled = x if columns is None else (x * columns).to(x.dtype)
        shape = self.shape.out_features, self.shape.in_features
        tensors = [table, *self.planes()]
        y: Tensor = prepared(scaled) if prepared else packed_linear(scaled, tensors, None, *shape, self.bits, 0)
        return y if rows is None else (y * rows[:, 0]).to(x.dtype)


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
        return self.embedding.get_buffer("weight")

    @weight.setter
    def weight(self, value: Tensor) -> None:
        """Take no tensor: ``tie_weights`` would set here what the embedding holds already."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply the head: [..., K] to [..., N] in the dtype of ``x``, differentiable in ``x``."""
        place = self.embedding.get_buffer("weight").device
        y = self.embedding.product(x.to(place)).to(x.device)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        """Say what there is to say of it where the model is printed."""
        return f"{self.in_features}, {self.out_features}, tied to the embedding"
