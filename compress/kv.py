"""A cache of keys and values for transformers that keeps all but the last tokens packed at 2 to 8 bits.

Most attention code of transformers asks the cache for all keys and values and hands them to torch's
``scaled_dot_product_attention``. What this cache hands out stands for its packed states and only becomes dense where something
else than that function wants to see it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._pytree import tree_map_only
from transformers import PretrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from compress.errors import CompressError
from compress.kernels.kv import Along, Grid, Packed, States, join, nothing, pack, scale_for, unpack
from compress.kernels.kv_cpu import attention
from compress.kernels.kv_mean import Mean, mean_for
from compress.kv_evict import Policy, importance, kept_tokens
from compress.kv_settings import WHOLE, KVBits, KVSettings, Pair
from compress.models import rotary_frequencies

_ATTENTION_OPTIONS = {"attn_mask", "scale", "enable_gqa", "dropout_p", "is_causal"}
_ALL = slice(None)
_ASKED = {getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "requires_grad", "is_cuda")}
_ASKED |= {Tensor.size, Tensor.dim, Tensor.stride, Tensor.numel, Tensor.is_contiguous}


class LazyStates(Tensor):
    """Stand for the keys or the values of a layer, [B, H, T, D], and become dense where anything but attention looks at them.

    Heads repeated for grouped queries (``repeat_kv`` of transformers: a new dimension, expanded and merged) stay lazy.
    """

    states: States
    of_keys: bool

    @staticmethod
    def __new__(cls: Any, states: States, of_keys: bool, shape: Sequence[int] | None = None) -> LazyStates:
        """Make a stand-in of the sizes, dtype and device of what it stands for."""
        whole = (states.whole_keys if of_keys else states.whole_values)[1]
        shape = shape or (*whole.shape[:2], states.tokens, whole.shape[3])
        made = Tensor._make_wrapper_subclass(cls, shape, dtype=whole.dtype, device=whole.device)
        made.states, made.of_keys = states, of_keys
        return made  # type: ignore[no-any-return]

    def dense(self) -> Tensor:
        """Return what it stands for."""
        found = self.states.dense()[0 if self.of_keys else 1]
        with torch._C.DisableTorchFunctionSubclass():
            shape, heads = self.shape, found.shape[1]
        if len(shape) == 5:
            return found[:, :, None].expand(shape)
        return found if shape[1] == heads else found.repeat_interleave(shape[1] // heads, 1)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Attend to packed states, keep repeated heads lazy, and make dense what anything else asks for."""
        kwargs = kwargs or {}
        if func in _ASKED:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        found = _attention(*args, **kwargs) if func is scaled_dot_product_attention else _repeated(func, *args)
        return func(*_dense(args), **_dense(kwargs)) if found is None else found

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Make dense what torch itself asks for."""
        return func(*_dense(args), **_dense(kwargs or {}))


def _dense(given: Any) -> Any:
    return tree_map_only(LazyStates, LazyStates.dense, given)


def _attention(query: Any, key: Any = None, value: Any = None, *rest: Any, **options: Any) -> Tensor | None:
    """Attend to packed states, where this is the plain attention to the keys and values of one layer."""
    plain = isinstance(key, LazyStates) and isinstance(value, LazyStates) and key.states is value.states
    scale = options.get("scale")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if plain and key.states.watch is not None:
        key.states.watch(query, options.get("attn_mask"), scale)
        return None
    if not plain or rest or set(options) - _ATTENTION_OPTIONS or options.get("dropout_p") or options.get("is_causal"):
        return None
    return attention(query, key.states, options.get("attn_mask"), scale)


def _repeated(func: Any, given: Any, *args: Any) -> LazyStates | None:
    """Take a step of ``repeat_kv`` without data, or return None if this is none."""
    if not isinstance(given, LazyStates):
        return None
    shape = given.shape
    if (
        func is Tensor.__getitem__
        and len(shape) == 4
        and args in (((_ALL, _ALL, None, _ALL, _ALL),), ((_ALL, _ALL, None),))
    ):
        return LazyStates(given.states, given.of_keys, (*shape[:2], 1, *shape[2:]))
    if func is Tensor.expand and len(shape) == 5 and args[:2] == tuple(shape[:2]) and args[3:] == tuple(shape[3:]):
        return LazyStates(given.states, given.of_keys, args)
    if func is Tensor.reshape and len(shape) == 5 and args == (shape[0], shape[1] * shape[2], *shape[3:]):
        return LazyStates(given.states, given.of_keys, args)
    return None


class KVLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """Hold one layer's keys and values: packed ones, but for the first ``sinks`` tokens and the last ``residual`` or some more.

    What one call of the model adds is attended to as it is and packed afterwards, so a prompt sees itself whole.
    """

    is_compileable = False
    is_croppable = True
    supports_early_init = True

    def __init__(
        self,
        settings: KVSettings,
        bits: tuple[int, int],
        sliding_window: int | None = None,
        frequencies: Tensor | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.settings, self.sliding_window, self.is_sliding = settings, sliding_window, sliding_window is not None
        self.bits, self.frequencies = bits, frequencies
        self.record_past = self.evicted = False
        self.seen = 0  # tokens, those included that a sliding window has lost
        self.packed: tuple[Packed, Packed] | None = None
        self.first: tuple[Tensor, Tensor] | None = None  # whole tokens before the packed ones
        self.whole: tuple[Tensor, Tensor] | None = None  # and behind them
        self.power: Tensor | None = (
            None  # sums of squares of the queries that were seen before a group of keys was full
        )
        self.scale: Tensor | None = None  # of the channels of keys, from then on
        self.mean: Mean | None = None  # of keys, the same

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take note of the dtype and the sizes, [B, H, T, D], of what is to come, and choose groups; refuse channels that do not fit."""
        self.settings = self.settings.fitted(key_states.shape[-1], value_states.shape[-1])
        self.whole = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    @property
    def held(self) -> int:
        """Return the number of tokens in memory."""
        packed = self.packed[0].tokens if self.packed else 0
        return packed + sum(part[0].shape[2] for part in (self.first, self.whole) if part)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add tokens [B, H, T, D]; return the keys and values to attend to, those that came before in front."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.whole is not None
        self._pack()  # what the last call added, if its attention did not show its queries
        watch = self._watch(key_states.shape[2])
        self.seen += key_states.shape[2]
        keys, values = (torch.cat(pair, 2) for pair in zip(self.whole, (key_states, value_states), strict=True))
        self.whole = keys, values
        states = None
        if watch is not None:
            none = [nothing(states, grid) for states, grid in zip(self.whole, self._grids(), strict=True)]
            states = States(none[0], none[1], (keys[:, :, :0], keys), (values[:, :, :0], values), watch)
        elif self.packed is not None and self.first is not None:
            states = States(*self.packed, (self.first[0], keys), (self.first[1], values))
        if not self.record_past:
            self._forget()
        if watch is None:
            self._pack()
        return (keys, values) if states is None else (LazyStates(states, True), LazyStates(states, False))

    def _watch(self, new: int) -> Callable[[Tensor, Tensor | None, float], None] | None:
        """Return what is to see the queries of a call that adds ``new`` tokens before they are packed, if anything is."""
        if self.settings.keep is not None and not self.is_sliding and not self.evicted:
            if self.seen:
                raise CompressError(
                    "kv keep: no attention of the prompt has been seen; load the model with attn_implementation='sdpa'."
                )
            return self._evict
        first = self.settings.sinks + self.settings.residual + self.settings.tokens  # tokens of which a group is packed
        return self._look if self.settings.scales and self.scale is None and self.seen < first else None

    def _look(self, query: Tensor, mask: Tensor | None, scale: float) -> None:
        """Add to the power of the queries, but for those of the very first tokens, then pack."""
        assert self.whole is not None
        asked = torch.unflatten(query.detach().float(), 1, (self.whole[0].shape[1], -1))
        if self.seen == query.shape[2]:
            asked = asked[:, :, :, self.settings.sinks :]
        power = asked.square().sum((2, 3))[:, :, None]
        self.power = power if self.power is None else self.power + power
        self._pack()

    def _evict(self, query: Tensor, mask: Tensor | None, scale: float) -> None:
        """Drop tokens of the prompt, then pack."""
        assert self.whole is not None
        assert self.settings.keep is not None
        if mask is not None:
            raise CompressError(
                "kv keep: takes tokens from prompts of equal length, without padding; give one at a time."
            )
        scores = importance(self.settings.policy, query, self.whole[0], scale)
        places = kept_tokens(scores, self.settings.keep, self.settings.sinks, self.settings.residual)[..., None]
        self.evicted = True
        self._change_whole(lambda states: states.gather(2, places.expand(-1, -1, -1, states.shape[3])))
        self._look(query, mask, scale)

    def _pack(self) -> None:
        """Pack groups of the oldest whole tokens but the very first ones, while ``residual`` stay."""
        assert self.whole is not None
        group, keep = self.settings.tokens, self.settings.residual
        gone = self.is_sliding and self.seen > self.held
        sinks = self.settings.sinks if self.first is None and not gone else 0
        count = (self.whole[0].shape[2] - sinks - keep) // group * group
        if count <= 0:
            return
        place = self.seen - self.whole[0].shape[2] + sinks
        if self.scale is None and self.mean is None:
            self._learn(self.whole[0][:, :, sinks : sinks + group], place)
        if WHOLE in self.bits:
            return
        if self.first is None:
            self.first = self.whole[0][:, :, :sinks].clone(), self.whole[1][:, :, :sinks].clone()
            self._change_whole(lambda states: states[:, :, sinks:])
        keys, values = self._grids()
        mean = None if self.mean is None else self.mean.behind(place - self.mean.place)
        new = [pack(self.whole[0][:, :, :count], keys, self.scale, mean), pack(self.whole[1][:, :, :count], values)]
        if self.packed is not None:
            new = [join([old, more]) for old, more in zip(self.packed, new, strict=True)]
        self.packed = new[0], new[1]
        self._change_whole(lambda states: states[:, :, count:].clone())

    def _learn(self, keys: Tensor, place: int) -> None:
        """Choose the mean and the scale of keys by the first group of them, [B, H, T, D], and the queries that were seen."""
        turned = None if self.frequencies is None else self.frequencies.to(keys.device)
        if self.settings.centres and turned is not None and 2 * len(turned) <= keys.shape[3]:
            self.mean = mean_for(keys, turned, place, self.power)
            keys = keys - self.mean.at(keys.shape[2])
        if self.settings.scales:
            self.scale = scale_for(keys, self.power)
        self.power = None

    def _grids(self) -> tuple[Grid, Grid]:
        return self.settings.grids(self.bits)

    def _change_whole(self, change: Callable[[Tensor], Tensor]) -> None:
        assert self.whole is not None
        self.whole = change(self.whole[0]), change(self.whole[1])

    def _forget(self) -> None:
        """Drop the very first tokens, and then groups, that a sliding window has left behind."""
        if self.sliding_window is None:
            return
        sinks, unseen = self.settings.sinks, self.seen - self.sliding_window + 1
        if unseen < sinks:
            return
        away = sinks + (unseen - sinks) // self.settings.tokens * self.settings.tokens
        count = max(0, away - (self.seen - self.held))
        if self.first is not None and count:
            count -= self.first[0].shape[2]
            self.first = self.first[0][:, :, :0].clone(), self.first[1][:, :, :0].clone()
        if self.packed is not None and count:
            tokens = self.packed[0].tokens
            gone = min(count, tokens)
            count -= gone
            parts = [packed.part(gone, tokens).map(Tensor.clone) for packed in self.packed]
            self.packed = (parts[0], parts[1]) if gone < tokens else None
        if count:
            self._change_whole(lambda states: states[:, :, count:].clone())

    def get_seq_length(self) -> int:
        """Return the number of tokens seen."""
        return self.seen

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """Return how many tokens the next call attends to, and the place of the first; transformers 5.0 gives places, not their number."""
        new = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self.held + new, self.seen - self.held

    def get_max_length(self) -> int:
        """Return that there is no limit; what a sliding window leaves behind is dropped."""
        return -1 if self.sliding_window is None else self.sliding_window

    get_max_cache_shape = get_max_length  # its name in transformers 5.0

    def activate_past_recording(self) -> None:
        """Keep what a sliding window leaves behind until :meth:`crop`."""
        self.record_past = True

    def crop(self, tokens: int) -> None:
        """Take the last ``-tokens`` away, or, as in transformers 5.0, all behind the first ``tokens``.

        Of a packed group that is cut, what stays becomes whole tokens again, as they were rounded.
        """
        remove = -tokens if tokens <= 0 else max(0, self.seen - tokens)
        if not self.is_initialized:
            return
        assert self.whole is not None
        left, needed = self.held - remove, self.seen - remove
        if self.sliding_window is not None:
            needed = min(needed, self.sliding_window - 1)
        if left < needed or left < 0:
            raise CompressError(
                f"{remove} tokens cannot be taken off this cache: its sliding window has lost what was before them; call activate_past_recording first."
            )
        self.seen -= remove
        whole = self.whole[0].shape[2]
        if remove > whole:
            self._cut_packed(left)
        elif remove:
            self._change_whole(lambda states: states[:, :, : whole - remove])
        self._forget()

    def _cut_packed(self, left: int) -> None:
        """Keep the first ``left`` of all tokens, fewer than are whole at first or packed."""
        assert self.packed is not None
        assert self.first is not None
        sinks = self.first[0].shape[2]
        if left < sinks:
            self.whole = self.first[0][:, :, :left].clone(), self.first[1][:, :, :left].clone()
            self.first = self.packed = None
            return
        left -= sinks
        start = left // self.settings.tokens * self.settings.tokens
        stop = min(start + self.settings.tokens, self.packed[0].tokens)
        rest = [packed.part(start, stop) for packed in self.packed]
        pairs = zip(rest, self.whole or (), strict=True)
        tails = [unpack(packed, whole.dtype)[:, :, : left - start] for packed, whole in pairs]
        self.whole = tails[0], tails[1]
        kept = [packed.part(0, start).map(Tensor.clone) for packed in self.packed]
        self.packed = kept[0], kept[1]

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change the first dimension of every tensor alike."""
        if self.packed is not None:
            self.packed = self.packed[0].map(change), self.packed[1].map(change)
        if self.first is not None:
            self.first = change(self.first[0]), change(self.first[1])
        if self.whole is not None:
            self._change_whole(change)
        self.power, self.scale = (None if part is None else change(part) for part in (self.power, self.scale))
        self.mean = None if self.mean is None else self.mean.map(change)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take rows of the batch, [B], as beam search does."""
        self.map_rows(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch."""
        self.map_rows(lambda tensor: tensor.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep rows of the batch."""
        self.map_rows(lambda tensor: tensor[indices])

    def reset(self) -> None:
        """Forget all tokens."""
        self.packed = self.first = self.whole = self.power = self.scale = self.mean = None
        self.seen, self.is_initialized, self.evicted = 0, False, False

    def set_bits(self, bits: tuple[int, int]) -> None:
        """Read packed keys and values at fewer bits from now on; what is dropped is freed."""
        if any(new > old for new, old in zip(bits, self.bits, strict=True)):
            raise CompressError(
                f"kv bits {bits}: this cache holds {self.bits}; bits that were not kept cannot be read."
            )
        if not self.settings.nested and bits != self.bits:
            raise CompressError("kv bits: codes on KIVI's own grid do not nest; make the cache with nested=True.")
        was_whole = WHOLE in self.bits
        self.bits = bits
        if self.packed is not None:
            self.packed = self.packed[0].at_bits(bits[0]), self.packed[1].at_bits(bits[1])
        elif was_whole and self.whole is not None:
            self._pack()

    def tensors(self) -> list[Tensor]:
        """Return all there is in memory."""
        packed = [tensor for part in self.packed or () for tensor in part.tensors()]
        mean = None if self.mean is None else self.mean.key
        scales = [part for part in (self.power, self.scale, mean) if part is not None]
        return [*packed, *(self.first or ()), *(self.whole or ()), *scales]


class KVCache(Cache):
    """Cache of keys and values that is packed, all but the last tokens of every layer.

    Give it to a model, or to its ``generate``, as ``past_key_values`` (``cache`` in transformers from 5.24 on: :func:`compress.hf.cache_name`).

    Args:
        bits: of a code, 2 to 8, or 16, which keeps a layer whole; (keys, values) if they differ; or a list of either, a layer each.
        group: values that share a smallest value and a span; (of keys, of values) if they differ. None: 128 tokens of a channel, and as
            many channels of a token as divide a head, up to 64.
        residual: so many of the last tokens stay as they are; some more wait until a group is full.
        keys: ``channel``: a group is ``group`` tokens of one channel; ``token``: channels of one token.
        values: the same for values.
        config: of the model. It tells which layers slide or hold no keys; without it every layer keeps all tokens.
        nested: False for KIVI's own grid, a control, of which fewer bits cannot be read.
        sinks: so many of the very first tokens stay as they are too: much attention goes there, and their keys are unlike all others.
        rotate: channels of a head are mixed by a Hadamard matrix before they are rounded, so that no channel is much louder than the rest.
        keep: take tokens from the first call of the model, the prompt, until so many are left in every layer without a window.
        policy: which: those that its last queries attend to most stay (``attention``), or the latest (``recent``), or any
            (``random``); the first ``sinks`` and the last ``residual`` in any case.
        scale_keys: channels of keys are scaled before they are rotated, by what the first queries and keys show
            (:func:`compress.kernels.kv.scale_for`), so that errors fall where queries are small.
        centre_keys: keys are packed less their mean, turned as rotary embeddings turn keys (:mod:`compress.kernels.kv_mean`); not where
            ``keep`` takes tokens away, nor without a config.

    Raises:
        CompressError: settings that are out of range, do not fit each other or the model, or a model without attention.
    """

    def __init__(
        self,
        bits: KVBits = 4,
        group: int | Pair | None = None,
        residual: int = 128,
        keys: Along = "channel",
        values: Along = "token",
        config: PretrainedConfig | None = None,
        nested: bool = True,
        sinks: int = 4,
        rotate: bool = True,
        keep: int | None = None,
        policy: Policy = "attention",
        scale_keys: bool = True,
        centre_keys: bool = True,
    ) -> None:
        settings = KVSettings(
            group, residual, keys, values, nested, sinks, rotate, keep, policy, scale_keys, centre_keys
        )
        self.settings, self._asked = settings, bits
        if config is None:
            super().__init__(layers=[])
            return
        plain = DynamicCache(config=config).layers
        kinds = [type(layer) for layer in plain]
        count = sum(kind in (DynamicLayer, DynamicSlidingWindowLayer) for kind in kinds)
        text: Any = config.get_text_config(decoder=True)
        if not count or not (getattr(text, "per_layer_config", None) or getattr(text, "num_attention_heads", None)):
            raise CompressError(
                f"kv bits: {config.model_type} has no layer that keeps keys and values, so there is nothing to pack."
            )
        by_layer = settings.by_layer(bits, len(plain))
        settings.check_config(config)
        layers = [
            KVLayer(settings, own, getattr(layer, "sliding_window", None), rotary_frequencies(config, place))
            if kind in (DynamicLayer, DynamicSlidingWindowLayer)
            else layer
            for place, (layer, kind, own) in enumerate(zip(plain, kinds, by_layer, strict=True))
        ]
        super().__init__(layers=layers)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add tokens to a layer, which without a config is made when first seen."""
        while len(self.layers) <= layer_idx:
            place = len(self.layers)
            self.layers.append(KVLayer(self.settings, self.settings.by_layer(self._asked, place + 1)[place]))
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    @property
    def packed_layers(self) -> dict[int, KVLayer]:
        """Return the layers that pack, by number; others (linear attention, say) are those of transformers."""
        return {place: layer for place, layer in enumerate(self.layers) if isinstance(layer, KVLayer)}

    def activate_past_recording(self) -> None:
        """Keep what sliding windows leave behind until :meth:`crop`; transformers 5.0 has no such method of its own."""
        for layer in self.layers:
            if hasattr(layer, "activate_past_recording"):
                layer.activate_past_recording()

    def set_bits(self, bits: KVBits) -> None:
        """Read what is held, and pack what will come, at fewer bits; what they need no longer is freed.

        The result is bit for bit a cache that was made at these bits and saw the same keys and values.

        Raises:
            CompressError: more bits than are held.
        """
        by_layer = self.settings.by_layer(bits, len(self.layers))
        for place, layer in self.packed_layers.items():
            layer.set_bits(by_layer[place])
        self._asked = bits

    def resident_bytes(self) -> int:
        """Return the bytes that the tensors of the packing layers take in memory, shared ones once."""
        tensors = [tensor for layer in self.packed_layers.values() for tensor in layer.tensors()]
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
        return sum(storages.values())
