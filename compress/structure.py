"""Find where things are in a model, by looking at its modules.

What looking cannot tell (which heads and channels structured pruning may remove, and how a model is told) is declared, as data.
A package can declare its own: an entry point of group ``compress.architectures`` that names an :class:`Architecture`, which also
overrides what would be found.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.metadata import entry_points
from typing import Literal

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from compress.carrying import Load
from compress.errors import CompressError, did_you_mean
from compress.models import empty_model, stated, text_config


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
    """Tell where things are in a model. Module names of linears are relative to one block.

    Attributes:
        model_types: values of ``config.model_type`` it is declared for.
        blocks: path of the list of transformer blocks; found where it is not declared.
        embedding: path of the token embedding; found.
        attention: linears of one attention group, inputs first, output projection last, where heads can be removed.
        mlp: linears of one MLP group, the one that leads back to the residual stream last, where channels can be removed.
        fused: linears that servers merge into one matrix, and that must have the same bits there; found by their usual names.
        groups: what structured pruning may remove; None where that is not declared.
        renamed: module names of newer transformers releases -> the name checkpoints are stored under.
        head: path of the language-model head; found.
        depth: how many blocks there are; found.
        experts: full paths of the modules that hold the experts of a mixture; found.
        left: linear's full name -> why it stays dense; found (:func:`compress.following.follow`).
        returns: for every block, how many values it returns in a tuple, 0 for a bare tensor; found by the same.
        carried: for every block, what it is given that earlier ones have made; found by the same.
    """

    model_types: tuple[str, ...]
    blocks: str = ""
    embedding: str = ""
    attention: tuple[str, ...] = ()
    mlp: tuple[str, ...] = ()
    fused: tuple[tuple[str, ...], ...] = ()
    groups: Groups | None = None
    renamed: Mapping[str, str] = field(default_factory=dict)
    head: str = ""
    depth: int = 0
    experts: tuple[str, ...] = ()
    left: Mapping[str, str] = field(default_factory=dict)
    returns: tuple[int, ...] = ()
    carried: tuple[Load, ...] = ()

    def stored_name(self, name: str) -> str:
        """Return the name a module or tensor has in checkpoint files."""
        first, dot, rest = name.partition(".")
        return self.renamed.get(first, first) + dot + rest


ARCHITECTURES = (
    Architecture(
        model_types=("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"),
        attention=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
        mlp=("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
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
        attention=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"),
        mlp=("fc1", "fc2"),
        groups=Groups("separate", {"num_heads": "heads"}, config_channels="ffn_dim"),
    ),
    Architecture(
        model_types=("gpt2",),
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
        attention=("self_attention.query_key_value", "self_attention.dense"),
        mlp=("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        groups=Groups(None, heads_fixed="its position slopes (ALiBi) are made for one number of heads in all blocks"),
    ),
    Architecture(
        model_types=("gpt_neox",),
        attention=("attention.query_key_value", "attention.dense"),
        mlp=("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        groups=Groups("interleaved", config_channels="intermediate_size"),
        renamed={"lm_head": "embed_out"},
    ),
)


def declaration(config: PretrainedConfig) -> Architecture | None:
    """Return what is declared of a config's model type, by packages before by this module."""
    return next(
        (known for known in (*_installed(), *ARCHITECTURES) if str(config.model_type) in known.model_types), None
    )


@cache
def _installed() -> tuple[Architecture, ...]:
    """Read what packages declare, once: looking through all that is installed takes some 20 ms."""
    return tuple(point.load() for point in entry_points(group="compress.architectures"))


def architecture(config: PretrainedConfig) -> Architecture:
    """Find where things are in the model of a config."""
    return inspected(empty_model(config))


def inspected(model: PreTrainedModel) -> Architecture:
    """Find where things are in a model, which may be on the meta device.

    Raises:
        CompressError: it has no list of blocks, no token embedding or no head.
    """
    kind = str(model.config.model_type)
    known = declaration(model.config) or Architecture((kind,))
    embedding: nn.Module | None
    head: nn.Module | None
    try:
        embedding = model.get_input_embeddings()
        inside = (one for one in model.modules() if isinstance(one, PreTrainedModel))  # it, or a language model in it
        heads = (
            one.get_output_embeddings()  # type: ignore[no-untyped-call]
            for one in inside
            if embedding in set(one.modules())
        )
        head = next((found for found in heads if found is not None), None)
    except NotImplementedError:
        embedding = head = None
    paths = {id(module): name for name, module in model.named_modules()}
    found = known.embedding or paths.get(id(embedding), "")
    blocks = known.blocks or _find_blocks(model, found)
    for what, path in (("token embedding", found), ("head", paths.get(id(head), "")), ("list of blocks", blocks)):
        if not path:
            raise CompressError(f"model type {kind!r}: no {what} is found in {type(model).__name__}. {_DECLARE}")
    layers = model.get_submodule(blocks)
    fused, depth = known.fused or _find_fused(layers), len(list(layers.children()))
    known = replace(known, blocks=blocks, embedding=found, head=paths[id(head)], fused=fused, depth=depth)
    return known if known.groups else _find_groups(known, model.config, list(layers.children()))


_DECLARE = "To say where it is, give an Architecture through an entry point of group 'compress.architectures' (CONTRIBUTING.md)."
_OTHER_SENSES = re.compile("vision|visual|vqmodel|image|video|audio|speech")
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # by names that servers go by


