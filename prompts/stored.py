"""Put fresh soft prompts before a model to be trained, and store them as ordinary peft adapters."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from compress.adapters import with_peft
from compress.models import stated, text_config
from compress.sidecars import PEFT_CONFIG, PEFT_WEIGHTS
from compress.workspace import Record, save_atomic, write_atomic

if TYPE_CHECKING:
    from peft import PeftModel

    from compress.prompted import PromptedModel


def new_prompt(model: PreTrainedModel, method: str, start: Tensor) -> PromptedModel:
    """Put a prompt that is to be trained before a model, packed or not; the model itself is frozen and not changed.

    It begins as ``start``, float32 [virtual tokens, embedding width]; for the method ``"prefix"``, and not ``"prompt"``,
    [virtual tokens, 2 · blocks · keys], each block's keys and then its values.
    """
    model.requires_grad_(False)
    with with_peft():
        from peft import PrefixTuningConfig, PromptTuningConfig

        from compress.prompted import PromptedModel

        kind = PrefixTuningConfig if method == "prefix" else PromptTuningConfig
        config = kind(task_type="CAUSAL_LM", num_virtual_tokens=start.shape[0])
        if method == "prompt":  # peft takes the hidden size, which is another where an embedding is projected
            config.token_dim, text = start.shape[1], text_config(model.config)
            config.num_layers = stated(text, "num_hidden_layers") or 1  # it asks for both, and uses neither
            config.num_attention_heads = stated(text, "num_attention_heads") or 1
        prompted = PromptedModel(model, config)
    prompted.eval()
    embedding(prompted).data.copy_(start)
    return prompted


def embedding(prompted: PeftModel) -> nn.Parameter:
    """Return the active prompt's numbers, float32 [virtual tokens, embedding width] (of a prefix, [tokens, 2 · blocks · keys])."""
    weight = prompted.get_parameter(f"prompt_encoder.{prompted.active_adapter}.embedding.weight")
    assert isinstance(weight, nn.Parameter)
    return weight


def write_prompt(folder: Path, tensor: Tensor, adapter: Mapping[str, Any]) -> None:
    """Write a prompt's numbers and the fields of its peft configuration, as peft would."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / PEFT_CONFIG, json.dumps(adapter, indent=2, sort_keys=True) + "\n")
    save_atomic(folder / PEFT_WEIGHTS, {"prompt_embeddings": tensor}, {"format": "pt"})


def adapter_fields(prompted: PeftModel) -> Record:
    """Return the active prompt's peft configuration as plain data, for the checkpoint that it will lie in."""
    fields = json.loads(
        json.dumps(prompted.active_peft_config.to_dict(), default=lambda value: getattr(value, "value", str(value)))
    )
    return {**fields, "inference_mode": True, "base_model_name_or_path": None}
