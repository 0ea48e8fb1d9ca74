"""Run a model that is never in memory whole.

The real model class is built without weights; the parts outside its blocks get theirs. Blocks are filled one at a time and
called as the model itself would: the arguments of every block's call are captured by letting the model's own ``forward`` run
over blocks that only take notes. No forward pass is written again here, so a new transformers release needs nothing.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from compress.carrying import Call, Load, pack, unpack
from compress.config import BlockShape, Shapes
from compress.errors import CompressError
from compress.experts import (
    Experts,
    SplitTensors,
    StackedTensors,
    parts_of,
    split_experts,
    stacked_shapes,
    stacked_sizes,
)
from compress.following import NeedsMoreError, follow
from compress.hf import packed_modules, rebuild, replace_packed
from compress.models import empty_model, text_config, untied
from compress.names import NamedTensors
from compress.precision import multiplies_bfloat16
from compress.quant.embedding import BitPlaneEmbedding, BitPlaneHead
from compress.quant.linear import BitPlaneLinear
from compress.quant.records import PackedShape
from compress.shapes import block_shape, fewer_blocks, head_dim, replace_shapes, settled, shape_block
from compress.structure import Architecture, Linear, block_of, block_prefix, inspected, linears_of
from compress.weights import Checkpoint, Joined, Renamed, TensorInfo, TensorSource

_FAST_FROM = 512  # columns: below, bfloat16 gains nothing


@dataclass(frozen=True)
class State:
    """Hold a model between two passes.

    ``packed`` are the matrices that are bit planes by now, ``key`` is the digest of all that led here, ``shapes`` are those
    of blocks that are not as large as the config says, and ``structure`` is found from the config where it is not given.
    ``beside`` has the tensors that the files hold beyond the model, such as a head for several tokens: they are kept.
    """

    source: TensorSource
    config: PretrainedConfig
    packed: Mapping[str, PackedShape]
    key: str
    shapes: Shapes = field(default_factory=dict)
    structure: Architecture = None  # type: ignore[assignment]
    beside: TensorSource | None = None

    def __post_init__(self) -> None:
        if self.structure is None:
            object.__setattr__(self, "structure", examine(self.config))


class _LastBlock(Exception):
    """Stop the model after its last note-taking block: the rest need not run."""


def examine(config: PretrainedConfig) -> Architecture:
    """Find where things are in a config's model, and what its forward pass does with them.

    Raises:
        CompressError: it is not a model that can be compressed block by block.
    """
    model = built(config, {}, {})
    structure = inspected(model)
    experts = tuple(name for name, module in model.named_modules() if isinstance(module, Experts))
    structure = replace(structure, experts=experts)
    try:
        return follow(model, structure)
    except NeedsMoreError:
        return follow(built(config, {}, {}), structure, carry=True)


def built(config: PretrainedConfig, packed: Mapping[str, PackedShape], shapes: Shapes) -> PreTrainedModel:
    """Build an empty model as passes have left it, every expert's matrices by themselves."""
    model = empty_model(config)
    split_experts(model)
    replace_shapes(model, shapes)
    replace_packed(model, packed)
    return model


def stored_state(state: State) -> State:
    """Return the same model under the names that checkpoint files use, experts in stacks."""
    parts = parts_of(built(state.config, state.packed, state.shapes)) if state.structure.experts else {}
    source = StackedTensors(state.source, parts)
    rename = state.structure.stored_name
    stored: TensorSource = Renamed(source, {rename(name): name for name in source.info()})
    packed = {rename(name): shape for name, shape in stacked_shapes(state.packed, state.structure.experts).items()}
    return replace(state, source=Joined(stored, state.beside) if state.beside else stored, packed=packed)


