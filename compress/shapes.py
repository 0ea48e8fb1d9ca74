"""Build models of blocks with fewer heads and MLP channels, and find out whether a plain config can say their sizes."""

from collections.abc import Sequence
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from compress.config import BlockShape, Shapes
from compress.errors import CompressError
from compress.models import empty_model, text_config
from compress.structure import (
    CHANNELS,
    Architecture,
    Groups,
    Linear,
    architecture,
    block_prefix,
    declaration,
    inspected,
)


def groups_of(structure: Architecture) -> Groups:
    """Return the declaration of a family's groups, and refuse a family that has none."""
    if structure.groups is None:
        raise CompressError(
            f"model type {structure.model_types[0]!r} is not declared for structured pruning, and its blocks are of no form that is "
            "recognised, so no heads, channels or blocks can be removed from it; declare an Architecture with Groups for it (CONTRIBUTING.md), or prune single weights."
        )
    return structure.groups


def head_dim(config: PretrainedConfig) -> int:
    """Return the dimension of a head."""
    text: Any = text_config(config)
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)


def config_shape(config: PretrainedConfig) -> BlockShape:
    """Return the shape that a config gives to every block; its query heads must be a multiple of the key-value heads."""
    known = declaration(config)
    key = known.groups.config_channels if known and known.groups else CHANNELS
    heads = int(config.num_attention_heads)
    shared = int(getattr(config, "num_key_value_heads", None) or heads)
    if heads % shared:
        raise CompressError(
            f"config.json: {heads} query heads are not a multiple of {shared} key-value heads, so there are no equal groups of "
            "heads to remove."
        )
    channels = getattr(config, key, None) if key else None
    return BlockShape(heads, shared, int(channels or 4 * config.hidden_size))


def block_shape(config: PretrainedConfig, shapes: Shapes, name: str) -> BlockShape:
    """Return the shape of a block, recorded or the config's."""
    return shapes.get(name) or config_shape(config)


def linear_sizes(
    structure: Architecture, shape: BlockShape, dimension: int
) -> dict[str, tuple[int | None, int | None]]:
    """Return (outputs, inputs) of the linears of a block of some shape, by inner name; None where it is the hidden size."""
    queries, shared = shape.heads * dimension, shape.key_value_heads * dimension
    separate = groups_of(structure).layout == "separate"
    sizes: dict[str, tuple[int | None, int | None]] = {}
    *first, last = structure.attention
    for position, name in enumerate(first):
        sizes[name] = ((queries if position == 0 else shared) if separate else 3 * queries, None)
    sizes[last] = (None, queries)
    *first, last = structure.mlp
    return sizes | dict.fromkeys(first, (shape.channels, None)) | {last: (None, shape.channels)}


def shape_block(block: nn.Module, structure: Architecture, shape: BlockShape, dimension: int) -> None:
    """Give linears of another size empty parameters of a shape, on the meta device, and tell the block's modules."""
    for name, (outputs, inputs) in linear_sizes(structure, shape, dimension).items():
        module = block.get_submodule(name)
        rows, columns = Linear(name, module).shape
        size = (outputs or rows, inputs or columns)
        if size != (rows, columns):
            weight = torch.empty(size, dtype=module.get_parameter("weight").dtype, device="meta")
            bias = getattr(module, "bias", None)
            set_linear(module, weight, None if bias is None else bias.new_empty(size[0], device="meta"))
    tell_block(block, structure, shape, dimension)


def tell_block(block: nn.Module, structure: Architecture, shape: BlockShape, dimension: int) -> None:
    """Set the attributes from which a block's forward pass knows its heads."""
    attention = block.get_submodule(structure.attention[0].rpartition(".")[0])
    values = {"heads": shape.heads, "width": shape.heads * dimension, "queries": shape.queries}
    for attribute, word in groups_of(structure).attributes.items():
        setattr(attention, attribute, values[word])


def tell_heads(config: PretrainedConfig, shapes: Shapes) -> None:
    """Tell readers of a loaded model's config of blocks with fewer heads: caches are made by it. Older releases have no place for it."""
    heads = {shape.key_value_heads for shape in shapes.values()}
    if not heads or not hasattr(config, "per_layer_config") or not heads - {config_shape(config).key_value_heads}:
        return
    names = [block_prefix(architecture(config), index) for index in range(config.num_hidden_layers)]
    counts = [block_shape(config, shapes, name).key_value_heads for name in names]
    grouped = getattr(config, "num_key_value_heads", None) is not None
    key, fixed = ("num_key_value_heads", {}) if grouped else ("num_attention_heads", {"head_dim": head_dim(config)})
    config.per_layer_config = {index: {key: count, **fixed} for index, count in enumerate(counts)}
    config.allow_global_per_layer_attribute_access = True


