"""Recipes of the papers without their weights: ``python tests/evals/dry_run.py docs/recipes/*.yaml``.

For every recipe a folder with the real model's configuration and the headers of its weights, but no data behind them
(a sparse file), takes the model's place; then the recipe is read, checked and planned as far as it goes without weights.
"""

from __future__ import annotations

import argparse
import json
import shutil
import struct
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, MistralConfig, OPTConfig, PretrainedConfig

from compress.errors import CompressError, did_you_mean
from compress.models import empty_model
from compress.passes import kinds
from compress.plan import plan
from compress.source import model_folder
from compress.structure import architecture
from compress.weights import SINGLE


def _llama(**changes: Any) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        tie_word_embeddings=False,
        **changes,
    )


def _opt(hidden: int, blocks: int, heads: int) -> OPTConfig:
    return OPTConfig(
        vocab_size=50272,
        hidden_size=hidden,
        word_embed_proj_dim=hidden,
        ffn_dim=4 * hidden,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
    )


CONFIGS: dict[str, PretrainedConfig] = {
    "huggyllama/llama-7b": _llama(max_position_embeddings=2048),
    "meta-llama/Llama-2-7b-hf": _llama(max_position_embeddings=4096),
    "mistralai/Mistral-7B-v0.1": MistralConfig(tie_word_embeddings=False),
    "facebook/opt-1.3b": _opt(2048, 24, 32),
    "facebook/opt-2.7b": _opt(2560, 32, 32),
    "facebook/opt-6.7b": _opt(4096, 32, 32),
    "facebook/opt-13b": _opt(5120, 40, 40),
}
"""The published configurations' sizes."""


def shapes(config: PretrainedConfig) -> dict[str, list[int]]:
    """Tensors of a checkpoint by their stored names; a tied head is not stored."""
    model, rename = empty_model(config), architecture(config).stored_name
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    tied = {id(head.weight)} if config.tie_word_embeddings and head is not None else set()
    return {rename(name): list(tensor.shape) for name, tensor in model.named_parameters() if id(tensor) not in tied}


def headers_only(config: PretrainedConfig, folder: Path) -> Path:
    """Write a model folder whose weights are float16 holes: shapes, but no data on the disk."""
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    for path in model_folder("builtin").glob("tokenizer*"):
        shutil.copy(path, folder / path.name)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name, shape in sorted(shapes(config).items()):
        size = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / SINGLE).open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + place)
    return folder


def _written(recipe: Path) -> dict[str, Any]:
    """A recipe as it is written; reading it properly asks for all its passes to be installed."""
    return yaml.safe_load(recipe.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def dry_run(recipe: Path, small: bool = False, model: str | None = None) -> dict[str, Any]:
    """Read, check and plan a recipe on its real model's shapes.

    Args:
        recipe: YAML file.
        small: with one block and a small vocabulary, to be quicker.
        model: another of :data:`CONFIGS`.

    Returns:
        What :func:`compress.plan.plan` tells, of the ``model`` by its real name.

    Raises:
        CompressError: whatever ``compress run`` would refuse before it reads a weight, or a model that is not in the list.
    """
    name = model or _written(recipe)["model"]
    if name not in CONFIGS:
        raise CompressError(f"{recipe}: the shapes of {name} are not known here. {did_you_mean(name, CONFIGS)}")
    config = type(CONFIGS[name])(**CONFIGS[name].to_dict())
    if small:
        config.num_hidden_layers, config.vocab_size = 1, 2048
    with tempfile.TemporaryDirectory() as place:
        folder = headers_only(config, Path(place) / "model")
        return plan(recipe, {"model": str(folder)}) | {"model": name}


def main() -> None:
    """Dry-run every recipe and print what it would take."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", type=Path, nargs="+")
    parser.add_argument("--small", action="store_true", help="one block and a small vocabulary, to be quicker")
    parser.add_argument("--model", choices=CONFIGS, help="in place of the recipe's")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    table = Table("recipe", "model", "dense, GB", "checkpoint, GB", "at bits, GB", "memory above imports, GB")
    for recipe in arguments.recipes:
        absent = {step["kind"] for step in _written(recipe)["passes"]} - set(kinds())
        if absent:
            table.add_row(recipe.stem, f"needs the pass {min(absent)}")
            continue
        found = dry_run(recipe, arguments.small, arguments.model)
        at = ", ".join(f"{bits}: {size / 1e9:.2f}" for bits, size in found["bytes_at_bits"].items())
        memory = max(step["memory_bytes"] for step in found["passes"]) / 1e9
        sizes = (f"{found[key] / 1e9:.2f}" for key in ("dense_bytes", "checkpoint_bytes"))
        table.add_row(recipe.stem, found["model"], *sizes, at, f"{memory:.1f}")
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
