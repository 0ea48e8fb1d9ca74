"""Teach transformers to read compressed checkpoints: importing this module registers a quantiser that rebuilds packed modules.

Only the part of the interface that is the same from transformers 5.0 to the latest is used. A process
that has not imported :mod:`compress` stops with a size mismatch: the seed planes bear the dense weight's name
with another shape, so transformers can not take them for weights nor fill them with random numbers.
"""

import inspect
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from compress.config import METHOD, Bits, StoredConfig, format_version
from compress.decoding import join_steps
from compress.errors import CompressError
from compress.experts import Experts, split
from compress.quant.embedding import BitPlaneEmbedding, BitPlaneHead
from compress.quant.format import expand
from compress.quant.fused import join
from compress.quant.linear import BitPlaneLinear
from compress.quant.records import PackedShape, SparseShape, StackedShape, bits_range, expert_name, unstacked
from compress.shapes import replace_shapes, set_linear, tell_heads
from compress.structure import Linear, architecture, declaration, is_linear, matching


def bits_by_module(bits: Bits, shapes: Mapping[str, PackedShape]) -> dict[str, int]:
    """Resolve a number or a set of patterns to the bits of every packed module; later patterns win.

    Modules that no pattern names stay at the most they have. A single number is brought into each module's own range, so
    that a mix of parents still loads at one number. Bits that no module, or not the named one, has are refused.
    """
    if isinstance(bits, bool) or not isinstance(bits, (int, Mapping)):
        raise CompressError(f"bits must be a number or a mapping of patterns to numbers, not {bits!r}.")
    if isinstance(bits, int):
        known = bits_range(shapes.values())
        if bits not in known:
            raise CompressError(
                f"{bits} bits are not available; this model can be read at {known[0]} to {known[-1]} bits."
            )
        return {name: shape.at(bits) for name, shape in shapes.items()}
    chosen = {name: shape.parent_bits for name, shape in shapes.items()}
    for pattern, value in bits.items():
        for name in [pattern] if pattern in shapes else matching(pattern, list(shapes)):
            if not isinstance(value, int) or value not in (span := shapes[name].all_bits):
                raise CompressError(f"{value} bits are not available for {name}; it has {span[0]} to {span[-1]}.")
            chosen[name] = value
    return chosen


class CompressConfig(StoredConfig, QuantizationConfigMixin):
    """Hold ``quantization_config`` for transformers."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]
        super().__init__(*args, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for ``config.json``; ``pruned`` only where there is something to say."""
        data: dict[str, Any] = super().to_dict()
        if not self.pruned:
            data.pop("pruned", None)
        return data


def name_in(model: PreTrainedModel, stored: str) -> str | None:
    """Return what files of a model's class call a module recorded as ``stored``; None for a head that it does not have.

    ``AutoModel`` builds the inner model of a causal LM, whose names lack a prefix.
    """
    start, inner = f"{model.base_model_prefix}.", model.base_model
    if stored.startswith(start) or hasattr(inner, stored.partition(".")[0]):
        return ("" if inner is model else start) + stored.removeprefix(start)
    return None if model.get_output_embeddings() is None else stored  # type: ignore[no-untyped-call]


def replace_packed(model: PreTrainedModel, shapes: Mapping[str, PackedShape]) -> None:
    """Put packed modules, on the meta device, where a model has dense ones, and refuse records that do not fit it."""
    known = declaration(model.config)
    renamed = {old: new for new, old in known.renamed.items()} if known else {}
    for stored, shape in shapes.items():
        name = stored if hasattr(model, stored.partition(".")[0]) else renamed.get(stored, stored)
        if isinstance(shape, StackedShape):
            _replace_stack(model, name, shape)
            continue
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
            packed: nn.Module = (
                # Gemma's embeddings multiply by a constant, under this name from the release that moved it there.
                BitPlaneEmbedding(shape, weight.dtype, getattr(module, "scalar_embed_scale", 1.0))
                if embedding
                else BitPlaneLinear(shape, getattr(module, "bias", None) is not None, weight.dtype)
            )
        packed._is_hf_initialized = True  # type: ignore[assignment]  # transformers draws random numbers for what is missing; we refuse it
        model.set_submodule(name, packed)
        if isinstance(packed, BitPlaneEmbedding) and getattr(model.config, "tie_word_embeddings", False):
            tie_head(model, packed)


def tie_head(model: PreTrainedModel, embedding: BitPlaneEmbedding) -> None:
    """Let the head of a model multiply by its packed embedding, and transformers tie nothing."""
    own = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if own is None:
        return  # a model without its head
    name = next(name for name, module in model.named_modules() if module is own)
    head = BitPlaneHead(embedding, getattr(model.get_submodule(name), "bias", None))
    model.set_submodule(name, head)
    model.all_tied_weights_keys.pop(f"{name}.weight", None)