def set_linear(module: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
    """Put other parameters into an ``nn.Linear`` or ``Conv1D``: a weight [out_features, in_features] and its bias."""
    rows, columns = weight.shape
    stored = weight.t().contiguous() if isinstance(module, Conv1D) else weight
    module.weight = nn.Parameter(stored, requires_grad=False)
    if bias is not None:
        module.bias = nn.Parameter(bias, requires_grad=False)
    names = ("nf", "nx") if isinstance(module, Conv1D) else ("out_features", "in_features")
    for name, size in zip(names, (rows, columns), strict=True):
        setattr(module, name, size)


def replace_shapes(model: PreTrainedModel, shapes: Shapes) -> None:
    """Give blocks of a model on the meta device their recorded shapes, and refuse those the model cannot have."""
    if not shapes:
        return
    structure, dimension, whole = inspected(model), head_dim(model.config), config_shape(model.config)
    for name, shape in shapes.items():
        try:
            block = model.get_submodule(name)
        except AttributeError:
            raise CompressError(f"config.json records a pruned block {name!r} that this model does not have.") from None
        if any(value > getattr(whole, field) for field, value in vars(shape).items()):
            raise CompressError(f"config.json: quantization_config.pruned[{name!r}] is larger than the model: {shape}.")
        shape_block(block, structure, shape, dimension)


def ordinary_config(config: PretrainedConfig, structure: Architecture, shape: BlockShape) -> PretrainedConfig | None:
    """Return a config with which plain transformers builds every block at a shape; None where no config can say it.

    A Llama whose number of heads no longer divides its hidden size, which its class refuses, becomes the same network under
    the name Mistral, where that is possible.
    """
    groups, now = groups_of(structure), config_shape(config)
    fields: dict[str, Any] = {}
    if shape.channels != now.channels:
        if groups.config_channels is None:
            return None
        fields[groups.config_channels] = shape.channels
    kind = str(config.model_type)
    if (shape.heads, shape.key_value_heads) != (now.heads, now.key_value_heads):
        if not groups.config_heads:
            return None
        fields |= {
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.key_value_heads,
            "head_dim": head_dim(config),
        }
        if kind in groups.heads_divide and config.hidden_size % shape.heads:
            if kind != "llama" or config.attention_bias or config.mlp_bias:
                return None
            dropped = {"model_type", "attention_bias", "mlp_bias", "pretraining_tp", "transformers_version"}
            kept = {key: value for key, value in config.to_dict().items() if key not in dropped}
            fields |= {"sliding_window": None, "architectures": ["MistralForCausalLM"]}
            return AutoConfig.for_model("mistral", **{**kept, **fields})
    if not fields:
        return config
    try:
        made = type(config).from_dict({**config.to_dict(), **fields})
    except (ValueError, StrictDataclassError):  # the class insists on other sizes
        return None
    known = declaration(config)
    return made if (known and known.groups) or _builds(made, structure, shape) else None


def _builds(config: PretrainedConfig, structure: Architecture, shape: BlockShape) -> bool:
    """Tell whether a config's class takes all sizes from the keys that should say them: some take the hidden size."""
    block = empty_model(fewer_blocks(config, [0])).get_submodule(f"{structure.blocks}.0")
    sizes = linear_sizes(structure, shape, head_dim(config))
    found = {name: Linear(name, block.get_submodule(name)).shape for name in sizes}
    return all(size in (None, there) for name in sizes for size, there in zip(sizes[name], found[name], strict=True))


def fewer_blocks(config: PretrainedConfig, kept: Sequence[int]) -> PretrainedConfig:
    """Return the config of a model that has only some of its blocks left."""
    data = config.to_dict()
    if types := getattr(config, "layer_types", None):
        data["layer_types"] = [types[index] for index in kept]
    data[type(config).attribute_map.get("num_hidden_layers", "num_hidden_layers")] = len(kept)
    return type(config).from_dict(data)


def settled(config: PretrainedConfig, shapes: Shapes, structure: Architecture) -> tuple[PretrainedConfig, Shapes]:
    """Move shapes into the config where all blocks have one that it can express; return the records still needed, too."""
    if not shapes:
        return config, {}
    names = [block_prefix(structure, index) for index in range(structure.depth)]
    found = {block_shape(config, shapes, name) for name in names}
    plain = ordinary_config(config, structure, found.pop()) if len(found) == 1 else None
    if plain is not None:
        return plain, {}
    whole = config_shape(config)
    return config, {name: shape for name, shape in shapes.items() if shape != whole}


def without(shape: BlockShape, heads: int = 0, key_value_heads: int = 0, channels: int = 0) -> BlockShape:
    """Return a shape with some fewer of each."""
    return BlockShape(shape.heads - heads, shape.key_value_heads - key_value_heads, shape.channels - channels)
