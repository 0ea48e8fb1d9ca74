"""Show the experts of a mixture as linears of their own, and as the stacks that models and files keep them in.

transformers keeps all experts of a layer in two parameters, [experts, out, in] each. Passes work on matrices, so the module is
replaced by :class:`Experts`, in which expert 3 of ``mlp.experts`` has the linears ``mlp.experts.3.gate_up_proj`` and
``mlp.experts.3.down_proj``. Files hold stacks: dense ones as transformers has them, packed ones with a stack for every plane and codebook
(``mlp.experts.gate_up_proj.weight`` of [planes, experts, N, words]).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any, cast

import torch
from torch import Tensor, nn

from compress.errors import CompressError
from compress.kernels import gpu
from compress.kernels.experts import sort_by_expert
from compress.quant.fused import stacked
from compress.quant.linear import BitPlaneLinear
from compress.quant.records import GroupedShape, GroupedStack, PackedShape, StackedShape, expert_name
from compress.weights import TensorInfo, TensorSource


@dataclass(frozen=True)
class Form:
    """Tell in which parameters a module keeps the matrices of its experts.

    Attributes:
        names: parameters, by name within the module, in the order of their use: one that leads out of the experts last.
        flat: they have two dimensions, the rows of all experts one below the other; the last is the transpose.
        given: an argument that only modules of this form are called with.
    """

    names: tuple[str, ...]
    flat: bool = False
    given: str = ""


_FORMS = (
    Form(("gate_up_proj", "down_proj")),
    Form(("gate_proj", "up_proj", "down_proj"), given="gammas"),  # Inkling's shared experts
    Form(("up_proj", "down_proj")),
    Form(("mlp.w1", "mlp.v1", "mlp.w2"), flat=True, given="top_k_index"),
    Form(("weight",), given="expert_size"),
)
_SORTED = ("Llama4TextExperts",)  # takes tokens sorted by expert, without transformers' mark for experts


class Experts(nn.Module):
    """Compute what a mixture's experts do, one after the other, those in use.

    Attributes:
        all_tokens: give every token to the first expert, and forget the routing: to follow shapes alone.
        routed: whether a router chooses among them for every token.
        counts: how many there are of each matrix; some routers also choose what passes tokens on as they are.
    """

    def __init__(self, dense: nn.Module) -> None:
        super().__init__()
        form = form_of(dense)
        assert form is not None
        self.all_tokens = False
        self.routed = "gammas" not in signature(dense.forward).parameters
        self.path = ""  # full name, once a checkpoint's stacks are taken apart: then they are saved as stacks again
        self.register_state_dict_post_hook(_save_stacks)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_load_stacks)  # type: ignore[no-untyped-call]
        parameters = dict(dense.named_parameters())
        self.form, self.matrices = form, tuple(name.rpartition(".")[2] for name in form.names)
        self.transposed = bool(getattr(dense, "is_transposed", type(dense).__name__ in _SORTED))
        self.biased = f"{form.names[0]}_bias" in parameters
        self.passes_on = hasattr(dense, "identity_expert")
        stacks = dict(zip(self.matrices, (parameters[name] for name in form.names), strict=True))
        self.counts = {name: int(dense.num_experts) if form.flat else len(stack) for name, stack in stacks.items()}  # type: ignore[arg-type]
        self.num_experts = self.counts[self.matrices[-1]]
        self._owner: list[Any] = [
            dense.get_submodule(form.names[0].rpartition(".")[0])
        ]  # in a list it is no module of this one
        for name, child in dense.named_children():
            if child is not self._owner[0]:
                self.add_module(name, child)
        for place in range(max(self.counts.values())):
            self.add_module(str(place), nn.Module())
        for name, stack in stacks.items():
            size = (len(stack) // self.num_experts, stack.shape[1]) if form.flat else stack.shape[1:]
            rows, columns = size[::-1] if self.turned(name) else size
            for place in range(self.counts[name]):
                linear = nn.Linear(columns, rows, self.biased, device="meta", dtype=stack.dtype)
                self.expert(place).add_module(name, linear)
        self._owner[0]._parameters.clear()

    def turned(self, name: str) -> bool:
        """Tell whether the experts of a matrix are kept as [in, out]."""
        return name == self.matrices[-1] if self.form.flat else self.transposed

    def expert(self, place: int) -> nn.Module:
        """Return the module that has one expert's linears."""
        return self.get_submodule(str(place))

    def keep_first(self) -> None:
        """Let go of all experts but the first, which stands for all where shapes alone are followed: there may be thousands."""
        self.all_tokens = True
        for place in range(1, max(self.counts.values())):
            del self._modules[str(place)]

    def compute(self, place: int, x: Tensor) -> Tensor:
        """Apply one expert: [tokens, in] to [tokens, out]."""
        expert = self.expert(place)
        return self._through(x, lambda name, x: expert.get_submodule(name)(x))

    def _through(self, x: Tensor, multiply: Callable[[str, Tensor], Tensor]) -> Tensor:
        """Apply what an expert is, given its products by the names of its matrices."""
        owner, inner = self._owner[0], multiply(self.matrices[0], x)
        if len(self.matrices) == 1:
            return inner
        gate: Any = getattr(owner, "_apply_gate", None)
        act: Any = getattr(owner, "act_fn", None) or getattr(owner, "activation_fn", None)
        if self.matrices[0] == "up_proj":
            inner = act(inner)
        elif len(self.matrices) == 3:
            inner = act(inner) * multiply(self.matrices[1], x)
        elif gate is not None:
            inner = gate(inner)
        else:
            left, right = inner.chunk(2, dim=-1)
            inner = right * act(left)
        out = multiply(self.matrices[-1], inner)
        return cast(Tensor, self.get_submodule("post_expert_norm")(out)) if "post_expert_norm" in self._modules else out

    def _in_one_launch(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor | None:
        """Compute all experts in use together, where a GPU holds them alike and no gradient is asked for: [tokens, out]; else None."""
        first: Any = self.expert(0).get_submodule(self.matrices[0])
        if not getattr(first, "is_tiled", False) or self.passes_on or torch.compiler.is_compiling():
            return None
        if (torch.is_grad_enabled() and x.requires_grad) or x.dtype not in gpu.KINDS or not len(x):
            return None
        found = {n: stacked([self.expert(p).get_submodule(n) for p in range(self.num_experts)]) for n in self.matrices}
        stacks = {name: stack for name, stack in found.items() if stack is not None}
        if len(stacks) < len(found):
            return None
        given = sort_by_expert(index, self.num_experts)
        made = self._through(x[given.order // index.shape[1]], lambda name, x: stacks[name].multiply(x, given))
        made = made * weights.flatten()[given.order, None]
        none = given.expert == self.num_experts  # a bias would give them something
        result = torch.empty_like(made)
        result[given.order] = made.masked_fill(none[:, None], 0)
        return result.view(*index.shape, -1).sum(1).to(x.dtype)

    def forward(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor | None = None,
        top_k_weights: Tensor | None = None,
        router_indices: Tensor | None = None,
        routing_weights: Tensor | None = None,
        gammas: Tensor | None = None,
    ) -> Tensor:
        """Add up what each token's experts make of it, by its weights: [..., in] to [..., out].

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
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        if (together := self._in_one_launch(x, index, weights)) is not None:
            return together.view(hidden_states.shape)
        result = torch.zeros_like(x)
        for place in torch.unique(index).tolist():
            if place < self.num_experts or self.passes_on:
                rows, choice = torch.where(index == place)
                found = self.compute(place, x[rows]) if place < self.num_experts else x[rows]
                result.index_add_(0, rows, (found * weights[rows, choice, None]).to(result.dtype))
        return result.view(hidden_states.shape)

    def _sorted(self, hidden_states: Tensor) -> Tensor:
        """Apply each expert to its own part of the tokens, as Llama 4 hands them over: all, one copy for each expert."""
        parts = hidden_states.view(self.num_experts, -1, hidden_states.shape[-1])
        return torch.cat([self.compute(place, part) for place, part in enumerate(parts)])

    def hold_stack(self, name: str, shape: StackedShape, dtype: torch.dtype) -> None:
        """Take a module that a checkpoint's stack is loaded into, on the meta device, in place of the experts' linears."""
        for place in range(self.counts[name]):
            del self.expert(place)._modules[name]
        self.add_module(name, _Stack(shape))
        if self.biased:
            bias = torch.empty(self.counts[name], shape.out_features, dtype=dtype, device="meta")
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
            wanted = [bits[expert_name(f"{path}.{name}", place)] for place in range(self.counts[name])]
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
        for matrix, name in zip(self.matrices, self.form.names, strict=True):
            linears: list[Any] = [self.expert(place).get_submodule(matrix) for place in range(self.counts[matrix])]
            weights = [one.dense(dtype) if isinstance(one, BitPlaneLinear) else one.weight.data for one in linears]
            weights = [weight.t() if self.turned(matrix) else weight for weight in weights]
            owner = stock.get_submodule(name.rpartition(".")[0])
            owner.register_parameter(matrix, nn.Parameter((torch.cat if self.form.flat else torch.stack)(weights)))
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
        if len(members) < members[0][0].count:
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
                tensors[name] = part.taken(stacks[part.stack])


class SizedExperts(Experts):
    """Apply every expert to its own part of the tokens, of which there are as many as a list says: JetMoE's matrices."""

    def forward(self, inputs: Tensor, expert_size: Sequence[int]) -> Tensor:  # type: ignore[override]
        """Apply one expert after the other, [tokens, in] to [tokens, out]."""
        if self.all_tokens:
            return self.compute(0, inputs)
        parts = torch.split(inputs, [*expert_size])
        return torch.cat([self.compute(place, part) for place, part in enumerate(parts)])


class _Stack(nn.Module):
    """Hold the tensors of a stack of packed matrices while they are loaded."""

    def __init__(self, shape: StackedShape) -> None:
        super().__init__()
        self.shape = shape
        for name, (size, kind) in shape.specification().items():
            self.register_buffer(name, torch.empty(size, dtype=getattr(torch, kind), device="meta"))


def form_of(module: nn.Module) -> Form | None:
    """Find the form in which a module keeps the experts of a mixture; None where it is of no form that is known."""
    sizes = {name: parameter.shape for name, parameter in module.named_parameters()}
    given = signature(module.forward).parameters
    for form in _FORMS:
        if not sizes.keys() >= {*form.names}:
            continue
        if form.given and form.given not in given:
            return None
        stacks, count = [sizes[name] for name in form.names], getattr(module, "num_experts", 0)
        if form.flat:
            fits = all(len(size) == 2 and count and size[0] % count == 0 for size in stacks)
        else:
            alike = len({size[0] for size in stacks if size}) == 1 or hasattr(module, "identity_expert")
            fits = alike and all(len(size) == 3 for size in stacks)
        marked = hasattr(module, "is_transposed") or type(module).__name__ in _SORTED or "top_k_index" in given
        return form if fits and (form.given or marked) else None
    return None


def split(module: nn.Module) -> Experts | None:
    """Return what takes the place of a module on the meta device that has stacks; None for any other."""
    form = form_of(module)
    return (Experts if len(form.names) > 1 else SizedExperts)(module) if form else None


def split_experts(model: nn.Module) -> None:
    """Put :class:`Experts` where a model on the meta device has stacks."""
    for name, module in list(model.named_modules()):
        if experts := split(module):
            model.set_submodule(name, experts)


@dataclass(frozen=True)
class Part:
    """Tell where a tensor of one expert lies in a stack.

    Attributes:
        stack: full name of the stack.
        place: at which place of the stack.
        count: how many there are in it.
        axis: along which.
        transposed: as its transpose.
        flat: the axis is that of the tensor's own rows.
    """

    stack: str
    place: int
    count: int
    axis: int = 0
    transposed: bool = False
    flat: bool = False

    def shape(self, inner: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the stack of tensors of a shape."""
        size = inner[::-1] if self.transposed else inner
        if self.flat:
            return (size[0] * self.count, *size[1:])
        return (*size[: self.axis], self.count, *size[self.axis :])

    def inner(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the tensors of a stack of a shape."""
        found = (size[0] // self.count, *size[1:]) if self.flat else size[: self.axis] + size[self.axis + 1 :]
        return found[::-1] if self.transposed else found

    def taken(self, stack: Tensor) -> Tensor:
        """Return the tensor out of its stack."""
        if self.flat:
            return stack.chunk(self.count)[self.place]
        return stack.select(self.axis, self.place)


def parts_of(model: nn.Module) -> dict[str, Part]:
    """Find the tensors of experts in a model whose stacks are split: full name -> its part."""
    mixtures = ((name, module) for name, module in model.named_modules() if isinstance(module, Experts))
    return {name: part for path, module in mixtures for name, part in _parts(module, f"{path}.")}


def _parts(module: Experts, prefix: str) -> Iterator[tuple[str, Part]]:
    flat, dense_names = module.form.flat, dict(zip(module.matrices, module.form.names, strict=True))
    for matrix, count in module.counts.items():
        for place in range(count):
            linear = module.expert(place).get_submodule(matrix)
            packed = isinstance(linear, BitPlaneLinear)
            inner = [name for name, _ in linear.named_buffers()]
            if isinstance(linear, BitPlaneLinear):  # on a GPU it holds other tensors than files do
                inner = [*linear.shape.specification()]
            for tensor in [*(name for name, _ in linear.named_parameters()), *inner]:
                if tensor == "bias":
                    part = Part(f"{prefix}{matrix}_bias", place, count)
                elif packed:
                    part = Part(f"{prefix}{matrix}.{tensor}", place, count, StackedShape.axis(tensor))
                else:
                    part = Part(f"{prefix}{dense_names[matrix]}", place, count, 0, module.turned(matrix), flat)
                yield f"{prefix}{place}.{matrix}.{tensor}", part


def stacked_sizes(sizes: Mapping[str, tuple[int, ...]], parts: Mapping[str, Part]) -> dict[str, tuple[int, ...]]:
    """Return the shapes that tensors have in files, given those in a model whose stacks are split."""
    found = {}
    for name, size in sizes.items():
        if name in parts:
            found[parts[name].stack] = parts[name].shape(size)
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
                found[name] = replace(info, shape=part.inner(info.shape))
        return found

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Copy some tensors; a stack that several are in is read once."""
        wanted = {name: self._parts.get(name) for name in names}
        tensors = self.below.read({part.stack if part else name for name, part in wanted.items()})
        result = {}
        for name, inside in wanted.items():
            value = inside.taken(tensors[inside.stack]) if inside else tensors[name]
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
                found[stack] = replace(widest, shape=part.shape(widest.shape))
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
            values, part = [value.to(dtype) for value in values], members[0][1]
            result[name] = torch.cat(values) if part.flat else torch.stack(values, part.axis)
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
