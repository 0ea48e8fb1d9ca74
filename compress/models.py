"""Build the class that a config stands for, empty: language models, and models of images and text with one inside."""

import math
import re
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from compress.errors import CompressError, first_line


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """Return the part of a config that describes the language model: itself, or what is nested in it."""
    return config.get_text_config()


def stated(config: PretrainedConfig, key: str) -> Any:
    """Return what a config says of a key for all blocks alike: None where it says nothing, or has a value for each block."""
    try:
        return getattr(config, key, None)
    except RuntimeError:  # transformers' own for values that differ
        return None


def rotary_frequencies(config: PretrainedConfig, layer: int) -> Tensor | None:
    """Return by how much rotary embeddings turn each pair of channels of a layer from a token to the next, float64; None where a config has none.

    Where they change with the length of a text (``dynamic``, ``longrope``) they are those of short ones.
    """
    text: Any = config.get_text_config(decoder=True)
    said = stated(text, "rope_parameters") or {}
    kinds = stated(text, "layer_types")
    kind = kinds[layer] if kinds and kinds[layer] in said else None
    own = said if kind is None else said[kind]
    theta, size, heads = own.get("rope_theta"), stated(text, "head_dim"), stated(text, "num_attention_heads")
    if theta is None or not isinstance(size or heads, int):
        return None
    if own.get("rope_type", "default") in ROPE_INIT_FUNCTIONS:
        found: Tensor = ROPE_INIT_FUNCTIONS[own["rope_type"]](text, "cpu", layer_type=kind)[0]
        return found.double()
    turned = int((size or text.hidden_size // heads) * own.get("partial_rotary_factor", 1.0))
    exponents = torch.arange(0, turned, 2, dtype=torch.float64, device="cpu") / turned
    return torch.pow(theta, -exponents)


def untied(config: PretrainedConfig) -> PretrainedConfig:
    """Return a config by which embedding and head are two tensors."""
    data = config.to_dict()
    for part in (data, *(value for value in data.values() if isinstance(value, dict))):
        if part is data or "tie_word_embeddings" in part:
            part["tie_word_embeddings"] = False
    return type(config).from_dict(data)


def auto_class(config: PretrainedConfig) -> Any:
    """Return the auto class of transformers that builds a config's model, the one its ``architectures`` name where it can.

    Raises:
        CompressError: transformers has no language model of this type, or the config names a model of another task.
    """
    kind = type(config)
    named = set(getattr(config, "architectures", None) or ())
    found = [
        (auto, {getattr(one, "__name__", "") for one in (entry if isinstance(entry, tuple) else (entry,))})
        for auto, mapping in (
            (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING),
            (AutoModelForImageTextToText, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING),
        )
        if kind in mapping and (entry := mapping[kind])
    ]
    if not found:
        raise CompressError(
            f"config.json: model type {config.model_type!r} is no language model that this release of transformers can build."
        )
    chosen = next((auto for auto, names in found if names & named), None)
    other = next(filter(_OTHER_TASK.search, sorted(named)), None)
    if chosen is None and other:
        raise CompressError(f"config.json: {other} is no language model: its files have no head for the next token.")
    return chosen or found[0][0]


_OTHER_TASK = re.compile("For.*(Classification|QuestionAnswering|MultipleChoice|Regression)")


class _OnMeta(TorchFunctionMode):
    """Let no memory be asked for that a mixture of experts would take before it moves to the meta device, and draw no values there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        filled = args[0] if args else given.get("tensor")
        if getattr(func, "__name__", "") in ("normal_", "uniform_") and getattr(filled, "is_meta", False):
            return filled  # torch takes milliseconds for each
        sizes = args[0] if args and isinstance(args[0], (tuple, list, torch.Size)) else args
        known = func in (torch.empty, torch.zeros, torch.ones) and all(isinstance(size, int) for size in sizes)
        if known and "device" not in given and math.prod(sizes) > 1 << 28:
            given["device"] = "meta"
        return func(*args, **given)


def empty_model(config: PretrainedConfig) -> PreTrainedModel:
    """Build the real model class with parameters on the meta device and buffers in place.

    Raises:
        CompressError: the class cannot be built, for want of a package say.
    """
    try:
        with _OnMeta(), init_empty_weights(include_buffers=False):
            model: PreTrainedModel = auto_class(config).from_config(config, dtype=torch.float32)
    except ImportError as error:
        raise CompressError(f"model type {config.model_type!r} cannot be built here: {first_line(error)}.") from error
    model.train(False)
    return model
