"""Packed matrices as a checkpoint records them (``quant/FORMAT.md``): which tensors, of which shapes (no torch)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

MAX_GAP_BITS = 8
MAX_RANK = 8
STORED_BITS = 5  # shared codebooks of more bits are computed, unless the seed has more
GROUP = 64  # columns that share a size, where rows have one for every group of them
_BYTES = {"int8": 1, "uint8": 1, "int32": 4, "float16": 2, "float32": 4}

Specification = dict[str, tuple[tuple[int, ...], str]]
"""Tensor name -> (shape, name of its dtype in torch)."""


@dataclass(frozen=True)
class PackedShape:
    """Record one packed matrix as a checkpoint does: ``quantization_config.modules[name]``.

    In a model loaded at 4 of 8 bits, ``parent_bits`` is 4: what is held is what there is.
    """

    out_features: int
    in_features: int
    seed_bits: int
    parent_bits: int
    codebook_dtype: str = "float16"

    @property
    def all_bits(self) -> range:
        """Return every number of bits this matrix can be read at."""
        return range(self.seed_bits, self.parent_bits + 1)

    @property
    def model_bits(self) -> range:
        """Return the numbers of bits of the whole model that it knows of: its own, unless it has a table of them."""
        return self.all_bits

    def at(self, bits: int) -> int:
        """Return the number of bits that it is read at where the model is read at ``bits``."""
        return min(max(bits, self.seed_bits), self.parent_bits)

    def step(self, bits: int) -> int:
        """Return the fewest bits of the model at which so many of its own are read."""
        return next((step for step in self.model_bits if self.at(step) >= bits), self.model_bits[-1])

    @property
    def dense(self) -> PackedShape:
        """Return the matrix as it is in memory, whatever its form on disk."""
        return self

    @property
    def sound(self) -> bool:
        """Tell whether a matrix can have these numbers."""
        bits = 1 <= self.seed_bits <= self.parent_bits <= 8
        return bits and min(self.in_features, self.out_features) > 0 and self.codebook_dtype in ("float16", "float32")

    def specification(self) -> Specification:
        """Return the shape and dtype of every stored tensor, by its name under the module."""
        rows, span = self.out_features, _words(self.in_features)
        tensors: Specification = {
            "weight": ((self.seed_bits, rows, span), "int32"),
            f"codebook_{self.seed_bits}": ((rows, 2**self.seed_bits), self.codebook_dtype),
        }
        for bits in self.all_bits[1:]:
            tensors[f"plane_{bits}"] = ((rows, span), "int32")
            tensors[f"codebook_{bits}"] = ((rows, 2**bits), self.codebook_dtype)
        return tensors

    def tensor_bytes(self) -> dict[str, int]:
        """Return the bytes of every stored tensor, by its name under the module."""
        return {name: math.prod(size) * _BYTES[dtype] for name, (size, dtype) in self.specification().items()}


@dataclass(frozen=True, kw_only=True)
class SparseShape(PackedShape):
    """Record a matrix that is stored sparse (:mod:`compress.quant.format`)."""

    survivors: int  # weights that are stored; the others have code 0, and 0.0 there in their row's codebooks
    gap_bits: int  # low bits of every gap that are stored as planes
    mask_bits: int  # length of the mask's unary part

    @property
    def dense(self) -> PackedShape:
        """Return the record of the matrix as it is in memory."""
        return PackedShape(self.out_features, self.in_features, self.seed_bits, self.parent_bits, self.codebook_dtype)

    @property
    def sound(self) -> bool:
        """Tell whether a matrix can have these numbers."""
        pruned = self.out_features * self.in_features - self.survivors
        if not super().sound or min(pruned, self.survivors, self.gap_bits) < 0 or self.gap_bits > MAX_GAP_BITS:
            return False
        return self.survivors <= self.mask_bits <= self.survivors + (pruned >> self.gap_bits)

    def specification(self) -> Specification:
        """Return the shape and dtype of every stored tensor, by its name under the module."""
        row = PackedShape(1, self.survivors, self.seed_bits, self.parent_bits, self.codebook_dtype)
        codebooks = {name: size for name, size in super().specification().items() if name.startswith("codebook_")}
        tensors: Specification = row.specification() | codebooks | {"mask": ((_words(self.mask_bits),), "int32")}
        if self.gap_bits:
            tensors["mask_low"] = ((self.gap_bits, _words(self.survivors)), "int32")
        return tensors


@dataclass(frozen=True, kw_only=True)
class SharedShape(PackedShape):
    """Record a matrix whose rows share their codebooks (:mod:`compress.quant.shared`)."""

    rank: int  # coefficients of every row

    @property
    def sound(self) -> bool:
        """Tell whether a matrix can have these numbers."""
        return super().sound and 1 <= self.rank <= MAX_RANK

    @property
    def stored_bits(self) -> range:
        """Return the numbers of bits whose codebooks are stored; those of more are computed from the last."""
        return range(self.seed_bits, min(self.parent_bits, max(self.seed_bits, STORED_BITS)) + 1)

    def specification(self) -> Specification:
        """Return the shape and dtype of every stored tensor, by its name under the module."""
        tensors = {name: size for name, size in super().specification().items() if not name.startswith("codebook_")}
        tensors["columns"] = (self.in_features,), self.codebook_dtype
        tensors["rows"] = (self.out_features, 1), self.codebook_dtype
        if self.rank > 1:
            tensors["shapes"] = (self.out_features, self.rank - 1), "int8"
        for bits in self.stored_bits:
            tensors[f"basis_{bits}"] = (self.rank, 2**bits), self.codebook_dtype
        last = self.stored_bits[-1]
        if self.parent_bits > last:
            tensors[f"width_{last + 1}"] = (self.rank, 2**last), self.codebook_dtype
        for bits in range(last + 1, self.parent_bits + 1):
            tensors[f"place_{bits}"] = (2 ** (bits - last),), self.codebook_dtype
        return tensors


@dataclass(frozen=True, kw_only=True)
class GroupedShape(SharedShape):
    """Record a matrix with one codebook for all rows, and a size for every row and group of columns."""

    group: int  # columns that share a size

    @property
    def stored_bits(self) -> range:
        """Return the numbers of bits whose codebooks are stored: all, as one for all rows takes next to nothing."""
        return self.all_bits

    @property
    def sound(self) -> bool:
        """Tell whether a matrix can have these numbers."""
        return super().sound and self.rank == 1 and self.group == GROUP

    def specification(self) -> Specification:
        """Return the shape and dtype of every stored tensor, by its name under the module."""
        return super().specification() | {"groups": ((self.out_features, -(-self.in_features // self.group)), "uint8")}


@dataclass(frozen=True, kw_only=True)
class EmbeddingShape(SharedShape):
    """Record an embedding or a head, which has its own number of bits for every one of the model's."""

    read_at: Mapping[str, int]  # bits of the model, as text, without a gap -> bits of this matrix, which do not fall

    @property
    def model_bits(self) -> range:
        """Return the numbers of bits of the whole model that it knows of."""
        known = sorted(map(int, self.read_at))
        return range(known[0], known[-1] + 1)

    def at(self, bits: int) -> int:
        """Return the number of bits that it is read at where the model is read at ``bits``."""
        known = self.model_bits
        return super().at(self.read_at[str(min(max(bits, known[0]), known[-1]))])

    @property
    def sound(self) -> bool:
        """Tell whether a matrix can have these numbers."""
        table = self.read_at
        if not isinstance(table, Mapping) or not table or not all(key in tuple("12345678") for key in table):
            return False
        if any(type(bits) is not int for bits in table.values()) or len(table) != len(self.model_bits):
            return False
        own = [table[str(bits)] for bits in self.model_bits]
        return super().sound and own == sorted(own) and 1 <= own[0] <= own[-1] <= 8


