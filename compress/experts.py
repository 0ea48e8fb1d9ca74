"""Show the experts of a mixture as linears of their own, and as the stacks that models and files keep them in.

transformers keeps all experts of a layer in two parameters, [experts, out, in] each. Passes work on matrices, so the module is
replaced by :class:`Experts`, in which expert 3 of ``mlp.experts`` has the linears ``mlp.experts.3.gate_up_proj`` and
``mlp.experts.3.down_proj``. Files hold stacks: dense ones as transformers has them, packed ones with a stack for every plane and codebook
(``mlp.experts.gate_up_proj.weight`` of [planes, experts, N, words]).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import CompressError
from compress.quant.linear import BitPlaneLinear
from compress.quant.records import GroupedShape, GroupedStack, PackedShape, StackedShape, expert_name
from compress.weights import TensorInfo, TensorSource


class Experts(nn.Module):
    """Compute what a mixture's experts do, one after the other, those in use.

    Attributes:
        all_tokens: give every token to the first expert, and forget the routing: to follow shapes alone.
        routed: whether a router chooses among them for every token.
    """

    def __init__(self, dense: nn.Module) -> None:
        super().__init__()
        self.all_tokens = False
        given = signature(dense.forward).parameters
        self.routed = "gammas" not in given
        self.path = ""  # full name, once a checkpoint's stacks are taken apart: then they are saved as stacks again
        self.register_state_dict_post_hook(_save_stacks)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_load_stacks)  # type: ignore[no-untyped-call]
        parameters = dict(dense.named_parameters(recurse=False))
        self.matrices = next(names for names in _MATRICES if parameters.keys() >= {*names})
        self.first = self.matrices[0]
        self.transposed = bool(getattr(dense, "is_transposed", type(dense).__name__ in _SORTED))
        self.num_experts = len(parameters[self.first])
        self.biased = f"{self.first}_bias" in parameters
        for name, child in dense.named_children():
            self.add_module(name, child)
        for place in range(self.num_experts):
            self.add_module(str(place), nn.Module())
        for name in self.matrices:
            stack, bias = parameters[name], parameters.get(f"{name}_bias")
            rows, columns = stack.shape[:0:-1] if self.transposed else stack.shape[1:]
            for place in range(self.num_experts):
                linear = nn.Linear(columns, rows, bias is not None, device="meta", dtype=stack.dtype)
                self.expert(place).add_module(name, linear)
        dense._parameters.clear()
        self._dense: list[Any] = [dense]  # for its activation; in a list it is no module of this one

    def expert(self, place: int) -> nn.Module:
        """Return the module that has one expert's linears."""
        return self.get_submodule(str(place))

    def keep_first(self) -> None:
        """Let go of all experts but the first, which stands for all where shapes alone are followed: there may be thousands."""
        self.all_tokens = True
        for place in range(1, self.num_experts):
            del self._modules[str(place)]

    def compute(self, place: int, x: Tensor) -> Tensor:
        """Apply one expert: [tokens, in] to [tokens, out]."""
        expert, dense = self.expert(place), self._dense[0]
        inner = expert.get_submodule(self.first)(x)
        gate = getattr(dense, "_apply_gate", None)
        if self.first == "up_proj":
            inner = dense.act_fn(inner)
        elif self.first == "gate_proj":
            inner = dense.act_fn(inner) * expert.get_submodule("up_proj")(x)
        elif gate is not None:
            inner = gate(inner)
        else:
            left, right = inner.chunk(2, dim=-1)
            inner = right * dense.act_fn(left)
        out: Tensor = expert.get_submodule("down_proj")(inner)
        return self.get_submodule("post_expert_norm")(out) if "post_expert_norm" in self._modules else out

    def forward(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor | None = None,
        top_k_weights: Tensor | None = None,
        router_indices: Tensor | None = None,
        routing_weights: Tensor | None = None,
        gammas: Tensor | None = None,
    ) -> Tensor:
        """Add up what each token's experts make of it, by its weights: [tokens, in] to [tokens, out].

        With ``gammas``, [..., experts], every token goes to every expert.
        """
        if self.all_tokens:
            return self.compute(0, hidden_states)
        if gammas is not None:
            rest = (gammas.view(*hidden_states.shape[:-1], -1)[..., i, None] for i in range(self.num_experts))
            return sum(self.compute(i, hidden_states) * gamma for i, gamma in enumerate(rest))  # type: ignore[return-value]
        index = router_indices if top_k_index is None else top_k_index
        weights = routing_weights if top_k_weights is None else top_k_weights
        if index is None or weights is None:
            return self._sorted(hidden_states)
        result = torch.zeros_like(hidden_states)
        for place in torch.unique(index).tolist():
            if place < self.num_experts:
                rows, choice = torch.where(index == place)
                found = self.compute(place, hidden_states[rows]) * weights[rows, choice, None]
                result.index_add_(0, rows, found.to(result.dtype))
        return result

    def _sorted(self, hidden_states: Tensor) -> Tensor:
        """Apply each expert to its own part of the tokens, as Llama 4 hands them over: all, one copy for each expert."""
        parts = hidden_states.view(self.num_experts, -1, hidden_states.shape[-1])
        return torch.cat([self.compute(place, part) for place, part in enumerate(parts)])

    def hold_stack(self, name: str, shape: StackedShape, dtype: torch.dtype) -> None:
        """Take a module that a checkpoint's stack is loaded into, on the meta device, in place of the experts' linears."""
        for place in range(self.num_experts):
            del self.expert(place)._modules[name]
        self.add_module(name, _Stack(shape))
        if self.biased:
            bias = torch.empty(self.num_experts, shape.out_features, dtype=dtype, device="meta")
            self.register_parameter(f"{name}_bias", nn.Parameter(bias, requires_grad=False))

    def stacked(self) -> dict[str, Tensor]:
        """Return the buffers that stacks are loaded into, by name."""
        stacks = ((name, module) for name, module in self.named_children() if isinstance(module, _Stack))
        return {f"{name}.{inner}": buffer for name, stack in stacks for inner, buffer in stack.named_buffers()}

    def take_stacks(self, bits: Mapping[str, int], path: str) -> None:
        """Give every expert its part of what was loaded, at its bits, by the matrices' full names; ``path`` is this module's."""
        self.path = path
        for name in self.matrices:
            stack = self._modules.get(name)
            if not isinstance(stack, _Stack):
                continue
            stack_bias = self._parameters.pop(f"{name}_bias", None)
            wanted = [bits[expert_name(f"{path}.{name}", place)] for place in range(self.num_experts)]
            mixed = len(set(wanted)) > 1
            for place, most in enumerate(wanted):
                shape = replace(stack.shape.one, parent_bits=most)
                tensors = {n: stack.get_buffer(n).select(stack.shape.axis(n), place) for n in shape.specification()}
                if mixed:  # what an expert does not need is to be freed
                    tensors = {n: tensor.clone() for n, tensor in tensors.items()}
                with torch.device("meta"):
                    linear = BitPlaneLinear(shape, False)
                linear.hold(shape, tensors)
                if stack_bias is not None:
                    linear.bias = nn.Parameter(stack_bias.data[place], requires_grad=False)
                self.expert(place).add_module(name, linear)
            del self._modules[name]

    def joined(self, stock: nn.Module, dtype: torch.dtype) -> nn.Module:
        """Return transformers' own module, given without parameters that count, with this one's decoded weights in its stacks."""
        for matrix in self.matrices:
            linears: list[Any] = [self.expert(place).get_submodule(matrix) for place in range(self.num_experts)]
            weights = [one.dense(dtype) if isinstance(one, BitPlaneLinear) else one.weight.data for one in linears]
            stack = torch.stack([weight.t() if self.transposed else weight for weight in weights])
            stock.register_parameter(matrix, nn.Parameter(stack))
            if self.biased:
                stock.register_parameter(
                    f"{matrix}_bias", nn.Parameter(torch.stack([one.bias.data for one in linears]))
                )
        return stock.train(self.training)


