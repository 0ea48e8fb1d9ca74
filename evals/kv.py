"""Measure text with a cache of keys and values in the loop: a block of tokens at a time, as it is served."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from compress.errors import CompressError
from compress.evals.perplexity import Window, as_tensors
from compress.evals.timing import now, spread
from compress.hf import cache_name
from compress.kv import KVCache
from compress.kv_serving import losses_by_blocks, make_caches
from compress.kv_settings import KVBits, KVSettings, kv_label, kv_options, parse_kv_bits
from compress.loading import read_config
from compress.passes import Progress

BLOCK = 32  # tokens that see each other whole; as many as wait, whole, until a group is full


@dataclass(frozen=True)
class KVWanted:
    """Say with which caches to measure."""

    bits: Sequence[KVBits] = ()
    settings: KVSettings = field(default_factory=KVSettings)

    def key(self, bits: KVBits) -> Mapping[str, Any]:
        """Return what figures depend on."""
        return {"bits": bits, **asdict(self.settings), "block": BLOCK}


def kv_wanted(bits: str | None, group: str | None, residual: int | None) -> KVWanted:
    """Read options of a command line: ``4,2``, ``32`` or ``128:64`` (keys:values), tokens."""
    changes = kv_options(group, residual)
    if changes and bits is None:
        raise CompressError("--kv-group and --kv-residual are about a packed cache: give --kv-bits too.")
    return KVWanted(parse_kv_bits(bits), KVSettings(**changes))


def refuse_misfits(folder: str, wanted: KVWanted) -> None:
    """Refuse, before its weights are read, caches that do not fit a model."""
    for bits in wanted.bits:
        KVCache(bits, config=read_config(folder), **wanted.settings.options())


class CachedLosses:
    """Compute the losses of windows with a new cache for each batch of them.

    Args:
        make: gives an empty cache.
        block: tokens of a call; they see each other whole, so with as many as wait whole anyway a token sees what it would
            see if it were generated, or up to ``block - 1`` whole tokens more.

    Attributes:
        bytes: that the largest cache took in memory.
        tokens: that it held, summed over the rows of the batch.
    """

    def __init__(self, make: Callable[[], Any], block: int = BLOCK) -> None:
        self.make, self.block = make, block
        self.bytes = self.tokens = 0

    def __call__(self, model: PreTrainedModel, batch: Sequence[Window]) -> Tensor:
        """Return the negative log-likelihoods of the scored tokens, zero elsewhere: [windows, T - 1]."""
        ids, wanted = as_tensors(batch, model.device)
        cache = self.make()
        losses = losses_by_blocks(model, ids, cache, self.block)
        size = bytes_of(cache)
        if size > self.bytes:
            self.bytes, self.tokens = size, ids.shape[0] * cache.get_seq_length()
        return losses.masked_fill(~wanted, 0.0)


@torch.inference_mode()
def decode_speed(
    model: PreTrainedModel,
    wanted: KVWanted,
    context: int,
    tokens: int = 8,
    rounds: int = 5,
    progress: Progress | None = None,
) -> dict[str, dict[str, Any]]:
    """Time tokens behind ``context`` tokens in each cache, which take turns; the states are random, as their values cost no time.

    Returns:
        label of the bits, or ``plain`` -> ``{"seconds", "versus_plain", "bytes"}``: of a token; ratios within a round; the cache's.
    """
    makers: dict[str, Callable[[], Any]] = {"plain": lambda: DynamicCache(config=model.config)}
    makers |= {kv_label(bits): make_caches(model, bits, wanted.settings) for bits in wanted.bits}
    caches = {name: _filled(make(), model, context) for name, make in makers.items()}
    times: dict[str, list[float]] = {name: [] for name in caches}
    argument, token = cache_name(model), torch.zeros(1, 1, dtype=torch.long, device=model.device)
    for turn in range(-1, rounds):  # the first is not counted
        for name, cache in caches.items():
            begun = now(model.device)
            for _ in range(tokens):
                model(input_ids=token, use_cache=True, **{argument: cache})
            if turn >= 0:
                times[name].append((now(model.device) - begun) / tokens)
            if progress is not None:
                progress(f"decoding with cache {name}", turn + 1, rounds + 1)
    return {
        name: {
            "seconds": spread(own),
            "versus_plain": spread([theirs / ours for theirs, ours in zip(times["plain"], own, strict=True)]),
            "bytes": bytes_of(caches[name]),
        }
        for name, own in times.items()
    }


def _filled(cache: Any, model: PreTrainedModel, context: int) -> Any:
    """Put random states of ``context`` tokens into a cache, of the sizes that the model gives."""
    probe = DynamicCache(config=model.config)
    model(
        input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=True, **{cache_name(model): probe}
    )
    generator = torch.Generator(model.device).manual_seed(0)
    layers: list[Any] = probe.layers
    for place, layer in enumerate(layers):
        shapes = [(*states.shape[:2], context, states.shape[3]) for states in (layer.keys, layer.values)]
        made = [torch.randn(shape, generator=generator, device=model.device).to(layer.keys.dtype) for shape in shapes]
        cache.update(*made, place)
    return cache


def bytes_of(cache: Any) -> int:
    """Measure the bytes of the storages that a cache of any library holds, each once."""
    storages = {
        each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in _tensors_in(cache, set())
    }
    return sum(storages.values())


def _tensors_in(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """Find the tensors that an object holds, those within wrapping ones too."""
    if id(value) in seen or isinstance(value, type):
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        inner = getattr(value, "__tensor_flatten__", None)
        if inner is None:
            yield value
            return
        parts: Iterable[Any] = [getattr(value, name) for name in inner()[0]]
    elif isinstance(value, (list, tuple)):
        parts = value
    else:
        parts = (value if isinstance(value, dict) else getattr(value, "__dict__", {})).values()
    for part in parts:
        yield from _tensors_in(part, seen)
