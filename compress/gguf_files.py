"""Read GGUF files, llama.cpp's, as the dense models that they stand for, tensor by tensor.

Names, layouts and configuration are those of transformers' own reader, of which the tables are used here; what it leaves out of a file
that computes something else without it is refused. The numbers are those of the package ``gguf``.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from compress.errors import CompressError, first_line
from compress.loading import has_tokenizer, load_tokenizer, read_config
from compress.models import empty_model, text_config
from compress.weights import Checkpoint, TensorInfo

_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_ROPE = "rope.scaling."
_SAME_TOKENS = 0.9  # converters write some, such as those that are never used, in other ways


def _reader(path: Path) -> Any:
    """Open a file; its tensors stay on disk."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise CompressError(f"{path}: reading GGUF files needs gguf: pip install 'compress-llm[gguf]'.") from error
    try:
        return GGUFReader(path)
    except (ValueError, OSError, KeyError, IndexError) as error:
        raise CompressError(f"{path}: not a readable GGUF file ({first_line(error)}); fetch it again.") from error


def open_gguf(path: Path) -> tuple[PretrainedConfig, PreTrainedTokenizerBase, GgufFile]:
    """Open a file as configuration, tokenizer and tensors; nothing is read but what describes them.

    Raises:
        CompressError: no GGUF file, of a type of model, tensor or tokenizer that transformers or ``gguf`` cannot read, or one of which
            transformers' reader would leave something out.
    """
    reader = _reader(path)
    config, tokenizer = read_config(path), load_tokenizer(path)
    files = GgufFile(path, reader, config)
    config.architectures = [type(empty_model(config)).__name__]
    config.dtype = max((getattr(torch, item.dtype) for item in files.matrices()), key=lambda dtype: dtype.itemsize)
    if limit := getattr(text_config(config), "max_position_embeddings", None):
        tokenizer.model_max_length = limit
    _check_tokenizer(path, reader, tokenizer)
    return config, tokenizer, files


class GgufFile(Checkpoint):
    """Offer the tensors of a GGUF file under the names of transformers' model of it.

    Blocks of integers become float32, as in ``from_pretrained``; tensors of floats keep their dtype.
    """

    def __init__(self, path: Path, reader: Any, config: PretrainedConfig) -> None:
        from gguf import dequantize
        from transformers.modeling_gguf_pytorch_utils import (
            TENSOR_PROCESSORS,
            TensorProcessor,
            get_gguf_hf_weights_map,
        )

        self.folder, self.files, self._dequantize = path, [path], dequantize
        model = empty_model(config)
        metadata = {key: field.contents() for key, field in reader.fields.items() if len(field.data) < 1000}
        self._stored = {tensor.name: tensor for tensor in reader.tensors}
        kind = str(metadata.get("general.architecture"))
        processors: Mapping[str, Any] = TENSOR_PROCESSORS
        self._processor = processors.get(kind, TensorProcessor)(config=config.to_dict())
        try:
            self._names: dict[str, str] = get_gguf_hf_weights_map(model, self._processor)
        except NotImplementedError as error:  # what only the newer of transformers' two readers knows
            raise CompressError(
                f"{path}: models of type {kind} are not read from GGUF; start from the checkpoint it was made of."
            ) from error
        _refuse_lost(path, kind, metadata, config)
        self._refuse_types()
        self._parts = dict[str, list[str]]()  # tensor of the model -> those of the file
        for name in self._stored:
            if (own := self._names.get(name) or self._names.get(name.removesuffix(".weight"))) is None:
                raise CompressError(
                    f"{path}: its tensor {name} has no place in transformers' {config.model_type}, which would be another model "
                    f"without{_said_of(name)}; start from the checkpoint it was made of."
                )
            self._parts.setdefault(own, []).append(name)
        self._info = dict(self._described(model.state_dict()))

    def matrices(self) -> list[TensorInfo]:
        """Describe those that are more than a vector."""
        return [item for item in self._info.values() if len(item.shape) > 1]

    def _refuse_types(self) -> None:
        for name, kind in {tensor.tensor_type: tensor.name for tensor in self._stored.values()}.items():
            try:
                self._dequantize(self._stored[kind].data[:1], name)
            except NotImplementedError as error:
                raise CompressError(
                    f"{self.folder}: tensor {kind} is of type {name.name}, which the package gguf cannot read; take another file."
                ) from error

    def _described(self, model: Mapping[str, Tensor]) -> Iterator[tuple[str, TensorInfo]]:
        for name, parts in self._parts.items():
            stored = [self._stored[part] for part in parts]
            shape = tuple(model[name].shape)
            if sum(int(one.n_elements) for one in stored) != math.prod(shape):
                raise CompressError(
                    f"{self.folder}: {parts[0]} has {list(map(int, stored[0].shape[::-1]))}, but the file's own sizes make it "
                    f"{list(shape)}; fetch it again."
                )
            dtype = _FLOATS.get(stored[0].tensor_type.name, "float32")
            yield name, TensorInfo(shape, dtype, getattr(torch, dtype).itemsize, self.folder)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Copy some tensors, each dequantised by itself."""
        return {name: self._read(name) for name in names}

    def _read(self, name: str) -> Tensor:
        found = dict[str, Tensor]()  # where processors of mixtures put what they make of several
        for part in self._parts[name]:
            stored = self._stored[part]
            values = self._dequantize(stored.data, stored.tensor_type)
            made = self._processor.process(
                weights=values, name=part, tensor_key_mapping=self._names, parsed_parameters={"tensors": found}
            )
            if made.name is not None:
                found[name] = torch.from_numpy(np.array(made.weights))
        return found[name].to(getattr(torch, self._info[name].dtype))


def _said_of(tensor: str) -> str:
    return " (RoPE scaling)" if tensor.startswith("rope_") else ""


def _refuse_lost(path: Path, kind: str, metadata: Mapping[str, Any], config: PretrainedConfig) -> None:
    """Refuse what a file says of its model and transformers' configuration of it does not."""
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    if int(metadata.get("split.count", 1)) > 1:
        raise CompressError(
            f"{path}: is one of {metadata['split.count']} parts; join them with llama-gguf-split --merge."
        )
    tables = (kind, config.model_type, config.model_type.removesuffix("_text"))
    mapping: Mapping[str, Any] = GGUF_CONFIG_MAPPING
    known: Mapping[str, Any] = next((mapping[name] for name in tables if name in mapping), {})
    kept = _kept(config)
    own = {key.removeprefix(f"{kind}."): value for key, value in metadata.items() if key.startswith(f"{kind}.")}
    for key, value in own.items():
        if key.startswith(_ROPE):
            scaled = own.get(f"{_ROPE}type") not in (None, "none") or own.get(f"{_ROPE}factor") not in (None, 0, 1)
            lost = scaled and not kept["rope_scaled"]
        else:
            lost = known.get(key) is None and not any(_same(value, one) for one in kept.get(key, ()))
        if lost:
            raise CompressError(
                f"{path}: {kind}.{key} is {value!r}, which transformers' reader leaves out, so another model would be compressed; "
                "start from the checkpoint the file was made of."
            )


