"""What can be known about the kernels without a GPU: ``python tests/kernels/static.py``.

Every kernel and configuration is compiled for NVIDIA's sm_80, sm_90 and sm_100, and the plain ones for AMD's gfx942; of the
machine code are read registers, spilled bytes and the instructions of the inner loop per weight. Integer instructions decide how
fast narrow widths can be: an H100 has time for 1.1, 1.7, 2.2 and 4.4 of them per weight at 2, 3, 4 and 8 bits before the memory
waits for them. The process exits with 1 where a budget is not kept.

Triton must not be in interpreter mode: ``TRITON_INTERPRET`` must not be set.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

from compress.kernels.configs import Problem, by_warps, candidates, heuristic
from compress.kernels.ptx import REGISTER_BITS, Entries
from compress.kernels.variants import Config, Kind, Operation, Variant

INTEGER = frozenset(
    {"LOP3", "SHF", "PRMT", "LEA", "IADD3", "IADD", "VIADD", "IMAD", "SEL", "ISETP", "BFE", "SGXT", "VIMNMX", "IMNMX"}
)
"""Counted against the budget. IMAD runs in another unit than the others; counting it too is the stricter reading."""
BUDGETS = {("plain", 2): 2.0, ("plain", 3): 2.2, ("plain", 4): 4.0, ("seed-packed", 2): 2.0, ("seed-packed", 4): 3.2}
"""Integer instructions per weight: planes alone, and crumbs or nibbles first."""
OTHER_BUDGETS = {("plain", 8): 2.6, ("seed-packed", 8): 2.3, ("plain", 32): 2.1, ("seed-packed", 32): 1.6}
"""The same at 4 bits where a look-up gives 8 or 32 bits (:data:`compress.kernels.ptx.Entries`)."""
GROUPS_BUDGET = {"gemv": 0.4, "dot": 1.2}  # more, with sizes of groups: a load and a conversion for every word
WIDE_BUDGET = 4.4  # 5 to 8 bits: what an H100 has time for at 8
_TWO_ADDRESSES = 16  # bytes that may be spilled: ptxas puts them aside where more warps then find room
_UNASKED = 48 << 10  # bytes of shared memory that a program gets without being allowed more
_KINDS: tuple[Kind, ...] = ("fp16", "bf16")
_POINTERS = {"fp16": "*fp16", "bf16": "*bf16", "fp32": "*fp32"}
_ALIGNED = (
    "x",
    "codes",
    "tables",
    "groups",
    "sizes",
    "bias",
    "y",
    "out",
    "plane_stride",
    "table_stride",
    "x_stride",
    "y_stride",
)


@dataclass(frozen=True)
class Progress:
    """What the machine code of one kernel shows.

    Attributes:
        registers: of one thread.
        spilled: bytes of one thread's stack and local memory.
        shared: bytes of one program's shared memory that Triton lays out.
        tables: bytes that the assembly reserves beside them.
        instructions: in the inner loop, per weight.
        integer: integer instructions there, per weight.
        matrix: matrix instructions in the inner loop.
    """

    registers: int
    spilled: int
    shared: int
    tables: int
    instructions: float
    integer: float
    matrix: int


def compiled(variant: Variant, config: Config, target: str) -> Any:
    """Compile one kernel for a target such as ``sm_90`` or ``gfx942``, which need not be there."""
    constants = variant.constants(config)
    if variant.operation in ("dot", "tile") and not variant.assembly:
        constants["UPCAST"] = False
    activations = _POINTERS[variant.kind]
    wide = variant.bits > 4 or variant.entries == 32 or not variant.assembly
    types = {"x": activations, "y": "*fp32" if config.split > 1 else activations, "out": activations}
    types |= {
        "bias": activations,
        "codes": "*i32",
        "tables": "*fp16" if wide else "*i32",
        "groups": "*u8",
        "sizes": "*fp32",
    }
    options = {"num_warps": config.warps}
    if variant.operation in ("dot", "tile"):
        options["num_stages"] = config.stages
    return compiled_for(target, variant.kernel(), constants, types, _ALIGNED, options)


def compiled_descent(fewest: int, parent: int, kept: int, target: str, sizes: bool = False) -> Any:
    """Compile the column loop of the codebook search for so many bits, as one launch for 128 columns would, with sizes of groups or none."""
    from compress.kernels.triton_descent import descend

    types = {"codes": "*i64", "new_codes": "*i64", "fixed": "*i1"}
    types |= dict.fromkeys(("sizes", "codebooks", "share", "gradient", "hessian"), "*fp32")
    constants = {"LEVELS": parent - fewest + 1, "PARENT": parent, "KEPT": kept, "SIZES": int(sizes), "BLOCK": 128}
    return compiled_for(target, descend, constants, types, (*types, "rows", "columns"), {"num_warps": 1})


def compiled_sums(entries: int, target: str) -> Any:
    """Compile the sums by code of that search, with values that lie together by columns."""
    from compress.kernels.triton_descent import sum_by_code

    types = {"values": "*fp32", "codes": "*i64", "sums": "*fp32"}
    constants = {"ENTRIES": entries, "STEP": 16, "column_stride": 1}
    options = {"num_warps": max(1, entries // 64)}
    return compiled_for(target, sum_by_code, constants, types, (*types, "columns", "row_stride"), options)


def compiled_experts(bits: int, head: int, kind: Kind, target: str, groups: bool = False) -> Any:
    """Compile the product of tokens sorted by expert, without a bias."""
    from compress.kernels.experts import BM, BN, WARPS
    from compress.kernels.triton_experts import dot

    types = {"x": _POINTERS[kind], "y": _POINTERS[kind], "bias": _POINTERS[kind], "codes": "*i32", "tables": "*fp16"}
    types |= {"groups": "*u8", "sizes": "*fp32"} | dict.fromkeys(("experts", "firsts", "ends"), "*i32")
    constants = {
        "BITS": bits,
        "HEAD": head,
        "BM": BM,
        "BN": BN,
        "STEP": 1,
        "BIAS": False,
        "UPCAST": False,
        "GROUPS": groups,
    }
    options = {"num_warps": WARPS, "num_stages": 1}
    return compiled_for(target, dot, constants, types, _ALIGNED, options)


def compiled_for(
    target: str, kernel: Any, constants: dict[str, Any], types: dict[str, str], aligned: Sequence[str], options: Any
) -> Any:
    """Compile a function of Triton's; of its arguments all but those in ``types`` and ``constants`` are integers."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(kernel.arg_names)
    source = ASTSource(
        kernel,
        {name: "constexpr" if name in constants else types.get(name, "i32") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned if name in names},
    )
    cuda = target.startswith("sm_")
    place = GPUTarget("cuda", int(target[3:]), 32) if cuda else GPUTarget("hip", target, 64)
    return triton.compile(source, target=place, options=options)


