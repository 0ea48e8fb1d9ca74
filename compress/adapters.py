"""Put stored peft adapters around a loaded model, packed or not: soft prompts before its text, low-rank adapters on its linears.

:mod:`compress.sidecars` finds them in a checkpoint. peft is imported when it is needed.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from compress.errors import CompressError
from compress.hf import packed_modules
from compress.quant.linear import BitPlaneLinear
from compress.sidecars import PROMPT_NAME, find_prompts, read_adapter, read_prompt

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

    from compress.prompted import PromptedModel


@contextmanager
def with_peft() -> Iterator[None]:
    """Import peft for the length of a ``with``, in which what it and transformers say of each other is not shown.

    Raises:
        CompressError: peft is not installed.
    """
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise CompressError("adapters need the peft library: pip install 'compress-llm[prompts]'.") from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def attach_prompts(model: PreTrainedModel, prompts: str | Path | Mapping[int | None, Path]) -> PromptedModel:
    """Put stored prompts before a model.

    All are loaded as adapters of one :class:`compress.prompted.PromptedModel`, a ``PeftModel`` (``default`` for all bit-widths, ``3bit`` and so on), and the one of the
    bits in use is active; :func:`compress.set_bits` keeps it so.

    Args:
        model: as loaded by :func:`compress.load`.
        prompts: folder for :func:`compress.sidecars.stored_prompts`, or what it returns.

    Raises:
        CompressError: no prompt there, one of another model's size, or one that leaves no room for text.
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
    config = model.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    prefix = 2 * config.num_hidden_layers * heads * size
    expected = int(getattr(model.get_input_embeddings(), "embedding_dim")) if kind == "PROMPT_TUNING" else prefix  # noqa: B009
    if wide != expected:
        raise CompressError(f"{folder}: does not fit this model ({wide} numbers per virtual token, not {expected}).")


def choose_prompt(prompted: nn.Module) -> None:
    """Activate the prompt of the bits in use: that very number's, else the one for all, else the nearest one's.

    A mix of bits counts as its mean. Models without prompts of several bit-widths are left as they are.
    """
    names = list(getattr(prompted, "peft_config", {}))
    by_bits = {int(match[1]): name for name in names if (match := PROMPT_NAME.fullmatch(name))}
    modules = packed_modules(prompted).values()
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
    """Count the tokens of text that a model has room for beside its prompt; None if neither it nor ``cap`` limits them.

    Raises:
        CompressError: fewer than two are left.
    """
    limits = [getattr(model.config, "max_position_embeddings", None), cap]
    known = [limit for limit in limits if limit is not None]
    if not known:
        return None
    left = int(min(known)) - virtual_tokens(model)
    if left < 2:
        raise CompressError(
            f"the prompt's {virtual_tokens(model)} virtual tokens leave no room for text in a context of {min(known)}; "
            "train a shorter prompt."
        )
    return left


def attach_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Put a low-rank adapter on the linears of a model, packed or not.

    Args:
        model: as loaded by :func:`compress.load`, at any bits.
        folder: the adapter's own, as :func:`compress.sidecars.find_adapter` returns it.

    Returns:
        A ``PeftModel`` around the model, whose linears now hold the adapter: ``get_base_model()`` computes with it too.

    Raises:
        CompressError: it cannot be read, or was trained for other linears than this model's.
    """
    fields, _ = read_adapter(folder)
    used = ("task_type", "r", "lora_alpha", "lora_dropout", "target_modules", "fan_in_fan_out", "bias")
    with with_peft():
        from peft import PeftModel

        config = lora_config(**{key: fields[key] for key in used if key in fields}, inference_mode=True)
        try:
            adapted: PeftModel = PeftModel.from_pretrained(model, str(folder), config=config)
        except (RuntimeError, ValueError) as error:  # sizes that differ, names that are not there
            raise CompressError(f"{folder}: this adapter does not fit the model ({error}).") from error
    adapted.eval()
    return adapted


def lora_config(**fields: Any) -> LoraConfig:
    """Return peft's configuration of low-rank adapters that knows packed linears; to be called within :func:`with_peft`."""
    from peft import LoraConfig

    config = LoraConfig(**fields)
    config._register_custom_module({BitPlaneLinear: _packed_lora()})
    return config


def _packed_lora() -> type[nn.Module]:
    """Make the layer that peft puts around a :class:`BitPlaneLinear`, when asked for, as peft is imported late."""
    from peft.tuners.lora.layer import LoraLayer

    class PackedLora(nn.Module, LoraLayer):
        """``y = packed(x) + (alpha / r) B A dropout(x)``; the packed weight is frozen."""

        def __init__(
            self,
            base_layer: BitPlaneLinear,
            adapter_name: str,
            config: LoraConfig,
            r: int = 8,
            lora_alpha: int = 16,
            **kwargs: Any,
        ) -> None:
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