def _find_blocks(model: nn.Module, embedding: str) -> str:
    """Find the list with most weights in the part of the model that owns the token embedding."""
    sizes: dict[str, int] = {
        name: sum(p.numel() for p in module.parameters() if p.ndim > 1)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and not _OTHER_SENSES.search(name)
    }
    scope = embedding
    while scope:
        scope = scope.rpartition(".")[0]
        inside = {name: size for name, size in sizes.items() if size and name.startswith(scope and scope + ".")}
        if inside:  # of equal ones the outermost
            return max(sorted(inside), key=lambda name: (inside[name], -name.count(".")))
    return ""


def _find_fused(blocks: nn.Module) -> tuple[tuple[str, ...], ...]:
    """Find the linears of a block that servers merge, relative to it, in any block."""
    found: dict[tuple[str, ...], None] = {}
    for block in blocks.children():
        names = {name for name, module in block.named_modules() if is_linear(module)}
        for group in _FUSED:
            for name in sorted(names):
                if name.rpartition(".")[2] == group[0]:
                    members = tuple(name.removesuffix(group[0]) + member for member in group)
                    if names >= set(members):
                        found[members] = None
    return tuple(found)


CHANNELS = "intermediate_size"
"""Key of configs for the channels of an MLP, where nothing else is declared."""
_HEADS = {
    "num_key_value_groups": "queries",
    "num_heads": "heads",
    "num_attention_heads": "heads",
}  # attributes -> what they hold
_ATTENTION = re.compile(r"(.*\.)?q_proj")
_MLPS = (("gate_proj", "up_proj", "down_proj"), ("up_proj", "down_proj"), ("fc1", "fc2"))


def _find_groups(structure: Architecture, config: PretrainedConfig, blocks: list[nn.Module]) -> Architecture:
    """Return the structure with what structured pruning may remove, where every block is an attention and an MLP of a known form.

    That is: queries, keys, values and an output projection of one head size, apart, and two or three linears of an MLP; nothing else in
    the attention but norms within a head, and no attribute that tells it of its heads but those that can be told.
    """
    found = {_parts_of(block) for block in blocks}
    parts = found.pop() if len(found) == 1 else None
    if parts is None or text_config(config) is not config:
        return structure
    (attention, mlp), values = parts, config.to_dict()
    heads, channels = stated(config, "num_attention_heads"), stated(config, CHANNELS)
    if not isinstance(heads, int) or not isinstance(channels, int):
        return structure
    shared = stated(config, "num_key_value_heads") or heads
    size = stated(config, "head_dim") or config.hidden_size // heads
    wanted = [heads * size, shared * size, shared * size, channels]
    for block in blocks:
        linears = linears_of(block, "")
        rows = [linears[name].shape[0] for name in (*attention[:3], mlp[0])]
        columns = [linears[name].shape[1] for name in (attention[3], mlp[-1])]
        inside = block.get_submodule(attention[0].rpartition(".")[0])
        own = {id(p) for name in attention for p in block.get_submodule(name).parameters()}
        others = [p for p in inside.parameters() if id(p) not in own]
        known = {
            name
            for name, value in vars(inside).items()
            if isinstance(value, int) and value in {heads, shared, heads * size}
        }
        if (
            rows != wanted
            or columns != [wanted[0], channels]
            or any(p.numel() != size for p in others)
            or {*inside._parameters}
            or known - {*_HEADS}
        ):
            return structure
    told = {name: word for name, word in _HEADS.items() if hasattr(inside, name)}
    sayable = "head_dim" in values and "num_key_value_heads" in values
    groups = Groups("separate", told, config_heads=sayable, config_channels=CHANNELS)
    return replace(structure, attention=attention, mlp=mlp, groups=groups)


def _parts_of(block: nn.Module) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """Find the linears of a block's attention and of its MLP, if there are no others."""
    names = set(linears_of(block, ""))
    path = next((name.removesuffix("q_proj") for name in sorted(names) if _ATTENTION.fullmatch(name)), None)
    if path is None:
        return None
    outputs = [path + name for name in ("o_proj", "out_proj", "dense") if path + name in names]
    attention = (*(f"{path}{name}_proj" for name in "qkv"), *outputs)
    rest = names - {*attention}
    for members in _MLPS:
        inner = {name.rpartition(".")[0] for name in rest}
        mlp = tuple(f"{next(iter(inner))}.{name}".lstrip(".") for name in members) if len(inner) == 1 else ()
        if {*mlp} == rest and len(outputs) == 1 and {*attention} <= names:
            held = {f"{name}.weight" for name in names}  # and no other matrices: experts of a mixture, say
            return (attention, mlp) if all(p.ndim < 2 or n in held for n, p in block.named_parameters()) else None
    return None


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


_ALSO_LINEAR = ("FalconLinear",)  # classes with a forward pass of their own that multiplies and no more


def is_linear(module: nn.Module) -> bool:
    """Tell whether a module is a dense weight matrix that passes work on: one that multiplies and does nothing else."""
    kind = type(module)
    if kind.__name__ in _ALSO_LINEAR:
        return True
    return isinstance(module, (nn.Linear, Conv1D)) and kind.forward in (nn.Linear.forward, Conv1D.forward)


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
