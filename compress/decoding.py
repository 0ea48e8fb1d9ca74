"""Decoder blocks of packed models that compute a few tokens on a CPU by one call of the C library, instead of module by module.

A block whose class is known to be a Llama's is replaced, when a checkpoint is loaded, by one of a subclass that has the same modules
under the same names. Its forward makes that call where it computes the same: a few tokens, without gradients, behind a plain
:class:`DynamicCache`, modules that are packed and bear no hooks. Everything else is left to the class it comes from.
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
from compress.kernels.step import Block, Sizes
from compress.quant.linear import BitPlaneLinear

_KNOWN = {
    f"transformers.models.{kind}.modeling_{kind}.{name}DecoderLayer"
    for kind, name in (("llama", "Llama"), ("mistral", "Mistral"), ("qwen2", "Qwen2"), ("qwen3", "Qwen3"))
}
"""Classes of blocks: x += attention(norm(x)), then x += down(act(gate(norm(x))) * up(norm(x)))."""
_ACTIVATIONS = {"SiLU": "silu", "SiLUActivation": "silu", "GELUTanh": "gelu_tanh", "PytorchGELUTanh": "gelu_tanh"}
_ATTENTION = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "o_proj"}
_MLP = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
JOINED, _ROOMS = "joined", "rooms"  # names under which a block keeps what its calls use again
_SPARE = 64  # tokens that a cache has room for when it grows, at least


def join_steps(model: PreTrainedModel) -> int:
    """Replace the blocks of a model that are known to be a Llama's and hold packed matrices; return their number."""
    found = [
        (name, module)
        for name, module in model.named_modules()
        if f"{type(module).__module__}.{type(module).__qualname__}" in _KNOWN
        and any(isinstance(part, BitPlaneLinear) for part in module.modules())
    ]
    for name, module in found if cpu.built() else []:
        joined = _bare(type(module))
        joined.__dict__ |= module.__dict__
        model.set_submodule(name, joined)
    return len(found)


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
        if not args and (made := _step(self, hidden_states, kwargs)) is not None:
            return made
        return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle by the class that transformers has, without what was derived from tensors."""
        state = {name: value for name, value in self.__dict__.items() if name not in (JOINED, _ROOMS)}
        return _bare, (self.plain,), state


class Joined:
    """Hold what a block's calls use again: its tensors as the library takes them, and room in caches behind their last token."""

    def __init__(self, block: Any) -> None:
        attention, mlp = block._modules["self_attn"], block._modules["mlp"]
        self._parents = [part._modules for part in (block, attention, mlp)]
        self._modules = [part.__dict__ for modules in self._parents for part in modules.values()]
        self._hooks = [held[kind] for held in self._modules for kind in ("_forward_hooks", "_forward_pre_hooks")]
        self._tensors = [held[kind] for held in self._modules for kind in ("_buffers", "_parameters") if held[kind]]
        self._packed = [held for held in self._modules if "_bits" in held]
        self.state = self.now()
        self.block = _describe(block)
        self.rooms: WeakKeyDictionary[Any, tuple[Tensor, Tensor]] = block.__dict__[
            _ROOMS
        ]  # a view's blocks have the same

    def now(self) -> list[object]:
        """Return all that a block's one call depends on."""
        found: list[object] = []
        for held in self._parents:
            found += held.values()
        for held in self._tensors:
            found += held.values()
        for held in self._packed:
            found += held["_bits"], held.get("_exact"), held["keep_dense"]
        return found

    def is_current(self) -> bool:
        """Tell whether every tensor, setting and module of the block is what it was."""
        now = self.now()
        return len(now) == len(self.state) and all(map(is_, now, self.state))

    def is_watched(self) -> bool:
        """Tell whether a hook wants to see a module's own call."""
        return any(self._hooks) or any("forward" in held for held in self._modules)

    def room(self, layer: Any, tokens: int) -> tuple[Tensor, Tensor]:
        """Return tensors that a cache's keys and values lie at the start of, with room for more tokens.

        They are the cache's own from then on. A cache that was cropped goes on in the same tensors.
        """
        keys, values, wanted = layer.keys, layer.values, layer.keys.shape[2] + tokens
        kept = self.rooms.get(layer)
        if (
            kept is not None
            and kept[0].shape[0] == keys.shape[0]
            and wanted <= kept[0].shape[2]
            and _starts(kept, layer)
        ):
            return kept
        size = *keys.shape[:2], wanted + max(_SPARE, wanted // 4), keys.shape[3]
        held = (
            torch.empty(size, dtype=keys.dtype, device=keys.device),
            torch.empty(size, dtype=keys.dtype, device=keys.device),
        )
        for new, old in zip(held, (keys, values), strict=True):
            new[:, :, : old.shape[2]] = old
        self.rooms[layer] = held
        return held


def _starts(room: tuple[Tensor, Tensor], layer: Any) -> bool:
    """Tell whether a cache's keys and values lie at the start of a room."""
    return bool(room[0].data_ptr() == layer.keys.data_ptr() and room[1].data_ptr() == layer.values.data_ptr())


def _step(block: Any, x: Tensor, given: dict[str, Any]) -> Tensor | None:
    """Return the block's output by one call; None where its own class has to compute it."""
    if type(x) is not Tensor or x.device.type != "cpu" or x.ndim != 3 or x.shape[0] * x.shape[1] > cpu.FUSED_ROWS:
        return None
    if torch.is_grad_enabled() or block.training or torch.compiler.is_compiling() or given.get("output_attentions"):
        return None
    cache, mask = given.get("cache") or given.get("past_key_values"), given.get("attention_mask")
    layer = _layer_of(cache, block)
    if layer is None or layer.keys.dtype != x.dtype or not (mask is None or type(mask) is Tensor):
        return None
    joined = _joined(block)
    if joined is None or joined.block is None:
        return None
    turns, past = given["position_embeddings"], layer.keys.shape[2]
    if not joined.block.serves(x, turns[0], past, mask):
        return None
    keys, values = joined.room(layer, x.shape[1])
    y = joined.block(x, turns, keys, values, past, mask)
    layer.keys, layer.values = keys.narrow(2, 0, past + x.shape[1]), values.narrow(2, 0, past + x.shape[1])
    return y


def _layer_of(cache: Any, block: Any) -> Any:
    """Return the plain cache layer of a block that already has tokens; None without one."""
    if type(cache) is not DynamicCache or cache.offloading:
        return None
    place = block._modules["self_attn"].layer_idx
    layer: Any = cache.layers[place] if place < len(cache.layers) else None
    plain = type(layer) is DynamicLayer and layer.is_initialized
    return layer if plain and layer.keys.numel() else None


def _joined(block: Any) -> Joined | None:
    """Return what is kept of a block, made again if anything in it is another; None if hooks watch it."""
    kept: Joined | None = block.__dict__.get(JOINED)
    if kept is None or not kept.is_current():
        kept = block.__dict__[JOINED] = Joined(block)
    return None if kept.is_watched() else kept


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
