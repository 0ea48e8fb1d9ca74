"""Run a block again and again while its linears become final one after another; what cannot change is computed once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from compress.passes import Run
from compress.statistics import Enough, watch


class Replay:
    """Run samples through a block whose linears become final in the order in which the block calls them.

    A part of it (a linear, the attention) whose linears are all final gives what it gave before, so that a run continues, in
    effect, after them. What is kept is freed once the part around it is kept. ``linears`` are names inside the block.
    """

    def __init__(self, module: nn.Module, runs: Sequence[Run], linears: Collection[str]) -> None:
        self._module, self._runs = module, runs
        self._open, self._linears = set(linears), frozenset(linears)
        self._kept: list[dict[str, Any]] = [{} for _ in runs]

    def finish(self, linears: Collection[str]) -> None:
        """Take some linears for final from now on."""
        self._open.difference_update(linears)

    def inputs(self, linear: str) -> Iterator[Tensor | None]:
        """Yield what one linear is given on every sample, [T, K]; None where a sample does not come to it."""
        watched = {"": self._module.get_submodule(linear)}
        for sample, run in enumerate(self._runs):
            seen: list[Tensor] = []

            def visit(_name: str, x: Tensor, seen: list[Tensor] = seen) -> None:
                seen.append(x.flatten(0, -2))
                raise Enough

            with self._stand_ins(sample), watch(watched, visit):
                try:
                    run(self._module)
                except Enough:
                    pass
            yield seen[0] if seen else None

    def outputs(self) -> Iterator[Tensor]:
        """Yield what the block makes of every sample, [1, T, hidden]."""
        for sample, run in enumerate(self._runs):
            with self._stand_ins(sample):
                yield run(self._module)
            self._kept[sample].clear()

    def _final(self) -> dict[str, nn.Module]:
        """Find the parts with linears that are all final."""

        def holds(part: str, linears: Collection[str]) -> bool:
            return part in linears or any(name.startswith(f"{part}.") for name in linears)

        parts = dict(self._module.named_modules())
        return {n: part for n, part in parts.items() if n and holds(n, self._linears) and not holds(n, self._open)}

    @contextmanager
    def _stand_ins(self, sample: int) -> Iterator[None]:
        """Let final parts return what they returned for a sample, in their first call of a run."""
        kept, called, parts = self._kept[sample], set[str](), self._final()

        def stand_in(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                if name in called:
                    return forward(*args, **kwargs)
                called.add(name)
                filled = [value for value in (*args, *kwargs.values()) if isinstance(value, MutableMapping)]
                if name not in kept:
                    result = forward(*args, **kwargs)
                    for inner in [other for other in kept if other.startswith(f"{name}.")]:
                        del kept[inner]
                    kept[name] = result, [dict(mapping) for mapping in filled]
                for mapping, left in zip(filled, kept[name][1], strict=True):  # keys and values for later blocks, say
                    mapping.update(left)
                return _copied(kept[name][0])

            return call

        for name, part in parts.items():
            part.forward = stand_in(name, part.forward)
        try:
            yield
        finally:
            for part in parts.values():
                del part.forward


def _copied(value: Any) -> Any:
    """Copy tensors, alone or in tuples: whoever is given one may write to it."""
    if isinstance(value, tuple):
        return tuple(map(_copied, value))
    return value.clone() if isinstance(value, Tensor) else value
