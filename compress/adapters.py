"""Put peft adapters around a loaded model, packed or not. They are stored by :mod:`compress.sidecars`; peft is imported late."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedModel

from compress.config import StoredConfig
from compress.errors import CompressError, first_line
from compress.hf import packed_modules
from compress.models import text_config
from compress.quant.records import EmbeddingShape
from compress.shapes import head_dim
from compress.sidecars import PROMPT_NAME, find_prompts, read_adapter, read_prompt

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

    from compress.prompted import PromptedModel


@contextmanager
def with_peft() -> Iterator[None]:
    """Import peft, and hide for the length of a ``with`` what it and transformers warn of each other."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise CompressError("adapters need the peft library: pip install 'compress-llm[prompts]'.") from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def attach_prompts(model: PreTrainedModel, prompts: str | Path | Mapping[int | None, Path]) -> PromptedModel:
    """Put stored prompts before a model, and refuse prompts that do not fit it or leave no room for text.

    All are loaded as adapters of one :class:`compress.prompted.PromptedModel`, a ``PeftModel`` (``default`` for all numbers of
    bits, ``3bit`` and so on), and the one of the bits in use is active; :func:`compress.set_bits` keeps it so.
    """
    found = prompts if isinstance(prompts, Mapping) else find_prompts("", prompts)
    prompted: PromptedModel | None = None
    with with_peft():
        from peft import PeftConfig

        from compress.prompted import PromptedModel

        for bits, path in found.items():
            name = "default" if bits is None else f"{bits}bit"
            _check_fit(model, path)
            if prompted is None:
                prompted = PromptedModel(model, PeftConfig.from_pretrained(str(path), inference_mode=True), name)
            prompted.load_adapter(str(path), adapter_name=name)
    assert prompted is not None
    prompted.eval()
    choose_prompt(prompted)
    text_length(prompted)
    return prompted


def _check_fit(model: PreTrainedModel, folder: Path) -> None:
    """Refuse a prompt not as wide as the model's embedding, or a prefix not as wide as all blocks' keys and values."""
    kind, _, wide = read_prompt(folder)
    config: Any = text_config(model.config)
    embedding: Any = model.get_input_embeddings()
    stored = getattr(model.config, "quantization_config", None)
    shapes = stored.block_shapes() if isinstance(stored, StoredConfig) else {}
    expected = embedding.embedding_dim
    if kind == "PREFIX_TUNING":
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        expected = 2 * config.num_hidden_layers * heads * head_dim(config)
        if {shape.key_value_heads for shape in shapes.values()} - {heads}:
            raise CompressError(
                f"{folder}: is a prefix, which has keys for equally many heads in every block, and some of this model's have "
                "fewer; train a prompt (method: prompt) for it, or prune in mode uniform."
            )
    if wide != expected:
        raise CompressError(f"{folder}: does not fit this model ({wide} numbers per virtual token, not {expected}).")


def choose_prompt(prompted: nn.Module) -> None:
    """Activate the prompt of the bits in use (a mix counts as its mean): that number's, the one for all, or the nearest."""
    names = list(getattr(prompted, "peft_config", {}))
    by_bits = {int(match[1]): name for name in names if (match := PROMPT_NAME.fullmatch(name))}
    held = packed_modules(prompted).values()
    modules = [
        module for module in held if not isinstance(module.shape, EmbeddingShape)
    ]  # its bits are not the model's
    if not by_bits or not modules:
        return
    weights = {module: module.shape.out_features * module.shape.in_features for module in modules}
    mean = sum(module.bits * count for module, count in weights.items()) / sum(weights.values())
    nearest = min(by_bits, key=lambda bits: (abs(bits - mean), bits))
    name = by_bits[nearest] if nearest == mean or "default" not in names else "default"
    prompted.set_adapter(name)  # type: ignore[operator]


def virtual_tokens(model: nn.Module) -> int:
    """Count the places of the context that prompts take, the most of all prompts that are loaded; 0 without any."""
    configs = getattr(model, "peft_config", None) or {}
    return max((getattr(config, "num_virtual_tokens", None) or 0 for config in configs.values()), default=0)


