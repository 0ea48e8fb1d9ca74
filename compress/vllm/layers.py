"""Layers of vLLM that multiply by packed matrices, and look rows of packed embeddings up.

What runs in compiled code is an operator that finds its layer by name when it is called: vLLM drops the guards of compiled code, so that
anything else (the number of bits, say) would be a constant there for good.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.linear import LinearMethodBase
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

from compress.quant.embedding import BitPlaneEmbedding
from compress.quant.records import PackedShape
from compress.vllm.matrices import Cut, Matrices, StoredMatrix, Vocabulary
from compress.vllm.settings import Held

DRAFT = "draft_model."
"""How the names of all layers of a draft begin."""
_SHARDS = {"q": 0, "k": 1, "v": 2}


@dataclass(frozen=True)
class Stored:
    """Name one matrix of a checkpoint: its folder, its record, or None if it is stored as it was, and the bits to hold."""

    folder: str
    name: str
    shape: PackedShape | None
    held: Held


def _register(layer: nn.Module, prefix: str) -> str:
    """Let the operators find a layer; return the name they find it by, which no other layer of the engine has."""
    layers = get_current_vllm_config().compilation_config.static_forward_context
    name = f"{prefix or type(layer).__name__}.compress"
    while name in layers:
        name += "+"
    layers[name] = layer
    return name


def _twin(layer: nn.Module, prefix: str, stored: Sequence[Stored]) -> nn.Module | None:
    """Return what a draft that is the same checkpoint can take from the layer of its target: the tensors, at its own bits.

    None for any other layer, and where the target does not hold the draft's bits.
    """
    layers = get_current_vllm_config().compilation_config.static_forward_context
    target = layers.get(f"{prefix.removeprefix(DRAFT) or type(layer).__name__}.compress")
    if not hasattr(target, "compress"):
        return None
    same = [(one.folder, one.name) for one in stored]
    if [(one.folder, one.name) for one in target.quant_method.stored] != same:
        return None
    found: nn.Module | None = target.compress.twin({one.name: one.held.bits for one in stored})
    return found


def _sinks(layer: nn.Module, matrices: Sequence[StoredMatrix], dtype: torch.dtype, read: bool) -> None:
    """Give a layer an empty parameter for every tensor that its matrices may have in the checkpoint.

    vLLM's own loaders would copy what they read into a parameter of its size, cut by columns where a word holds 32. Without
    ``read`` what comes is left alone.
    """

    def loader(tensor_name: str) -> Callable[..., None]:
        def load(parameter: nn.Parameter, tensor: Tensor, shard: Any = None) -> None:
            place = _SHARDS.get(shard, shard) or 0
            if read:
                matrices[place].take(tensor_name, tensor, parameter.device)

        return load

    for tensor_name in sorted({name for matrix in matrices for name in matrix.stored_names()}):
        sink = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
        sink.weight_loader = loader(tensor_name)  # type: ignore[attr-defined]
        layer.register_parameter(tensor_name, sink)


def _drop_sinks(layer: nn.Module, matrices: Sequence[StoredMatrix]) -> None:
    for tensor_name in {name for matrix in matrices for name in matrix.stored_names()}:
        delattr(layer, tensor_name)


class LinearMethod(LinearMethodBase):
    """Serve a linear layer of vLLM from one or more matrices of the checkpoint, each packed or as it was."""

    def __init__(self, stored: Sequence[Stored]) -> None:
        self.stored, self.matrices, self.sizes = stored, list[StoredMatrix](), list[int]()

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        """Prepare a layer for what will be loaded: the rows and columns of this process."""
        self.sizes = output_partition_sizes
        first = layer.tp_rank * input_size_per_partition if input_size_per_partition < input_size else 0
        columns = range(first, first + input_size_per_partition)
        for place, (one, size) in enumerate(zip(self.stored, self.sizes, strict=True)):
            whole = one.shape.out_features if one.shape else _stored_rows(layer, place, output_size)
            copies = layer.num_kv_head_replicas if place and hasattr(layer, "num_kv_head_replicas") else 1
            row = layer.tp_rank // copies * size if size < whole else 0
            self.matrices.append(
                StoredMatrix(one.name, one.shape, one.held, Cut(range(row, row + size), columns, size))
            )
        self.twin = _twin(layer, layer.prefix, self.stored)
        _sinks(layer, self.matrices, params_dtype, read=self.twin is None)
        self.name = _register(layer, layer.prefix)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Put the matrices that were loaded in the place of what collected them."""
        _drop_sinks(layer, self.matrices)
        if self.twin is None:
            modules = [matrix.build(layer.params_dtype) for matrix in self.matrices]
            layer.compress = Matrices(modules, [one.name for one in self.stored])
        else:
            layer.compress = self.twin
        layer.qweight = next(layer.compress.buffers(), None)  # LoRA finds a layer's device by it
        self.matrices = []

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Multiply activations, [..., K] to [..., N of all matrices]."""
        if torch.compiler.is_compiling():
            y: Tensor = named_product(x, self.name, sum(self.sizes))
        else:
            y = layer.compress(x)
        return y if bias is None else y + bias


def _stored_rows(layer: Any, place: int, output_size: int) -> int:
    """Return how many rows a matrix that is stored as it was has, of those that a layer keeps as one."""
    sizes = getattr(layer, "output_sizes", None)
    return int(sizes[place]) if sizes else output_size


class VocabularyMethod(QuantizeMethodBase):
    """Serve an embedding, a head, or both from one packed matrix."""

    def __init__(self, stored: Stored) -> None:
        self.stored = (stored,)

    def create_weights(self, layer: Any, *sizes: Any, params_dtype: torch.dtype, **extra: Any) -> None:
        """Prepare a layer for the rows of this process; those that pad the vocabulary stay zero."""
        (one,), where = self.stored, layer.shard_indices
        shape = one.shape
        assert shape is not None
        rows = range(where.org_vocab_start_index, min(where.org_vocab_end_index, shape.out_features))
        part = Cut(rows, range(shape.in_features), layer.num_embeddings_per_partition)
        self.matrix = StoredMatrix(one.name, shape, one.held, part)
        self.twin = _twin(layer, layer.prefix, self.stored)
        _sinks(layer, [self.matrix], params_dtype, read=self.twin is None)
        self.name = _register(layer, layer.prefix)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Put the matrix that was loaded in the place of what collected it."""
        if hasattr(layer, "compress"):
            return
        _drop_sinks(layer, [self.matrix])
        if self.twin is None:
            rows = self.matrix.build(layer.params_dtype, embedding=True)
            assert isinstance(rows, BitPlaneEmbedding)
            layer.compress = Vocabulary(rows, self.matrix.name)
        else:
            layer.compress = self.twin

    def embedding(self, layer: Any, tokens: Tensor) -> Tensor:
        """Look rows up, int64 [...] to [..., K]."""
        if torch.compiler.is_compiling():
            found: Tensor = named_rows(tokens, self.name, layer.embedding_dim, layer.params_dtype)
        else:
            found = layer.compress(tokens)
        return found

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Multiply activations by all rows, [..., K] to [..., N]."""
        y: Tensor = layer.compress.product(x)
        return y if bias is None else y + bias


class TiedHead(QuantizeMethodBase):
    """Serve a head from the packed embedding that it is tied to."""

    def create_weights(self, layer: Any, *sizes: Any, **extra: Any) -> None:
        """Make nothing: the tensors are the embedding's."""

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        """Remember the embedding."""
        layer.tied_to = (embed_tokens,)  # within a tuple: its tensors would be there twice
        return layer

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Multiply activations by all rows, [..., K] to [..., N]."""
        embedding = layer.tied_to[0]
        y: Tensor = embedding.quant_method.apply(embedding, x, bias)
        return y


@torch.library.custom_op("compress::vllm_product", mutates_args=())
def named_product(x: Tensor, name: str, size: int) -> Tensor:
    """Multiply by the matrices of a named layer: [..., K] to [..., size]."""
    y: Tensor = get_forward_context().no_compile_layers[name].compress(x)
    return y


@named_product.register_fake
def _(x: Tensor, name: str, size: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], size)


@torch.library.custom_op("compress::vllm_rows", mutates_args=())
def named_rows(tokens: Tensor, name: str, size: int, dtype: torch.dtype) -> Tensor:
    """Look rows of a named embedding up: int64 [...] to [..., size]."""
    found: Tensor = get_forward_context().no_compile_layers[name].compress(tokens)
    return found


@named_rows.register_fake
def _(tokens: Tensor, name: str, size: int, dtype: torch.dtype) -> Tensor:
    return tokens.new_empty(*tokens.shape, size, dtype=dtype)