@dataclass(frozen=True, kw_only=True)
class GroupedEmbeddingShape(EmbeddingShape, GroupedShape):
    """Record an embedding or a head with one codebook for all rows, and a size for every row and group of columns."""


@dataclass(frozen=True, kw_only=True)
class StackedShape(PackedShape):
    """Record the matrices of a mixture's experts, all of one shape, that are stored with one tensor per plane for all.

    In memory every expert is a matrix of its own (:mod:`compress.experts`).
    """

    experts: int

    @property
    def one(self) -> PackedShape:
        """Return the record of one expert's matrix."""
        return PackedShape(self.out_features, self.in_features, self.seed_bits, self.parent_bits, self.codebook_dtype)

    @property
    def sound(self) -> bool:
        """Tell whether a stack can have these numbers."""
        return self.one.sound and self.experts > 0

    @staticmethod
    def axis(tensor: str) -> int:
        """Return along which dimension of a stored tensor the experts lie."""
        return 1 if tensor == "weight" else 0

    def specification(self) -> Specification:
        """Return the shape and dtype of every stored tensor, by its name under the stack."""
        tensors = self.one.specification().items()
        return {
            n: ((*size[: self.axis(n)], self.experts, *size[self.axis(n) :]), dtype) for n, (size, dtype) in tensors
        }