def machine_code(kernel: Any) -> tuple[dict[str, int], list[str]]:
    """Return what a kernel for an NVIDIA GPU takes, by ``REG``, ``STACK``, ``SHARED`` and ``LOCAL``, and its inner loop."""
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
    return found, inner_loop(text)


def counted(loop: Sequence[str]) -> Counter[str]:
    """Count instructions by their first name."""
    return Counter(re.sub(r"^@!?U?P\w+\s+", "", line).split()[0].split(".")[0] for line in loop)


def progress(kernel: Any, variant: Variant, config: Config) -> Progress:
    """Read the machine code of a kernel that was compiled for an NVIDIA GPU."""
    found, loop = machine_code(kernel)
    # rows of weights times words times 32 columns, over the threads of the program
    weights = (config.bn if variant.operation in ("dot", "tile") else 32) * config.step * 32 / (32 * config.warps)
    names = counted(loop)
    integer = sum(count for name, count in names.items() if name in INTEGER)
    matrix = sum(count for name, count in names.items() if name in ("HMMA", "HGMMA", "UTCHMMA"))
    return Progress(
        found["REG"],
        found["STACK"] + found["LOCAL"],
        kernel.metadata.shared,
        found["SHARED"],
        len(loop) / weights,
        integer / weights,
        matrix,
    )


def rows_of_a_warp(ttgir: str) -> int:
    """Rows of a tile that lie beside each other in the lanes of a warp, where ``gemv`` adds products up."""
    name = re.findall(r"-> tensor<\d+x32xf32, #(\w+)>", ttgir)[-1]
    found = re.search(rf"#{name} = .*sizePerThread = \[1, 1\], threadsPerWarp = \[\d+, (\d+)\]", ttgir)
    return int(found[1]) if found else 0


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


@dataclass(frozen=True)
class Case:
    """One kernel to compile and judge."""

    variant: Variant
    config: Config
    target: str

    @property
    def budget(self) -> float | None:
        """Integer instructions per weight that its inner loop may have, or None.

        It is for the products that wait for memory, on planes alone or the seed packed together; with larger tiles
        of activations the loop also moves those.
        """
        variant = self.variant
        slim = variant.operation == "gemv" or (
            variant.operation == "dot" and self.config.bm == 16 and variant.bits <= 4
        )
        alone = variant.bits > 4 or variant.entries == 32  # one row to a lane, which converts its activations itself
        widened = variant.kind == "bf16" and variant.operation == "gemv" and alone
        if not variant.assembly or not slim or widened:
            return None
        packed = variant.head == 4 or (variant.head == 2 and variant.bits == 2)
        name = "seed-packed" if packed else "plain"
        more = GROUPS_BUDGET[variant.operation] * variant.groups
        if variant.entries != 16:
            return OTHER_BUDGETS[name, variant.entries] + more
        return BUDGETS.get((name, variant.bits), WIDE_BUDGET) + more


