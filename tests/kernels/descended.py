"""Runs in a process with TRITON_INTERPRET=1: the column loop of the codebook search for GPUs, against the one for CPUs.

Both add in the same order, so codes and gradients are the same bits; on a GPU multiplications and additions are fused.
"""

import torch

from compress.quant import nested
from compress.quant.descent import Descent, GpuDescent, gather_columns, sums_by_code
from compress.quant.nested import nested_output_codebooks

generator = torch.Generator().manual_seed(0)


def random(*shape):
    return torch.randn(*shape, generator=generator)


def hessian(columns):
    inputs = random(400, columns) @ (torch.eye(columns) + random(columns, columns) / 8)
    return inputs.t() @ inputs / 400


# rows, columns of the block, fewest bits, most bits, bits that stay
CASES = [(5, 17, 3, 6, 0), (2, 20, 2, 6, 0), (3, 24, 3, 6, 3), (2, 33, 2, 6, 4), (3, 16, 7, 7, 6), (1, 1, 8, 8, 0)]
for rows, columns, first, parent, kept in [*CASES, (1, 65, 3, 4, 0)]:
    codebooks = {bits: random(rows, 2**bits).sort(1).values for bits in range(max(first, kept + 1), parent + 1)}
    codes = torch.randint(0, 2**parent, (rows, columns), generator=generator)
    fixed, gradient = random(rows, columns) > 1, random(len(codebooks), rows, columns)
    share = torch.tensor([2.0**bits for bits in codebooks]).numpy()
    wanted, found = [codes.clone(), gradient.clone()], [codes.clone(), gradient.clone()]
    by, sizes = hessian(columns), random(rows, columns if kept % 2 else 0).abs() + 0.1  # of groups, or none
    loop = Descent({bits: codebook.numpy() for bits, codebook in codebooks.items()}, share, kept)
    loop(wanted[0].numpy(), fixed.numpy(), sizes.numpy(), wanted[1].numpy(), by.numpy())
    GpuDescent(codebooks, share, kept)(found[0], fixed, sizes, found[1], by)
    assert rows == 1 or bool((found[0] != codes).any())
    assert torch.equal(found[0][fixed], codes[fixed])
    assert torch.equal(found[0] >> (parent - kept), codes >> (parent - kept))
    assert all(map(torch.equal, found, wanted)), (rows, columns, first, parent, kept)
print("one block of columns at every number of bits: ok")

for rows, columns, entries, parts in [(3, 40, 8, 1), (2, 70, 64, 5), (2, 33, 256, 3), (1, 1, 4, 17)]:
    codes, spread = torch.randint(0, entries, (rows, columns), generator=generator), random(columns, parts)
    found = sums_by_code(spread.expand(rows, -1, -1), codes, entries)
    assert torch.allclose(found, gather_columns(codes, spread, entries), rtol=1e-5, atol=1e-5)
    assert torch.equal(found, nested._gathered(codes, spread, entries))
    values = random(rows, columns)
    plain = torch.zeros(rows, entries).scatter_add_(1, codes, values)
    assert torch.allclose(nested._sums(values, codes, entries), plain, rtol=1e-5, atol=1e-5)
print("sums by code: ok")

nested._COLUMNS = 10  # so that a few columns are several blocks
weight, metric = random(2, 24), hessian(24)
zeros = weight.abs() < 0.3
targets = dict.fromkeys(range(3, 8), weight.masked_fill(zeros, 0.0))
found = nested_output_codebooks(targets, metric, zeros=zeros)
nested.gpu.serves = lambda device: False
wanted = nested_output_codebooks(targets, metric, zeros=zeros)
assert (found.codes != wanted.codes).float().mean() < 0.01  # matrix products may differ by where their operands lie
for bits in targets:
    away = found.dense(bits) - wanted.dense(bits)
    assert float(away.norm() / wanted.dense(bits).norm()) < 0.01
print("a whole search: ok")
