"""Run a model that is never in memory whole.

The real model class is built without weights; the parts outside its blocks get theirs. Blocks are filled one at a time and
called as the model itself would: the arguments of every block's call are captured by letting the model's own ``forward`` run
over blocks that only take notes. No forward pass is written again here, so a new transformers release needs nothing.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from compress.config import BlockShape, Shapes
from compress.errors import CompressError
from compress.hf import packed_modules, rebuild, replace_packed
from compress.precision import multiplies_bfloat16
from compress.quant.embedding import BitPlaneEmbedding, BitPlaneHead
from compress.quant.linear import BitPlaneLinear
from compress.quant.records import PackedShape
from compress.shapes import block_shape, fewer_blocks, head_dim, replace_shapes, settled, shape_block
from compress.structure import Architecture, Linear, architecture, block_of, block_prefix, head_name, linears_of
from compress.weights import Renamed, TensorInfo, TensorSource

_FAST_FROM = 512  # columns: below, bfloat16 gains nothing


@dataclass(frozen=True)
class State:
    """Hold a model between two passes.

    ``packed`` are the matrices that are bit planes by now, ``key`` is the digest of all that led here, and ``shapes`` are those
    of blocks that are not as large as the config says.
    """

    source: TensorSource
    config: PretrainedConfig
    packed: Mapping[str, PackedShape]
    key: str
    shapes: Shapes = field(default_factory=dict)


@dataclass(frozen=True)
class Call:
    """Hold what the model gives to one block besides the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _LastBlock(Exception):
    """Stop the model after its last note-taking block: the rest need not run."""


def tensor_names(model: PreTrainedModel) -> dict[str, tuple[str, ...]]:
    """Return, for every tensor, the names it may have in files, which lack a prefix, have one in excess, or an old name."""
    structure, start = architecture(model.config), f"{model.base_model_prefix}."
    names: dict[str, tuple[str, ...]] = {
        name: (name, name.removeprefix(start), start + name, structure.stored_name(name)) for name in model.state_dict()
    }
    embedding, head = f"{structure.embedding}.weight", f"{head_name(model)}.weight"
    if model.config.tie_word_embeddings and embedding in names and head in names:  # files may have either
        names[embedding] += names[head]
    return names


def empty_model(config: PretrainedConfig) -> PreTrainedModel:
    """Build the real model class with parameters on the meta device and buffers in place."""
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    model.train(False)
    return model


def reshaped(state: State, shapes: Mapping[str, BlockShape | None]) -> State:
    """Return the same tensors, of their new sizes already, as a model of other shapes; None for a block that is removed."""
    structure = architecture(state.config)
    names = [block_prefix(structure, index) for index in range(state.config.num_hidden_layers)]
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
    config, records = settled(config, whole, structure)
    return State(source, config, state.packed, state.key, records)


@dataclass(frozen=True)
class _Foreseen:
    """Hold the shapes and types of tensors that are not there yet."""

    tensors: Mapping[str, TensorInfo]

    def info(self) -> Mapping[str, TensorInfo]:
        return self.tensors

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        raise NotImplementedError("tensors of a plan cannot be read")


def foreseen(state: State, shapes: Mapping[str, BlockShape | None]) -> State:
    """Return what :func:`reshaped` will give once a pass has done its work, with tensors that can only be looked at."""
    after = reshaped(state, shapes)
    model = empty_model(after.config)
    replace_shapes(model, after.shapes)
    sizes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    info = {name: replace(item, shape=sizes.get(name, item.shape)) for name, item in after.source.info().items()}
    return State(_Foreseen(info), after.config, after.packed, after.key, after.shapes)