def text_length(model: nn.Module, cap: int | None = None) -> int | None:
    """Count the tokens of text that fit beside a prompt, at least two; return None if neither model nor ``cap`` limits them."""
    config: Any = model.config
    limits = [getattr(text_config(config), "max_position_embeddings", None), cap]
    context = min((int(limit) for limit in limits if limit is not None), default=None)
    taken = virtual_tokens(model)
    if context is not None and context - taken < 2:
        raise CompressError(
            f"the prompt's {taken} virtual tokens leave no room for text in a context of {context}; "
            "train a shorter prompt."
        )
    return None if context is None else context - taken


_NEED_DENSE = ("use_dora", "target_parameters", "kasa_config")
"""Settings of peft's that read or change the weight within."""
_NEED_DENSE_EMBEDDING = ("trainable_token_indices",)
_SAME_WEIGHT = (None, True, False, "gaussian", "orthogonal", "eva")
"""Values of ``init_lora_weights`` that leave the weight within as it is."""
_INERT = ("peft_version", "qalora_group_size", "runtime_config")
"""What older releases of peft do not know and need not."""


def attach_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Put the low-rank adapter of a folder on the linears of a model, packed or not, at any number of bits.

    Every setting of its configuration counts; one that peft does not know, or that packed linears cannot follow, is refused.
    Return a ``PeftModel`` around the model, whose linears now hold the adapter: ``get_base_model()`` computes with it too.
    """
    fields, _ = read_adapter(folder)
    with with_peft():
        from peft import PeftModelForCausalLM

        config = lora_config(**_settings(fields, folder, model))
        try:
            adapted = PeftModelForCausalLM(model, config)
            found = adapted.load_adapter(str(folder), "default")
        except (
            ImportError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:  # sizes that differ, names that are not there
            raise CompressError(f"{folder}: this adapter does not fit the model ({first_line(error)}).") from error
    if apart := [*found.unexpected_keys, *found.missing_keys]:
        what = "the model has no place for" if found.unexpected_keys else "it lacks"
        raise CompressError(f"{folder}: this adapter does not fit the model: {what} {apart[0]}.")
    adapted.eval()
    return adapted


def _settings(fields: Mapping[str, Any], folder: Path, model: PreTrainedModel) -> dict[str, Any]:
    """Return the settings of a stored adapter for peft, and refuse by name those that would not be followed."""
    from peft import LoraConfig

    known = {field.name for field in dataclasses.fields(LoraConfig)}
    for key, value in fields.items():
        if value and key not in known and key not in _INERT:
            raise CompressError(
                f"{folder}: has the setting {key!r}, which this release of peft does not know; upgrade peft."
            )
    if (task := fields.get("task_type")) not in (None, "CAUSAL_LM"):
        raise CompressError(f"{folder}: is an adapter for {task}, not of a causal LM.")
    settings = {key: value for key, value in fields.items() if key in known} | {"inference_mode": True}
    if packed := packed_modules(model):
        embedding = model.get_input_embeddings() in packed.values()
        refused = [key for key in (*_NEED_DENSE, *_NEED_DENSE_EMBEDDING * embedding) if fields.get(key)]
        if fields.get("init_lora_weights") not in _SAME_WEIGHT:
            refused.append("init_lora_weights")
        if refused:
            raise CompressError(
                f"{folder}: {refused[0]} ({fields[refused[0]]}) works on dense weights, and the model's are packed; train the "
                "adapter without it, or merge it into the dense model before that is compressed."
            )
        settings["init_lora_weights"] = True  # what is drawn is overwritten, and some draws ask the weight for its type
    return settings


def lora_config(**fields: Any) -> LoraConfig:
    """Return peft's configuration of low-rank adapters, which packed linears take as others do; to be called within :func:`with_peft`."""
    from peft import LoraConfig

    return LoraConfig(**fields)
