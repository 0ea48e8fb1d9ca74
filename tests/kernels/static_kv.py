"""Compiles attention to packed keys and values for GPUs that need not be there; prints one JSON line per kernel."""

import json

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from compress.kernels import triton_kv
from compress.kernels.kv import Grid, pack
from compress.kernels.kv_gpu import constants


def compiled(bits, channels, rows, has_mask, target):
    grids = Grid(bits, 32, "channel"), Grid(bits, 32, "token", centred=True)
    packed = [pack(torch.zeros(1, 1, 32, channels), grid) for grid in grids]
    fixed, names = constants(*packed, rows, has_mask), list(triton_kv.attend.arg_names)
    types = dict.fromkeys(("query", "mask", "largest", "total", "mixed"), "*fp32")
    types |= {f"{side}{plane}": "*u8" for side in "kv" for plane in range(8)}
    # Of centred groups the kernel reads bytes, and it is given the spans in the place of the smallest values.
    types |= {f"{side}_{what}": kind for side, kind in (("key", "*fp16"), ("value", "*u8")) for what in ("low", "span")}
    signature = {name: "constexpr" if name in fixed else types.get(name, "i32") for name in names}
    constexprs = {(names.index(name),): value for name, value in fixed.items()}
    source = ASTSource(triton_kv.attend, signature, constexprs=constexprs)
    place = GPUTarget("cuda", int(target[3:]), 32) if target.startswith("sm_") else GPUTarget("hip", target, 64)
    return triton.compile(source, target=place, options={"num_warps": 4})


SIZES = ((4, 128, 8, True), (2, 64, 3, False), (8, 128, 1, False))
for target, sizes in (("sm_80", SIZES[:1]), ("sm_90", SIZES), ("gfx942", SIZES[:1])):
    for bits, channels, rows, has_mask in sizes:
        kernel = compiled(bits, channels, rows, has_mask, target)
        shared, code = kernel.metadata.shared, kernel.asm.get("cubin") or kernel.asm["hsaco"]
        print(json.dumps({"target": target, "bits": bits, "shared": shared, "code": len(code)}))
