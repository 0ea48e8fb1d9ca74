"""Runs in a process without the interpreter: what the launcher passes is bound and compiled as on an H100, up to the launch.

Triton's own binder takes the arguments, so a name that a kernel does not have, a size of 1 (which becomes a constant) or a missing bias
is found here and not on the first GPU.
"""

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from compress.kernels import gpu, triton_descent, triton_plain
from compress.kernels.layout import random_tiled
from compress.kernels.tune import packed_of
from compress.quant.descent import GpuDescent, sums_by_code


class NoGpu:
    """As much of a driver as compiling needs."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=0):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


class Warm:
    """A kernel that is compiled where it would be launched."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        def compiled(*arguments, **named):
            launches.append(self.kernel.fn.__name__)
            assert all(size < 1 << 16 for size in grid[1:])
            assert "cubin" in self.kernel.warmup(*arguments, grid=grid, **named).asm

        return compiled


driver.set_active(NoGpu())
gpu.device_of = lambda index: gpu.Device("H100", 132, True, 227 << 10, 90)
kernel_of = gpu._compiled_for
gpu._compiled_for = lambda variant, config: (Warm(kernel_of(variant, config)[0]), kernel_of(variant, config)[1])
triton_plain.reduce = Warm(triton_plain.reduce)

launches = []
counts = [(1, "float16"), (1, "bfloat16"), (5, "float16"), (70, "bfloat16"), (513, "float16")]
for rows, columns, bits, exact, groups, tried in [
    (1, 1, 3, True, False, (0, 2)),
    (100, 330, 4, False, False, range(5)),
    (64, 4096, 4, True, False, (1, 4)),
    (40, 100, 8, True, False, (2, 3)),
    (1, 1, 3, True, True, (0,)),
    (100, 330, 4, False, True, (2, 3)),
    (40, 4096, 8, True, True, (1, 4)),
]:
    packed = packed_of(random_tiled(rows, columns, bits, exact=exact, groups=groups), bits)
    for count, kind in [counts[place] for place in tried]:
        x = torch.zeros(count, columns, dtype=getattr(torch, kind))
        bias = torch.zeros(rows, dtype=x.dtype) if count == 5 else None
        assert gpu.multiply(x, packed, bias).shape == (count, rows)
gpu.multiply(torch.zeros(2, 330), packed_of(random_tiled(100, 330, 3), 3), None)  # float32: plain
assert set(launches) == {"gemv", "dot", "look_up", "reduce"}

triton_descent.descend, triton_descent.sum_by_code = Warm(triton_descent.descend), Warm(triton_descent.sum_by_code)
for rows, columns, fewest, parent, kept in [(1000, 128, 3, 6, 0), (1, 1, 8, 8, 7), (30, 21, 4, 6, 3)]:
    codebooks = {bits: torch.zeros(rows, 2**bits) for bits in range(fewest, parent + 1)}
    codes, gradient = torch.zeros(rows, columns, dtype=torch.int64), torch.zeros(len(codebooks), rows, columns)
    share = torch.ones(len(codebooks)).numpy()
    GpuDescent(codebooks, share, kept)(codes, codes == 1, gradient[0] + 1, gradient, torch.eye(columns))
    assert sums_by_code(gradient[0, :, :, None], codes, 2**parent).shape == (rows, 2**parent, 1)
assert launches[-2:] == ["descend", "sum_by_code"]
print(f"{len(launches)} launches: ok")
