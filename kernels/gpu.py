"""Packed products on a GPU, for :mod:`compress.kernels.bitplane`.

The kernels are Triton's: with inline PTX on NVIDIA GPUs from sm_80 on, plain elsewhere. Nothing of Triton is imported before a
tensor on a GPU is there. A call allocates its output and nothing else (partial sums of a split product lie behind the
output, in the same allocation; activations are copied if their rows do not begin at multiples of 16 bytes, or K is no
multiple of 32; more than 512 rows need looked-up weights, :data:`LOOKED_UP_BYTES` at a time) and runs on
the current stream of the tensors' device, so it can be captured in a CUDA graph.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear as dense_linear
from torch.nn.functional import pad

from compress.kernels.configs import Problem, choose_config, tuned
from compress.kernels.layout import ROWS, Tiled, untiled_groups
from compress.kernels.packing import scale_groups, words
from compress.kernels.ptx import PAIRED, REGISTER_BITS, Entries
from compress.kernels.variants import Config, Kind, Operation, Variant

KINDS: dict[torch.dtype, Kind] = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
LOOKED_UP_BYTES = 256 << 20


@dataclass(frozen=True)
class Device:
    """Describe a GPU, as far as the choice of a kernel depends on it."""

    name: str  # as torch gives it
    processors: int  # streaming multiprocessors
    assembly: bool  # whether it runs PTX that needs sm_80
    shared: int  # bytes of shared memory that one program may use
    capability: int  # 90 for sm_90; 0 where it means nothing


@torch.compiler.assume_constant_result
def interpreting() -> bool:
    """Tell whether Triton's interpreter stands in for a GPU: ``TRITON_INTERPRET=1``, which is Triton's own variable."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes") and missing() is None


@cache
def missing() -> str | None:
    """Say why Triton cannot be used, or return None."""
    try:
        found = version("triton")
    except PackageNotFoundError:
        return "triton is not installed"
    return None if tuple(int(part) for part in found.split(".")[:2]) >= (3, 6) else f"triton {found} is older than 3.6"


@cache
def device_of(index: int) -> Device:
    """Describe the GPU of an index; -1 is the interpreter."""
    if index < 0:
        return Device("interpreter", 1, False, 1 << 30, 0)
    properties = torch.cuda.get_device_properties(index)
    capability = 10 * properties.major + properties.minor if torch.version.hip is None else 0
    shared = getattr(properties, "shared_memory_per_block_optin", 99 << 10)
    return Device(properties.name, properties.multi_processor_count, capability >= 80, shared, capability)


@torch.compiler.assume_constant_result
def available() -> bool:
    """Tell whether there is a GPU, or an interpreter, that the kernels run on."""
    return missing() is None and (torch.cuda.is_available() or interpreting())


def serves(device: torch.device) -> bool:
    """Tell whether packed layers on a device go through these kernels."""
    return available() and (device.type == "cuda" or (device.type == "cpu" and interpreting()))


def describe() -> str:
    """Say what serves packed layers on GPUs, and why."""
    reason = missing()
    if reason is not None:
        return f"torch: reference look-up, because {reason}"
    found = f"triton {version('triton')}"
    if not torch.cuda.is_available():
        return f"{found}: plain kernels in its interpreter" if interpreting() else f"{found}: idle, as torch sees none"
    kinds = []
    for index in range(torch.cuda.device_count()):
        gpu = device_of(index)
        how = "look-up in registers by inline PTX" if gpu.assembly else "plain kernels, as the PTX needs sm_80 or later"
        by = "measured configurations" if tuned(gpu.name) else "configurations by rule, as compress tune was not run"
        kinds.append(f"{how} on {gpu.name}, {by}")
    return f"{found}: " + "; ".join(sorted(set(kinds)))