@dataclass(frozen=True, kw_only=True)
class GroupedStack(StackedShape):
    """Record a stack whose experts each have one codebook for all rows, and a size for every row and group of columns."""

    rank: int
    group: int

    @property
    def one(self) -> PackedShape:
        """Return the record of one expert's matrix."""
        return GroupedShape(**{name: value for name, value in vars(self).items() if name != "experts"})


def expert_name(stack: str, place: int) -> str:
    """Return the full name of one expert's matrix: ``mlp.experts.3.down_proj`` of the stack ``mlp.experts.down_proj``."""
    path, _, matrix = stack.rpartition(".")
    return f"{path}.{place}.{matrix}"


def unstacked(shapes: Mapping[str, PackedShape]) -> dict[str, PackedShape]:
    """Return the records of all matrices, those of stacks one by one."""
    found: dict[str, PackedShape] = {}
    for name, shape in shapes.items():
        if isinstance(shape, StackedShape):
            found |= {expert_name(name, place): shape.one for place in range(shape.experts)}
        else:
            found[name] = shape
    return found


def _words(bits: int) -> int:
    """Return how many int32 hold one bit each for a row of so many columns."""
    return -(-bits // 32)


def shape_of(record: Mapping[str, Any]) -> PackedShape:
    """Return the shape that a module's record in ``quantization_config.modules`` describes.

    Raises:
        TypeError: missing or unknown fields.
    """
    marks: dict[str, type[PackedShape]] = {
        "survivors": SparseShape,
        "read_at": EmbeddingShape,
        "group": GroupedShape,
        "rank": SharedShape,
    }
    if "read_at" in record and "group" in record:
        return GroupedEmbeddingShape(**record)
    if "experts" in record:
        marks = {"group": GroupedStack, "experts": StackedShape}
    kind: type[PackedShape] = next((kind for mark, kind in marks.items() if mark in record), PackedShape)
    return kind(**record)


def first_bits(tensor_name: str) -> int | None:
    """Return the fewest bits that need a stored tensor: 5 for ``….plane_5``; None for the seed and dense tensors."""
    kind, _, bits = tensor_name.rpartition(".")[2].partition("_")
    return int(bits) if kind in ("plane", "codebook", "basis", "width", "place") and bits.isdigit() else None


def packed_bytes(shape: PackedShape, bits: int) -> int:
    """Return the bytes of one packed matrix that loading at a number of bits reads."""
    held = shape.tensor_bytes().items()
    return sum(size for tensor, size in held if (first_bits(tensor) or 0) <= max(bits, shape.seed_bits))


def model_bytes(shapes: Iterable[PackedShape], bits: int) -> int:
    """Return the bytes of packed matrices that loading the model at a number of bits reads."""
    return sum(packed_bytes(shape, shape.at(bits)) for shape in shapes)


def bits_range(shapes: Iterable[PackedShape]) -> range:
    """Return all bits that modules can be read at together, from the least seed's to the largest parent's; none of none.

    Embeddings with a table of the model's bits count only where there is nothing else.
    """
    every = list(shapes)
    others = [shape for shape in every if not isinstance(shape, EmbeddingShape)]
    held = [shape.model_bits for shape in others or every]
    return range(min(bits[0] for bits in held), max(bits[-1] for bits in held) + 1) if held else range(0)