class StreamedModel:
    """Hold a model, in float32, whose blocks are in memory one at a time; on ``meta`` nothing is read, only looked at.

    With ``fast``, blocks multiply in bfloat16 where the device does that in hardware; weights, norms and the residual stream
    stay float32.
    """

    def __init__(self, state: State, device: torch.device, fast: bool = False) -> None:
        self.state, self.device = state, device
        wide = int(getattr(state.config, "hidden_size", 0)) >= _FAST_FROM
        self._fast = fast and wide and multiplies_bfloat16(device)
        self.structure: Architecture = architecture(state.config)
        self.model = empty_model(state.config)
        self.head = head_name(self.model)
        replace_shapes(self.model, state.shapes)
        replace_packed(self.model, state.packed)
        for packed in packed_modules(self.model).values():
            packed.keep_dense = False  # a dense copy would outlive its block
        self.blocks = list(self.model.get_submodule(self.structure.blocks).children())
        self._returns_tuple = False
        wanted = {name: tuple(tensor.shape) for name, tensor in self.model.state_dict().items()}
        if state.config.tie_word_embeddings and self.head not in state.packed:
            wanted.pop(f"{self.head}.weight", None)  # it shares the embedding's storage and need not be in the files
        self._check_tensors(wanted)
        if device.type != "meta":
            self._fill(self.model, {name: name for name in wanted if block_of(name, self.structure) is None})
            self.model.tie_weights(recompute_mapping=False)  # a packed embedding and its head are tied already
            for module in self.model.modules():
                for name, buffer in module.named_buffers(recurse=False):
                    if buffer.device.type != "meta":
                        setattr(module, name, buffer.to(device))
            self._find_return_type()

    def _check_tensors(self, wanted: Mapping[str, tuple[int, ...]]) -> None:
        """Refuse, before any work is done, tensors that are missing or not of the model's own shape."""
        stored = self.state.source.info()
        for name, shape in wanted.items():
            info = stored.get(name)
            if info is None:
                raise CompressError(f"tensor {name!r} of the model is missing from its safetensors files.")
            if info.shape != shape:
                raise CompressError(
                    f"tensor {name!r} is {list(info.shape)} in {info.file.name}, but config.json makes it "
                    f"{list(shape)}; the two do not belong together."
                )

    def _fill(self, module: nn.Module, names: Mapping[str, str]) -> None:
        """Give a module its tensors: names inside it -> names in the state."""
        tensors = self.state.source.read(names.values())
        values = {}
        for inner, stored in names.items():
            value = tensors[stored]
            table = stored.rpartition(".")[0] in self.state.packed and not stored.endswith(".bias")
            floating = value.is_floating_point() and not table
            values[inner] = value.to(self.device, torch.float32 if floating else value.dtype)
        module.load_state_dict(values, strict=False, assign=True)
        module.requires_grad_(False)
        rebuild(module)

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """Fill a block with its weights for the length of a ``with``; whoever prunes it may leave it smaller."""
        module, prefix = self.blocks[index], block_prefix(self.structure, index)
        empty = {name: tensor.to("meta") for name, tensor in module.state_dict().items()}
        stored = {name: packed.shape for name, packed in packed_modules(module).items()}
        self._fill(module, {name: f"{prefix}.{name}" for name in empty})
        try:
            yield module
        finally:
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
            self._fill(block, {name: f"{prefix}.{name}" for name in block.state_dict()})
        return self.model

    def linears(self, index: int) -> dict[str, Linear]:
        """Return the dense linears of a block, by full name."""
        return linears_of(self.blocks[index], block_prefix(self.structure, index))

    def outside(self) -> dict[str, Linear]:
        """Return embedding and head, as matrices, unless they are packed."""
        modules = {name: self.model.get_submodule(name) for name in (self.structure.embedding, self.head)}
        packed = BitPlaneHead, BitPlaneLinear, BitPlaneEmbedding
        return {name: Linear(name, module) for name, module in modules.items() if not isinstance(module, packed)}

    def head_matrix(self) -> str:
        """Return the name of the matrix that the head multiplies by: the embedding's, if the two are tied."""
        return self.structure.embedding if self.state.config.tie_word_embeddings else self.head

    @contextmanager
    def _forwards(self, forward: Callable[[int], Callable[..., Any]]) -> Iterator[None]:
        """Let other functions stand for the blocks' forward passes."""
        for index, block in enumerate(self.blocks):
            block.forward = forward(index)
        try:
            yield
        finally:
            for block in self.blocks:
                del block.forward

    def _wrapped(self, hidden: Tensor) -> Any:
        return (hidden,) if self._returns_tuple else hidden

    def capture(self, tokens: Tensor) -> tuple[Tensor, list[Call]]:
        """Let the model prepare one sample, int64 [T]: the first block's inputs [1, T, hidden], and how blocks are called."""
        first: list[Tensor] = []
        calls: list[Call] = []

        def forward(index: int) -> Callable[..., Any]:
            def take_note(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
                if not first:
                    first.append(hidden)
                calls.append(Call(args, kwargs))
                if index == len(self.blocks) - 1:
                    raise _LastBlock
                return self._wrapped(hidden)

            return take_note

        with self._forwards(forward):
            try:
                self.model(input_ids=tokens[None].to(self.device), use_cache=False)
            except _LastBlock:
                pass
        return first[0], calls

    @torch.no_grad()
    def first_inputs(self, samples: Iterable[Tensor]) -> dict[str, Tensor]:
        """Return the first block's hidden states for every sample, by its place in the list."""
        return {str(place): self.capture(tokens)[0] for place, tokens in enumerate(samples)}

    @torch.no_grad()
    def _find_return_type(self) -> None:
        """Call the first block as the model does: some releases' blocks return a tensor, some a tuple."""
        hidden, calls = self.capture(torch.zeros(2, dtype=torch.long))
        with self.block(0) as block:
            self._returns_tuple = isinstance(block(hidden, *calls[0].args, **calls[0].kwargs), tuple)

    def run(self, block: nn.Module, hidden: Tensor, call: Call) -> Tensor:
        """Run one block on one sample: [1, T, hidden] to the same, float32."""
        with self._products():
            result: Tensor | tuple[Tensor, ...] = block(hidden, *call.args, **call.kwargs)
        return (result[0] if isinstance(result, tuple) else result).float()

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
        with self._forwards(lambda _index: lambda _hidden, *_args, **_kwargs: self._wrapped(hidden)):
            output = self.model(input_ids=tokens[None].to(self.device), use_cache=False)
        return output.logits[0].float()  # type: ignore[no-any-return]
