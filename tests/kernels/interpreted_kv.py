"""Runs in a process with TRITON_INTERPRET=1: attention to packed keys and values in Triton, against float64."""

import torch

from compress.kernels.gpu import interpreting
from compress.kernels.kv import Grid, States, attend, pack
from compress.kernels.kv_gpu import attend_on_gpu, serves_on_gpu
from compress.kernels.kv_mean import Mean

assert interpreting()
generator = torch.Generator().manual_seed(0)


def draw(*shape):
    return torch.randn(shape, generator=generator)


def check(
    bits, channels, tokens, whole, repeats, queries, kind=None, along=("channel", "token"), nested=True, rotated=True
):
    grids = [
        Grid(
            bits[place],
            8 if way == "channel" else channels[place] // 2,
            way,
            nested,
            rotated,
            nested and way == "token",
        )
        for place, way in enumerate(along)
    ]
    scales = draw(2, 2, 1, channels[0]).exp() if rotated else None, None
    frequencies = torch.linspace(1, 0.01, channels[0] // 2, dtype=torch.float64)
    means = Mean(draw(2, 2, 1, channels[0]), frequencies, 9) if rotated else None, None
    drawn = [draw(2, 2, tokens, size) for size in channels]
    packed = [pack(*each) for each in zip(drawn, grids, scales, means, strict=True)]
    parts = [[draw(2, 2, count, size) for count in whole] for size in channels]
    held, query = States(*packed, *map(tuple, parts)), draw(2, 2 * repeats, queries, channels[0])
    mask = None
    if kind:
        mask = torch.rand(2, 1, queries, held.tokens, generator=generator) < 0.7
        mask[0, :, 0] = False
        mask[1, :, :, : tokens // 2] = False
        mask = mask if kind == "bool" else torch.where(mask, 0.0, -torch.inf)
    assert serves_on_gpu(query, held)
    torch.testing.assert_close(
        attend_on_gpu(query, held, mask, 0.2), attend(query, held, mask, 0.2), rtol=1e-4, atol=1e-4
    )


for bits in range(1, 9):
    check((bits, 9 - bits), (16, 32), 40, (2, 5), 2, 1)
print("every width: ok")
check((4, 2), (24, 80), 264, (0, 3), 3, 1, rotated=False)
check((4, 2), (64, 64), 104, (4, 0), 1, 5, along=("token", "channel"))
check((3, 3), (64, 64), 8, (4, 30), 1, 1, nested=False)
print("heads, groups and lengths: ok")
for kind in ("bool", "float"):
    check((4, 4), (16, 16), 72, (4, 9), 2, 3, kind)
print("masks: ok")
