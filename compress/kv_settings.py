"""Settings of the cache of keys and values, and the numbers of bits that a command line names (no torch)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Union

from compress.errors import CompressError

if TYPE_CHECKING:
    from compress.kernels.kv import Along, Grid
    from compress.kv_evict import Policy

WHOLE = 16  # bits of a layer that stays as it is
_TOKENS, _CHANNELS = 128, 64  # of a group
Pair = tuple[int, int]
KVBits = Union[int, Pair, Sequence[Union[int, Pair]]]
"""Bits of keys and values alike, (keys, values), or a list of either with an entry for every layer."""


@dataclass(frozen=True)
class KVSettings:
    """Say how states are packed; fields as of :class:`compress.KVCache`."""

    group: int | Pair | None = None
    residual: int = 128
    keys: Along = "channel"
    values: Along = "token"
    nested: bool = True
    sinks: int = 4
    rotate: bool = True
    keep: int | None = None
    policy: Policy = "attention"
    scale_keys: bool = True
    centre_keys: bool = True

    def __post_init__(self) -> None:
        if min(self.groups) < 1 or self.residual < 0 or self.sinks < 0:
            raise CompressError(
                f"kv group {self.group}, residual {self.residual}, sinks {self.sinks}: a group has at least one value, and neither of the others is negative."
            )
        for name in (self.keys, self.values):
            if name not in ("channel", "token"):
                raise CompressError(f"kv groups along {name!r}: give 'channel' or 'token'.")
        if self.policy not in ("attention", "recent", "random"):
            raise CompressError(f"kv policy {self.policy!r}: give 'attention', 'recent' or 'random'.")
        if self.keep is not None and self.keep < self.sinks + self.residual:
            raise CompressError(
                f"kv keep {self.keep}: fewer tokens than stay whole ({self.sinks} first and {self.residual} last ones); "
                "keep more, or lower residual."
            )

    def options(self) -> dict[str, Any]:
        """Return the arguments of :class:`compress.KVCache` but for bits and the model's configuration."""
        return asdict(self)

    @property
    def groups(self) -> Pair:
        """Return the group of keys and that of values; 128 tokens, or up to 64 channels, where none is given."""
        if self.group is None:
            keys, values = (_TOKENS if along == "channel" else _CHANNELS for along in (self.keys, self.values))
            return keys, values
        return (self.group, self.group) if isinstance(self.group, int) else self.group

    def fitted(self, *channels: int) -> KVSettings:
        """Return settings for so many channels, of keys and of values; refuse a group that does not divide them."""
        if self.group is None:
            both = zip(channels, self.groups, (self.keys, self.values), strict=True)
            keys, values = (group if along == "channel" else _fitting(size, group) for size, group, along in both)
            return replace(self, group=(keys, values))
        for size, group, along in zip(channels, self.groups, (self.keys, self.values), strict=True):
            if along == "token" and size % group:
                raise CompressError(
                    f"kv group {group}: does not divide the {size} channels of this model's heads; "
                    f"give a group that does, {_fitting(size, group)} say."
                )
        return self

    @property
    def tokens(self) -> int:
        """Return by how many tokens packed states grow."""
        along = zip(self.groups, (self.keys, self.values), strict=True)
        return (
            math.lcm(*(group for group, name in along if name == "channel"))
            if "channel" in (self.keys, self.values)
            else 32
        )

    @property
    def scales(self) -> bool:
        """Tell whether channels of keys are scaled; without a rotation their groups would be the same."""
        return self.scale_keys and self.rotate and self.keys == "channel"

    @property
    def centres(self) -> bool:
        """Tell whether keys are packed less their mean; where tokens are taken away the places of the others are not known."""
        return self.centre_keys and self.rotate and self.keep is None

    def grids(self, bits: Pair) -> tuple[Grid, Grid]:
        """Return the grids of keys and of values."""
        from compress.kernels.kv import Grid

        both = zip(bits, self.groups, (self.keys, self.values), strict=True)
        keys, values = (
            Grid(number, group, along, self.nested, self.rotate, self.nested and self.rotate and along == "token")
            for number, group, along in both
        )
        return keys, values

    def check_config(self, config: Any) -> None:
        """Refuse, before any work, heads that groups do not divide, where the configuration tells their size."""
        from compress.models import stated  # imports torch

        text = config.get_text_config(decoder=True)
        size, heads = stated(text, "head_dim"), stated(text, "num_attention_heads")
        if size is None and heads:
            size = text.hidden_size // heads
        if isinstance(size, int) and stated(text, "v_head_dim") is None:
            self.fitted(size, size)

    def by_layer(self, bits: KVBits, count: int) -> list[Pair]:
        """Return (keys, values) for each of so many layers."""
        several = isinstance(bits, Sequence) and not isinstance(bits, tuple)
        each = [_pair(own) for own in bits] if several else [_pair(bits)] * count  # type: ignore[union-attr]
        if len(each) < count:
            raise CompressError(f"kv bits: {len(each)} entries for a model of {count} layers; give one for each.")
        return each


def _fitting(size: int, most: int) -> int:
    """Return the largest group of at most ``most`` channels that divides ``size``."""
    return max(number for number in range(1, min(size, most) + 1) if size % number == 0)


def _pair(bits: Any) -> Pair:
    pair = tuple(bits) if isinstance(bits, (tuple, list)) else (bits, bits)
    usable = all(isinstance(one, int) and (2 <= one <= 8 or one == WHOLE) for one in pair)
    if len(pair) != 2 or not usable or (WHOLE in pair and pair != (WHOLE, WHOLE)):
        raise CompressError(f"kv bits {bits!r}: give 2 to 8, or 16 to keep all as it is; keys and values apart as 4:2.")
    return pair


def parse_kv_bits(text: str | None) -> list[KVBits]:
    """Read numbers of bits of a command line, ``4,2,4:2`` (keys:values); none from an absent option."""
    found: list[KVBits] = []
    for part in (text or "").split(",") if text else []:
        try:
            pair = tuple(int(number) for number in part.split(":"))
        except ValueError:
            raise CompressError(
                f"--kv-bits {text!r}: give numbers of bits such as 4,2 or, keys and values apart, 4:2."
            ) from None
        _pair(pair if len(pair) > 1 else pair[0])
        found.append(pair[0] if len(pair) == 1 else (pair[0], pair[1]))
    return found


def kv_options(group: str | None, residual: int | None) -> dict[str, Any]:
    """Read settings of a command line, those that are given: ``32`` or ``128:64`` (keys:values), and tokens."""
    changes: dict[str, Any] = {} if residual is None else {"residual": residual}
    if group is not None:
        try:
            numbers = tuple(map(int, group.split(":")))
        except ValueError:
            numbers = ()
        if not 1 <= len(numbers) <= 2:
            raise CompressError(f"--kv-group {group!r}: give one number, or those of keys and values as 128:64.")
        changes["group"] = numbers[0] if len(numbers) == 1 else numbers
    return changes


def kv_label(bits: KVBits) -> str:
    """Name numbers of bits as a command line does: ``4``, ``4:2``; ``mixed`` where layers differ."""
    if isinstance(bits, int):
        return str(bits)
    return ":".join(map(str, bits)) if isinstance(bits, tuple) else "mixed"
