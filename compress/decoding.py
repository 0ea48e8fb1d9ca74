"""Decoder blocks of packed models that compute a few tokens on a CPU by one call of the C library, instead of module by module.

A block whose class is known to be a Llama's is replaced, when a checkpoint is loaded, by one of a subclass that has the same modules
under the same names. Its forward makes that call where it computes the same: a few tokens, without gradients, behind a plain
:class:`DynamicCache`, modules that are packed and bear no hooks. Everything else is left to the class it comes from.

Where all blocks of a model are such, a hook on the model tells them that it is the model that calls them: the first then computes
all of them by one call, and the others hand on what it made.
"""

from __future__ import annotations

import functools
from operator import is_
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from compress.kernels import cpu
from compress.kernels.step import Block, Sizes, Steps
from compress.quant.linear import BitPlaneLinear

_KINDS = ("llama", "Llama"), ("mistral", "Mistral"), ("qwen2", "Qwen2"), ("qwen3", "Qwen3")
_KNOWN = {f"transformers.models.{kind}.modeling_{kind}.{name}DecoderLayer" for kind, name in _KINDS}
"""Classes of blocks: x += attention(norm(x)), then x += down(act(gate(norm(x))) * up(norm(x)))."""
_MODELS = {f"transformers.models.{kind}.modeling_{kind}.{name}Model" for kind, name in _KINDS}
"""Classes of models whose blocks are ``layers``, called one after the other with what the one before returned."""
_CAUSAL = {f"transformers.models.{kind}.modeling_{kind}.{name}ForCausalLM" for kind, name in _KINDS}
"""Classes whose logits are ``lm_head`` of what such a ``model`` returns: its ``norm`` of its last block's output."""
_ACTIVATIONS = {"SiLU": "silu", "SiLUActivation": "silu", "GELUTanh": "gelu_tanh", "PytorchGELUTanh": "gelu_tanh"}
_ATTENTION = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "o_proj"}
_MLP = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
JOINED, _ROOMS = "joined", "rooms"  # names under which a block, or a model, keeps what its calls use again
_AHEAD = "joined_blocks"  # name under which a model hands its blocks an :class:`Ahead`
_SPARE = 64  # tokens that a cache has room for when it grows, at least


def join_steps(model: PreTrainedModel) -> int:
    """Replace the blocks of a model that are known to be a Llama's and hold packed matrices; return their number."""
    found = [
        (name, module)
        for name, module in model.named_modules()
        if _name(type(module)) in _KNOWN and any(isinstance(part, BitPlaneLinear) for part in module.modules())
    ]
    for name, module in found if cpu.built() else []:
        joined = _bare(type(module))
        joined.__dict__ |= module.__dict__
        model.set_submodule(name, joined)
    for module in model.modules():
        if _name(type(module)) in _MODELS and all(isinstance(block, JoinedBlock) for block in cast(Any, module).layers):
            module.register_forward_pre_hook(_look_ahead, with_kwargs=True)
    return len(found)


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


class Ahead:
    """Hold what one call of a model computes ahead: all its blocks by one call."""

    def __init__(self, joined: Joined, first: Any) -> None:
        self.joined, self.first = joined, first
        self.output: Tensor | None = None

    def take(self, block: Any, x: Tensor, given: dict[str, Any]) -> Tensor | None:
        """Return the output of all blocks, if this is the first or gets what the first returned; else None."""
        # Only now: asked for hidden states, transformers puts hooks there after those of the model.
        if block is self.first and _serves(self.joined, x, given):
            self.output = _step(self.joined, x, given)
        return self.output if block is self.first or x is self.output else None