def _case(variant: Variant, target: str, count: int) -> Case:
    """With the configuration that the rule gives for a layer of 14336 x 4096 on a GPU of 132 processors."""
    capability = int(target[3:]) if target.startswith("sm_") else 0
    problem = Problem(14336, 4096, variant.bits, count, variant.kind, variant.assembly, capability)
    if variant.operation == "gemv" and variant.assembly and count == 1:
        config = by_warps(problem, 132, variant.entries == 32)
    else:
        config = heuristic(problem, 132, 227 << 10)
    config = replace(config, split=1)
    return Case(replace(variant, operation="dot", rows=1) if config.matrix else variant, config, target)


def _heads(bits: int) -> list[int]:
    return [head for head in (1, 2, 4) if head <= bits and not (head == 2 and bits > 4)]


def quick() -> list[Case]:
    """A case of every kind, for continuous integration."""
    heads = [(2, 1), (2, 2), (3, 1), (4, 1), (4, 4), (5, 4), (6, 4), (7, 4), (8, 4)]
    cases = [_case(Variant("gemv", bits, head, "fp16"), "sm_90", 1) for bits, head in heads]
    cases += [_case(Variant("dot", bits, head, "fp16"), "sm_90", 16) for bits, head in heads[1:8:2]]
    other: tuple[Entries, ...] = (8, 32)
    cases += [_case(Variant("gemv", 4, head, "fp16", entries=n), "sm_90", 1) for head in (1, 4) for n in other]
    cases += [_case(Variant("dot", 4, 4, "fp16", entries=8), "sm_90", 16)]
    cases += [_case(Variant("look_up", 8, 1, "fp16"), "sm_90", 1024)]
    cases += [_case(Variant("tile", 8, 4, "fp16"), "sm_90", 512), _case(Variant("dot", 7, 4, "fp16"), "sm_80", 64)]
    cases += [_case(Variant("gemv", 3, 1, "bf16"), "sm_80", 1), _case(Variant("dot", 3, 1, "bf16"), "sm_80", 16)]
    cases += [_case(Variant("gemv", 3, 1, "fp16"), "sm_100", 1)]
    cases += [Case(Variant("gemv", 3, 1, "fp16", 4, even=False), Config(8, 8), "sm_90")]
    grouped = [("gemv", 4, 4, 1), ("gemv", 8, 4, 1), ("dot", 8, 4, 16)]
    cases += [
        _case(Variant(cast(Operation, name), bits, head, kind, groups=True), "sm_90", count)
        for (name, bits, head, count), kind in zip(grouped, ("fp16", "bf16", "fp16"), strict=True)
    ]
    plain = [("gemv", 1), ("dot", 16), ("look_up", 1024)]
    return cases + [
        _case(Variant(cast(Operation, name), 3, 1, "fp16", assembly=False, groups=groups), "gfx942", count)
        for name, count in plain
        for groups in (False, True)[: 1 + (name == "dot")]
    ]


def full() -> list[Case]:
    """Every kernel at every width, packing and kind of activations, and every configuration there is to choose from."""
    cases = []
    for target, bits in itertools.product(("sm_80", "sm_90", "sm_100"), range(2, 9)):
        for head in _heads(bits):
            cases += [_case(Variant("gemv", bits, head, "fp16"), target, 1)]
            cases += [_case(Variant("dot", bits, head, "fp16"), target, 16)]
        cases += [
            _case(Variant("gemv", bits, 1, "bf16"), target, 1),
            _case(Variant("dot", bits, 1, "bf16"), target, 16),
        ]
        cases += [
            _case(Variant("dot", bits, 1, "fp16"), target, 64),
            _case(Variant("tile", bits, 1, "fp16"), target, 512),
        ]
        cases += [_case(Variant("look_up", bits, 1, kind), target, 1024) for kind in _KINDS]
        grouped = [Variant("gemv", bits, _heads(bits)[-1], kind, groups=True) for kind in _KINDS]
        cases += [_case(variant, target, 1) for variant in grouped]
        cases += [_case(replace(v, operation="dot"), target, count) for v in grouped for count in (16, 64)]
    for target, head in itertools.product(("sm_80", "sm_90", "sm_100"), (1, 2, 4)):
        rounded = Variant("gemv", 4, head, "fp16", entries=8)
        pairs = replace(rounded, entries=32)
        cases += [_case(replace(v, kind=kind), target, 1) for v in (rounded, pairs) for kind in _KINDS]
        cases += [_case(replace(rounded, operation="dot"), target, count) for count in (16, 64)]
        cases += [_case(replace(rounded, operation="tile"), target, 512)]
        cases += [_case(replace(rounded, operation="look_up"), target, 1024)]
    cases += [_case(Variant("dot", bits, 1, "fp16"), "sm_90", 32) for bits in range(2, 9)]
    for bits, count in [*itertools.product((3, 6), (1, 4, 16)), (4, 1)]:
        problem = Problem(14336, 4096, bits, count, "fp16")
        for config in candidates(problem):
            operation = "dot" if config.matrix else problem.operation
            entries: Entries = 32 if config.pairs else 16
            cases.append(Case(Variant(operation, bits, 1, "fp16", count, True, False, False, entries), config, "sm_90"))
    plain: list[tuple[Operation, int]] = [("gemv", 4), ("dot", 16), ("look_up", 1024)]
    for target, bits, (name, count) in itertools.product(("gfx942", "sm_90"), (1, 3, 8), plain):
        cases.append(_case(Variant(name, bits, _heads(bits)[-1], "bf16", count, assembly=False), target, count))
    return list(dict.fromkeys(cases))