def _replace_stack(model: PreTrainedModel, name: str, shape: StackedShape) -> None:
    """Put what a stack of experts is loaded into where a model has a parameter of 3 dimensions."""
    path, _, matrix = name.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        module = nn.Module()
    if experts := split(module):
        module = experts
        model.set_submodule(path, module)
    if not isinstance(module, Experts) or matrix not in module.matrices:
        raise CompressError(f"config.json records packed experts {name!r} that this model does not have.")
    weight = module.expert(0).get_submodule(matrix).get_parameter("weight")
    if (module.counts[matrix], *weight.shape) != (shape.experts, shape.out_features, shape.in_features):
        raise CompressError(
            f"{name}: recorded as {shape.experts} x {shape.out_features} x {shape.in_features}, but the model's own shape is "
            f"{module.counts[matrix]} x {weight.shape[0]} x {weight.shape[1]}."
        )
    module.hold_stack(matrix, shape, weight.dtype)


def packed_modules(model: nn.Module) -> dict[str, BitPlaneLinear | BitPlaneEmbedding]:
    """Find every packed module of a loaded model, by the name it has in the checkpoint, whatever adapter is around it.

    A head that is tied to the embedding has no tensors of its own, and is none of them.
    """
    return {
        name.removesuffix(".base_layer"): module
        for name, module in model.named_modules()
        if isinstance(module, (BitPlaneLinear, BitPlaneEmbedding))
    }


