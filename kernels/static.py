"""What can be known about the kernels without a GPU: ``python -m compress.kernels.static``.

Every kernel and configuration is compiled for NVIDIA's sm_80, sm_90 and sm_100, and the plain ones for AMD's gfx942; of the
machine code are read registers, spilled bytes and the instructions of the inner loop per weight. Integer instructions decide how
fast narrow widths can be: an H100 has time for 1.1, 1.7, 2.2 and 4.4 of them per weight at 2, 3, 4 and 8 bits before the memory
waits for them. The process exits with 1 where a budget is not kept.

Triton must not be in interpreter mode: ``TRITON_INTERPRET`` must not be set.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from compress.kernels.variants import Config, Variant

INTEGER = frozenset({"LOP3", "SHF", "PRMT", "LEA", "IADD3", "IADD", "VIADD", "IMAD", "SEL", "ISETP", "BFE", "SGXT", "VIMNMX", "IMNMX"})
"""Counted against the budget. IMAD runs in another unit than the others; counting it too is the stricter reading."""
BUDGETS = {("plain", 2): 2.0, ("plain", 3): 2.2, ("plain", 4): 4.0, ("seed-packed", 2): 2.0, ("seed-packed", 4): 3.2}
"""Integer instructions per weight: planes alone, and crumbs or nibbles first."""
WIDE_BUDGET = 4.4  # 5 to 8 bits: what an H100 has time for at 8
_POINTERS = {"fp16": "*fp16", "bf16": "*bf16", "fp32": "*fp32"}
_ALIGNED = ("x", "codes", "tables", "bias", "y", "out", "plane_stride", "table_stride", "x_stride", "y_stride")


@dataclass(frozen=True)
class Report:
    """What the machine code of one kernel shows.

    Attributes:
        registers: of one thread.
        spilled: bytes of one thread's stack and local memory.
        shared: bytes of one program's shared memory.
        instructions: in the inner loop, per weight.
        integer: integer instructions there, per weight.
        matrix: matrix instructions in the inner loop.
    """

    registers: int
    spilled: int
    shared: int
    instructions: float
    integer: float
    matrix: int


def compiled(variant: Variant, config: Config, target: str) -> Any:
    """Compile one kernel for a target such as ``sm_90`` or ``gfx942``, which need not be there."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, constants = variant.kernel(), variant.constants(config)
    if variant.operation in ("dot", "tile") and not variant.assembly:
        constants["UPCAST"] = False
    activations = _POINTERS[variant.kind]
    wide = variant.bits > 4 or not variant.assembly
    types = {"x": activations, "y": "*fp32" if config.split > 1 else activations, "out": activations}
    types |= {"bias": activations, "codes": "*i32", "tables": "*fp16" if wide else "*i32"}
    names = list(kernel.arg_names)
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    source = ASTSource(
        kernel, signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in _ALIGNED if name in names},
    )  # fmt: skip
    cuda = target.startswith("sm_")
    place = GPUTarget("cuda", int(target[3:]), 32) if cuda else GPUTarget("hip", target, 64)
    options = {"num_warps": config.warps}
    if variant.operation in ("dot", "tile"):
        options["num_stages"] = config.stages
    return triton.compile(source, target=place, options=options)


def report(kernel: Any, variant: Variant, config: Config) -> Report:
    """Read the machine code of a kernel that was compiled for an NVIDIA GPU."""
    import triton

    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, text = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    loop = inner_loop(text)
    # rows of weights times words times 32 columns, over the threads of the program
    weights = (config.bn if variant.operation in ("dot", "tile") else 32) * config.step * 32 / (32 * config.warps)
    names = Counter(re.sub(r"^@!?U?P\w+\s+", "", line).split()[0].split(".")[0] for line in loop)
    integer = sum(count for name, count in names.items() if name in INTEGER)
    matrix = sum(count for name, count in names.items() if name in ("HMMA", "HGMMA", "UTCHMMA"))
    return Report(
        found["REG"], found["STACK"] + found["LOCAL"], found["SHARED"] + kernel.metadata.shared,
        len(loop) / weights, integer / weights, matrix,
    )  # fmt: skip


def inner_loop(sass: str) -> list[str]:
    """The instructions of the longest stretch that a backward branch closes; all there are if there is none."""
    lines = [(int(place, 16), text.strip()) for place, text in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+([^;]*);", sass)]
    end = next((place for place, text in lines if text.startswith("EXIT")), lines[-1][0])
    loops = []
    for place, text in lines:
        branch = re.search(r"\bBRA\S*\s.*?0x([0-9a-f]+)", text)
        if branch and int(branch[1], 16) < place:
            loops.append([body for at, body in lines if int(branch[1], 16) <= at <= place])
    return max(loops, key=len) if loops else [text for place, text in lines if place <= end]
