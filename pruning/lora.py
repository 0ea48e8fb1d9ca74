"""Put fresh low-rank adapters on a model to be trained, and store them: ordinary peft adapters."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compress.adapters import lora_config, with_peft
from compress.sidecars import PEFT_CONFIG, PEFT_WEIGHTS
from compress.workspace import save_atomic, write_atomic

if TYPE_CHECKING:
    from peft import PeftModel


def adapter_model(
    model: PreTrainedModel, targets: Sequence[str], rank: int, alpha: float, dropout: float, seed: int
) -> PeftModel:
    """Put fresh adapters on some linears of a model; they change nothing until they are trained."""
    with with_peft(), torch.random.fork_rng():
        from peft import get_peft_model

        torch.manual_seed(seed)
        config = lora_config(
            task_type="CAUSAL_LM", r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(targets)
        )
        return get_peft_model(model, config)


def adapter_state(adapted: PeftModel) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return an adapter's tensors, copied to the CPU, and its peft configuration as plain data."""
    from peft import get_peft_model_state_dict

    tensors = {
        name: tensor.detach().to("cpu", copy=True) for name, tensor in get_peft_model_state_dict(adapted).items()
    }
    settings = adapted.peft_config["default"].to_dict()
    fields = {key: sorted(value) if isinstance(value, set) else value for key, value in settings.items()}
    plain = (str, int, float, bool, list, dict, type(None))
    return tensors, {key: value for key, value in fields.items() if isinstance(value, plain)}


def write_adapter(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Write an adapter as peft would; it belongs to the model in the folder above."""
    folder.mkdir(parents=True, exist_ok=True)
    save_atomic(folder / PEFT_WEIGHTS, tensors, {"format": "pt"})
    fields = {**config, "base_model_name_or_path": "..", "inference_mode": True}
    write_atomic(folder / PEFT_CONFIG, json.dumps(fields, indent=1, sort_keys=True) + "\n")