def resize_packed(
    model: PreTrainedModel, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, *_: Any, **__: Any
) -> nn.Module:
    """Stand in for ``resize_token_embeddings`` of a model whose embedding or head is packed: no row can be added to it."""
    embedding: Any = model.get_input_embeddings()
    wanted, step = new_num_tokens or embedding.num_embeddings, pad_to_multiple_of or 1
    if -(-wanted // step) * step != embedding.num_embeddings:
        raise CompressError(
            f"{model.name_or_path}: its embedding or head is packed, so no token can be added or taken away; call dequantize() "
            "on the model first, or compress it again with embedding_bits 0."
        )
    return embedding  # type: ignore[no-any-return]


def join_layers(model: PreTrainedModel) -> None:
    """Let the layers of a model that multiply the same input be launched together where GPU kernels serve them."""
    linears = {name: module for name, module in packed_modules(model).items() if isinstance(module, BitPlaneLinear)}
    if any(module.is_tiled for module in linears.values()):
        join(linears, architecture(model.config).fused)


def cache_name(model: nn.Module) -> str:
    """Return what this release of transformers calls a model's cache of keys and values, given and returned.

    An adapter's ``forward`` takes whatever the model inside does, and does not say what.
    """
    unwrap: Any = getattr(model, "get_base_model", lambda: model)
    return "cache" if "cache" in inspect.signature(unwrap().forward).parameters else "past_key_values"


def rebuild(model: nn.Module) -> None:
    """Expand, one after the other, the modules filled in the sparse form; those on the meta device are left alone."""
    for name, module in packed_modules(model).items():
        if isinstance(module.shape, SparseShape) and not module.get_buffer("mask").is_meta:
            tensors = expand(name, module.shape, dict(module.named_buffers()))
            module.hold(module.shape.dense, tensors)


def _unread(stored: Mapping[str, PackedShape], loaded: Mapping[str, PackedShape]) -> list[str]:
    """Make patterns for the stored tensors that the bits in use, or the model, do not need."""
    by_tensors: dict[tuple[str, ...], list[str]] = {}
    for name, shape in stored.items():
        unread = shape.specification().keys() - (loaded[name].specification().keys() if name in loaded else set())
        by_tensors.setdefault(tuple(sorted(unread)), []).append(re.escape(name))
    return [f"^(?:{'|'.join(names)})\\.(?:{'|'.join(unread)})$" for unread, names in by_tensors.items() if unread]


def _most(name: str, shape: PackedShape, bits: Mapping[str, int]) -> int:
    """Return the most bits that are asked of a matrix, or of the matrices of a stack."""
    if isinstance(shape, StackedShape):
        return max(bits[expert_name(name, place)] for place in range(shape.experts))
    return bits[name]


def _has(model: nn.Module, name: str) -> bool:
    """Tell whether a model still has a module of a name."""
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


def _bytes(shapes: Mapping[str, PackedShape]) -> int:
    return sum(sum(shape.tensor_bytes().values()) for shape in shapes.values())


class CompressQuantizer(HfQuantizer):
    """Build a compressed model around its checkpoint's tensors."""

    requires_calibration = False
    stored_share = 1.0  # bytes of the packed modules as stored, per byte of what they become
    experts_bits: Mapping[str, int] = MappingProxyType({})  # by matrix, as asked for

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        config = self.quantization_config
        assert isinstance(config, CompressConfig)
        stored = config.shapes()
        bits = bits_by_module({} if config.bits is None or not stored else config.bits, unstacked(stored))
        own = {name: name_in(model, name) for name in [*stored, *config.pruned]}
        loaded = {
            place: replace(shape, parent_bits=_most(name, shape, bits))
            for name, shape in stored.items()
            if (place := own[name])
        }
        self.experts_bits = {
            expert_name(own[name] or name, place): bits[expert_name(name, place)]
            for name, shape in stored.items()
            if isinstance(shape, StackedShape)
            for place in range(shape.experts)
        }
        pruned = {own[name] or name: shape for name, shape in config.block_shapes().items()}
        replace_shapes(model, pruned)
        replace_packed(model, loaded)
        known = model._keys_to_ignore_on_load_unexpected  # a list in transformers 5.0, a set in later ones
        collection = list if known is None else type(known)
        model._keys_to_ignore_on_load_unexpected = collection(
            [*(known or []), *_unread({own[name] or name: shape for name, shape in stored.items()}, loaded)]
        )
        dense = {name: shape.dense for name, shape in loaded.items()}
        self.stored_share = min(1.0, _bytes(loaded) / max(1, _bytes(dense)))
        # What will be in memory is what save_pretrained would write, so that is what the config says.
        config.format_version, config.bits = format_version(dense.values(), pruned), None
        config.modules = {name: dict(vars(shape)) for name, shape in dense.items()}
        config.pruned = {name: dict(vars(shape)) for name, shape in pruned.items()}
        return model

    def update_weight_conversions(  # releases up to 5.19 give no model
        self, weight_conversions: list[Any], model: PreTrainedModel | None = None
    ) -> list[Any]:
        """Leave out what merges or turns tensors: a compressed checkpoint has them as the model has them, but for names."""
        return [entry for entry in weight_conversions if not isinstance(entry, WeightConverter)]

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        # transformers marks what it read from the checkpoint; it would fill the rest with whatever memory held.
        packed = packed_modules(model)
        experts = {name: module for name, module in model.named_modules() if isinstance(module, Experts)}
        for name, module in [*packed.items(), *experts.items()]:
            for tensor, value in [*module.named_buffers(), *module.named_parameters()]:
                if not getattr(value, "_is_hf_initialized", False):
                    where = f"tensor {name}.{tensor}"
                    if "disk" in getattr(model, "hf_device_map", {}).values():
                        raise CompressError(
                            f"{model.name_or_path}: {where} is packed, so it cannot be left on the disk; give a device_map "
                            "without disk, or more memory in max_memory."
                        )
                    raise CompressError(f"{model.name_or_path}: {where} is missing; fetch or write it again.")
        for path, mixture in experts.items():
            mixture.take_stacks(self.experts_bits, path)
        packed = packed_modules(model)
        rebuild(model)
        for module in packed.values():
            if isinstance(module, BitPlaneLinear):
                module.tile()
        join_layers(model)
        join_steps(model)
        assert isinstance(self.quantization_config, CompressConfig)
        tell_heads(model.config, self.quantization_config.block_shapes())
        ends = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[no-untyped-call]
        if any(module is end for module in packed.values() for end in ends):
            model.resize_token_embeddings = partial(resize_packed, model)  # type: ignore[assignment, method-assign]
        return model

    def dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Make all of a model dense, of ``dtype``, or of the one it has by now, which its config does not know."""
        wanted = dtype or model.dtype
        return super().dequantize(model, wanted).to(wanted)  # type: ignore[no-any-return, no-untyped-call]

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Put dense modules, of the bits in use, where a model has packed ones."""
        assert isinstance(self.quantization_config, CompressConfig)
        if self.quantization_config.pruned:
            raise CompressError(
                f"{model.name_or_path}: its blocks are of different sizes, which only a compressed checkpoint can record, so a "
                "dequantised model could not be saved; prune with mode: uniform for one that can."
            )
        with init_empty_weights(include_buffers=False):
            plain: PreTrainedModel = type(model)(model.config)
        for name, module in list(model.named_modules()):
            if isinstance(module, BitPlaneHead):
                model.set_submodule(name, plain.get_submodule(name))  # what it is tied to comes with tie_weights
            if isinstance(module, Experts):
                model.set_submodule(name, module.joined(plain.get_submodule(name), dtype or model.dtype))
            if not isinstance(module, (BitPlaneLinear, BitPlaneEmbedding)) or not _has(model, name):
                continue
            dense = plain.get_submodule(name.replace(".base_layer", ""))
            weight = module.dense(dtype or model.dtype)
            if isinstance(module, BitPlaneLinear):
                set_linear(dense, weight, module.bias)
            else:
                dense.weight = nn.Parameter(weight)
            dense.requires_grad_(".base_layer" not in name)
            model.set_submodule(name, dense.to(weight.device).train(module.training))
        model.__dict__.pop("resize_token_embeddings", None)
        model.all_tied_weights_keys = plain.all_tied_weights_keys
        model.tie_weights()
        return model

    def adjust_max_memory(self, max_memory: dict[str, int | str]) -> dict[str, int | str]:
        """Leave room on every device for what sparse modules become: transformers fills devices by what is stored."""
        return {place: int(float(room) * self.stored_share) for place, room in max_memory.items()}

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Tell that a loaded model can be saved again."""
        return True

    is_trainable = True  # adapters and prompts can be; the packed weights are frozen
    is_compileable = True  # the forward pass of a packed module is one operator


# Transformers refuses a second registration, which a reloaded module would be.
if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
    register_quantization_config(METHOD)(CompressConfig)
if METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantizer(METHOD)(CompressQuantizer)