def open_state(
    files: Checkpoint,
    config: PretrainedConfig,
    key: str,
    packed: Mapping[str, PackedShape] | None = None,
    shapes: Shapes | None = None,
) -> State:
    """Open a folder as passes see it: nothing is read but headers."""
    structure, packed, shapes = examine(config), packed or {}, shapes or {}
    model = built(config, packed, shapes)
    tensors = open_tensors(files, model, structure)
    source: TensorSource = tensors
    ends = [f"{name}.weight" for name in (structure.embedding, structure.head)]
    if ends[1] in model.all_tied_weights_keys and structure.head not in packed and tensors.info().keys() >= set(ends):
        embedding, head = (tensors.read([name])[name] for name in ends)
        if torch.equal(embedding, head):
            source = Renamed(tensors, {name: name for name in tensors.info() if name != ends[1]})
        else:  # transformers reads a head whose config calls it tied where files have one of its own
            config = untied(config)
    names = [name for name in tensors.unused if not _RECOMPUTED.search(name)]
    beside = Renamed(files, {name: name for name in names}) if names else None
    return State(source, config, packed, key, shapes, structure, beside)


_RECOMPUTED = re.compile(r"(inv_freq|masked_bias|attn\.bias|attention\.bias)$")  # buffers that old releases stored


def open_tensors(files: Checkpoint, model: PreTrainedModel, structure: Architecture) -> SplitTensors:
    """Read the tensors of a model from a folder, by the names of the model's own modules."""
    parts = parts_of(model)
    sizes = stacked_sizes({name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}, parts)
    stock = empty_model(model.config) if structure.experts else model  # conversions look at its parameters
    named = NamedTensors(files, stock, sizes, structure)
    return SplitTensors(named, parts, named.unused)


def reshaped(state: State, shapes: Mapping[str, BlockShape | None]) -> State:
    """Return the same tensors, of their new sizes already, as a model of other shapes; None for a block that is removed."""
    structure = state.structure
    names = [block_prefix(structure, index) for index in range(structure.depth)]
    kept = [index for index, name in enumerate(names) if shapes.get(name, True) is not None]
    whole = {**state.shapes, **{name: shape for name, shape in shapes.items() if shape is not None}}
    source, config = state.source, state.config
    if len(kept) < len(names):
        moved = {index: names[place] for place, index in enumerate(kept)}
        renamed: dict[str, str] = {}
        for name in source.info():
            place = block_of(name, structure)
            if place is None:
                renamed[name] = name
            elif place in moved:
                renamed[moved[place] + name.removeprefix(names[place])] = name
        source, config = Renamed(source, renamed), fewer_blocks(config, kept)
        whole = {moved[index]: whole[names[index]] for index in kept if names[index] in whole}
    returns, carried = (tuple(structure.returns[i] for i in kept), tuple(structure.carried[i] for i in kept))
    structure = replace(structure, depth=len(kept), returns=returns, carried=carried)
    config, records = settled(config, whole, structure)
    return replace(state, source=source, config=config, shapes=records, structure=structure)


@dataclass(frozen=True)
class _Foreseen:
    """Hold the shapes and types of tensors that are not there yet; the beginnings of those that are stand for them."""

    tensors: Mapping[str, TensorInfo]
    source: TensorSource

    def info(self) -> Mapping[str, TensorInfo]:
        return self.tensors

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        found = self.source.read(names)
        return {n: tensor[tuple(map(slice, self.tensors[n].shape))].contiguous() for n, tensor in found.items()}


def foreseen(after: State) -> State:
    """Return what a model will be once a pass has done its work, of its new sizes, for a plan: its weights are not the real ones."""
    model = built(after.config, {}, after.shapes)
    sizes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    info = {name: replace(item, shape=sizes.get(name, item.shape)) for name, item in after.source.info().items()}
    return replace(after, source=_Foreseen(info, after.source))


