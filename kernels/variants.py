"""The compile-time constants of each kernel: one place for launching, for tuning and for the static proof."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from compress.kernels import ptx

Kind = Literal["fp16", "bf16", "fp32"]
"""Of activations."""
Operation = Literal["gemv", "dot", "tile", "look_up"]


@dataclass(frozen=True)
class Config:
    """Say how one kernel divides its work, as tuning files do."""

    warps: int = 4  # of one program
    step: int = 16  # words (of 32 columns) per iteration of a program
    split: int = 1  # programs that share the columns of one row
    bm: int = 16  # rows of activations per program (``dot``)
    bn: int = 32  # rows of weights per program
    stages: int = 2  # of the software pipeline (``dot``)
    matrix: bool = False  # whether ``dot`` serves, where the number of rows alone would say ``gemv``
    pairs: bool = False  # whether ``gemv`` looks two weights up at once, at ``ptx.PAIRED`` bits


@dataclass(frozen=True)
class Variant:
    """Name one kernel and what it is compiled for."""

    operation: Operation
    bits: int  # of a code, 1 to 8
    head: int  # of the layout
    kind: Kind  # of the activations; of the result too
    rows: int = 1  # of activations (``gemv`` only)
    assembly: bool = True  # whether the assembly is used, or plain Triton
    even: bool = True  # whether every iteration is whole (assembly only)
    bias: bool = False  # whether one is added
    entries: ptx.Entries = 16  # bits of each; at 4 bits also 8, in ``gemv`` 32 (plain Triton reads any table)
    groups: bool = False  # whether groups of columns have sizes (``look_up`` with assembly leaves them to the caller)

    def constants(self, config: Config) -> dict[str, Any]:
        """Return the arguments that are known when the kernel is compiled."""
        matrix = self.operation in ("dot", "tile")
        found: dict[str, Any] = {"BITS": self.bits, "STEP": config.step}
        if matrix:
            found |= {"BM": config.bm, "BN": config.bn}
        if self.operation != "look_up":
            found |= {"SPLIT": config.split, "BIAS": self.bias and config.split == 1}
        if self.operation != "look_up" or not self.assembly:
            found["GROUPS"] = self.groups
        if self.operation == "gemv":
            found["M"] = self.rows
        return found | (self._assembly(config, matrix) if self.assembly else {"HEAD": self.head})

    def _assembly(self, config: Config, matrix: bool) -> dict[str, Any]:
        kind: Literal["fp16", "bf16"] = "bf16" if self.kind == "bf16" else "fp16"
        tiles = config.bn // 32 if matrix else 1
        entries = self.entries
        words = ptx.table_words(self.bits, entries) + int(self.operation == "look_up" and entries == 8)
        found: dict[str, Any] = {
            "RESERVE": ptx.reserve(self.bits, tiles, entries).text,
            "PUT": ptx.put().text,
            "WORDS": words,
        }
        if self.operation != "look_up":
            found["ENTRIES"] = entries
        if not matrix:
            found["EVEN"] = self.even
        if self.operation == "gemv":
            load = ptx.activations()
            text = ptx.product(self.bits, self.head, self.rows, self.form, entries)
            found |= {"LOAD_TEXT": load.text, "LOAD_IO": load.constraints}
        elif matrix:
            text = ptx.weights(self.bits, self.head, kind, entries, self.groups)
        else:
            text = ptx.stored(self.bits, self.head, kind, entries)
        return found | {"TEXT": text.text, "IO": text.constraints}

    @property
    def form(self) -> ptx.Form:
        """Return how ``gemv`` takes and adds."""
        if self.kind == "bf16":
            return "bfloat16"
        return "half" if self.bits <= ptx.REGISTER_BITS else "single"

    def kernel(self) -> Any:
        """Return the function Triton compiles."""
        from compress.kernels import triton_plain, triton_ptx

        module = triton_ptx if self.assembly else triton_plain
        return getattr(module, "dot" if self.operation == "tile" else self.operation)
