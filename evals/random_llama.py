"""Write Llamas with random weights, for measuring speed and memory where no trained checkpoint is at hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig

import compress
from compress.errors import CompressError, did_you_mean
from compress.hub import model_folder
from compress.models import empty_model
from compress.passes import Progress
from compress.weights import INDEX
from compress.workspace import save_atomic, write_atomic


def llama(hidden: int, blocks: int, **others: int) -> LlamaConfig:
    """Return the configuration of a Llama; heads have 64 values, two share keys, unless ``others`` say otherwise."""
    sizes: dict[str, Any] = {
        "vocab_size": 2048,
        "intermediate_size": hidden * 11 // 4,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 128,
        "max_position_embeddings": 2048,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return LlamaConfig(hidden_size=hidden, num_hidden_layers=blocks, tie_word_embeddings=False, **sizes | others)


_LLAMA_3 = {"vocab_size": 128256, "num_attention_heads": 32, "num_key_value_heads": 8}
SIZES = {
    "llama-tiny": llama(128, 2),
    "llama-7b": llama(
        4096, 32, vocab_size=32000, intermediate_size=11008, num_attention_heads=32, num_key_value_heads=32
    ),
    "llama-1b": llama(2048, 16, intermediate_size=8192, **_LLAMA_3),
    "llama-8b": llama(4096, 32, intermediate_size=14336, **_LLAMA_3),
}
"""``llama-1b`` has the sizes of Llama-3.2-1B, but a head of its own; ``llama-8b`` those of Llama-3.1-8B."""


def sized(name: str, blocks: int) -> LlamaConfig:
    """Return one of :data:`SIZES`, cut to its first blocks."""
    if name not in SIZES:
        raise CompressError(f"there is no random model {name!r}. {did_you_mean(name, SIZES)}")
    config = LlamaConfig.from_dict(SIZES[name].to_dict())
    config.num_hidden_layers = blocks
    return config


def write_llama(folder: Path, config: LlamaConfig) -> Path:
    """Write a random bfloat16 Llama with the built-in model's tokenizer, a block at a time; return its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    config.dtype, config.architectures = torch.bfloat16, ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    shards: dict[str, dict[str, torch.Size]] = {}
    for name, tensor in empty_model(config).state_dict().items():
        block = name.split(".")[2] if ".layers." in name else "outside"
        shards.setdefault(f"model-{block}.safetensors", {})[name] = tensor.shape
    generator, total = torch.Generator().manual_seed(0), 0
    for file, shapes in shards.items():
        tensors = {name: _drawn(shape, config.initializer_range, generator) for name, shape in shapes.items()}
        save_atomic(folder / file, tensors, {"format": "pt"})
        total += sum(tensor.nbytes for tensor in tensors.values())
    files = {name: file for file, shapes in shards.items() for name in shapes}
    write_atomic(folder / INDEX, json.dumps({"metadata": {"total_size": total}, "weight_map": files}, indent=1))
    for path in model_folder("builtin").glob("tokenizer*"):
        shutil.copy(path, folder / path.name)
    return folder


def _drawn(shape: torch.Size, deviation: float, generator: torch.Generator) -> Tensor:
    """Draw a matrix; vectors are the weights of norms."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.randn(shape, generator=generator).mul_(deviation).bfloat16()


def write_packed_llama(folder: Path, size: str, progress: Progress | None = None) -> Path:
    """Write a random Llama as ``dense`` in a folder, quantise it from 2 to 8 bits, head included, and return the checkpoint."""
    if size not in SIZES:
        raise CompressError(f"--random {size}: there is no random model of that name. {did_you_mean(size, SIZES)}")
    settings = {"objective": "weight", "sensitivity": "none", "seed_bits": 2, "include": ["lm_head"]}
    dense = write_llama(folder / "dense", SIZES[size])
    recipe = {"model": str(dense), "passes": [{"kind": "any_precision", **settings}]}
    return compress.run(recipe, folder / "packed", progress=progress)
