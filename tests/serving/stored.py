"""Small matrices in every form that a checkpoint stores, and what they stand for."""

import torch

from compress.quant.embedding import BitPlaneEmbedding
from compress.quant.format import Codes, pack, pack_smaller
from compress.quant.linear import BitPlaneLinear
from compress.quant.records import EmbeddingShape, SparseShape
from compress.quant.shared import Shared

FORMS = ("own", "sparse", "shared", "one coefficient", "groups", "embedding")
SEED, PARENT = 2, 6


def stored(form, rows=24, columns=100, seed=0):
    """Return a record, and tensors by their stored names."""
    generator = torch.Generator().manual_seed(seed)

    def random(*size):
        return torch.randn(*size, generator=generator)

    codes = torch.randint(0, 2**PARENT, (rows, columns), dtype=torch.uint8, generator=generator)
    if form == "own":
        return pack(codes, {bits: random(rows, 2**bits) for bits in range(SEED, PARENT + 1)})
    if form == "sparse":
        codebooks = {bits: random(rows, 2**bits) for bits in range(SEED, PARENT + 1)}
        for codebook in codebooks.values():
            codebook[:, 0] = 0
        codes *= (torch.rand(rows, columns, generator=generator) < 0.1).byte()
        shape, tensors, _ = pack_smaller(Codes(codes, codebooks))
        assert isinstance(shape, SparseShape)
        return shape, dict(tensors)
    rank = 3 if form == "shared" else 1
    shared = Shared(
        random(columns).abs() + 0.5,
        random(rows, 1).abs() + 0.5,
        torch.randint(-99, 99, (rows, rank - 1), dtype=torch.int8, generator=generator) if rank > 1 else None,
        {bits: random(rank, 2**bits) for bits in range(SEED, 7 if form == "groups" else 6)},
        None if form == "groups" else random(rank, 2**5),
        None if form == "groups" else {6: random(2)},
        torch.randint(1, 256, (rows, -(-columns // 64)), generator=generator).byte() if form == "groups" else None,
    )
    table = {bits: shared.codebook(bits) for bits in range(SEED, PARENT + 1)}
    read_at = {"2": 4, "3": 5, "4": 6} if form == "embedding" else None
    shape, tensors, _ = pack_smaller(Codes(codes, table, shared=shared, read_at=read_at))
    assert isinstance(shape, EmbeddingShape) == (form == "embedding")
    return shape, dict(tensors)


def dense(shape, tensors, bits):
    """Return the weights that a stored matrix stands for, as the library's own module reads it: float32 [N, K]."""
    from compress.quant.format import expand

    if isinstance(shape, SparseShape):
        shape, tensors = shape.dense, expand("it", shape, tensors)
    kind = BitPlaneEmbedding if isinstance(shape, EmbeddingShape) else lambda shape: BitPlaneLinear(shape, False)
    module = kind(shape)
    module.hold(shape, tensors)
    return module.dense(bits=bits)