class StreamedModel:
    """Hold a model, in float32, whose blocks are in memory one at a time; on ``meta`` nothing is read, only looked at.

    With ``fast``, blocks multiply in bfloat16 where the device does that in hardware; weights, norms and the residual stream
    stay float32.
    """

    def __init__(self, state: State, device: torch.device, fast: bool = False) -> None:
        self.state, self.device = state, device
        wide = int(getattr(text_config(state.config), "hidden_size", 0)) >= _FAST_FROM
        self._fast = fast and wide and multiplies_bfloat16(device)
        self.structure = state.structure
        self.model = built(state.config, state.packed, state.shapes)
        self.head = self.structure.head
        for packed in packed_modules(self.model).values():
            packed.keep_dense = False  # a dense copy would outlive its block
        self._all_blocks = list(self.model.get_submodule(self.structure.blocks).children())
        self.blocks = self._all_blocks  # with fewer, the first, the last of them leads to the logits
        wanted = self._wanted()
        self._check_tensors(wanted)
        if device.type != "meta":
            self._fill(self.model, {name: name for name in wanted if block_of(name, self.structure) is None})
            self.model.tie_weights(recompute_mapping=False)  # a packed embedding and its head are tied already
            for module in self.model.modules():
                for name, buffer in module.named_buffers(recurse=False):
                    if buffer.device.type != "meta":
                        setattr(module, name, buffer.to(device))

    def _wanted(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the tensors that have to be in the files: not those that share the storage of others."""
        tied = set() if self.head in self.state.packed else set(self.model.all_tied_weights_keys)
        stored = self.state.source.info()
        computed = {
            name for name, buffer in self.model.named_buffers() if buffer.device.type != "meta" and name not in stored
        }
        tensors = self.model.state_dict().items()
        return {name: tuple(tensor.shape) for name, tensor in tensors if name not in tied and name not in computed}

    def _check_tensors(self, wanted: Mapping[str, tuple[int, ...]]) -> None:
        """Refuse, before any work is done, tensors that are missing or not of the model's own shape."""
        stored = self.state.source.info()
        for name, shape in wanted.items():
            info = stored.get(name)
            if info is None:
                others = sorted(self.state.beside.info()) if self.state.beside else []
                more = (
                    f", which have {others[0]!r} and others that transformers gives to no part of it" if others else ""
                )
                raise CompressError(f"tensor {name!r} of the model is missing from its safetensors files{more}.")
            if info.shape != shape:
                raise CompressError(
                    f"tensor {name!r} is {list(info.shape)} in {info.file.name}, but config.json makes it "
                    f"{list(shape)}; the two do not belong together."
                )

    def _fill(self, module: nn.Module, names: Mapping[str, str]) -> None:
        """Give a module its tensors: names inside it -> names in the state."""
        values = {}
        # One at a time, so that nothing is there twice; experts come from a stack, which is read once for all.
        at_once = [names] if self.structure.experts else [{inner: stored} for inner, stored in names.items()]
        for some in at_once:
            tensors = self.state.source.read(some.values())
            for inner, stored in some.items():
                value = tensors.pop(stored)
                table = stored.rpartition(".")[0] in self.state.packed and not stored.endswith(".bias")
                floating = value.is_floating_point() and not table
                values[inner] = value.to(self.device, torch.float32 if floating else value.dtype)
        module.load_state_dict(values, strict=False, assign=True)
        module.requires_grad_(False)
        rebuild(module)

    def _stored(self, prefix: str, names: Iterable[str]) -> dict[str, str]:
        """Return the names in the files of a block's tensors; one that an earlier block has too is there once."""
        tied = self.model.all_tied_weights_keys
        return {name: tied.get(f"{prefix}.{name}", f"{prefix}.{name}") for name in names}

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """Fill a block with its weights for the length of a ``with``; whoever prunes it may leave it smaller."""
        module, prefix = self.blocks[index], block_prefix(self.structure, index)
        empty = {name: tensor.to("meta") for name, tensor in module.state_dict().items()}
        stored = {name: packed.shape for name, packed in packed_modules(module).items()}
        modules = dict(module.named_modules())
        self._fill(module, self._stored(prefix, empty))
        try:
            yield module
        finally:
            for path, before in modules.items():  # mixtures that were left with fewer experts
                if path and module.get_submodule(path) is not before:
                    module.set_submodule(path, before)
            for name, packed in packed_modules(module).items():
                packed.hold(stored[name], {inner: empty[f"{name}.{inner}"] for inner in stored[name].specification()})
            if any(empty[name].shape != tensor.shape for name, tensor in module.state_dict().items()):
                config = self.state.config
                shape_block(module, self.structure, block_shape(config, self.state.shapes, prefix), head_dim(config))
            module.load_state_dict(empty, assign=True)

    def whole(self) -> PreTrainedModel:
        """Fill all blocks and return the model, for passes that need it in memory."""
        for index, block in enumerate(self.blocks):
            prefix = block_prefix(self.structure, index)
            self._fill(block, self._stored(prefix, block.state_dict()))
        return self.model

    def linears(self, index: int) -> dict[str, Linear]:
        """Return the dense linears of a block that passes work on, by full name."""
        found = linears_of(self.blocks[index], block_prefix(self.structure, index))
        return {name: linear for name, linear in found.items() if name not in self.structure.left}

    def outside(self) -> dict[str, Linear]:
        """Return embedding and head, as matrices, unless they are packed."""
        modules = {name: self.model.get_submodule(name) for name in (self.structure.embedding, self.head)}
        packed = BitPlaneHead, BitPlaneLinear, BitPlaneEmbedding
        open_ones = {n: m for n, m in modules.items() if n not in self.structure.left and not isinstance(m, packed)}
        return {name: Linear(name, module) for name, module in open_ones.items()}

    def head_matrix(self) -> str:
        """Return the name of the matrix that the head multiplies by: the embedding's, if the two are tied."""
        tied = bool(getattr(self.state.config, "tie_word_embeddings", False))
        return self.structure.embedding if tied else self.head

    @contextmanager
    def _forwards(self, forward: Callable[[int], Callable[..., Any]]) -> Iterator[None]:
        """Let other functions stand for the blocks' forward passes."""
        for index, block in enumerate(self._all_blocks):
            block.forward = forward(index)
        try:
            yield
        finally:
            for block in self._all_blocks:
                del block.forward

    def _wrapped(self, index: int, hidden: Tensor) -> Any:
        """Return hidden states in the form in which a block returns them."""
        values = self.structure.returns[index]
        return (hidden, *[None] * (values - 1)) if values else hidden

    def capture(self, tokens: Tensor) -> tuple[Tensor, list[Call]]:
        """Let the model prepare one sample, int64 [T]: the first block's inputs [1, T, hidden], and how blocks are called."""
        first: list[Tensor] = []
        calls: list[Call] = []
        loads = (*self.structure.carried[: len(self.blocks)], Load())

        def forward(index: int) -> Callable[..., Any]:
            def take_note(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
                if not first:
                    first.append(hidden)
                calls.append(Call(args, kwargs, *loads[index : index + 2]))
                if index == len(self.blocks) - 1:
                    raise _LastBlock
                return self._wrapped(index, hidden)

            return take_note

        with self._forwards(forward):
            try:
                self.model(input_ids=tokens[None].to(self.device), use_cache=False)
            except _LastBlock:
                pass
        return first[0], calls

    @torch.no_grad()
    def first_inputs(self, samples: Mapping[int, Tensor]) -> dict[str, Tensor]:
        """Return the first block's hidden states for every sample, by its place."""
        return {str(place): self.capture(tokens)[0] for place, tokens in samples.items()}

    def run(self, block: nn.Module, hidden: Tensor, call: Call) -> Tensor:
        """Run one block on one sample: [1, T, hidden] to the same, float32; with all that it hands on, if it does."""
        hidden, args, kwargs = unpack(hidden, call)
        with self._products():
            output: Tensor | Sequence[Tensor] = block(hidden, *args, **kwargs)
        return pack(output, args, kwargs, call)

    def _products(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16) if self._fast else nullcontext()

    @torch.no_grad()
    def run_all(self, tokens: Tensor) -> Tensor:
        """Run the model on a sample, int64 [T], with one block in memory at a time: logits, float32 [T, vocabulary]."""
        hidden, calls = self.capture(tokens)
        for index, call in enumerate(calls):
            with self.block(index) as block:
                hidden = self.run(block, hidden, call)
        return self.logits(tokens, hidden)

    def logits(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """Compute what the model makes of the last block's output: [1, T, hidden] -> float32 [T, vocabulary]."""
        with self._forwards(lambda index: lambda _hidden, *_args, **_kwargs: self._wrapped(index, hidden)):
            output = self.model(input_ids=tokens[None].to(self.device), use_cache=False)
        return output.logits[0].float()  # type: ignore[no-any-return]
