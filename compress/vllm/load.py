"""Choose fewer bits where more requests wait: ``8,4,3`` or, with the number of requests from which they hold, ``8,4:4,3:16``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from compress.errors import CompressError

_FIRST, _TIMES = (
    4,
    4,
)  # requests from which the second number of bits holds; every further one from so many times as many


@dataclass(frozen=True)
class LoadPolicy:
    """Hold pairs of requests and bits: from so many requests at once, so many bits."""

    steps: Sequence[tuple[int, int]]

    def at(self, requests: int) -> int:
        """Return the bits for a number of requests."""
        return [bits for least, bits in self.steps if requests >= least][-1]

    def next(self, bits: float, requests: int) -> int | None:
        """Return the bits to change to, or None to stay.

        Down where the requests ask for it, up only where twice as many would not: else every request that ends would change them.
        """
        if self.at(requests) < bits:
            return self.at(requests)
        calm = self.at(2 * requests)
        return calm if calm > bits else None


def load_policy(text: str) -> LoadPolicy:
    """Read ``--bits-by-load``.

    Raises:
        CompressError: not falling numbers of bits, or not rising numbers of requests.
    """
    steps: list[tuple[int, int]] = []
    for place, part in enumerate(text.split(",")):
        bits, _, least = part.strip().partition(":")
        usual = str(_FIRST * _TIMES ** (place - 1) if place else 0)
        if not bits.isdigit() or not (least or usual).isdigit():
            raise CompressError(
                f"--bits-by-load {text!r}: give bits, as 8,4,3, or with numbers of requests, as 8,4:4,3:16."
            )
        steps.append((int(least or usual), int(bits)))
    falls = all(one[0] < other[0] and one[1] > other[1] for one, other in pairwise(steps))
    if len(steps) < 2 or not falls or steps[0][0]:
        raise CompressError(
            f"--bits-by-load {text!r}: give two or more, fewer bits from more requests, the first from none."
        )
    return LoadPolicy(steps)
