"""Loading a checkpoint at a width, and changing the width of a loaded model."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.hub import cached_file

from compress.budget import as_number, widths_for_budget
from compress.config import METHOD, Bits, StoredConfig, check_tensors, index_name
from compress.errors import CompressError, first_line
from compress.hf import join_layers, packed_modules, widths_for
from compress.manifest import MANIFEST
from compress.sidecars import ADAPTER_FOLDER, Choice, find_adapter, find_prompts
from compress.structure import architecture, matching

_log = logging.getLogger(__name__)


def load(
    folder: str | Path,
    bits: Bits | float | str | None = None,
    memory: str | int | None = None,
    keep_dense: bool | None = None,
    exact: bool = True,
    prompt: bool | str | Path = False,
    adapter: Choice = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """Load a checkpoint as a stock Hugging Face model.

    Only the planes that the widest module needs are read (and, from the hub, downloaded).

    Args:
        folder: checkpoint folder or hub id; a dense model works too.
        bits: one width, or widths by module name or ``re:`` pattern (modules not named take their parent
            width); everything that is stored if None. A mean width, ``"3.5"`` or 3.5, gives every matrix the width
            that makes the summed error, as measured when the checkpoint was made, least at that many bytes.
        memory: the same for a number of bytes that all tensors may take, such as ``"2GB"``. Activations and dense
            copies (``keep_dense``) come on top.
        keep_dense: whether each layer's looked-up weight is kept between calls: as much memory as the dense model.
            None keeps it only where no backend multiplies by the planes themselves (:func:`compress.backend`), as
            looking it up again every time is many times slower.
        exact: whether tables are used as they are stored, and sums on a CPU are of float32 products; if not, the C
            library rounds activations (64 at a time) and table entries to 8 bits, and the GPU kernels round entries to
            8 bits at width 4 (no other): both are faster.
        prompt: put the checkpoint's own soft prompts before the model (True), or those of a folder; the result is then
            a ``PeftModel`` around it.
        adapter: put the checkpoint's own low-rank adapter (True), or that of a folder, on the model, which is then a
            ``PeftModel`` too; or none (False). By default a checkpoint that was made with an adapter is loaded with it, and
            a line on the log says so; plain ``from_pretrained`` does not know of it.
        **kwargs: for ``AutoModelForCausalLM.from_pretrained``.

    Raises:
        CompressError: no such checkpoint or width, a pattern that matches nothing, damaged or missing files, no prompt or
            adapter where one is asked for.
    """
    revision = kwargs.get("revision")  # what lies beside the model is looked for before the model is read
    prompts = find_prompts(folder, prompt, revision) if prompt else None
    adapted = find_adapter(folder, adapter, revision)
    model = _load_model(str(folder), bits, memory, keep_dense, exact, **kwargs)
    if prompts is None and adapted is None:
        return model
    from compress.adapters import attach_adapter, attach_prompts

    result: Any = model
    if adapted is not None:
        result = attach_adapter(model, adapted)
        if adapter is None:
            _log.warning("%s: loaded with its %s/; adapter=False (--no-adapter) leaves it off.", folder, ADAPTER_FOLDER)
    return result if prompts is None else attach_prompts(model, prompts)  # type: ignore[return-value]


def _load_model(
    name: str,
    bits: Bits | float | str | None,
    memory: str | int | None,
    keep_dense: bool | None,
    exact: bool,
    **kwargs: Any,
) -> PreTrainedModel:
    config = read_config(name, kwargs.get("revision"))
    settings = getattr(config, "quantization_config", None)
    if settings is None or settings.get("quant_method") != METHOD:
        if bits is not None or memory is not None:
            raise CompressError(f"{name}: is not a compressed checkpoint, so it has no widths to choose from.")
        return _from_pretrained(name, **kwargs)
    stored = StoredConfig(**settings)
    shapes = stored.shapes()
    widest = None
    chosen = bits_for(name, bits, memory, kwargs.get("revision"))
    if chosen is not None and not shapes:
        raise CompressError(f"{name}: none of its matrices is packed, so it has no widths to choose from.")
    if chosen is not None:
        widest = max(widths_for(chosen, shapes).values())
        config.quantization_config = {**settings, "bits": chosen if isinstance(chosen, int) else dict(chosen)}
        if Path(name).is_dir() and not (Path(name) / index_name(widest)).exists():
            widest = None  # save_pretrained writes no index of a width
        else:
            kwargs["variant"] = f"{widest}bit"
    if Path(name).is_dir():
        check_tensors(Path(name), stored, widest)
    model = _from_pretrained(name, config=config, **kwargs)
    for module in packed_modules(model).values():
        module.keep_dense, module.exact = keep_dense, exact
    if not exact:
        join_layers(model)
    return model


def read_config(name: str | Path, revision: str | None = None) -> PretrainedConfig:
    """Read the configuration of a folder or hub id, without running any code of its own.

    Raises:
        CompressError: there is none, or transformers cannot use it.
    """
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(str(name), revision=revision)
    except CompressError:
        raise
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, … for a bad config.json
        raise CompressError(
            f"{name}: is not a model folder or hub id that can be read ({first_line(error)})."
        ) from error
    return config


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint or dense model.

    Raises:
        CompressError: there is none, or it cannot be read.
    """
    try:
        return AutoTokenizer.from_pretrained(str(folder))
    except Exception as error:  # tokenizer classes fail in many ways
        raise CompressError(f"{folder}: its tokenizer cannot be loaded ({first_line(error)}).") from error


