"""Follow a model's own forward pass, with tensors that have shapes and no data, to see what it does with its blocks.

No weight is needed, so a config is enough. What is found: which linears are multiplied by and which are only read (a packed
one has no weight to read), what blocks return, and whether a block can be run by itself, given the hidden states alone.
"""

from collections.abc import Collection, Iterator, Mapping, MutableMapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from compress.carrying import Item, Load
from compress.errors import CompressError, first_line
from compress.experts import Experts, in_stack
from compress.structure import Architecture, block_of, block_prefix, linears_of

_TOKENS = 24
_LEAST = 0.5  # of the weights of blocks
_NO_OTHER_SIZE = 29  # tokens, where their dimension is to be told from others
READ = "the model reads its weight, which a packed matrix does not have"
STACK = "several matrices in one parameter, in a form that is not known"
BIASED = "transformers fits the bias of a tied head to the rows of its weight, which a packed matrix does not have"
NOT_CALLED = "the model does not call it on text alone"
SHARED = "several blocks have one tensor for its weight"


class _AllChosen(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Answer what depends on the values of tensors without any as if all were chosen, and all numbers were zero.

    A choice of tokens then has the shape of all, and every expert of a mixture is called.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        if func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
            args = (args[0], [place for index in args[1] for place in _places(index)], *args[2:])
        try:
            return func(*args, **(kwargs or {}))
        except (DataDependentOutputException, DynamicOutputShapeException):
            given = args[0]
            if func is aten.nonzero.default:
                return given.new_empty((given.numel(), given.ndim), dtype=torch.long)
            if func is aten._local_scalar_dense.default:
                return 0.0 if given.is_floating_point() else given.dtype != torch.bool and 0
            raise


def _places(index: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return an index as numbers: a mask has one tensor of them for each of its dimensions."""
    if index is None or index.dtype not in (torch.bool, torch.uint8):
        return (index,)
    return tuple(index.new_empty(index.numel(), dtype=torch.long) for _ in range(index.ndim))


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


class NeedsMoreError(CompressError):
    """Refuse a model whose blocks need what earlier ones have made besides the hidden states."""


class _TouchedError(Exception):
    """Raised by a block that looks at what an earlier one has made besides the hidden states."""


class _Sealed:
    """Stand for a value that must not be looked at."""

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise _TouchedError

    __getattr__ = __getitem__ = __len__ = __iter__ = __bool__ = __add__ = __mul__ = _refuse

    @classmethod
    def __torch_function__(cls, *_: Any, **__: Any) -> Any:
        raise _TouchedError


class _WriteOnly(dict[Any, Any]):
    """Take what blocks leave behind in a mapping for others, and show it to nobody."""

    def _refuse(self, *_: Any) -> Any:
        raise _TouchedError

    __getitem__ = __contains__ = __iter__ = get = pop = keys = values = items = _refuse


class _Blocks:
    """Take note of every call of a block, and keep from it all that earlier ones have made but the hidden states.

    With ``carry``, what they have made is noted instead, where it comes from the block before or lies in a mapping.
    """

    def __init__(self, blocks: list[nn.Module], carry: bool) -> None:
        self.order: list[int] = []
        self.returns: dict[int, int] = {}
        self.loads: list[Load] = []
        self.faults: dict[str, None] = {}
        self.hidden: list[Tensor] = []
        self._carry = carry
        self._filled_later: list[MutableMapping[Any, Any]] = []  # empty before the first block
        self._made: list[Any] = []  # all that blocks have returned, kept alive so that identities stay their own
        for index, block in enumerate(blocks):
            block.register_forward_pre_hook(self._before, with_kwargs=True)
            block.register_forward_hook(self._after(index), with_kwargs=True)

    def _before(self, _block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not args or not isinstance(args[0], Tensor):
            self.faults["they take the hidden states by keyword"] = None
        elif self._made and not _same(args[0], _first(self._made[-1])):
            self.faults["the model works on the hidden states between them"] = None
        mappings = [value for value in (*args[1:], *kwargs.values()) if isinstance(value, MutableMapping)]
        if not self.order:
            self._filled_later = [value for value in mappings if not value]
        filled = {id(value) for value in self._filled_later if value}
        if self._carry:
            args, kwargs = self._noted(args, kwargs, filled)
            filled = set()
        others = {id(leaf) for made in self._made for leaf in list(_leaves(made))[1:]}
        sealed = tuple(_sealed(value, others, filled) for value in args[1:]), _sealed(kwargs, others, filled)
        if any(leaf.requires_grad for leaf in _leaves(sealed)):
            self.faults["the model gives them what it makes of the hidden states of several"] = None
        return (*args[:1], *sealed[0]), sealed[1]

    def _noted(self, args: tuple[Any, ...], kwargs: dict[str, Any], filled: set[int]) -> Any:
        """Take note of what a block is given that earlier ones have made; return its arguments, cut off from them."""
        last = self._made[-1] if self._made and isinstance(self._made[-1], (tuple, list)) else ()
        places = {id(value): place for place, value in enumerate(last) if place and isinstance(value, Tensor)}
        items: list[Item] = []

        def cut(slot: int | str, value: Any) -> Any:
            if id(value) in places:
                items.append(_item(slot, None, places[id(value)], value))
                return value.detach()
            for key, tensors in [*value.items()] if id(value) in filled else ():
                items.extend(_item(slot, key, place, tensor) for place, tensor in enumerate(tensors))
                value[key] = tuple(tensor.detach() for tensor in tensors)
            return value

        cut_off = [cut(slot, value) for slot, value in enumerate(args[1:])]
        by_name = {name: cut(name, value) for name, value in kwargs.items()}
        self.loads.append(Load(_shape(args[0]) if items else (), tuple(items)))
        return (*args[:1], *cut_off), by_name

    def _after(self, index: int) -> Any:
        def hook(_block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            first = _first(output)
            if not isinstance(first, Tensor):
                self.faults[f"they return a {type(output).__name__}"] = None
                return output
            self.order.append(index)
            self.returns[index] = len(output) if isinstance(output, (tuple, list)) else 0
            self.hidden.append(
                first.detach().requires_grad_()
            )  # what is made of it, but by the next block, can be told
            marked = type(output)([self.hidden[-1], *output[1:]]) if self.returns[index] else self.hidden[-1]
            self._made.append(marked)
            return marked

        return hook

    def check_end(self, logits: Tensor) -> None:
        """Take note if the logits are made of more than the last block's hidden states."""
        earlier = self.hidden[:-1]
        found = (
            torch.autograd.grad(logits.sum(), earlier, allow_unused=True) if earlier and logits.requires_grad else ()
        )
        if any(gradient is not None for gradient in found):
            self.faults["the model looks at the hidden states of others than the last"] = None


def _same(given: Tensor, made: Tensor) -> bool:
    """Tell whether a tensor is another, or a slice of it that is all of it."""
    layout = given.shape, given.stride(), given.storage_offset()
    return given is made or (given._base is made and layout == (made.shape, made.stride(), made.storage_offset()))


def _item(slot: int | str, key: Any, place: int, tensor: Tensor) -> Item:
    return Item(slot, key, place, _shape(tensor), tensor.dtype)


def _shape(tensor: Tensor) -> tuple[int, ...]:
    """Return a tensor's shape, -1 for its one dimension of tokens."""
    if [*tensor.shape].count(_NO_OTHER_SIZE) != 1:
        raise _TouchedError
    return tuple(-1 if size == _NO_OTHER_SIZE else size for size in tensor.shape)


def _sealed(value: Any, others: set[int], filled: set[int]) -> Any:
    """Replace tensors among ``others``, and mappings among ``filled``."""
    if isinstance(value, Tensor):
        return _Sealed() if id(value) in others else value
    if id(value) in filled:
        return _WriteOnly()
    if type(value) is dict:
        return {key: _sealed(inner, others, filled) for key, inner in value.items()}
    return type(value)(_sealed(v, others, filled) for v in value) if type(value) in (tuple, list) else value


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, (tuple, list)) and output else output


def _leaves(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested containers."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping) and not isinstance(value, _WriteOnly):
        for inner in value.values():
            yield from _leaves(inner)
    elif isinstance(value, (tuple, list)):
        for inner in value:
            yield from _leaves(inner)


def follow(model: PreTrainedModel, structure: Architecture, carry: bool = False) -> Architecture:
    """Return the structure with what one forward pass shows; the model, empty and with its experts split, is used up.

    Raises:
        NeedsMoreError: blocks need what earlier ones have made besides the hidden states, and ``carry`` is not set.
        CompressError: the blocks cannot be run one at a time, each given what the one before returns.
    """
    tokens = _NO_OTHER_SIZE if carry else _TOKENS
    kind = model.config.model_type
    blocks = list(model.get_submodule(structure.blocks).children())
    weights, alike = _weights(model, structure), _alike(model, structure)
    for module in list(model.modules()):
        if isinstance(module, Experts):
            module.keep_first()
    inside = {name: model.get_submodule(name) for name in set(alike.values())}
    outside = {name: model.get_submodule(name) for name in (structure.embedding, structure.head)}
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    _give_shapes(model, mode)
    linears, calls = _Linears({**inside, **outside}), _Blocks(blocks, carry)
    try:
        with torch.enable_grad(), mode, _AllChosen():  # type: ignore[no-untyped-call]
            output = model(input_ids=torch.zeros(1, tokens, dtype=torch.long, device="cpu"), use_cache=False)
            calls.check_end(output.logits)
            if output.logits.shape[:2] != (1, tokens):
                calls.faults["its logits are not one row for every token of the text"] = None
    except _TouchedError:
        raise NeedsMoreError(
            f"model type {kind!r}: its blocks cannot be run one at a time: block {len(calls.order)} needs more than the hidden "
            "states of those before it."
        ) from None
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
    left |= {name: SHARED for name in sorted(_shared(model, structure)) if name in alike}
    left |= {name: NOT_CALLED for name, first in sorted(alike.items()) if first not in linears.called}
    left |= {
        name: READ
        for name, first in sorted({**alike, **{end: end for end in outside}}.items())
        if first in linears.read
    }
    ends = {structure.embedding, structure.head}
    if f"{structure.head}.weight" in model.all_tied_weights_keys:  # one tensor
        biased = getattr(outside[structure.head], "bias", None) is not None
        left |= dict.fromkeys(sorted(ends if ends & linears.read else ()), READ)
        left |= dict.fromkeys(sorted(ends if biased else ()), BIASED)
    _refuse_mostly_left(str(kind), weights, alike.keys() - left.keys(), left)
    returns, loads = tuple(calls.returns[i] for i in range(len(blocks))), tuple(calls.loads) or (Load(),) * len(blocks)
    return replace(structure, left=left, returns=returns, carried=loads)


def check_embeddings(model: PreTrainedModel, structure: Architecture) -> None:
    """Refuse a model that cannot be given embeddings in place of tokens; it is empty, its experts are split, and it is used up."""
    width = model.get_submodule(structure.embedding).embedding_dim
    for module in list(model.modules()):
        if isinstance(module, Experts):
            module.keep_first()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    _give_shapes(model, mode)
    try:
        with torch.no_grad(), mode, _AllChosen():  # type: ignore[no-untyped-call]
            model(inputs_embeds=torch.zeros(1, _TOKENS, width), use_cache=False)  # type: ignore[call-overload]
    except Exception as error:  # whatever a model's code raises
        raise CompressError(
            f"model type {model.config.model_type!r}: a prompt stands before the embeddings of tokens, and this model cannot be given "
            f"embeddings ({type(error).__name__}: {first_line(error)})."
        ) from error


def _stacks(model: nn.Module, structure: Architecture) -> list[str]:
    """Name the parameters of blocks that are several matrices in one, in a form that is not known."""
    found = model.get_submodule(structure.blocks).named_parameters(prefix=structure.blocks)
    convolutions = {id(module.weight) for module in model.modules() if isinstance(module, nn.Conv1d)}
    wide = ((name, parameter) for name, parameter in found if sum(size > 1 for size in parameter.shape) > 2)
    return [name for name, parameter in wide if id(parameter) not in convolutions]


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


def _shared(model: PreTrainedModel, structure: Architecture) -> set[str]:
    """Name the modules of blocks that have a weight in common with those of others."""
    pairs = model.all_tied_weights_keys.items()
    both = (pair for pair in pairs if all(block_of(name, structure) is not None for name in pair))
    return {name.removesuffix(".weight") for pair in both for name in pair}


def _alike(model: nn.Module, structure: Architecture) -> dict[str, str]:
    """Name the linears of blocks, and for each the one that shows how it is called: of a mixture's experts the first."""
    found = {}
    for index, block in enumerate(model.get_submodule(structure.blocks).children()):
        for name in linears_of(block, block_prefix(structure, index)):
            path, _, matrix = name.rpartition(".")
            stack = path.rpartition(".")[0]
            found[name] = f"{stack}.0.{matrix}" if in_stack(name, structure.experts) else name
    return found


def _weights(model: PreTrainedModel, structure: Architecture) -> dict[str, int]:
    """Count the weights of the parameters of blocks that have rows and columns, each once."""
    found = model.get_submodule(structure.blocks).named_parameters(prefix=structure.blocks)
    tied = model.all_tied_weights_keys
    return {n: p.numel() for n, p in found if sum(size > 1 for size in p.shape) > 1 and n not in tied}


def _refuse_mostly_left(kind: str, weights: Mapping[str, int], taken: Collection[str], left: Mapping[str, str]) -> None:
    """Refuse a model of which less than half could be packed, naming the largest part that could not."""
    others = {name: count for name, count in weights.items() if name.removesuffix(".weight") not in taken}
    share = 1 - sum(others.values()) / max(1, sum(weights.values()))
    if share < _LEAST:
        name = max(others, key=lambda name: others[name])
        reason = left.get(name) or left.get(name.removesuffix(".weight"), "no linear has it for its weight")
        raise CompressError(
            f"model type {kind!r}: only {100 * share:.0f} % of the weights of its blocks are in matrices that can be packed; the "
            f"largest of the others is {name} ({reason})."
        )