def _look_ahead(
    model: Any, args: tuple[Any, ...], given: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Tell the blocks that the model calls them one after the other, where they can be computed by one call."""
    cache = given.get("cache") or given.get("past_key_values")
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or type(cache) is not DynamicCache:
        return None
    if not cache.get_seq_length() or not _is_plain(model):
        return None
    blocks = list(model.layers)
    return args, {**given, _AHEAD: Ahead(_joined(model, blocks), blocks[0])}


class Short:
    """Compute a token's logits by the parts of a Llama alone, past the code of transformers that calls them.

    Tensors and hooks are looked at when it is made, numbers of bits with every token. So it is for one text: tensors that are put in
    the place of others in the middle are not seen.

    Args:
        model: that :meth:`fits`.
        cache: of the text.
    """

    def __init__(self, model: Any, cache: Any) -> None:
        decoder = model.model
        self._model, self._cache = model, cache
        self._embed, self._turns, self._norm = decoder.embed_tokens, decoder.rotary_emb, decoder.norm
        self._look()

    def _look(self) -> None:
        decoder = self._model.model
        self._joined = _joined(decoder, list(decoder.layers))
        self._bits = self._joined.bits()

    @staticmethod
    def fits(model: Any) -> bool:
        """Tell whether a model is one whose parts are known, all of it on the CPU and nobody looking at them."""
        if _name(type(model)) not in _CAUSAL or _name(type(model.model)) not in _MODELS or not _is_plain(model.model):
            return False
        decoder = model.model
        parts = model, decoder, decoder.embed_tokens, decoder.rotary_emb, decoder.norm, model.lm_head
        hooks = [hook for part in parts for hook in (*part._forward_hooks.values(), *part._forward_pre_hooks.values())]
        called = any("forward" in part.__dict__ or part.training for part in parts)
        return all(hook is _look_ahead for hook in hooks) and not called and model.device.type == "cpu"

    def __call__(self, tokens: Tensor) -> Tensor | None:
        """Return the logits behind the latest token, int64 [B, 1] to [B, 1, V], or None where transformers has to compute them."""
        if tokens.shape[1] != 1 or not (past := self._cache.get_seq_length()):
            return None
        if self._joined.bits() != self._bits:
            self._look()
        x = self._embed(tokens)
        given = {"past_key_values": self._cache, "position_embeddings": self._turns(x, torch.tensor([[past]]))}
        y = _step(self._joined, x, given) if _serves(self._joined, x, given) else None
        return None if y is None else self._model.lm_head(self._norm(y))


def _is_plain(model: Any) -> bool:
    """Tell whether all blocks of a model are joined ones, and see the same mask."""
    config = model.config
    alike = (
        len(set(getattr(config, "layer_types", None) or [None])) == 1 and len(model.layers) == config.num_hidden_layers
    )
    return alike and all(isinstance(block, JoinedBlock) for block in model.layers)


@functools.cache
def _joined_class(plain: type[nn.Module]) -> type[nn.Module]:
    """Make the subclass of a block's class, under its name: transformers looks for some by name."""
    return type(plain.__name__, (JoinedBlock, plain), {"plain": plain, "__module__": plain.__module__})


def _bare(plain: type[nn.Module]) -> nn.Module:
    """Make a block without anything in it."""
    made = _joined_class(plain)  # type: ignore[arg-type]  # classes can be hashed, whatever mypy says of a metaclass
    block = made.__new__(made)
    block.__dict__[_ROOMS] = WeakKeyDictionary()
    return block


class JoinedBlock:
    """Compute a block by one call where that is the same; mixed into the block's own class."""

    plain: type[nn.Module]

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return the block's output, as its own class does."""
        ahead: Ahead | None = kwargs.pop(_AHEAD, None)
        if not args and ahead is not None and (made := ahead.take(self, hidden_states, kwargs)) is not None:
            return made
        if not args and _few(hidden_states, kwargs):
            joined = _joined(self, [self])
            made = _step(joined, hidden_states, kwargs) if _serves(joined, hidden_states, kwargs) else None
            if made is not None:
                return made
        return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle by the class that transformers has, without what was derived from tensors."""
        state = {name: value for name, value in self.__dict__.items() if name not in (JOINED, _ROOMS)}
        return _bare, (self.plain,), state


class Joined:
    """Hold what calls of blocks use again: their tensors as the library takes them, and room in caches behind their last token.

    Args:
        blocks: computed by one call, one after the other.
        whole: whether hooks on the blocks themselves count; those of a block that is called see what it returns.
    """

    def __init__(self, blocks: list[Any], whole: bool) -> None:
        self._parents = [
            part._modules for block in blocks for part in (block, block._modules["self_attn"], block._modules["mlp"])
        ]
        parts = [part.__dict__ for modules in self._parents for part in modules.values()]
        self._modules = parts + [block.__dict__ for block in blocks if whole]
        self._hooks = [held[kind] for held in self._modules for kind in ("_forward_hooks", "_forward_pre_hooks")]
        self._tensors = [held[kind] for held in parts for kind in ("_buffers", "_parameters") if held[kind]]
        self._packed = [held for held in parts if "_bits" in held]
        self.state = self.now()
        self.modules, described = blocks, [_describe(block) for block in blocks]
        self.blocks = None if any(one is None for one in described) else cast("list[Block]", described)
        self.left = WeakKeyDictionary[Any, Left]()  # by cache

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle as None: addresses mean nothing elsewhere."""
        return type(None), ()

    def now(self) -> list[object]:
        """Return all that the call depends on."""
        found = [part for modules in self._parents for part in modules.values()]
        found += [tensor for held in self._tensors for tensor in held.values()]
        for held in self._packed:
            found += held["_bits"], held.get("_exact"), held["keep_dense"]
        return found

    def bits(self) -> list[Any]:
        """Return the numbers of bits of all packed modules."""
        return [held["_bits"] for held in self._packed]

    def is_current(self) -> bool:
        """Tell whether every tensor, setting and module of the block is what it was."""
        return _same(self.now(), self.state)

    def is_watched(self) -> bool:
        """Tell whether a hook wants to see a module's own call."""
        return any(self._hooks) or any("forward" in held for held in self._modules)


def _room(block: Any, layer: Any, tokens: int) -> tuple[Tensor, Tensor]:
    """Return tensors that a cache's keys and values lie at the start of, with room for more tokens.

    They are the cache's own from then on. A cache that was cropped goes on in the same tensors. A view's blocks have the same rooms.
    """
    keys, values, wanted, rooms = layer.keys, layer.values, layer.keys.shape[2] + tokens, block.__dict__[_ROOMS]
    kept: tuple[Tensor, Tensor] | None = rooms.get(layer)
    if kept is not None and kept[0].shape[0] == keys.shape[0] and wanted <= kept[0].shape[2] and _starts(kept, layer):
        return kept
    size = *keys.shape[:2], wanted + max(_SPARE, wanted // 4), keys.shape[3]
    held = (
        torch.empty(size, dtype=keys.dtype, device=keys.device),
        torch.empty(size, dtype=keys.dtype, device=keys.device),
    )
    for new, old in zip(held, (keys, values), strict=True):
        new[:, :, : old.shape[2]] = old
    rooms[layer] = held
    return held


def _starts(room: tuple[Tensor, Tensor], layer: Any) -> bool:
    """Tell whether a cache's keys and values lie at the start of a room."""
    return bool(room[0].data_ptr() == layer.keys.data_ptr() and room[1].data_ptr() == layer.values.data_ptr())


def _few(x: Tensor, given: dict[str, Any]) -> bool:
    """Tell whether hidden states are of a few tokens on a CPU, and nobody needs what the modules would tell."""
    if type(x) is not Tensor or x.device.type != "cpu" or x.ndim != 3 or x.shape[0] * x.shape[1] > cpu.FUSED_ROWS:
        return False
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling() or given.get("output_attentions"))


def _serves(joined: Joined, x: Tensor, given: dict[str, Any]) -> bool:
    """Tell whether a call is one that the library may compute, unwatched."""
    return _few(x, given) and not joined.is_watched() and not any(block.training for block in joined.modules)


def _step(joined: Joined, x: Tensor, given: dict[str, Any]) -> Tensor | None:
    """Return the output of blocks by one call; None where their own class has to compute it."""
    cache, mask = given.get("cache") or given.get("past_key_values"), given.get("attention_mask")
    if joined.blocks is None or not (mask is None or type(mask) is Tensor) or type(cache) is not DynamicCache:
        return None
    left = joined.left.get(cache)
    if left is None or not left.serves(cache, x):
        layers = [_layer_of(cache, block) for block in joined.modules]
        if any(layer is None or layer.keys.dtype != x.dtype for layer in layers):
            return None
        if len({layer.keys.shape[2] for layer in layers}) > 1:
            return None
        left = joined.left[cache] = Left(joined, layers, x.shape[1])
    turns = given["position_embeddings"]
    if not all(block.serves(x, turns[0], left.tokens, mask) for block in joined.blocks):
        return None
    y = left.steps(x, turns, left.tokens, mask)
    left.grow(x.shape[1])
    return y


class Left:
    """Hold a cache as blocks left it: what is as they left it need not be looked at again.

    Args:
        joined: the blocks, all of which are known to the library.
        layers: of the cache, one for each.
        new: tokens that there has to be room for.
    """

    def __init__(self, joined: Joined, layers: list[Any], new: int) -> None:
        self._rooms = [_room(block, layer, new) for block, layer in zip(joined.modules, layers, strict=True)]
        self.steps = Steps(cast("list[Block]", joined.blocks), self._rooms)
        self._places = [block._modules["self_attn"].layer_idx for block in joined.modules]
        self._layers, self.tokens = layers, layers[0].keys.shape[2]
        self._most = min(keys.shape[2] for keys, _ in self._rooms)
        self._states = [(layer.keys, layer.values) for layer in layers]

    def serves(self, cache: Any, x: Tensor) -> bool:
        """Tell whether the cache is as it was left, with room for hidden states, [B, T, hidden]."""
        if self.tokens + x.shape[1] > self._most or self._rooms[0][0].dtype != x.dtype or cache.offloading:
            return False
        held, layers = zip(self._places, self._layers, self._states, strict=True), cache.layers
        return all(
            place < len(layers) and layers[place] is layer and layer.keys is keys and layer.values is values
            for place, layer, (keys, values) in held
        )

    def grow(self, new: int) -> None:
        """Give the cache the tokens that have been written behind its own."""
        self.tokens += new
        self._states = [
            (keys.narrow(2, 0, self.tokens), values.narrow(2, 0, self.tokens)) for keys, values in self._rooms
        ]
        for layer, (keys, values) in zip(self._layers, self._states, strict=True):
            layer.keys, layer.values = keys, values


def _layer_of(cache: Any, block: Any) -> Any:
    """Return the plain layer of a cache, where the block already has tokens; None without one."""
    if cache.offloading:
        return None
    place = block._modules["self_attn"].layer_idx
    layer: Any = cache.layers[place] if place < len(cache.layers) else None
    plain = type(layer) is DynamicLayer and layer.is_initialized
    return layer if plain and layer.keys.numel() else None


def _joined(owner: Any, blocks: list[Any]) -> Joined:
    """Return what an owner keeps of blocks, made again if anything in them is another."""
    kept: Joined | None = owner.__dict__.get(JOINED)
    if kept is None or not _same(kept.modules, blocks) or not kept.is_current():
        kept = owner.__dict__[JOINED] = Joined(blocks, whole=owner is not blocks[0])
    return kept


def _same(one: list[Any], other: list[Any]) -> bool:
    """Tell whether lists have the very same members."""
    return len(one) == len(other) and all(map(is_, one, other))


def _describe(block: Any) -> Block | None:
    """Return a block as the library takes it; None if it is of a form that the library does not know."""
    attention, mlp = block.self_attn, block.mlp
    linears = {ours: attention._modules.get(name) for ours, name in _ATTENTION.items()}
    linears |= {ours: mlp._modules.get(name) for ours, name in _MLP.items()}
    norms = {
        "before": block.input_layernorm,
        "mlp": block.post_attention_layernorm,
        "query": attention._modules.get("q_norm"),
        "key": attention._modules.get("k_norm"),
    }
    activation = _ACTIVATIONS.get(type(mlp.act_fn).__name__)
    scaled = {norm.variance_epsilon for norm in norms.values() if norm is not None}
    if activation is None or len(scaled) != 1 or not all(type(linear) is BitPlaneLinear for linear in linears.values()):
        return None
    matrices = {name: cast(BitPlaneLinear, linear).prepared() for name, linear in linears.items()}
    if any(matrix is None for matrix in matrices.values()):
        return None
    channels, keys = attention.head_dim, attention.k_proj.out_features // attention.head_dim
    sizes = Sizes(
        attention.q_proj.out_features // channels, keys, channels, activation, scaled.pop(), attention.scaling
    )
    weights = {name: norm.weight for name, norm in norms.items() if norm is not None}
    try:
        return Block(cast("dict[str, cpu.Prepared]", matrices), weights, sizes)
    except ValueError:
        return None