def bits_for(
    folder: str | Path, bits: Bits | float | str | None, memory: str | int | None = None, revision: str | None = None
) -> Bits | None:
    """Turn a mean width or an amount of memory into widths by module; anything else is given back as it is.

    Args:
        folder: compressed checkpoint, or a hub id.
        bits: as for :func:`load`.
        memory: as for :func:`load`.
        revision: of a hub id.

    Raises:
        CompressError: both are given, or nothing fits.
    """
    mean = as_number(bits)
    if memory is None and mean is None:
        return bits  # type: ignore[return-value]
    if memory is not None and bits is not None:
        raise CompressError("bits and memory are two ways to choose widths; give one of them.")
    try:
        manifest = cached_file(str(folder), MANIFEST, revision=revision)
    except OSError as error:
        raise CompressError(
            f"{folder}: has no {MANIFEST} with measured errors, by which widths are chosen; give a whole width, or patterns."
        ) from error
    assert manifest is not None  # it raises where it finds nothing
    config = read_config(folder, revision)
    shapes = StoredConfig(**config.quantization_config).shapes()
    return widths_for_budget(Path(manifest).parent, shapes, architecture(config), mean, memory)


def _from_pretrained(name: str, **kwargs: Any) -> PreTrainedModel:
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(name, **kwargs)
    except SafetensorError as error:
        raise CompressError(f"{name}: a shard is damaged or truncated ({error}); fetch or write it again.") from error
    except OSError as error:
        raise CompressError(f"{name}: cannot be loaded ({first_line(error)}).") from error
    return model


def set_bits(model: nn.Module, bits: Bits) -> None:
    """Change the width of a loaded model, without reading anything again.

    Args:
        model: loaded by :func:`load` or ``from_pretrained``; with soft prompts of several widths, the one of this width
            becomes active.
        bits: one width, or widths by module name or ``re:`` pattern; modules not named keep theirs.

    Raises:
        CompressError: the model has no packed modules, the width was not loaded, a pattern matches nothing.
    """
    modules = packed_modules(_inner(model))
    if not modules:
        raise CompressError("this model has no packed modules, so it has no width to set.")
    shapes = {name: module.shape for name, module in modules.items()}
    try:
        widths = widths_for(bits, shapes)
    except CompressError as error:
        raise CompressError(f"{error} Load it at more bits to have more to choose from.") from error
    named = widths if isinstance(bits, int) else _named(bits, shapes)
    for name in named:
        modules[name].bits = widths[name]
    if hasattr(model, "peft_config"):
        from compress.adapters import choose_prompt

        choose_prompt(model)


def _inner(model: nn.Module) -> nn.Module:
    """What is within an adapter: names are those of the checkpoint there."""
    base: Any = getattr(model, "get_base_model", lambda: model)
    inner: nn.Module = base()
    return inner


def _named(bits: Mapping[str, int], shapes: Mapping[str, Any]) -> list[str]:
    return [name for pattern in bits for name in matching(pattern, list(shapes))]


def get_bits(model: nn.Module) -> int | dict[str, int]:
    """The width in use: a number if all packed modules share it, else one per module.

    Raises:
        CompressError: the model has no packed modules.
    """
    widths = {name: module.bits for name, module in packed_modules(_inner(model)).items()}
    if not widths:
        raise CompressError("this model has no packed modules, so it has no width.")
    return next(iter(widths.values())) if len(set(widths.values())) == 1 else widths
