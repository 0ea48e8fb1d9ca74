"""Let a model use the packed cache by itself, wherever it would make a plain one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from compress.errors import CompressError
from compress.hf import cache_name
from compress.kv import KVCache
from compress.kv_settings import KVBits, KVSettings, parse_kv_bits
from compress.logits import Predictions, losses_of

_PLAIN = KVSettings()
_NAMES = ("past_key_values", "cache")


def make_caches(model: PreTrainedModel, bits: KVBits, settings: KVSettings = _PLAIN) -> Callable[[], KVCache]:
    """Return a function that makes an empty cache for a model; refuse, at once, settings that do not fit it."""

    def make() -> KVCache:
        return KVCache(bits, config=model.config, **settings.options())

    make()
    return make


def score_by_blocks(
    model: Any, ids: Tensor, cache: Any, block: int, score: Callable[[Tensor, slice], Tensor]
) -> Tensor:
    """Join what ``score`` makes of the logits after all tokens but the last, [B, T - 1, ...], of tokens [B, T] read a block at a time.

    Tokens of a block see each other whole; what came before they see as the cache holds it. ``score`` is given the logits,
    float32 [B, some, vocabulary], and which tokens they follow.
    """
    name, found, end = cache_name(model), [], ids.shape[1] - 1
    for start in range(0, end, block):
        part = ids[:, start : start + block]
        made = Predictions(model, part, range(min(block, end - start)), use_cache=True, **{name: cache})

        def placed(logits: Tensor, own: slice, start: int = start) -> Tensor:
            return score(logits, slice(start + own.start, start + own.stop))

        found.append(made.each(placed))
    return torch.cat(found, 1)


def losses_by_blocks(model: Any, ids: Tensor, cache: Any, block: int) -> Tensor:
    """Return the negative log-likelihoods of all tokens but the first, [B, T - 1], of tokens [B, T] read a block at a time."""
    after = ids[:, 1:]
    return score_by_blocks(model, ids, cache, block, lambda logits, part: losses_of(logits, after[:, part]))


def use_kv_cache(model: PreTrainedModel, make: Callable[[], KVCache]) -> None:
    """Have a model's forward take a new packed cache where it gets none, or a plain one, whose tokens move there.

    ``generate`` then uses it too. A call with ``use_cache=False``, or with a cache of another class, is left alone, and so is a model that trains.
    """
    name = cache_name(model)

    def replace_cache(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        given = next((kwargs[other] for other in _NAMES if kwargs.get(other) is not None), None)
        wanted = kwargs.get("use_cache", getattr(module.config, "use_cache", True))
        if module.training or not wanted or not (given is None or type(given) is DynamicCache):
            return None
        cache = make()
        if given is not None and not _move(given, cache):
            return None
        others = {key: value for key, value in kwargs.items() if key not in _NAMES}
        return args, {**others, name: cache}

    model.register_forward_pre_hook(replace_cache, with_kwargs=True)


def _move(plain: DynamicCache, cache: KVCache) -> bool:
    """Move the tokens of a plain cache, if it still has all of them."""
    if plain.get_seq_length() == 0:
        return True
    if len(plain.layers) != len(cache.packed_layers):
        return False
    layers: list[Any] = plain.layers
    if any(layer.keys is None or layer.keys.shape[2] != layer.get_seq_length() for layer in layers):
        return False
    for place, layer in enumerate(layers):
        cache.update(layer.keys, layer.values, place)
    return True


def kv_of(given: KVBits | str | dict[str, Any], recommended: dict[str, Any] | None) -> tuple[KVBits, KVSettings]:
    """Return bits and settings from what :func:`compress.load` was given.

    Args:
        given: bits; ``"4"`` or ``"4:2"``; ``"recommended"``; or a mapping of ``bits`` and arguments of :class:`compress.KVCache`.
        recommended: such a mapping from the manifest, None if there is none.
    """
    if given == "recommended":
        if recommended is None:
            raise CompressError(
                "kv='recommended': this checkpoint recommends no setting; add the pass kv_calibrate, or give bits."
            )
        given = recommended
    options: dict[str, Any] = dict(given) if isinstance(given, dict) else {"bits": given}
    bits = options.pop("bits", 4)
    if unknown := options.keys() - KVSettings.__dataclass_fields__.keys():
        raise CompressError(f"kv: {min(unknown)!r} is not a known setting.")
    if isinstance(options.get("group"), list):
        options["group"] = tuple(options["group"])
    if isinstance(bits, str):
        several = parse_kv_bits(bits)
        if len(several) != 1:
            raise CompressError(f"kv {bits!r}: give one number of bits.")
        bits = several[0]
    return bits, KVSettings(**options)
