"""Low-rank adapters (arXiv 2106.09685) on packed layers: what peft needs to know to train on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from compress.quant.linear import BitPlaneLinear


class LoraBitPlaneLinear(nn.Module, LoraLayer):
    """A packed linear layer and the low-rank update beside it; the packed weight itself stays as it is.

    The update can not be merged: the sum has no codes.
    """

    def __init__(
        self, base_layer: BitPlaneLinear, adapter_name: str, config: LoraConfig, r: int = 0, lora_alpha: int = 1,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N] in the dtype of ``x``."""
        result: Tensor = self.base_layer(x)
        if self.disable_adapters:
            return result
        for name in self.active_adapters:
            if name in self.lora_A:
                down, up = self.lora_A[name], self.lora_B[name]
                update = up(down(self.lora_dropout[name](x.to(next(down.parameters()).dtype))))
                result = result + (self.scaling[name] * update).to(result.dtype)
        return result


def lora_config(
    rank: int, targets: Sequence[str] | str, alpha: float | None = None, dropout: float = 0.0
) -> LoraConfig:
    """A configuration that knows packed layers; stored adapters have to be loaded with one like it (``config=``).

    Args:
        rank: of every update.
        targets: names of linears, or the end of them.
        alpha: the update is scaled by ``alpha / rank``; ``rank`` if None.
        dropout: share of the update's input that is dropped in training.
    """
    targeted = targets if isinstance(targets, str) else list(targets)
    config = LoraConfig(
        task_type="CAUSAL_LM", r=rank, lora_alpha=rank if alpha is None else alpha,  # type: ignore[arg-type]
        target_modules=targeted, lora_dropout=dropout,
    )  # fmt: skip
    config._register_custom_module({BitPlaneLinear: LoraBitPlaneLinear})
    return config


def add_lora(model: PreTrainedModel, config: LoraConfig, seed: int) -> PeftModel:
    """Put low-rank updates into a model, packed or not, in place; they are all that requires a gradient.

    Args:
        model: causal LM.
        config: of :func:`lora_config`.
        seed: of the random half of each update; the other half is zero, so nothing changes yet.
    """
    model.requires_grad_(False)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        adapted: PeftModel = get_peft_model(model, config)
    return adapted