def _save_stacks(module: nn.Module, tensors: dict[str, Tensor], prefix: str, _metadata: Any) -> None:
    """Put the tensors of a loaded mixture's experts into stacks, as its checkpoint has them."""
    assert isinstance(module, Experts)
    if not module.path:
        return
    stacks: dict[str, list[tuple[Part, Tensor]]] = {}
    for name, part in _parts(module, prefix):
        stacks.setdefault(part.stack, []).append((part, tensors.pop(name)))
    for stack, members in stacks.items():
        if len(members) < module.num_experts:
            raise CompressError(
                f"{stack}: the experts are held at different bits; load the model at one number of bits to save it."
            )
        tensors[stack] = torch.stack([tensor for _, tensor in members], members[0][0].axis)


def _load_stacks(module: nn.Module, tensors: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Undo :func:`_save_stacks`, in the tensors that are about to be loaded."""
    assert isinstance(module, Experts)
    if module.path:
        found = list(_parts(module, prefix))
        stacks = {part.stack: tensors.pop(part.stack) for _, part in found if part.stack in tensors}
        for name, part in found:
            if part.stack in stacks:
                tensors[name] = stacks[part.stack].select(part.axis, part.place)


class _Stack(nn.Module):
    """Hold the tensors of a stack of packed matrices while they are loaded."""

    def __init__(self, shape: StackedShape) -> None:
        super().__init__()
        self.shape = shape
        for name, (size, kind) in shape.specification().items():
            self.register_buffer(name, torch.empty(size, dtype=getattr(torch, kind), device="meta"))


_MATRICES = (("gate_up_proj", "down_proj"), ("gate_proj", "up_proj", "down_proj"), ("up_proj", "down_proj"))
_SORTED = ("Llama4TextExperts",)  # takes tokens sorted by expert, without transformers' mark for experts


def is_experts(module: nn.Module) -> bool:
    """Tell whether a module keeps the experts of a mixture in the parameters that transformers gives them."""
    sizes = {name: parameter.shape for name, parameter in module.named_parameters(recurse=False)}
    names = next((names for names in _MATRICES if sizes.keys() >= {*names}), ())
    stacks = [sizes[name] for name in names if len(sizes[name]) == 3]
    if not names or len(stacks) < len(names) or len({size[0] for size in stacks}) > 1:
        return False
    given = signature(module.forward).parameters
    if "gate_proj" in names:  # Inkling's shared experts
        return "gammas" in given
    return hasattr(module, "is_transposed") or type(module).__name__ in _SORTED or "top_k_index" in given


def split_experts(model: nn.Module) -> None:
    """Put :class:`Experts` where a model on the meta device has stacks."""
    for name, module in list(model.named_modules()):
        if is_experts(module):
            model.set_submodule(name, Experts(module))


@dataclass(frozen=True)
class Part:
    """Tell where a tensor of one expert lies in a stack: which, at which place along an axis, and whether as its transpose."""

    stack: str
    place: int
    axis: int = 0
    transposed: bool = False


def parts_of(model: nn.Module) -> dict[str, Part]:
    """Find the tensors of experts in a model whose stacks are split: full name -> its part."""
    mixtures = ((name, module) for name, module in model.named_modules() if isinstance(module, Experts))
    return {name: part for path, module in mixtures for name, part in _parts(module, f"{path}.")}


def _parts(module: Experts, prefix: str) -> Iterator[tuple[str, Part]]:
    for matrix in module.matrices:
        for place in range(module.num_experts):
            linear = module.expert(place).get_submodule(matrix)
            packed = isinstance(linear, BitPlaneLinear)
            for tensor in [
                *(name for name, _ in linear.named_parameters()),
                *(name for name, _ in linear.named_buffers()),
            ]:
                if tensor == "bias":
                    part = Part(f"{prefix}{matrix}_bias", place)
                elif packed:
                    part = Part(f"{prefix}{matrix}.{tensor}", place, StackedShape.axis(tensor))
                else:
                    part = Part(f"{prefix}{matrix}", place, 0, module.transposed)
                yield f"{prefix}{place}.{matrix}.{tensor}", part


def stacked_sizes(sizes: Mapping[str, tuple[int, ...]], parts: Mapping[str, Part]) -> dict[str, tuple[int, ...]]:
    """Return the shapes that tensors have in files, given those in a model whose stacks are split."""
    counts: dict[str, int] = {}
    for part in parts.values():
        counts[part.stack] = max(counts.get(part.stack, 0), part.place + 1)
    found = {}
    for name, size in sizes.items():
        if name in parts:
            part = parts[name]
            inner = size[::-1] if part.transposed else size
            found[part.stack] = (*inner[: part.axis], counts[part.stack], *inner[part.axis :])
        else:
            found[name] = size
    return found


class SplitTensors:
    """Read the tensors of experts one by one out of a source of stacks; other tensors as they are.

    ``unused`` are names in the files that no tensor of the model is read from.
    """

    def __init__(self, below: TensorSource, parts: Mapping[str, Part], unused: Sequence[str] = ()) -> None:
        self.below, self._parts, self.unused = below, parts, unused

    def info(self) -> Mapping[str, TensorInfo]:
        """Describe every tensor, by its name in a model whose stacks are split."""
        below = self.below.info()
        stacks = {part.stack for part in self._parts.values()}
        found = {name: info for name, info in below.items() if name not in stacks}
        for name, part in self._parts.items():
            if info := below.get(part.stack):
                size = info.shape[: part.axis] + info.shape[part.axis + 1 :]
                found[name] = replace(info, shape=size[::-1] if part.transposed else size)
        return found

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Copy some tensors; a stack that several are in is read once."""
        wanted = {name: self._parts.get(name) for name in names}
        tensors = self.below.read({part.stack if part else name for name, part in wanted.items()})
        result = {}
        for name, inside in wanted.items():
            value = tensors[inside.stack].select(inside.axis, inside.place) if inside else tensors[name]
            result[name] = value.t().contiguous() if inside and inside.transposed else value
        return result


class StackedTensors:
    """Read stacks put together from the tensors of experts; other tensors as they are."""

    def __init__(self, below: TensorSource, parts: Mapping[str, Part]) -> None:
        self.below = below
        self._stacks: dict[str, list[tuple[str, Part]]] = {}
        for name, part in parts.items():
            self._stacks.setdefault(part.stack, []).append((name, part))
        self._inside = set(parts)

    def info(self) -> Mapping[str, TensorInfo]:
        """Describe every tensor, by its name in files."""
        below = self.below.info()
        found = {name: info for name, info in below.items() if name not in self._inside}
        for stack, members in self._stacks.items():
            infos = [below[name] for name, _ in members if name in below]
            if infos:
                part, widest = members[0][1], max(infos, key=lambda info: info.itemsize)
                size = widest.shape[::-1] if part.transposed else widest.shape
                found[stack] = replace(widest, shape=(*size[: part.axis], len(members), *size[part.axis :]))
        return found

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Copy some tensors."""
        result: dict[str, Tensor] = {}
        for name in names:
            members = self._stacks.get(name)
            if members is None:
                result |= self.below.read([name])
                continue
            tensors = self.below.read([member for member, _ in members])
            values = [tensors[member].t() if part.transposed else tensors[member] for member, part in members]
            dtype = max((value.dtype for value in values), key=lambda kind: kind.itemsize)  # codebooks may differ
            result[name] = torch.stack([value.to(dtype) for value in values], members[0][1].axis)
        return result


def in_stack(name: str, paths: Collection[str]) -> bool:
    """Tell whether a matrix is one expert's, of the modules at some paths."""
    return name.rsplit(".", 2)[0] in paths


def stacked_shapes(packed: Mapping[str, PackedShape], paths: Iterable[str]) -> dict[str, PackedShape]:
    """Return the records of packed matrices as files have them, those of experts, of the modules at ``paths``, as stacks.

    Raises:
        CompressError: of a stack's experts only some are packed.
    """
    inside, found = set(paths), dict[str, PackedShape]()
    stacks: dict[str, dict[int, PackedShape]] = {}
    for name, shape in packed.items():
        rest, _, matrix = name.rpartition(".")
        path, _, place = rest.rpartition(".")
        if path in inside and place.isdigit():
            stacks.setdefault(f"{path}.{matrix}", {})[int(place)] = shape
        else:
            found[name] = shape
    for stack, shapes in stacks.items():
        count = max(shapes) + 1
        kinds = {replace(shape, codebook_dtype="float16") for shape in shapes.values()}
        if sorted(shapes) != list(range(count)) or len(kinds) > 1:
            raise CompressError(
                f"{stack}: some experts are quantised and others are not, or otherwise; ignore all experts of a layer or none."
            )
        kind = GroupedStack if isinstance(shapes[0], GroupedShape) else StackedShape
        dtype = max((shape.codebook_dtype for shape in shapes.values()), key=["float16", "float32"].index)
        found[stack] = kind(**{**vars(shapes[0]), "codebook_dtype": dtype}, experts=count)
    return found