@dataclass(frozen=True)
class GpuMatrix:
    """Describe one matrix [N, K] at one number of bits."""

    tensors: Sequence[Tensor]  # as :meth:`compress.kernels.layout.Tiled.tensors` gives them
    rows: int  # N
    columns: int  # K
    bits: int  # of a code
    head: int  # of the layout
    groups: Tensor | None = None  # as :class:`compress.kernels.layout.Tiled` has them

    @property
    def codes(self) -> Tensor:
        """Return the codes, int32 [p, ceil(N / 32), ceil(K / 32), 32]."""
        return self.tensors[0]

    @property
    def table(self) -> Tensor:
        """Return the table, floating [ceil(N / 32), 2**bits, 32]."""
        return self.tensors[1]

    @property
    def registers(self) -> Tensor | None:
        """Return the table as the assembly keeps it in registers, or None."""
        return self.tensors[2] if len(self.tensors) > 2 + (self.groups is not None) else None

    @property
    def span(self) -> int:
        """Return the words in a row."""
        return words(self.columns)

    def variant(self, problem: Problem, config: Config, bias: bool) -> Variant:
        """Return the kernel for a problem."""
        even = self.span % (config.split * config.step) == 0
        operation = "dot" if config.matrix else problem.operation
        entries: Entries = 8 if self.rounded and not _in_bfloat16(operation, problem.kind) else 16
        if config.pairs and self.bits == PAIRED and self.table.dtype == torch.float16:
            entries = 32
        facts = operation, self.bits, self.head, problem.kind, problem.count, problem.assembly, even, bias
        return Variant(*facts, entries, self.groups is not None)

    @property
    def rounded(self) -> bool:
        """Tell whether entries have 8 bits."""
        return self.registers is not None and self.registers.dim() == 2

    def assembly(self, kind: Kind, device: Device) -> bool:
        """Tell whether the kernels with assembly serve it; those in plain Triton serve all."""
        held = self.registers is not None or self.bits > 4
        return device.assembly and kind != "fp32" and held and self.bits >= 2

    def operands(self, variant: Variant) -> dict[str, Any]:
        """Return the arguments that all kernels share."""
        found = {"codes": self.codes, "tables": self.table, "words": self.span, "plane_stride": self.codes.stride(0)}
        if variant.operation != "look_up" or not variant.assembly:
            found |= {"groups": self.groups, "sizes": None if self.groups is None else self.tensors[-1]}
        if variant.assembly:
            found["table_stride"] = self.codes.shape[1] * ROWS
        if variant.assembly and variant.entries < 32 and self.bits <= REGISTER_BITS and self.registers is not None:
            other = _in_bfloat16(variant.operation, variant.kind)
            if self.rounded:
                held = self.registers[-(2**self.bits // 2) :] if other else self.registers
            else:
                held = self.registers[int(other)]
            found |= {"tables": held, "table_stride": held.stride(0)}
        return found


def _in_bfloat16(operation: Operation, kind: Kind) -> bool:
    """Tell whether entries are wanted in bfloat16, as matrix instructions and looked-up weights are; ``gemv`` takes float16."""
    return kind == "bf16" and operation != "gemv"


def _ready(x: Tensor, columns: int, whole: bool) -> Tensor:
    """Return activations [count, K] with unit stride, and where they are read in whole words, padded and aligned."""
    if whole and columns % 32:
        return pad(x, (0, 32 - columns % 32))
    if x.stride(1) != 1 or (x.shape[0] > 1 and x.stride(0) < x.shape[1]):
        return x.contiguous()
    aligned = x.data_ptr() % 16 == 0 and (x.shape[0] == 1 or x.stride(0) * x.element_size() % 16 == 0)
    return x if aligned or not whole else x.clone(memory_format=torch.contiguous_format)


def _launch(variant: Variant, config: Config, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
    kernel, constants = _compiled_for(variant, config)
    kernel[grid](**arguments, **constants)


@cache
def _compiled_for(variant: Variant, config: Config) -> tuple[Any, dict[str, Any]]:
    """Return a kernel, and its constants with the compiler's options."""
    constants, matrix = variant.constants(config), variant.operation in ("dot", "tile")
    if matrix and not variant.assembly:
        constants["UPCAST"] = interpreting()
    if not interpreting():
        constants |= {"num_warps": config.warps} | ({"num_stages": config.stages} if matrix else {})
    return variant.kernel(), constants


def _allocate(x: Tensor, count: int, rows: int, split: int) -> tuple[Tensor, Tensor]:
    """Allocate the output [count, rows], and where the kernel writes: the output, or [split, count, rows] float32 behind it."""
    if split == 1:
        y = torch.empty(count, rows, dtype=x.dtype, device=x.device)
        return y, y
    size = -(-count * rows * x.element_size() // 16) * 16
    room = torch.empty(size + 4 * split * count * rows, dtype=torch.uint8, device=x.device)
    y = room[: count * rows * x.element_size()].view(x.dtype).view(count, rows)
    return y, room[size:].view(torch.float32)


def multiply(x: Tensor, packed: GpuMatrix, bias: Tensor | None, config: Config | None = None) -> Tensor:
    """Return ``x @ W.T + bias`` for [count, K] activations; ``config`` overrides the choice, for tuning and tests."""
    count, kind = x.shape[0], KINDS[x.dtype]
    device = device_of(x.get_device())
    assembly = packed.assembly(kind, device)
    problem = Problem(packed.rows, packed.columns, packed.bits, count, kind, assembly, device.capability)
    chosen = config or choose_config(problem, device.name, device.processors, device.shared)
    if problem.operation == "look_up":
        return _by_matrix_product(x, packed, bias)
    x = _ready(x, packed.columns, assembly)
    variant = packed.variant(problem, chosen, bias is not None)
    y, target = _allocate(x, count, packed.rows, chosen.split)
    steps = -(-packed.span // (chosen.split * chosen.step))
    arguments = packed.operands(variant) | {
        "x": x,
        "bias": bias,
        "y": target,
        "rows": packed.rows,
        "chunk": steps * chosen.step,
        "x_stride": x.stride(0) if count > 1 else packed.columns,
        "y_stride": packed.rows,
    }
    if not assembly:
        arguments["columns"] = packed.columns
    grid: tuple[int, ...] = (-(-packed.rows // ROWS), chosen.split)
    if variant.operation != "gemv":
        arguments["count"] = count
        grid = (-(-packed.rows // chosen.bn), chosen.split, -(-count // chosen.bm))
    _launch(variant, chosen, grid, arguments)
    if chosen.split > 1:
        from compress.kernels.triton_plain import reduce

        reduce[(-(-packed.rows // 256), count)](
            target, bias, y, count, packed.rows, packed.rows, SPLIT=chosen.split, BIAS=bias is not None, BLOCK=256
        )
    return y


def _parts(packed: GpuMatrix, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Look all weights up, a few tiles of rows at a time: the rows they are, and [rows, K]."""
    device, kind = device_of(packed.codes.get_device()), KINDS[dtype]
    problem = Problem(packed.rows, packed.columns, packed.bits, 1 << 20, kind, packed.assembly(kind, device))
    config = choose_config(problem, device.name, device.processors, device.shared)
    variant, tiles = packed.variant(problem, config, False), packed.codes.shape[1]
    step = max(1, LOOKED_UP_BYTES // (ROWS * packed.span * 32 * dtype.itemsize))
    for first in range(0, tiles, step):
        count = min(step, tiles - first)
        out = torch.empty(count * ROWS, packed.span * 32, dtype=dtype, device=packed.codes.device)
        arguments = packed.operands(variant) | {"out": out, "first_tile": first}
        _launch(variant, config, (count, -(-packed.span // config.step)), arguments)
        rows = slice(first * ROWS, min((first + count) * ROWS, packed.rows))
        found = out[: rows.stop - rows.start, : packed.columns]
        if packed.groups is not None and variant.assembly:
            groups = untiled_groups(packed.groups[first : first + count], len(found))
            scale_groups(found, groups * packed.tensors[-1][rows, None])
        yield rows, found


def _by_matrix_product(x: Tensor, packed: GpuMatrix, bias: Tensor | None) -> Tensor:
    parts = [dense_linear(x, weight, None if bias is None else bias[rows]) for rows, weight in _parts(packed, x.dtype)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _reference(packed: GpuMatrix, dtype: torch.dtype) -> Tensor:
    """Look up every weight in plain torch: [N, K]."""
    tables, sizes = {packed.bits: packed.table}, None if packed.groups is None else packed.tensors[-1]
    tiled = Tiled(packed.rows, packed.columns, packed.head, packed.codes, tables, {}, None, packed.groups, sizes)
    return tiled.dense(packed.bits, dtype)


def weight(packed: GpuMatrix, dtype: torch.dtype) -> Tensor:
    """Look up every weight of a matrix: [N, K] in ``dtype``. On a device without the kernels plain torch does it."""
    if not serves(packed.codes.device) or dtype not in KINDS:
        return _reference(packed, dtype)
    with torch.cuda.device(packed.codes.get_device()):
        out = torch.empty(packed.rows, packed.columns, dtype=dtype, device=packed.codes.device)
        for part, found in _parts(packed, dtype):
            out[part] = found
        return out


def linear(x: Tensor, packed: GpuMatrix, bias: Tensor | None) -> Tensor:
    """Return ``x @ W.T + bias``, [..., K] to [..., N] in ``x``'s dtype. On a device without the kernels plain torch computes it.

    Raises:
        ValueError: ``x`` is on another device than the codes: a kernel would read what is not its own.
    """
    if x.device != packed.codes.device:
        raise ValueError(f"activations are on {x.device}, and the packed layer is on {packed.codes.device}")
    if not serves(x.device) or x.dtype not in KINDS:
        return dense_linear(x, _reference(packed, x.dtype), bias)
    if x.numel() == 0:
        return x.new_empty(*x.shape[:-1], packed.rows)
    with torch.cuda.device(x.get_device()):
        return multiply(x.reshape(-1, packed.columns), packed, bias).view(*x.shape[:-1], packed.rows)
