"""LoRA by peft on a model whose linears may be bit planes; adapters on disk and on a loaded model."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compress.errors import CompressError
from compress.quant.linear import BitPlaneLinear
from compress.weights import read_header
from compress.workspace import save_atomic, write_atomic

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

FOLDER = "adapter"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def _packed_lora() -> type[nn.Module]:
    """The layer that peft puts around a :class:`BitPlaneLinear`; made when asked for, as peft is imported late."""
    from peft.tuners.lora.layer import LoraLayer

    class PackedLora(nn.Module, LoraLayer):
        """``y = packed(x) + (alpha / r) B A dropout(x)``; the packed weight is frozen."""

        def __init__(
            self, base_layer: BitPlaneLinear, adapter_name: str, config: LoraConfig, r: int = 8, lora_alpha: int = 16,
            **kwargs: Any,
        ) -> None:  # fmt: skip
            super().__init__()
            LoraLayer.__init__(self, base_layer, **kwargs)
            self._active_adapter = adapter_name
            self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.base_layer(x)
            if self.disable_adapters:
                return result
            for name in self.active_adapters:
                if name in self.lora_A:
                    down, up = self.lora_A[name], self.lora_B[name]
                    inner = down(self.lora_dropout[name](x).to(down.get_parameter("weight").dtype))
                    result = result + (up(inner) * self.scaling[name]).to(result.dtype)
            return result

    return PackedLora


def lora_config(**fields: Any) -> LoraConfig:
    """A configuration of peft that knows packed linears.

    Raises:
        CompressError: peft is not installed.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise CompressError("adapters need the peft library: pip install 'compress-llm[prompts]'.") from error
    config = LoraConfig(**fields)
    config._register_custom_module({BitPlaneLinear: _packed_lora()})
    return config


def adapter_model(
    model: PreTrainedModel, targets: Sequence[str], rank: int, alpha: float, dropout: float, seed: int
) -> PeftModel:
    """A model with fresh adapters on some linears; they change nothing until they are trained."""
    config = lora_config(
        task_type="CAUSAL_LM", r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(targets)
    )
    from peft import get_peft_model

    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers and peft about each other, and about Conv1D
        torch.manual_seed(seed)
        return get_peft_model(model, config)


def write_adapter(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Write an adapter as peft would; it belongs to the model in the folder above."""
    folder.mkdir(parents=True, exist_ok=True)
    save_atomic(folder / WEIGHTS, tensors, {"format": "pt"})
    fields = {**config, "base_model_name_or_path": "..", "inference_mode": True}
    write_atomic(folder / CONFIG, json.dumps(fields, indent=1, sort_keys=True) + "\n")


def load_adapter(model: PreTrainedModel, folder: str | Path) -> PeftModel:
    """Put the adapter of a checkpoint on its loaded model.

    Args:
        model: from :func:`compress.load`, at any width.
        folder: the checkpoint, or the adapter's own folder.

    Raises:
        CompressError: there is no adapter, or it cannot be read.
    """
    root = Path(folder)
    root = root if (root / CONFIG).exists() else root / FOLDER
    if not (root / CONFIG).exists():
        raise CompressError(f"{folder}: has no {FOLDER}/{CONFIG}, so there is no adapter to load.")
    read_header(root / WEIGHTS)  # refuses pickled weights, for which peft would look next
    try:
        fields = dict(json.loads((root / CONFIG).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CompressError(f"{root / CONFIG}: cannot be read ({error}); fetch or write it again.") from error
    used = ("task_type", "r", "lora_alpha", "lora_dropout", "target_modules", "fan_in_fan_out", "bias")
    config = lora_config(**{key: fields[key] for key in used if key in fields}, inference_mode=True)
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(model, root, config=config)
