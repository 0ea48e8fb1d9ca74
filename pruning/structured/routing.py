"""Ask the router of a block where it would send its tokens if there were fewer experts, and compute what these would make."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from compress.errors import CompressError
from compress.experts import Experts
from compress.mixtures import Fewer
from compress.passes import Run

Small = Callable[[int], PreTrainedModel]
"""Returns the empty model with so many experts in every mixture."""
_PARAMETERS = signature(Experts.forward)


@dataclass(frozen=True)
class Call:
    """Hold one call of a block's experts.

    Attributes:
        x: their inputs, [tokens, in].
        weights: by which each token's experts count, [tokens, experts + 1]; the last column is for what is no expert.
        args: positional arguments of the module that has router and experts in it.
        kwargs: its other arguments.
        output: what the experts make together, [tokens, out]; nothing where only the router was asked.
    """

    x: Tensor
    weights: Tensor
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Tensor


class _Asked(Exception):
    """Stop a forward pass where experts are called."""


class Router:
    """Ask the router of one block.

    Where experts are in groups that a token chooses among, there must be equally many in each, and those that are not to be chosen are
    given a bias of minus infinity; else a smaller router is asked, transformers' own.
    """

    def __init__(self, block: nn.Module, name: str, change: Fewer, groups: int, small: Small) -> None:
        self._block, self._name, self._change, self._small = block, name, change, small
        self.path = next(path for path in change.paths if path.startswith(f"{name}."))
        found = block.get_submodule(self.path.removeprefix(f"{name}."))
        assert isinstance(found, Experts)
        self.experts = found
        axes = [tensor for tensor in change.axes if tensor.startswith(f"{name}.")]
        parent = self.path.rpartition(".")[0]
        around = all(tensor.startswith(f"{parent}.") for tensor in axes)
        self.scope = parent.removeprefix(name).lstrip(".") if around else ""
        self._prefix = f"{parent if around else name}."
        self._tensors = {n: t for n, t in self._module(block).state_dict().items() if not self._of_expert(n)}
        self._biases = [n for n, t in self._tensors.items() if self._prefix + n in axes and t.numel() == t.shape[-1]]
        self.masked = groups > 1

    def _module(self, block: nn.Module) -> nn.Module:
        """Return the module that has router and experts in it."""
        return block.get_submodule(self.scope)

    def _of_expert(self, name: str) -> bool:
        inner = self.path.removeprefix(self._prefix)
        return name.startswith(f"{inner}.") and name.removeprefix(f"{inner}.")[0].isdigit()

    @torch.no_grad()
    def call(self, run: Run, compute: bool = True) -> Call:
        """Run one sample through the block, up to the experts alone if these are not to compute."""
        given: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        asked: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        outputs: list[Tensor] = []

        def note(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            asked.append((args, kwargs))
            if not compute:
                raise _Asked

        hooks = [
            self._module(self._block).register_forward_pre_hook(
                lambda _m, a, k: given.append((a, k)), with_kwargs=True
            ),
            self.experts.register_forward_pre_hook(note, with_kwargs=True),
            self.experts.register_forward_hook(lambda _m, _i, output: outputs.append(output)),
        ]
        try:
            run(self._block)
        except _Asked:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        if len(asked) != 1:
            raise CompressError("its experts are not called once for all tokens of a text")
        x, weights = self._weights(*asked[0], range(self.experts.num_experts))
        return Call(x, weights, *given[0], outputs[0] if outputs else x[:0])

    @torch.no_grad()
    def weights(self, call: Call, kept: Sequence[int]) -> Tensor:
        """Return the weights of a call, [tokens, experts + 1], if the router could choose only some of the experts, in order."""
        if self.masked:
            gone = [place for place in range(self.experts.num_experts) if place not in kept]
            masks = {name: self._tensors[name].clone() for name in self._biases}
            for bias in masks.values():
                bias[..., gone] = float("-inf")
            return self._ask(self._block, masks, call, range(self.experts.num_experts))
        return self.cut_weights(call, kept)

    @torch.no_grad()
    def cut_weights(self, call: Call, kept: Sequence[int]) -> Tensor:
        """Return the same of a router that is smaller."""
        block = self._small(len(kept)).get_submodule(self._name)
        rows = {name: self._change.rows(self._prefix + name, t, kept) for name, t in self._tensors.items()}
        others = ((n, buffer) for n, buffer in self._module(block).named_buffers() if n not in rows)
        there = {name: buffer.to(call.x.device) for name, buffer in others if not buffer.is_meta}
        return self._ask(block, rows | there, call, kept)

    def _ask(self, block: nn.Module, tensors: dict[str, Tensor], call: Call, kept: Sequence[int]) -> Tensor:
        asked: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def note(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            asked.append((args, kwargs))
            raise _Asked

        experts = block.get_submodule(self.path.removeprefix(f"{self._name}."))
        hook = experts.register_forward_pre_hook(note, with_kwargs=True)
        try:
            functional_call(self._module(block), tensors, call.args, dict(call.kwargs))
        except _Asked:
            pass
        finally:
            hook.remove()
        return self._weights(*asked[0], kept)[1]

    def _weights(self, args: tuple[Any, ...], kwargs: dict[str, Any], kept: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the inputs of a call of experts and their weights, [tokens, experts + 1]."""
        given = _PARAMETERS.bind(self.experts, *args, **kwargs).arguments
        x, index = given["hidden_states"], given.get("top_k_index", given.get("router_indices"))
        values = given.get("top_k_weights", given.get("routing_weights"))
        if index is None or values is None or index.shape != values.shape or len(index) != len(x):
            raise CompressError(
                "its router does not say of every token which experts it goes to, and with which weight"
            )
        count = self.experts.num_experts
        numbers = torch.tensor([*kept, count], device=index.device)
        weights = torch.zeros(len(x), count + 1, device=x.device)
        return x, weights.scatter_add_(1, numbers[index.clamp(max=len(kept))], values.float())

    @torch.no_grad()
    def together(self, x: Tensor, weights: Tensor) -> Tensor:
        """Compute what experts make together of some tokens, [tokens, in], by weights, [tokens, experts + 1]."""
        found: Tensor | None = None
        for place in weights[:, :-1].any(0).nonzero().flatten().tolist():
            rows = weights[:, place].nonzero().flatten()
            part = self.experts.compute(place, x[rows]) * weights[rows, place, None]
            found = part.new_zeros(len(x), part.shape[1]) if found is None else found
            found.index_add_(0, rows, part)
        return torch.zeros_like(x) if found is None else found