def judge(case: Case) -> dict[str, Any]:
    """Compile one case and read what came out.

    Returns:
        The case, what was read (NVIDIA only), and ``faults``: sentences, none if all is well.
    """
    variant, config = case.variant, case.config
    found: dict[str, Any] = {"target": case.target, **asdict(variant), "config": asdict(config), "faults": []}
    try:
        kernel = compiled(variant, config, case.target)
    except Exception as error:  # whatever it is, the other cases are worth seeing
        found["faults"].append(f"does not compile: {type(error).__name__}: {' '.join(str(error).split())[-200:]}")
        return found
    if not case.target.startswith("sm_"):
        return found
    seen = progress(kernel, variant, config)
    found |= {**asdict(seen), "budget": case.budget}
    if seen.spilled > _TWO_ADDRESSES and case.variant.assembly:
        found["faults"].append(f"{seen.spilled} bytes are spilled")
    if seen.shared <= _UNASKED < seen.shared + seen.tables:
        found["faults"].append(f"{seen.shared} + {seen.tables} bytes of shared memory, and Triton asks for neither")
    shared = variant.assembly and (variant.bits > REGISTER_BITS or variant.entries == 32)
    if shared and variant.operation == "gemv" and config.warps == config.step:
        lanes = rows_of_a_warp(kernel.asm["ttgir"])
        found["faults"] += [] if lanes == 32 else [f"{lanes} rows beside each other in a warp, not 32: banks conflict"]
    if case.budget is not None and seen.integer > case.budget:
        found["faults"].append(f"{seen.integer:.2f} integer instructions per weight, of {case.budget}")
    return found


def line(found: dict[str, Any]) -> str:
    """One case as one line of text."""
    config = found["config"]
    body = {8: "8-bit entries", 16: "assembly", 32: "pairs"}[found["entries"]] if found["assembly"] else "plain"
    size = f"{config['warps']} warps, {config['step']} words"
    if found["operation"] in ("dot", "tile"):
        size += f", {config['bn']} x {config['bm']}, {config['stages']} stages"
    name = (
        f"{found['target']:7}{found['operation']:8}{body:14}{found['bits']} bits, head {found['head']}, {found['kind']}"
    )
    rows = f"{found['rows']} rows{', groups' if found['groups'] else ''}"
    text = f"{name:44} {rows}, {size:38}"
    if "registers" in found:
        budget = f" of {found['budget']}" if found["budget"] else ""
        text += f" {found['registers']:3} registers, {found['spilled']} spilled, {found['instructions']:5.2f} instructions, "
        text += f"{found['integer']:.2f}{budget} integer"
    return text + "".join(f"; FAULT: {fault}" for fault in found["faults"])


def main(arguments: list[str] | None = None) -> int:
    """Print one line per case; 1 if any has a fault."""
    import triton

    parser = argparse.ArgumentParser(description="Compile the kernels without a GPU and check their machine code.")
    parser.add_argument("--full", action="store_true", help="every kernel and configuration; half an hour or more")
    parser.add_argument("--json", help="write what was found to this file")
    given = parser.parse_args(arguments)
    cases = full() if given.full else quick()
    results = []
    for case in cases:
        results.append(judge(case))
        print(line(results[-1]), flush=True)
    bad = sum(bool(found["faults"]) for found in results)
    print(f"triton {triton.__version__}: {len(results)} kernels compiled, {bad} with faults")
    if given.json:
        with open(given.json, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=1)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