def _kept(config: PretrainedConfig) -> dict[str, list[Any]]:
    """Return what a configuration says, by the names that GGUF has for it and transformers' table has not."""
    text = text_config(config)
    said = dict[str, list[Any]]()
    for key, value in _leaves(text.to_dict()):
        said.setdefault(key, []).append(value)
    heads = int(getattr(text, "num_attention_heads", 0) or 1)
    head = int(getattr(text, "head_dim", 0) or getattr(text, "hidden_size", 0) // heads)
    part = said.get("partial_rotary_factor", [1.0])[0] or 1.0
    theta = said.get("rope_theta", []) + said.get("rope_local_base_freq", [])
    types = {kind for kind in said.get("rope_type", []) if kind not in (None, "default")}
    return {
        **said,
        "attention.key_length": [head],
        "attention.value_length": [head],
        "attention.sliding_window": said.get("sliding_window", []),
        "attention.causal": [True],
        "rope.dimension_count": [int(head * part)],
        "rope.freq_base": theta,
        "rope.freq_base_swa": theta,
        "expert_feed_forward_length": said.get("moe_intermediate_size", []),
        "expert_shared_feed_forward_length": said.get("shared_expert_intermediate_size", []),
        "rope_scaled": sorted(types),
    }


def _leaves(tree: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value)
        else:
            yield str(key), value


def _same(value: Any, other: Any) -> bool:
    numbers = all(isinstance(one, int | float) for one in (value, other))
    return math.isclose(value, other, rel_tol=1e-5) if numbers else bool(value == other)


def _check_tokenizer(path: Path, reader: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that is not the one which the file describes."""
    keys = ("tokenizer.ggml.model", "tokenizer.ggml.pre")
    kind, split = (reader.fields[key].contents() if key in reader.fields else None for key in keys)
    if not has_tokenizer(path.parent):
        if kind == "gpt2" and split not in _splits():
            raise CompressError(
                f"{path}: transformers does not know the way to split text that tokenizer.ggml.pre {split!r} names; put the "
                "tokenizer.json and tokenizer_config.json of the checkpoint it was made of beside it."
            )
        return
    tokens = reader.fields["tokenizer.ggml.tokens"].contents() if "tokenizer.ggml.tokens" in reader.fields else []
    beside = tokenizer.convert_ids_to_tokens(list(range(min(len(tokenizer), len(tokens)))))
    if sum(map(operator.eq, tokens, beside)) < _SAME_TOKENS * len(tokens):
        raise CompressError(f"{path}: the tokenizer.json beside it is of another model; put that of this one there.")


def _splits() -> set[str]:
    """Return the names of ways to split text that transformers' reader follows."""
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
    except ImportError:  # releases that look at no name
        return {"gpt-2", "gpt2"}
    return {"gpt-2", "gpt2", *GGUF_PRE_TOKENIZER_SPLITS}


def write_beside(folder: Path, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write what a Hugging Face folder has beside weights and configuration, and a GGUF file within it."""
    tokenizer.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
