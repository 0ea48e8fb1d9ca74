"""Find soft prompts and low-rank adapters in a checkpoint: ordinary peft adapters in folders of their own.

``soft_prompt/`` holds one prompt for all bits, ``soft_prompt/3bit/`` and so on one for each number; ``adapter/`` what
``lora_recovery`` with ``merge: false`` has trained. Never do they lie in the model's own folder, where transformers would take
them for its own. Only headers are read here: neither torch nor peft is needed.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from compress.errors import CompressError
from compress.hub import fetched, located

PROMPTS_FOLDER, ADAPTER_FOLDER = "soft_prompt", "adapter"
PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PROMPT_NAME = re.compile(r"(\d+)bit")
"""What a prompt for one number of bits is called: its folder, and the adapter when it is loaded."""
Choice = bool | str | Path | None
"""Which adapter to use: the checkpoint's own if it has one (None), that and no other (True), a folder's, or none (False)."""


def stored_prompts(folder: str | Path) -> dict[int | None, Path]:
    """Find the soft prompts of a checkpoint, of a ``soft_prompt`` folder, or of one adapter's own folder.

    Return bits -> folder of the prompt, with None for a prompt for all bits; refuse what is no prompt or cannot be read.
    """
    root = Path(folder)
    if not (root / PEFT_CONFIG).exists() and (root / PROMPTS_FOLDER).is_dir():
        root = root / PROMPTS_FOLDER
    found: dict[int | None, Path] = {None: root} if (root / PEFT_CONFIG).exists() else {}
    for path in sorted(root.glob(f"*bit/{PEFT_CONFIG}")):
        if match := PROMPT_NAME.fullmatch(path.parent.name):
            found[int(match[1])] = path.parent
    for path in found.values():
        read_prompt(path)
    return found


def read_prompt(folder: Path) -> tuple[str, int, int]:
    """Read a prompt's peft type, its virtual tokens, and the numbers for each; refuse files that do not belong together."""
    config, shapes = _read(folder, "a soft prompt")
    if config.get("peft_type") not in ("PROMPT_TUNING", "PREFIX_TUNING") or config.get("task_type") != "CAUSAL_LM":
        raise CompressError(f"{folder}: is a {config.get('peft_type')} adapter, not a prompt or prefix of a causal LM.")
    tokens, numbers = (*shapes.get("prompt_embeddings", ()), 0, 0)[:2]
    if tokens != config.get("num_virtual_tokens"):
        raise CompressError(
            f"{folder}: its config has {config.get('num_virtual_tokens')} virtual tokens, its tensor {tokens}; "
            "fetch or write it again."
        )
    return str(config["peft_type"]), tokens, numbers


def read_adapter(folder: Path) -> tuple[dict[str, Any], int]:
    """Read a low-rank adapter's peft configuration, and count its numbers; pickled weights, which peft would take, are refused."""
    config, shapes = _read(folder, "an adapter")
    if config.get("peft_type") != "LORA":
        raise CompressError(f"{folder}: is a {config.get('peft_type')} adapter; a LORA adapter is wanted.")
    return config, sum(math.prod(shape) for shape in shapes.values())


def _read(folder: Path, what: str) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """Read the configuration of a peft adapter, and its tensors' shapes by name."""
    try:
        config = dict(json.loads((folder / PEFT_CONFIG).read_text(encoding="utf-8")))
        with safe_open(folder / PEFT_WEIGHTS, framework="np") as handle:
            return config, {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise CompressError(f"{folder}: is not {what} that can be read ({error}).") from error


def find_prompts(folder: str | Path, prompt: bool | str | Path = True, **access: Any) -> dict[int | None, Path]:
    """Find the soft prompts to use with a checkpoint, a folder or hub id: its own, or those of another folder.

    ``access`` is what ``from_pretrained`` takes to find a model's files (:data:`compress.hub.ACCESS`).
    """
    place = _place(folder, PROMPTS_FOLDER, access) if prompt is True else Path(prompt or folder)
    found = stored_prompts(place)
    if not found:
        names = f"{PEFT_CONFIG} in it, in {PROMPTS_FOLDER}/ or in {PROMPTS_FOLDER}/<b>bit/"
        raise CompressError(f"{place}: holds no soft prompt ({names}).")
    return found


def find_adapter(folder: str | Path, adapter: Choice = None, **access: Any) -> Path | None:
    """Find the low-rank adapter to use with a checkpoint, a folder or hub id; return the adapter's own folder, if any.

    A folder that is chosen may be a checkpoint or the adapter's own. An adapter that is asked for must be there. ``access`` is
    as of :func:`find_prompts`.
    """
    if adapter is False:
        return None
    try:
        place = Path(adapter) if isinstance(adapter, str | Path) else _place(folder, ADAPTER_FOLDER, access)
    except CompressError:
        if adapter:
            raise
        return None  # what is wrong with the model's name shows where the model is loaded
    place = place if isinstance(adapter, str | Path) and (place / PEFT_CONFIG).exists() else place / ADAPTER_FOLDER
    if not (place / PEFT_CONFIG).exists():
        if adapter is None:
            return None
        raise CompressError(f"{place.parent}: has no {ADAPTER_FOLDER}/{PEFT_CONFIG}, so there is no adapter to load.")
    config, _ = read_adapter(place)
    # Without being asked for, only what was trained for the model in the folder above is used.
    return place if adapter is not None or config.get("base_model_name_or_path") == ".." else None


def _place(model: str | Path, sidecars: str, access: Mapping[str, Any]) -> Path:
    """Return a model's folder; of one on the hub, its sidecars of a kind are downloaded."""
    place, access = located(model, access)
    return Path(place) if Path(place).is_dir() else fetched(place, (f"{sidecars}/*",), access)


def inspect_sidecars(folder: Path) -> Mapping[str, Any]:
    """Describe the sidecars of a model, for ``compress inspect``: prompts by label, and the adapter where there is one."""
    found: dict[str, Any] = {"prompts": {}}
    for bits, path in stored_prompts(folder).items():
        _, tokens, numbers = read_prompt(path)
        label = "all widths" if bits is None else f"{bits} bits"
        found["prompts"][label] = {"tokens": tokens, "numbers": tokens * numbers}
    if adapter := find_adapter(folder):
        config, numbers = read_adapter(adapter)
        found["adapter"] = {"rank": config["r"], "numbers": numbers}
    return found
