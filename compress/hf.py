"""The Hugging Face side: one quantiser that rebuilds packed modules, registered by ``import compress``.

Only the part of the interface that is the same from transformers 5.0 to the latest is used. A process
that has not imported :mod:`compress` stops with a size mismatch: the seed planes bear the dense weight's name
with another shape, so transformers can not take them for weights nor fill them with random numbers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from compress.errors import CompressError, did_you_mean
from compress.quant.format import PackedShape, SparseShape, bits_range, expand, shape_of
from compress.quant.fused import join
from compress.quant.linear import BitPlaneEmbedding, BitPlaneLinear
from compress.shapes import BlockShape, Shapes, read_shapes, replace_shapes
from compress.structure import Linear, architecture, is_linear

METHOD = "compress"
DENSE_VERSION, SPARSE_VERSION, SHAPED_VERSION = 1, 2, 3
"""Of the format: the third if and only if blocks of other sizes than the config's are recorded, the second if and only if
none is and a module is stored sparse."""

Bits = int | Mapping[str, int]
"""A width for all packed modules, or widths by exact module name or ``re:`` pattern."""


def matching(pattern: str, names: list[str]) -> list[str]:
    """The names a pattern means: an exact name, or ``re:`` and a regular expression for a whole name.

    Raises:
        CompressError: it matches nothing, or is not a regular expression.
    """
    if pattern.startswith("re:"):
        try:
            rule = re.compile(pattern[3:])
        except re.error as error:
            raise CompressError(f"pattern {pattern!r} is not a regular expression: {error}.") from error
        found = [name for name in names if rule.fullmatch(name)]
    else:
        found = [name for name in names if name == pattern]
    if not found:
        raise CompressError(
            f"pattern {pattern!r} matches no module; give a full name or 're:' and a regular expression for one. "
            f"{did_you_mean(pattern.removeprefix('re:'), names[:40])}"
        )
    return found


def widths_for(bits: Bits, shapes: Mapping[str, PackedShape]) -> dict[str, int]:
    """Resolve a width or a set of patterns to one width per packed module; later patterns win.

    Modules that no pattern names stay at the most they have. A single number is brought into each
    module's own range, so that a mix of parents still loads at one width.

    Raises:
        CompressError: a width no module (or not the named one) can be read at; a pattern that matches nothing.
    """
    if isinstance(bits, bool) or not isinstance(bits, (int, Mapping)):
        raise CompressError(f"bits must be a number or a mapping of patterns to numbers, not {bits!r}.")
    if isinstance(bits, int):
        stored = bits_range(shapes.values())
        if bits not in stored:
            raise CompressError(
                f"width {bits} is not available; this model can be read at {stored[0]} to {stored[-1]} bits."
            )
        return {name: min(max(bits, s.seed_bits), s.parent_bits) for name, s in shapes.items()}
    widths = {name: shape.parent_bits for name, shape in shapes.items()}
    for pattern, value in bits.items():
        for name in matching(pattern, list(shapes)):
            if not isinstance(value, int) or value not in shapes[name].widths:
                span = shapes[name].widths
                raise CompressError(f"width {value} for {name} is not available; it has {span[0]} to {span[-1]} bits.")
            widths[name] = value
    return widths


class CompressConfig(QuantizationConfigMixin):
    """``quantization_config`` of a compressed checkpoint (``quant/FORMAT.md``).

    Args:
        format_version: of the stored tensors.
        bits: width to load at, or patterns; None means all that is stored.
        modules: packed module name -> fields of :class:`PackedShape`.
        pruned: block name -> fields of :class:`BlockShape`, for blocks that are not as the rest of the config says.
    """

    def __init__(
        self,
        format_version: int = DENSE_VERSION,
        bits: Bits | None = None,
        modules: Mapping[str, Mapping[str, Any]] | None = None,
        pruned: Mapping[str, Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]
        if format_version not in (DENSE_VERSION, SPARSE_VERSION, SHAPED_VERSION):
            raise CompressError(
                f"config.json: format_version {format_version} is none of {DENSE_VERSION}, {SPARSE_VERSION} and "
                f"{SHAPED_VERSION}, which this release of compress reads; install a release that knows it."
            )
        self.format_version, self.bits = format_version, bits
        try:
            self.modules = {name: dict(fields) for name, fields in (modules or {}).items()}
        except (TypeError, ValueError, AttributeError) as error:
            raise CompressError(f"config.json: quantization_config.modules is malformed: {error}.") from error
        self.pruned = {name: vars(shape) for name, shape in read_shapes(pruned or {}).items()}
        if self.pruned and format_version != SHAPED_VERSION:
            raise CompressError(
                f"config.json: quantization_config.pruned needs format_version {SHAPED_VERSION}, not {format_version}."
            )

    def to_dict(self) -> dict[str, Any]:
        """For ``config.json``; ``pruned`` only where there is something to say."""
        data: dict[str, Any] = super().to_dict()
        if not self.pruned:
            data.pop("pruned", None)
        return data

    def block_shapes(self) -> dict[str, BlockShape]:
        """The recorded blocks."""
        return read_shapes(self.pruned)

    def shapes(self) -> dict[str, PackedShape]:
        """The packed modules.

        Raises:
            CompressError: a record with missing or unknown fields, or values that make no sense.
        """
        try:
            shapes = {name: shape_of(fields) for name, fields in self.modules.items()}
        except TypeError as error:
            raise CompressError(f"config.json: quantization_config.modules is malformed: {error}.") from error
        if self.format_version < format_version(shapes.values()):
            raise CompressError(
                "config.json: quantization_config.modules is malformed: version 1 has no sparse modules."
            )
        for name, shape in shapes.items():
            if any(type(value) is not int for field, value in vars(shape).items() if field != "codebook_dtype"):
                raise CompressError(
                    f"config.json: quantization_config.modules[{name!r}] has a field that is no integer."
                )
            sound = 1 <= shape.seed_bits <= shape.parent_bits <= 8 and min(shape.in_features, shape.out_features) > 0
            sound = sound and (not isinstance(shape, SparseShape) or shape.sound)
            if not sound or shape.codebook_dtype not in ("float16", "float32"):
                raise CompressError(f"config.json: quantization_config.modules[{name!r}] is out of range: {shape}.")
        return shapes


def replace_packed(model: PreTrainedModel, shapes: Mapping[str, PackedShape]) -> None:
    """Put packed modules, on the meta device, where a model has dense ones.

    Raises:
        CompressError: a recorded module is not there or has other dimensions.
    """
    renamed = {old: new for new, old in architecture(model.config).renamed.items()}
    for stored, shape in shapes.items():
        name = stored if hasattr(model, stored.partition(".")[0]) else renamed.get(stored, stored)
        try:
            module = model.get_submodule(name)
        except AttributeError:
            raise CompressError(
                f"config.json records a packed module {name!r} that this model does not have."
            ) from None
        embedding = isinstance(module, nn.Embedding)
        if not embedding and not is_linear(module):
            raise CompressError(f"config.json records {name!r} as packed, but it is a {type(module).__name__}.")
        weight = Linear(name, module).weight
        if tuple(weight.shape) != (shape.out_features, shape.in_features):
            raise CompressError(
                f"{name}: recorded as {shape.out_features} x {shape.in_features}, but the model's own shape is "
                f"{weight.shape[0]} x {weight.shape[1]}."
            )
        with torch.device("meta"):
            packed: nn.Module
            if embedding:
                # Gemma's embeddings multiply by a constant, under this name from the release that moved it there.
                packed = BitPlaneEmbedding(shape, weight.dtype, getattr(module, "scalar_embed_scale", 1.0))
            else:
                packed = BitPlaneLinear(shape, getattr(module, "bias", None) is not None, weight.dtype)
        model.set_submodule(name, packed)


def packed_modules(model: nn.Module) -> dict[str, BitPlaneLinear | BitPlaneEmbedding]:
    """Find every packed module of a loaded model, by the name it has in the checkpoint, whatever adapter is around it."""
    return {
        name.removesuffix(".base_layer"): module
        for name, module in model.named_modules()
        if isinstance(module, (BitPlaneLinear, BitPlaneEmbedding))
    }


def join_layers(model: PreTrainedModel) -> None:
    """Let the layers of a model that multiply the same input be launched together where GPU kernels serve them."""
    linears = {name: module for name, module in packed_modules(model).items() if isinstance(module, BitPlaneLinear)}
    join(linears, architecture(model.config).fused)


def format_version(shapes: Iterable[PackedShape], pruned: Shapes | None = None) -> int:
    """The version of the format that modules and blocks need."""
    if pruned:
        return SHAPED_VERSION
    return SPARSE_VERSION if any(isinstance(shape, SparseShape) for shape in shapes) else DENSE_VERSION


def rebuild(model: nn.Module) -> None:
    """Let every module that was filled in the sparse form hold the planes it computes with, one after the other.

    Modules that have not been filled (on the meta device) are left alone.

    Raises:
        CompressError: a mask that does not fit its matrix.
    """
    for name, module in packed_modules(model).items():
        if isinstance(module.shape, SparseShape) and not module.get_buffer("mask").is_meta:
            tensors = expand(name, module.shape, dict(module.named_buffers()))
            module.hold(module.shape.dense, tensors)


def records(shapes: Mapping[str, PackedShape]) -> dict[str, dict[str, Any]]:
    """The form of ``quantization_config.modules``."""
    return {name: asdict(shape) for name, shape in shapes.items()}


def _unread(stored: Mapping[str, PackedShape], loaded: Mapping[str, PackedShape]) -> list[str]:
    """Patterns for the stored tensors that the widths in use do not need."""
    by_tensors: dict[tuple[str, ...], list[str]] = {}
    for name, shape in stored.items():
        unread = shape.specification().keys() - loaded[name].specification().keys()
        by_tensors.setdefault(tuple(sorted(unread)), []).append(re.escape(name))
    return [f"^(?:{'|'.join(names)})\\.(?:{'|'.join(unread)})$" for unread, names in by_tensors.items() if unread]


def _bytes(shapes: Mapping[str, PackedShape]) -> int:
    sizes = [item for shape in shapes.values() for item in shape.specification().values()]
    return sum(torch.Size(size).numel() * dtype.itemsize for size, dtype in sizes)


class CompressQuantizer(HfQuantizer):
    """Builds a compressed model around its checkpoint's tensors."""

    requires_calibration = False
    stored_share = 1.0  # bytes of the packed modules as stored, per byte of what they become

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        config = self.quantization_config
        assert isinstance(config, CompressConfig)
        stored = config.shapes()
        widths = {name: shape.parent_bits for name, shape in stored.items()}
        if config.bits is not None and stored:
            widths = widths_for(config.bits, stored)
        loaded = {name: replace(shape, parent_bits=widths[name]) for name, shape in stored.items()}
        pruned = config.block_shapes()
        replace_shapes(model, pruned)
        replace_packed(model, loaded)
        known = model._keys_to_ignore_on_load_unexpected  # a list in transformers 5.0, a set in later ones
        collection = list if known is None else type(known)
        model._keys_to_ignore_on_load_unexpected = collection([*(known or []), *_unread(stored, loaded)])
        dense = {name: shape.dense if isinstance(shape, SparseShape) else shape for name, shape in loaded.items()}
        self.stored_share = min(1.0, _bytes(loaded) / max(1, _bytes(dense)))
        # What will be in memory is what save_pretrained would write, so that is what the config says.
        config.format_version, config.modules, config.bits = format_version([], pruned), records(dense), None
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        # transformers marks what it read from the checkpoint; it would fill the rest with whatever memory held.
        buffers = {
            f"{name}.{tensor}": getattr(buffer, "_is_hf_initialized", False)
            for name, module in packed_modules(model).items()
            for tensor, buffer in module.named_buffers()
        }
        if not all(buffers.values()):
            absent = next(name for name, read in buffers.items() if not read)
            raise CompressError(
                f"{model.name_or_path}: tensor {absent} is missing; fetch or write the checkpoint again."
            )
        rebuild(model)
        for module in packed_modules(model).values():
            if isinstance(module, BitPlaneLinear):
                module.tile()
        join_layers(model)
        return model

    def adjust_max_memory(self, max_memory: dict[str, int | str]) -> dict[str, int | str]:
        """Devices are filled by what is stored; leave room for what sparse modules become."""
        return {place: int(float(room) * self.stored_share) for place, room in max_memory.items()}

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """A loaded model can be saved again."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters and prompts can be trained on it; the packed weights are frozen."""
        return True

    @property
    def is_compileable(self) -> bool:
        """The forward pass of a packed module is one operator."""
        return True


def register() -> None:
    """Make transformers know the method; calling it again does nothing."""
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(CompressConfig)
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(METHOD)(CompressQuantizer)
