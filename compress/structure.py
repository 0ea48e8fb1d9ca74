"""Find where things are in a model: one declaration per architecture family, as data.

A package can add its own: an entry point of group ``compress.architectures`` that names an :class:`Architecture`.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Literal

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from compress.errors import CompressError, did_you_mean
from compress.quant.linear import BitPlaneLinear


@dataclass(frozen=True)
class Groups:
    """Declare what structured pruning may remove from a family's blocks, and how a model is told.

    Attributes:
        layout: how heads lie in the attention linears: ``separate`` query, key and value; ``stacked``, all queries, then
            all keys, then all values in one; None where heads cannot be removed; ``interleaved``, each head's three together.
        attributes: attribute of the attention module -> what it holds: ``heads``, ``width`` (heads times their
            dimension) or ``queries`` (query heads per key-value head).
        config_heads: whether ``config.json`` can give any number of heads of an unchanged dimension.
        config_channels: its key for the number of channels of an MLP; None where it has none.
        heads_divide: whether the model's own class insists that the number of heads divides the hidden size.
        heads_fixed: why heads cannot be removed.
        depth_fixed: config key that, if set, makes a block depend on its position.
    """

    layout: Literal["separate", "stacked", "interleaved"] | None
    attributes: Mapping[str, str] = field(default_factory=dict)
    config_heads: bool = False
    config_channels: str | None = None
    heads_divide: tuple[str, ...] = ()
    heads_fixed: str = ""
    depth_fixed: str = ""


@dataclass(frozen=True)
class Architecture:
    """Declare a family of models. Module names of linears are relative to one block.

    Attributes:
        model_types: values of ``config.model_type`` it covers.
        blocks: path of the list of transformer blocks.
        embedding: path of the token embedding.
        attention: linears of one attention group, inputs first, output projection last.
        mlp: linears of one MLP group, the one that leads back to the residual stream last.
        fused: linears that servers merge into one matrix, and that must have the same bits there.
        groups: what structured pruning may remove; None where that is not declared.
        renamed: module names of newer transformers releases -> the name checkpoints are stored under.
    """

    model_types: tuple[str, ...]
    blocks: str
    embedding: str
    attention: tuple[str, ...]
    mlp: tuple[str, ...]
    fused: tuple[tuple[str, ...], ...] = ()
    groups: Groups | None = None
    renamed: Mapping[str, str] = field(default_factory=dict)

    def stored_name(self, name: str) -> str:
        """Return the name a module or tensor has in checkpoint files."""
        first, dot, rest = name.partition(".")
        return self.renamed.get(first, first) + dot + rest


ARCHITECTURES = (
    Architecture(
        model_types=("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"),
        blocks="model.layers",
        embedding="model.embed_tokens",
        attention=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
        mlp=("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
        fused=(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")),
        groups=Groups(
            "separate",
            {"num_key_value_groups": "queries"},
            config_heads=True,
            config_channels="intermediate_size",
            heads_divide=("llama", "gemma2", "gemma3_text"),
        ),
    ),
    Architecture(
        model_types=("opt",),
        blocks="model.decoder.layers",
        embedding="model.decoder.embed_tokens",
        attention=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"),
        mlp=("fc1", "fc2"),
        fused=(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),),
        groups=Groups("separate", {"num_heads": "heads"}, config_channels="ffn_dim"),
    ),
    Architecture(
        model_types=("gpt2",),
        blocks="transformer.h",
        embedding="transformer.wte",
        attention=("attn.c_attn", "attn.c_proj"),
        mlp=("mlp.c_fc", "mlp.c_proj"),
        groups=Groups(
            "stacked",
            {"num_heads": "heads", "split_size": "width"},
            config_channels="n_inner",
            depth_fixed="scale_attn_by_inverse_layer_idx",
        ),
    ),
    Architecture(
        model_types=("bloom",),
        blocks="transformer.h",
        embedding="transformer.word_embeddings",
        attention=("self_attention.query_key_value", "self_attention.dense"),
        mlp=("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        groups=Groups(None, heads_fixed="its position slopes (ALiBi) are made for one number of heads in all blocks"),
    ),
    Architecture(
        model_types=("gpt_neox",),
        blocks="gpt_neox.layers",
        embedding="gpt_neox.embed_in",
        attention=("attention.query_key_value", "attention.dense"),
        mlp=("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        groups=Groups("interleaved", config_channels="intermediate_size"),
        renamed={"lm_head": "embed_out"},
    ),
)


def architecture(config: PretrainedConfig) -> Architecture:
    """Return the declaration that covers a model, and refuse a model that none covers."""
    kind = str(config.model_type)
    others = (point.load() for point in entry_points(group="compress.architectures"))
    declared: list[Architecture] = [*ARCHITECTURES, *others]
    for candidate in declared:
        if kind in candidate.model_types:
            return candidate
    known = [name for candidate in declared for name in candidate.model_types]
    text = str(getattr(getattr(config, "text_config", None), "model_type", ""))
    if text in known:
        raise CompressError(
            f"model type {kind!r} reads more than text, which is not supported; its language model is a {text!r}, which can be "
            "compressed once it is saved as a model of its own."
        )
    if any(key in config.to_dict() for key in ("num_experts", "num_local_experts", "n_routed_experts")):
        raise CompressError(
            f"model type {kind!r} is a mixture of experts, whose fused expert tensors are not supported yet; "
            f"use a dense model ({', '.join(known)})."
        )
    raise CompressError(
        f"model type {kind!r} is not declared in compress/structure.py. {did_you_mean(kind, known)} To add it, give "
        "an Architecture (the paths of its blocks, embedding and head, and the linears of one attention and one "
        "MLP group) through an entry point of group 'compress.architectures'."
    )


def matching(pattern: str, names: list[str]) -> list[str]:
    """Find the names a pattern means, at least one: an exact name, or ``re:`` and a regular expression for a whole name."""
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


class Linear:
    """Show one weight matrix as [out_features, in_features] whatever its class: GPT-2's ``Conv1D`` keeps the transpose."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name, self.module = name, module
        self.transposed = isinstance(module, Conv1D)

    @property
    def weight(self) -> Tensor:
        """Return the weight, [out_features, in_features], a view: writing into it changes the model."""
        weight = self.module.get_parameter("weight").data
        return weight.t() if self.transposed else weight

    @property
    def shape(self) -> tuple[int, int]:
        """Return (out_features, in_features)."""
        rows, columns = self.weight.shape
        return rows, columns


def is_linear(module: nn.Module) -> bool:
    """Tell whether a module is a dense weight matrix that passes work on."""
    return isinstance(module, (nn.Linear, Conv1D)) and not isinstance(module, BitPlaneLinear)


def linears_of(block: nn.Module, prefix: str) -> dict[str, Linear]:
    """Find every dense linear inside a block, by full module name, in the order of definition."""
    return {name: Linear(name, module) for name, module in block.named_modules(prefix=prefix) if is_linear(module)}


def block_prefix(structure: Architecture, index: int) -> str:
    """Return the module name of a block, for example ``model.layers.3``."""
    return f"{structure.blocks}.{index}"


def block_of(name: str, structure: Architecture) -> int | None:
    """Return the index of the block a module or tensor name lies in, or None."""
    head, _, rest = name.partition(structure.blocks + ".")
    index = rest.partition(".")[0]
    return int(index) if not head and index.isdigit() else None


def head_name(model: PreTrainedModel) -> str:
    """Return the path of the language-model head, which some releases have renamed."""
    head: nn.Module = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    names: Iterator[str] = (name for name, module in model.named_modules() if module is head)
    return next(names)
