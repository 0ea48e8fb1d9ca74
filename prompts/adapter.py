"""Soft prompts on disk and on a model: ordinary peft adapters, one for all widths or one for each.

In a checkpoint they lie in ``soft_prompt/`` (one for all) or in ``soft_prompt/3bit/`` and so on; never beside the model's own
``config.json``, where transformers would take them for an adapter of another kind.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from compress.errors import CompressError
from compress.hf import packed_modules
from compress.workspace import Record, save_atomic, write_atomic

if TYPE_CHECKING:
    from peft import PeftModel

FOLDER = "soft_prompt"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_WIDTH = re.compile(r"(\d+)bit")


def stored_prompts(folder: str | Path) -> dict[int | None, Path]:
    """The soft prompts of a checkpoint, of a ``soft_prompt`` folder, or of one adapter's own folder.

    Returns:
        Width -> folder of the adapter; the key of a prompt for all widths is None. Empty if there are none.

    Raises:
        CompressError: an adapter that is not a prompt, or whose files cannot be read.
    """
    root = Path(folder)
    if not (root / CONFIG).exists() and (root / FOLDER).is_dir():
        root = root / FOLDER
    found: dict[int | None, Path] = {None: root} if (root / CONFIG).exists() else {}
    for path in sorted(root.glob(f"*bit/{CONFIG}")):
        if match := _WIDTH.fullmatch(path.parent.name):
            found[int(match[1])] = path.parent
    for path in found.values():
        _check(path)
    return found


def prompt_sizes(folder: str | Path) -> dict[int | None, tuple[int, int]]:
    """Of every stored prompt, virtual tokens and numbers for each."""
    return {width: _check(path)[1:] for width, path in stored_prompts(folder).items()}


def _check(folder: Path) -> tuple[str, int, int]:
    """An adapter's two files belong together: its type, virtual tokens, and numbers for each."""
    try:
        config = dict(json.loads((folder / CONFIG).read_text(encoding="utf-8")))
        with safe_open(folder / WEIGHTS, framework="pt") as handle:
            shape = handle.get_slice("prompt_embeddings").get_shape()
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise CompressError(f"{folder}: is not a soft prompt that can be read ({error}).") from error
    if config.get("peft_type") not in ("PROMPT_TUNING", "PREFIX_TUNING") or config.get("task_type") != "CAUSAL_LM":
        raise CompressError(
            f"{folder}: is a {config.get('peft_type')} adapter; a prompt or prefix of a causal LM is wanted."
        )
    if shape[0] != config.get("num_virtual_tokens"):
        raise CompressError(
            f"{folder}: its config has {config.get('num_virtual_tokens')} virtual tokens, its tensor {shape[0]}; "
            "fetch or write it again."
        )
    return str(config["peft_type"]), shape[0], shape[1]


def prompt_config(method: str, tokens: int) -> Any:
    """A configuration of peft for a new prompt (``"prompt"``) or prefix (``"prefix"``) for a causal LM."""
    try:
        from peft import PrefixTuningConfig, PromptTuningConfig
    except ImportError as error:
        raise CompressError("soft prompts need the peft library: pip install 'compress-llm[prompts]'.") from error
    return (PromptTuningConfig if method == "prompt" else PrefixTuningConfig)(
        task_type="CAUSAL_LM", num_virtual_tokens=tokens
    )


def new_prompt(model: PreTrainedModel, method: str, start: Tensor) -> PeftModel:
    """A model with a prompt to be trained; the model itself is frozen and not changed.

    Args:
        model: causal LM, packed or not.
        method: ``"prompt"`` or ``"prefix"``.
        start: what it begins as, float32 [virtual tokens, hidden]; for a prefix [virtual tokens, 2 · blocks · keys], each
            block's keys and then its values.
    """
    config = prompt_config(method, start.shape[0])
    from peft import get_peft_model

    model.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, at what peft asks it
        prompted: PeftModel = get_peft_model(model, config)
    _take_embedding(prompted, model)
    prompted.eval()
    embedding(prompted).data.copy_(start)
    return prompted


def embedding(prompted: PeftModel) -> nn.Parameter:
    """The trained numbers of the active prompt, float32 [tokens, hidden] (of a prefix, [tokens, 2 · layers · hidden])."""
    weight = prompted.get_parameter(f"prompt_encoder.{prompted.active_adapter}.embedding.weight")
    assert isinstance(weight, nn.Parameter)
    return weight


def _take_embedding(prompted: PeftModel, model: PreTrainedModel) -> None:
    """The library looks for a parameter as long as the vocabulary; a packed embedding has none."""
    prompted.word_embeddings = model.get_input_embeddings()


