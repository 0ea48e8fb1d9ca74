"""Follow a model's own forward pass, with tensors that have shapes and no data, to see what it does with its blocks.

No weight is needed, so a config is enough. What is found: which linears are multiplied by and which are only read (a packed
one has no weight to read), what blocks return, and whether a block can be run by itself, given the hidden states alone.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from compress.errors import CompressError, first_line
from compress.experts import Experts
from compress.structure import Architecture, block_prefix, linears_of

_TOKENS = 24
READ = "the model reads its weight, which a packed matrix does not have"
STACK = "several matrices in one parameter, in a form that is not known"
NOT_CALLED = "the model does not call it on text alone"


class _Linears:
    """Watch modules for the length of one forward pass: who is called, and whose weight is read by somebody else."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.called: set[str] = set()
        self.read: set[str] = set()
        for name, module in modules.items():
            module.__class__ = self._watched(name, type(module))

    def _watched(self, name: str, kind: type[nn.Module]) -> type[nn.Module]:
        found, inside = self, False

        class Watched(kind):  # type: ignore[misc, valid-type]
            @property
            def weight(self) -> Tensor:
                if not inside:
                    found.read.add(name)
                return cast(Tensor, self._parameters["weight"])

            def forward(self, *args: Any, **kwargs: Any) -> Any:
                nonlocal inside
                found.called.add(name)
                inside = True
                try:
                    return super().forward(*args, **kwargs)
                finally:
                    inside = False

        return Watched


class _Blocks:
    """Take note of every call of a block."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        self.order: list[int] = []
        self.returns: dict[int, int] = {}
        self.faults: dict[str, None] = {}
        self._made: list[Any] = []  # all that blocks have returned, kept alive so that identities stay their own
        for index, block in enumerate(blocks):
            block.register_forward_pre_hook(self._before(index), with_kwargs=True)
            block.register_forward_hook(self._after(index), with_kwargs=True)

    def _before(self, index: int) -> Any:
        def hook(_block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._given = [id(leaf) for leaf in _leaves([args[1:], kwargs])]
            if not args or not isinstance(args[0], Tensor):
                self.faults["they take the hidden states by keyword"] = None
            elif self._made and args[0] is not _first(self._made[-1]):
                self.faults["the model works on the hidden states between them"] = None
            others = {id(leaf) for made in self._made for leaf in list(_leaves(made))[1:]}
            if others & set(self._given):
                self.faults["one hands more than the hidden states to a later one"] = None

        return hook

    def _after(self, index: int) -> Any:
        def hook(_block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if self._given != [id(leaf) for leaf in _leaves([args[1:], kwargs])]:
                self.faults["one leaves something behind for a later one"] = None
            if not isinstance(_first(output), Tensor):
                self.faults[f"they return a {type(output).__name__}"] = None
            self.order.append(index)
            self.returns[index] = len(output) if isinstance(output, (tuple, list)) else 0
            self._made.append(output)

        return hook


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, (tuple, list)) and output else output


def _leaves(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested containers."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _leaves(inner)
    elif isinstance(value, (tuple, list)):
        for inner in value:
            yield from _leaves(inner)


def follow(model: PreTrainedModel, structure: Architecture) -> Architecture:
    """Return the structure with what one forward pass shows; the model, empty and with its experts split, is used up.

    Raises:
        CompressError: the blocks cannot be run one at a time, each given what the one before returns.
    """
    kind = model.config.model_type
    blocks = list(model.get_submodule(structure.blocks).children())
    _refuse_shared(blocks, kind)
    inside = {
        name: linear.module
        for index, block in enumerate(blocks)
        for name, linear in linears_of(block, block_prefix(structure, index)).items()
    }
    outside = {name: model.get_submodule(name) for name in (structure.embedding, structure.head)}
    for module in model.modules():
        if isinstance(module, Experts):
            module.all_tokens = True
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        _give_shapes(model, mode)
        linears, calls = _Linears({**inside, **outside}), _Blocks(blocks)
        try:
            with mode:
                model(input_ids=torch.zeros(1, _TOKENS, dtype=torch.long, device="cpu"), use_cache=False)
        except Exception as error:  # whatever a model's code raises
            raise CompressError(
                f"model type {kind!r}: its forward pass on text cannot be followed without weights "
                f"({type(error).__name__}: {first_line(error)}), so its blocks cannot be run one at a time."
            ) from error
    if calls.order != list(range(len(blocks))):
        calls.faults["they are not called one after the other, each once"] = None
    if calls.faults:
        raise CompressError(f"model type {kind!r}: its blocks cannot be run one at a time: {'; '.join(calls.faults)}.")
    left = dict.fromkeys(_stacks(model, structure), STACK)
    left |= dict.fromkeys(sorted(inside.keys() - linears.called), NOT_CALLED)
    left |= dict.fromkeys(sorted(linears.read), READ)
    return replace(structure, left=left, returns=tuple(calls.returns[i] for i in range(len(blocks))))


def _stacks(model: nn.Module, structure: Architecture) -> list[str]:
    """Name the parameters of blocks that are several matrices in one, in a form that is not known."""
    found = model.get_submodule(structure.blocks).named_parameters(prefix=structure.blocks)
    convolutions = {id(module.weight) for module in model.modules() if isinstance(module, nn.Conv1d)}
    return [name for name, parameter in found if parameter.ndim > 2 and id(parameter) not in convolutions]


def _give_shapes(model: nn.Module, mode: FakeTensorMode) -> None:
    """Put parameters that have shapes, and seem to be on the CPU, where a model has some on the meta device."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in made:
                with mode:
                    like = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
                    made[id(parameter)] = nn.Parameter(like, requires_grad=False)
            module._parameters[name] = made[id(parameter)]


def _refuse_shared(blocks: list[nn.Module], kind: str) -> None:
    owner: dict[int, int] = {}
    for index, block in enumerate(blocks):
        for name, parameter in block.named_parameters():
            if owner.setdefault(id(parameter), index) != index:
                raise CompressError(
                    f"model type {kind!r}: blocks {owner[id(parameter)]} and {index} share one tensor ({name}), so they "
                    "cannot be compressed one at a time."
                )
