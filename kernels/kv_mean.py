"""The mean key of a head: what its keys have in common before rotary embeddings (RoPE, arXiv 2104.09864) turn them by their places.

Turned, that mean swings within every group of tokens and widens its span. Keys are packed less it, so that errors get smaller, and
attention adds the products of queries with it, from no more than the mean itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

_STRETCH = 128  # tokens whose means are dense at a time


@dataclass(frozen=True)
class Mean:
    """Hold the mean keys of packed tokens.

    Attributes:
        key: float32 [B, H, 1, D], as if at place 0.
        frequencies: float64 [R / 2]: channels c and c + R / 2 turn together, by so much from a token to the next; those from R on do not.
        place: of the first packed token.
    """

    key: Tensor
    frequencies: Tensor
    place: int

    def behind(self, tokens: int) -> Mean:
        """Return that of the packed tokens but the first ``tokens``."""
        return replace(self, place=self.place + tokens)

    def map(self, change: Callable[[Tensor], Tensor]) -> Mean:
        """Return it with the tensor that has rows of a batch changed."""
        return replace(self, key=change(self.key))

    def at(self, tokens: int) -> Tensor:
        """Return the mean at the place of each of the first ``tokens``: [B, H, T, D]."""
        return turn(self.key, _places(self.place, tokens, self.key), self.frequencies)

    def products(self, queries: Tensor, tokens: int) -> Tensor:
        """Return ``queries @ at(tokens).mT`` for queries, float32 [B, H, Q, D], without a mean for each token: they are turned back by whole stretches."""
        starts = _places(self.place, tokens, queries)[::_STRETCH]
        back = turn(queries[..., None, :], -starts, self.frequencies)  # [B, H, Q, stretches, D]
        stretch = replace(self, place=0).at(_STRETCH)
        found = torch.unflatten(back.flatten(2, 3) @ stretch.mT, 2, back.shape[2:4])
        return found.flatten(3)[..., :tokens]


def _places(first: int, tokens: int, like: Tensor) -> Tensor:
    return torch.arange(first, first + tokens, device=like.device)


def turn(states: Tensor, places: Tensor, frequencies: Tensor) -> Tensor:
    """Turn pairs of channels, [..., T or 1, D], as rotary embeddings do at places, [T], by :attr:`Mean.frequencies`."""
    angles = places[:, None].double() * frequencies
    cosines, sines = angles.cos().to(states.dtype), angles.sin().to(states.dtype)
    half = len(frequencies)
    one, other, rest = torch.split(states, [half, half, states.shape[-1] - 2 * half], -1)
    turned = [one * cosines - other * sines, other * cosines + one * sines]
    return torch.cat([*turned, rest.expand(*turned[0].shape[:-1], -1)], -1)


def mean_for(keys: Tensor, frequencies: Tensor, place: int, power: Tensor | None) -> Mean:
    """Return the mean of keys, floating [B, H, T, D], the first of which is at ``place``.

    A pair of channels takes part where the mean of the first half of the tokens makes the second vary less, channels weighed by the power of the
    queries, [B, H, 1, D]: where a model turns no keys, or other pairs than these, it does not, and what does not vary needs no mean.
    """
    keys = keys.detach().float()
    half = keys.shape[2] // 2
    back = turn(keys, -_places(place, keys.shape[2], keys), frequencies)
    early = Mean(back[:, :, :half].mean(2, keepdim=True), frequencies, place + half)
    late = keys[:, :, half:]
    gain = late.var(2, correction=0) - (late - early.at(late.shape[2])).var(2, correction=0)
    gain = gain if power is None else gain * power.squeeze(2)
    pairs = len(frequencies)
    pays = (gain[..., :pairs] + gain[..., pairs : 2 * pairs] > 0).repeat(1, 1, 2)
    pays = torch.nn.functional.pad(pays, (0, keys.shape[3] - 2 * pairs))
    return Mean(back.mean(2, keepdim=True) * pays[:, :, None], frequencies, place)
