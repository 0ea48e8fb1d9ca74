"""Measure text with a cache of keys and values in the loop: a block of tokens at a time, as it is served."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from compress.errors import CompressError
from compress.evals.perplexity import Window, as_tensors
from compress.kv import KVCache
from compress.kv_serving import losses_by_blocks
from compress.kv_settings import KVBits, KVSettings, parse_kv_bits

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
    changes: dict[str, Any] = {} if residual is None else {"residual": residual}
    if group is not None:
        try:
            numbers = tuple(map(int, group.split(":")))
        except ValueError:
            numbers = ()
        if not 1 <= len(numbers) <= 2:
            raise CompressError(f"--kv-group {group!r}: give one number, or those of keys and values as 128:64.")
        changes["group"] = numbers[0] if len(numbers) == 1 else numbers
    if changes and bits is None:
        raise CompressError("--kv-group and --kv-residual are about a packed cache: give --kv-bits too.")
    return KVWanted(parse_kv_bits(bits), KVSettings(**changes))


class CachedLosses:
    """Compute the losses of windows with a new cache for each batch of them.

    Args:
        make: gives an empty cache.
        block: tokens of a call; they see each other whole, so with as many as wait whole anyway a token sees what it would
            see if it were generated, or up to ``block - 1`` whole tokens more.

    Attributes:
        bytes: that the largest cache took in memory, of a packed cache.
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
        size = cache.resident_bytes() if isinstance(cache, KVCache) else 0
        if size > self.bytes:
            self.bytes, self.tokens = size, ids.shape[0] * cache.get_seq_length()
        return losses.masked_fill(~wanted, 0.0)