def write_prompt(folder: Path, tensor: Tensor, adapter: Mapping[str, Any]) -> None:
    """Write an adapter as peft would.

    Args:
        folder: to create.
        tensor: the trained numbers.
        adapter: fields of peft's configuration.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / CONFIG, json.dumps(adapter, indent=2, sort_keys=True) + "\n")
    save_atomic(folder / WEIGHTS, {"prompt_embeddings": tensor}, {"format": "pt"})


def adapter_fields(prompted: PeftModel) -> Record:
    """The configuration of the active prompt in peft's terms, as plain data, for the checkpoint that it will lie in."""
    fields = json.loads(
        json.dumps(prompted.active_peft_config.to_dict(), default=lambda value: getattr(value, "value", str(value)))
    )
    return {**fields, "inference_mode": True, "base_model_name_or_path": None}


def find_prompts(
    folder: str | Path, prompt: bool | str | Path = True, revision: str | None = None
) -> dict[int | None, Path]:
    """The prompts to use with a checkpoint.

    Args:
        folder: of the checkpoint, or its hub id.
        prompt: True for its own prompts, else where they are.
        revision: of a hub id.

    Raises:
        CompressError: there are none.
    """
    place = Path(folder if prompt is True else prompt)  # type: ignore[arg-type]
    if prompt is True and not place.is_dir():
        from huggingface_hub import snapshot_download

        try:
            place = Path(snapshot_download(str(folder), revision=revision, allow_patterns=f"{FOLDER}/*"))
        except Exception as error:  # the hub's own types change between releases
            raise CompressError(f"{folder}: its soft prompts cannot be fetched ({error}).") from error
    found = stored_prompts(place)
    if not found:
        raise CompressError(f"{place}: holds no soft prompt ({CONFIG} in it, in {FOLDER}/ or in {FOLDER}/<b>bit/).")
    return found


def attach(model: PreTrainedModel, prompts: str | Path | Mapping[int | None, Path]) -> PeftModel:
    """Put stored prompts before a model.

    All are loaded as adapters of one ``PeftModel`` (``default`` for all widths, ``3bit`` and so on), and the one of the width
    in use is active; :func:`compress.set_bits` keeps it so.

    Args:
        model: as loaded by :func:`compress.load`.
        prompts: folder for :func:`stored_prompts`, or what it returns.

    Raises:
        CompressError: no prompt there, one of another model's size, or one that leaves no room for text.
    """
    found = prompts if isinstance(prompts, Mapping) else find_prompts("", prompts)
    try:
        from peft import PeftModel
    except ImportError as error:
        raise CompressError("soft prompts need the peft library: pip install 'compress-llm[prompts]'.") from error
    prompted: PeftModel | None = None
    for width, path in found.items():
        name = "default" if width is None else f"{width}bit"
        _check_fit(model, path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of transformers, at what peft asks it
            if prompted is None:
                prompted = PeftModel.from_pretrained(model, str(path), adapter_name=name)
            else:
                prompted.load_adapter(str(path), adapter_name=name)
    assert prompted is not None
    _take_embedding(prompted, model)
    prompted.eval()
    choose(prompted)
    text_length(prompted)
    return prompted


def _check_fit(model: PreTrainedModel, folder: Path) -> None:
    """A prompt is as wide as the model's embedding, a prefix as all its blocks' keys and values."""
    kind, _, wide = _check(folder)
    config = model.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    prefix = 2 * config.num_hidden_layers * heads * size
    expected = int(getattr(model.get_input_embeddings(), "embedding_dim")) if kind == "PROMPT_TUNING" else prefix  # noqa: B009
    if wide != expected:
        raise CompressError(f"{folder}: does not fit this model ({wide} numbers per virtual token, not {expected}).")


def choose(prompted: nn.Module) -> None:
    """Activate the prompt of the width in use: that very width's, else the one for all, else the nearest one's.

    A mix of widths counts as its mean. Models without prompts of several widths are left as they are.
    """
    names = list(getattr(prompted, "peft_config", {}))
    widths = {int(match[1]): name for name in names if (match := _WIDTH.fullmatch(name))}
    modules = packed_modules(prompted).values()
    if not widths or not modules:
        return
    weights = {module: module.shape.out_features * module.shape.in_features for module in modules}
    mean = sum(module.bits * count for module, count in weights.items()) / sum(weights.values())
    nearest = min(widths, key=lambda width: (abs(width - mean), width))
    name = widths[nearest] if nearest == mean or "default" not in names else "default"
    prompted.set_adapter(name)  # type: ignore[operator]


def virtual_tokens(model: nn.Module) -> int:
    """Places of the context that prompts take, 0 for a model without; the most of all prompts that are loaded."""
    configs = getattr(model, "peft_config", None) or {}
    return max((getattr(config, "num_virtual_tokens", None) or 0 for config in configs.values()), default=0)


def text_length(model: nn.Module, cap: int | None = None) -> int | None:
    """Tokens of text that a model has room for beside its prompt; None if neither it nor ``cap`` limits them.

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
