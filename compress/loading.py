"""Load a checkpoint at some bits, and change the bits of a loaded model."""

import copy
import logging
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.hub import cached_file

from compress.budget import as_number, bits_for_budget
from compress.config import Bits, check_tensors, index_name, stored_config
from compress.defaults import usual_defaults
from compress.errors import CompressError, first_line
from compress.hf import bits_by_module, join_layers, packed_modules
from compress.hub import ACCESS, located
from compress.kv import KVCache
from compress.kv_serving import kv_of, make_caches, use_kv_cache
from compress.kv_settings import KVBits
from compress.manifest import MANIFEST, noted, read_manifest
from compress.models import auto_class
from compress.quant.records import EmbeddingShape, unstacked
from compress.sidecars import ADAPTER_FOLDER, Choice, find_adapter, find_prompts
from compress.structure import architecture, matching

_log = logging.getLogger(__name__)


@usual_defaults()
def load(
    folder: str | Path,
    bits: Bits | float | str | None = None,
    memory: str | int | None = None,
    keep_dense: bool | None = None,
    exact: bool = True,
    prompt: bool | str | Path = False,
    adapter: Choice = None,
    kv: KVBits | str | dict[str, Any] | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """Load a checkpoint as a stock Hugging Face model.

    Only the planes that the module with the most bits needs are read (and, from the hub, downloaded).

    Args:
        folder: checkpoint folder or hub id; a dense model works too.
        bits: one number, or numbers by module name or ``re:`` pattern (modules not named take all of theirs); everything
            that is stored if None. A mean, ``"3.5"`` or 3.5, gives every matrix the bits that make the summed error, as
            measured when the checkpoint was made, least at that many bytes.
        memory: the same for a number of bytes that all tensors may take, such as ``"2GB"``. Activations and dense
            copies (``keep_dense``) come on top.
        keep_dense: whether each layer's looked-up weight is kept between calls: as much memory as the dense model.
            None keeps it only where no backend multiplies by the planes themselves (:func:`compress.backend`), as
            looking it up again every time is many times slower.
        exact: whether codebooks are used as they are stored, and sums on a CPU are of float32 products; if not, the C
            library rounds activations (64 at a time) and codebook entries to 8 bits, and the GPU kernels round entries
            to 8 bits at 4 bits (at no other number): both are faster.
        prompt: put the checkpoint's own soft prompts before the model (True), or those of a folder; the result is then
            a ``PeftModel`` around it.
        adapter: put the checkpoint's own low-rank adapter (True), or that of a folder, on the model, which is then a
            ``PeftModel`` too; or none (False). By default a checkpoint that was made with an adapter is loaded with it, and
            a line on the log says so; plain ``from_pretrained`` does not know of it.
        kv: keep keys and values packed, wherever the model would make a cache of its own (:class:`compress.KVCache`): bits, ``"4:2"``
            for keys and values apart, a mapping of ``bits`` and its other arguments, or ``"recommended"``, what the pass
            ``kv_calibrate`` found for this checkpoint.
        **kwargs: for ``AutoModelForCausalLM.from_pretrained``; what finds a model's files (``revision``, ``subfolder``,
            ``cache_dir``, ``token``, …) goes to everything that is opened; ``output_loading_info`` works as there.

    Raises:
        CompressError: no such checkpoint or bits, a pattern that matches nothing, damaged or missing files, no prompt,
            adapter or cache setting where one is asked for.
    """
    place, access = located(folder, kwargs)
    others = {key: value for key, value in kwargs.items() if key not in ACCESS}
    # What lies beside the model is looked for before the model is read.
    prompts = find_prompts(place, prompt, **access) if prompt else None
    adapted = find_adapter(place, adapter, **access)
    cached = None if kv is None else kv_of(kv, recommended_kv(place, **access))
    if cached is not None:
        KVCache(cached[0], config=read_config(place, **access), **cached[1].options())  # refuses what does not fit
    loaded = _load_model(place, bits, memory, access, others)
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    if cached is not None:
        use_kv_cache(model, make_caches(model, *cached))
    _choose_products(model, keep_dense, exact)
    result = _with_sidecars(model, prompts, adapted)
    if adapted and adapter is None:
        _log.warning("%s: loaded with its %s/; adapter=False (--no-adapter) leaves it off.", folder, ADAPTER_FOLDER)
    return (result, loaded[1]) if isinstance(loaded, tuple) else result  # type: ignore[return-value]


def _choose_products(model: PreTrainedModel, keep_dense: bool | None, exact: bool) -> None:
    """Tell packed modules how to multiply."""
    packed = packed_modules(model)
    for module in packed.values():
        module.keep_dense, module.exact = keep_dense, exact
    if packed and not exact:
        join_layers(model)


def _with_sidecars(model: PreTrainedModel, prompts: Any, adapter: Path | None) -> Any:
    """Put an adapter and prompts, where there are any, on a model."""
    result: Any = model
    if prompts is not None or adapter is not None:
        from compress.adapters import attach_adapter, attach_prompts

        result = attach_adapter(model, adapter) if adapter else model
        result = attach_prompts(model, prompts) if prompts is not None else result
    return result


def _load_model(
    name: str, bits: Bits | float | str | None, memory: str | int | None, access: dict[str, Any], kwargs: dict[str, Any]
) -> Any:
    """Load a model, or with ``output_loading_info`` (model, information); ``kwargs`` are those that find no files."""
    config = read_config(name, **access)
    stored = stored_config(getattr(config, "quantization_config", None))
    if stored is None:
        if bits is not None or memory is not None:
            raise CompressError(f"{name}: is not a compressed checkpoint, so it has no bits to choose from.")
        return _from_pretrained(name, **access, **kwargs)
    config, kwargs = _with_settings(name, config, access, kwargs)
    shapes, most = stored.shapes(), None
    chosen = bits_for(name, bits, memory, **access)
    if chosen is not None:
        if not shapes:
            raise CompressError(f"{name}: none of its matrices is packed, so it has no bits to choose from.")
        matrices = unstacked(shapes)
        most = max(matrices[name].step(own) for name, own in bits_by_module(chosen, matrices).items())
        config.quantization_config["bits"] = chosen if isinstance(chosen, int) else dict(chosen)
        if Path(name).is_dir() and not (Path(name) / index_name(most)).exists():
            most = None  # save_pretrained writes no index by bits
        else:
            kwargs["variant"] = f"{most}bit"
    if Path(name).is_dir():
        check_tensors(Path(name), stored, most)
    return _from_pretrained(name, config=config, **access, **kwargs)


def _with_settings(
    name: str, config: PretrainedConfig, access: dict[str, Any], kwargs: dict[str, Any]
) -> tuple[PretrainedConfig, dict[str, Any]]:
    """Return the configuration with what ``kwargs`` say of it, and the rest of them, as ``from_pretrained`` does.

    What a configuration that is given says of packed modules counts only as it stands in a file: that of a loaded model is of
    what it has in memory.
    """
    record, given = config.quantization_config, kwargs.pop("config", None)
    if isinstance(given, PretrainedConfig):
        config = copy.deepcopy(given)
        if not isinstance(getattr(config, "quantization_config", None), dict):
            config.quantization_config = record
        return config, kwargs
    untouched = {key: kwargs.pop(key) for key in ("dtype", "torch_dtype", "trust_remote_code") if key in kwargs}
    config, rest = AutoConfig.from_pretrained(str(given or name), return_unused_kwargs=True, **access, **kwargs)
    config.quantization_config = record
    return config, {**rest, **untouched}


def read_config(name: str | Path, **access: Any) -> PretrainedConfig:
    """Read the configuration of a folder or hub id, without running any code of its own; ``access`` finds the file."""
    name, access = located(name, access)
    try:
        return AutoConfig.from_pretrained(name, **access)  # type: ignore[no-any-return]
    except CompressError:
        raise
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, … for a bad config.json
        raise CompressError(
            f"{name}: is not a model folder or hub id that can be read ({first_line(error)})."
        ) from error


def load_tokenizer(folder: str | Path, **access: Any) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint or dense model; ``access`` finds its files. One beside a GGUF file goes before its own."""
    place, access = located(folder, access)
    if has_tokenizer(Path(place)):
        access.pop("gguf_file", None)
    try:
        return AutoTokenizer.from_pretrained(place, **access)
    except Exception as error:  # tokenizer classes fail in many ways
        raise CompressError(f"{folder}: its tokenizer cannot be loaded ({first_line(error)}).") from error


def has_tokenizer(folder: Path) -> bool:
    """Tell whether a folder has a tokenizer of its own."""
    return (folder / "tokenizer.json").is_file()


def recommended_kv(folder: str | Path, **access: Any) -> dict[str, Any] | None:
    """Return the cache setting that a checkpoint's manifest recommends; None without one."""
    try:
        manifest = cached_file(str(folder), MANIFEST, **access)
    except OSError:
        return None
    return dict(noted(read_manifest(Path(manifest).parent) or {}, "kv")) or None  # type: ignore[arg-type]


def bits_for(
    folder: str | Path, bits: Bits | float | str | None, memory: str | int | None = None, **access: Any
) -> Bits | None:
    """Turn a mean or an amount of memory into bits by module; return other bits as they are. Arguments as of :func:`load`."""
    mean = as_number(bits)
    if memory is None and mean is None:
        return bits  # type: ignore[return-value]
    if memory is not None and bits is not None:
        raise CompressError("bits and memory are two ways to choose bits by module; give one of them.")
    try:
        manifest = cached_file(str(folder), MANIFEST, **access)
    except OSError as error:
        raise CompressError(
            f"{folder}: has no {MANIFEST} with measured errors, by which bits are chosen; give a whole number of bits, or patterns."
        ) from error
    config = read_config(folder, **access)
    stored = stored_config(config.quantization_config)
    assert manifest is not None  # cached_file raises where it finds nothing
    assert stored is not None
    return bits_for_budget(Path(manifest).parent, unstacked(stored.shapes()), architecture(config), mean, memory)


def _from_pretrained(name: str, **kwargs: Any) -> Any:
    try:
        access = {key: value for key, value in kwargs.items() if key in ACCESS}
        config = kwargs.get("config") or read_config(name, **access)
        return auto_class(config).from_pretrained(name, **kwargs)
    except SafetensorError as error:
        raise CompressError(f"{name}: a shard is damaged or truncated ({error}); fetch or write it again.") from error
    except OSError as error:
        raise CompressError(f"{name}: cannot be loaded ({first_line(error)}).") from error


def set_bits(model: nn.Module, bits: Bits) -> None:
    """Change the bits of a loaded model, without reading anything again.

    Args:
        model: loaded by :func:`load` or ``from_pretrained``; of several soft prompts, the one for these bits becomes active.
        bits: one number, or numbers by module name or ``re:`` pattern; modules not named keep theirs.

    Raises:
        CompressError: the model has no packed modules, the bits were not loaded, a pattern matches nothing.
    """
    modules = _packed_within(model)
    shapes = {name: module.shape for name, module in modules.items()}
    try:
        by_module = bits_by_module(bits, shapes)
    except CompressError as error:
        raise CompressError(f"{error} Load it at more bits to have more to choose from.") from error
    if not isinstance(bits, int):
        by_module = {name: by_module[name] for pattern in bits for name in matching(pattern, list(shapes))}
    for name, value in by_module.items():
        modules[name].bits = value
    if hasattr(model, "peft_config"):
        from compress.adapters import choose_prompt

        choose_prompt(model)


def _packed_within(model: nn.Module) -> dict[str, Any]:
    """Return the packed modules of a model, within its adapter if it has one: there they have the checkpoint's names."""
    within: Any = getattr(model, "get_base_model", lambda: model)
    modules = packed_modules(within())
    if not modules:
        raise CompressError("this model has no packed modules, so it has no bits to choose from.")
    return dict(modules)


def get_bits(model: nn.Module) -> int | dict[str, int]:
    """Return the bits in use: one number if all packed modules share it, else one each; refuse a model without any.

    An embedding or head that is read at the bits which belong to that number shares it.
    """
    modules = _packed_within(model)
    bits: dict[str, int] = {name: module.bits for name, module in modules.items()}
    embeddings = [module for module in modules.values() if isinstance(module.shape, EmbeddingShape)]
    same = {module.bits for module in modules.values() if module not in embeddings}
    if len(same) == 1:
        one: int = same.pop()
        if all(module.bits == module.shape.at(one) for module in embeddings):
            return one
    return bits
