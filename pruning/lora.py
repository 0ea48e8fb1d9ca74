"""Put fresh low-rank adapters on a model to be trained, and store them: ordinary peft adapters."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compress.adapters import lora_config, with_peft
from compress.sidecars import PEFT_CONFIG, PEFT_WEIGHTS
from compress.structure import Linear
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


class MaskedLora(nn.Module):
    """Train ``W + (alpha / rank) B A`` where the weight W of a linear is not zero; what pruning has set to zero stays zero."""

    def __init__(self, base: nn.Module, rank: int, alpha: float, dropout: float) -> None:
        super().__init__()
        self.base = base
        self.linear = Linear("", base)
        self.scale = alpha / rank
        weight = self.linear.weight
        rows, columns = self.linear.shape
        self.down = nn.Parameter(weight.new_empty(rank, columns))
        self.up = nn.Parameter(weight.new_zeros(rows, rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))  # as peft begins
        self.lora_dropout = nn.Dropout(dropout)

    def update(self) -> Tensor:
        """Return what is added to the weight, [N, K]."""
        return (self.scale * self.up @ self.down).masked_fill(self.linear.weight == 0, 0.0)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the linear with its updated weight."""
        added: Tensor = self.base(x) + nn.functional.linear(self.lora_dropout(x), self.update())
        return added


def masked_model(
    model: nn.Module, targets: Sequence[str], rank: int, alpha: float, dropout: float, seed: int
) -> nn.Module:
    """Put fresh masked adapters on some linears of a model, in place; :func:`merge_masked` merges them."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for name in targets:
            model.set_submodule(name, MaskedLora(model.get_submodule(name), rank, alpha, dropout))
    return model


@torch.no_grad()
def merge_masked(model: nn.Module) -> nn.Module:
    """Add the updates of all masked adapters to the weights and take the adapters away, in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, MaskedLora):
            module.linear.weight.add_(module.update())
            model.set_submodule(name, module.base)
    return model


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
