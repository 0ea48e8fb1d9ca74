"""What ``config.json`` records of a compressed model, and whether its files agree with it (no torch)."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.errors import CompressError
from compress.quant.records import (
    GroupedEmbeddingShape,
    GroupedShape,
    GroupedStack,
    PackedShape,
    SharedShape,
    SparseShape,
    StackedShape,
    first_bits,
    shape_of,
)
from compress.weights import INDEX, Checkpoint

METHOD = "compress"
(
    DENSE_VERSION,
    SPARSE_VERSION,
    SHAPED_VERSION,
    SHARED_VERSION,
    EXPERTS_VERSION,
    GROUPED_VERSION,
    GROUPED_ALL_VERSION,
) = range(1, 8)
"""Versions of the format (:func:`format_version`)."""

Bits = int | Mapping[str, int]
"""Bits for all packed modules, or by exact module name or ``re:`` pattern."""


@dataclass(frozen=True)
class BlockShape:
    """Hold how large one block is: query heads, a multiple of the key-value heads, and the channels within the MLP."""

    heads: int
    key_value_heads: int
    channels: int

    @property
    def queries(self) -> int:
        """Return the query heads per key-value head."""
        return self.heads // self.key_value_heads


Shapes = Mapping[str, BlockShape]
"""Block name -> its shape, for blocks that are not as the config says."""


class StoredConfig:
    """Hold ``quantization_config`` of a compressed checkpoint (``quant/FORMAT.md``); keys of other releases are ignored.

    ``modules`` has fields of :class:`PackedShape` by packed module, ``pruned`` those of :class:`BlockShape` by block.
    """

    def __init__(
        self,
        format_version: int = DENSE_VERSION,
        bits: Bits | None = None,
        modules: Mapping[str, Mapping[str, Any]] | None = None,
        pruned: Mapping[str, Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> None:
        if format_version not in range(DENSE_VERSION, GROUPED_ALL_VERSION + 1):
            raise CompressError(
                f"config.json: format_version {format_version} is none of {DENSE_VERSION} to {GROUPED_ALL_VERSION}, "
                "which this release of compress reads; install a release that knows it."
            )
        self.format_version, self.bits = format_version, bits
        self.modules, self.pruned = _fields(modules, "modules"), _fields(pruned, "pruned")
        self.pruned = {name: dict(vars(shape)) for name, shape in self.block_shapes().items()}
        if self.pruned and format_version < SHAPED_VERSION:
            raise CompressError(
                f"config.json: quantization_config.pruned needs format_version {SHAPED_VERSION} or more, "
                f"not {format_version}."
            )

    def block_shapes(self) -> dict[str, BlockShape]:
        """Return the shapes of the recorded blocks, and refuse records that make no sense."""
        try:
            shapes = {name: BlockShape(**fields) for name, fields in self.pruned.items()}
        except TypeError as error:
            raise CompressError(f"config.json: quantization_config.pruned is malformed: {error}.") from error
        for name, shape in shapes.items():
            sound = all(type(value) is int and value > 0 for value in vars(shape).values())
            if not sound or shape.heads % shape.key_value_heads:
                raise CompressError(f"config.json: quantization_config.pruned[{name!r}] is out of range: {shape}.")
        return shapes

    def shapes(self) -> dict[str, PackedShape]:
        """Return the shapes of the packed modules, and refuse records that make no sense."""
        try:
            shapes = {name: shape_of(fields) for name, fields in self.modules.items()}
        except TypeError as error:
            raise CompressError(f"config.json: quantization_config.modules is malformed: {error}.") from error
        if self.format_version < format_version(shapes.values()):
            raise CompressError(
                f"config.json: quantization_config.modules is malformed: version {self.format_version} has no modules "
                f"that are stored {'shared or as stacks' if self.format_version > DENSE_VERSION else 'sparse or shared'}."
            )
        for name, shape in shapes.items():
            named = {field: value for field, value in vars(shape).items() if field not in ("codebook_dtype", "read_at")}
            if any(type(value) is not int for value in named.values()):
                raise CompressError(
                    f"config.json: quantization_config.modules[{name!r}] has a field that is no integer."
                )
            if not shape.sound:
                raise CompressError(f"config.json: quantization_config.modules[{name!r}] is out of range: {shape}.")
        return shapes


def _fields(records: Any, key: str) -> dict[str, dict[str, Any]]:
    """Copy the records under a key of ``quantization_config``: name -> fields."""
    try:
        return {str(name): dict(fields) for name, fields in (records or {}).items()}
    except (TypeError, ValueError, AttributeError) as error:
        raise CompressError(f"config.json: quantization_config.{key} is malformed: {error}.") from error


def stored_config(settings: Mapping[str, Any] | None) -> StoredConfig | None:
    """Read a ``quantization_config``; return None where it is absent or of another method."""
    ours = settings is not None and settings.get("quant_method") == METHOD
    return StoredConfig(**settings) if settings and ours else None


def format_version(shapes: Iterable[PackedShape], pruned: Shapes | None = None) -> int:
    """Return the version of the format that modules, and blocks of sizes the rest of the config does not tell, need."""
    held = list(shapes)
    if any(isinstance(shape, (GroupedStack, GroupedEmbeddingShape)) for shape in held):
        return GROUPED_ALL_VERSION
    if any(isinstance(shape, GroupedShape) for shape in held):
        return GROUPED_VERSION
    if any(isinstance(shape, StackedShape) for shape in held):
        return EXPERTS_VERSION
    if any(isinstance(shape, SharedShape) for shape in held):
        return SHARED_VERSION
    if pruned:
        return SHAPED_VERSION
    return SPARSE_VERSION if any(isinstance(shape, SparseShape) for shape in held) else DENSE_VERSION


def read_settings(folder: Path) -> StoredConfig | None:
    """Read ``quantization_config`` of a model folder; return None for a dense model."""
    path = folder / "config.json"
    try:
        return stored_config(json.loads(path.read_text(encoding="utf-8")).get("quantization_config"))
    except (OSError, ValueError, AttributeError) as error:
        raise CompressError(f"{path}: cannot be read ({error}); is {folder} a model folder?") from error


def index_name(bits: int | None) -> str:
    """Return the name of the index for some bits, ``variant="<bits>bit"`` for transformers; or, for None, of everything."""
    return INDEX if bits is None else INDEX.replace(".json", f".{bits}bit.json")


def check_tensors(folder: Path, config: StoredConfig, bits: int | None = None) -> int:
    """Check that every packed tensor that some bits need (all, for None) is there, of its recorded shape and dtype.

    Only headers are read. Return how many there are; refuse the first that is wrong, by file and tensor.
    """
    info, count = Checkpoint(folder, index_name=index_name(bits)).info(), 0
    for name, shape in config.shapes().items():
        for tensor, (size, dtype) in shape.specification().items():
            if (first_bits(tensor) or 0) > (shape.at(bits) if bits else shape.parent_bits):
                continue
            found = info.get(f"{name}.{tensor}")
            if found is None:
                raise CompressError(f"{folder}: tensor {name}.{tensor} is missing; fetch or write it again.")
            if found.shape != size or found.dtype != dtype:
                raise CompressError(
                    f"{found.file}: {name}.{tensor} is {found.dtype} {list(found.shape)} instead of {dtype} {list(size)}."
                )
            count += 1
    return count
