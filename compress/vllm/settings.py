"""What a user may ask of the plugin, at how many bits each matrix is then held, and what vLLM cannot serve (no vLLM)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from compress.config import StoredConfig
from compress.errors import CompressError, did_you_mean
from compress.quant.records import GROUP, EmbeddingShape, PackedShape, StackedShape, bits_range, unstacked

_DENSE_EMBEDDING = ("gemma", "gemma2", "opt", "falcon", "bloom", "mixtral", "gpt_oss")  # they pass it no quantisation


@dataclass(frozen=True)
class Held:
    """Say at how many bits a matrix is read, which others are kept so that it can be read at them later, and how it multiplies."""

    bits: int
    least: int
    most: int
    exact: bool = True


@dataclass(frozen=True)
class Settings:
    """Hold what ``--hf-overrides.compress_KEY`` or ``--additional-config '{"compress": {"KEY": …}}'`` say.

    Attributes:
        bits: as :func:`compress.load` takes them: a number, a mean such as 3.5, or numbers by name or pattern.
        memory: the same as bytes that all tensors may take, such as "2GB".
        held_bits: up to so many bits are kept in memory, so that the engine can be switched while it runs; only those in use
            if None.
        draft_bits: what ``bits`` are for a draft of speculative decoding.
        exact: as of :func:`compress.load`: whether sums on a CPU are of float32 products, not of 8-bit ones.
        by_load: fewer bits for more requests (:func:`compress.vllm.load.load_policy`), for :mod:`compress.vllm.http`.
    """

    bits: Any = None
    memory: str | int | None = None
    held_bits: int | None = None
    draft_bits: Any = None
    exact: bool | None = None
    by_load: str | None = None


def settings_of(given: Mapping[str, Any], where: str) -> Settings:
    """Read settings, and refuse keys that there are not."""
    known = [field.name for field in fields(Settings)]
    for key in given:
        if key not in known:
            raise CompressError(f"{where}{key}: there is no such setting of compress. {did_you_mean(key, known)}")
    return Settings(**given)


def held_bits(folder: str, stored: StoredConfig, asked: Settings, access: Mapping[str, Any]) -> dict[str, Held]:
    """Choose for every packed module the bits to read it at and those to keep.

    Raises:
        CompressError: bits that the checkpoint does not have, or that it cannot choose by.
    """
    from compress.hf import bits_by_module
    from compress.loading import bits_for

    shapes, bits = unstacked(stored.shapes()), asked.bits
    if isinstance(bits, str) and bits.isdigit():
        bits = int(bits)
    if bits is None and asked.memory is None:
        bits = {} if stored.bits is None else stored.bits
    chosen = bits_by_module(bits_for(folder, bits, asked.memory, **access) or {}, shapes)
    if asked.exact not in (None, True, False):
        raise CompressError(f"exact {asked.exact!r}: give true or false.")
    exact = asked.exact is not False
    if asked.held_bits is None:
        return {name: Held(own, own, own, exact) for name, own in chosen.items()}
    known = bits_range(shapes.values())
    if type(asked.held_bits) is not int or asked.held_bits not in known:
        raise CompressError(f"held_bits {asked.held_bits!r}: this model can be read at {known[0]} to {known[-1]} bits.")
    return {
        name: Held(own, shapes[name].seed_bits, max(own, shapes[name].at(asked.held_bits)), exact)
        for name, own in chosen.items()
    }


def common_bits(in_use: Mapping[str, int], shapes: Mapping[str, PackedShape]) -> int | float:
    """Return the number of bits that a model is read at, or where its matrices differ their mean, by weights and without embeddings."""
    for bits in bits_range(shapes.values()):
        if all(shapes[name].at(bits) == own for name, own in in_use.items()):
            return bits
    others = {name: own for name, own in in_use.items() if not isinstance(shapes[name], EmbeddingShape)} or in_use
    weights = {name: shapes[name].out_features * shapes[name].in_features for name in others}
    return round(sum(own * weights[name] for name, own in others.items()) / sum(weights.values()), 2)


def unserved(stored: StoredConfig, model_type: str) -> str | None:
    """Say in a few words why vLLM cannot serve a checkpoint; None where nothing is known that stands against it."""
    shapes = stored.shapes()
    if stored.pruned:
        return "its blocks are of different sizes, which vLLM's models cannot have (prune with mode: uniform)"
    if any(isinstance(shape, StackedShape) or ".experts." in name for name, shape in shapes.items()):
        return "it has packed experts, which vLLM multiplies by kernels of its own"
    if model_type == "gpt2":
        return "vLLM turns the matrices of GPT-2 while it reads them, which packed ones cannot be"
    if model_type in _DENSE_EMBEDDING and any(isinstance(shape, EmbeddingShape) for shape in shapes.values()):
        return f"vLLM's class for {model_type} takes no packed embedding (compress with embedding_bits: 0)"
    return None


def legal_degrees(config: Mapping[str, Any], shapes: Iterable[PackedShape] = ()) -> list[int]:
    """Return the degrees of tensor parallelism that a model can be served at, from the content of its ``config.json``.

    Attention is split by heads, where keys and values are split or repeated; the MLP by channels; the vocabulary by rows, in
    multiples of 64. Any number of columns can be split: where parts do not begin with a word of 32, planes are packed again.
    Only where one of the packed matrices, ``shapes``, has a size for every group of 64 columns, parts are whole groups.
    """
    text = {**config, **(config.get("text_config") or {})}
    heads = int(text.get("num_attention_heads") or text.get("n_head") or 1)
    pairs = int(text.get("num_key_value_heads") or heads)
    hidden = int(text.get("hidden_size") or text.get("n_embd") or 0)
    names = ("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner")
    channels = next((text[name] for name in names if text.get(name)), 4 * hidden)
    sizes = [heads, -(-int(text.get("vocab_size") or 0) // 64) * 64]
    sizes += channels if isinstance(channels, list) else [int(channels)]
    if any("groups" in shape.specification() for shape in shapes):
        columns = [heads * int(text.get("head_dim") or hidden // heads), *sizes[2:]]
        whole = [size // GROUP if size % GROUP == 0 else 1 for size in columns]  # one group: it is not split
    else:
        whole = []
    return [
        degree
        for degree in range(1, heads + 1)
        if all(size % degree == 0 for size in sizes + whole) and (pairs % degree == 0 or degree % pairs == 0)
    ]
