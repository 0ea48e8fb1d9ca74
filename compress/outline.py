"""Tell what is found in a model before anything is done with it, from its config alone."""

import math
import re
from pathlib import Path
from typing import Any

from compress.errors import CompressError
from compress.hub import model_folder
from compress.loading import read_config
from compress.models import empty_model
from compress.streaming import built, examine
from compress.structure import block_of, is_linear, linears_of

_INDEX = re.compile(r"\.\d+(?=\.|$)")


def outline(model: str) -> dict[str, Any]:
    """Find the structure of a model: a folder (of which ``config.json`` is enough), or a hub id.

    Returns:
        ``{"model_type", "class", "parameters", "blocks": {"path", "count"}, "embedding", "head", "tied", "experts": {path:
        how many}, "fused", "refused", "matrices": {name: {"count", "shape", "parameters"}}, "left": {name: {"count",
        "reason"}}, "outside": {name: {"count", "parameters"}}}``. In names ``*`` stands for any number, such as a block's. ``refused``
        is the reason why the model cannot be compressed, or None; without a structure what would be of it is empty.

    Raises:
        CompressError: not a config, or of no language model that this release of transformers has.
    """
    folder = Path(model).expanduser()
    config = read_config(folder if (folder / "config.json").is_file() else model_folder(model))
    whole = empty_model(config)
    found: dict[str, Any] = {
        "model_type": config.model_type,
        "class": type(whole).__name__,
        "parameters": sum(parameter.numel() for parameter in whole.parameters()),
        "refused": None,
    }
    try:
        structure = examine(config)
    except CompressError as error:
        return {**found, "refused": str(error), **{key: {} for key in ("matrices", "left", "outside", "experts")}}
    split = built(config, {}, {})
    inside = linears_of(split.get_submodule(structure.blocks), structure.blocks)
    taken = {name: linear.shape for name, linear in inside.items() if name not in structure.left}
    outside = {
        name: sum(p.numel() for p in module.parameters(recurse=False))
        for name, module in split.named_modules()
        if block_of(name, structure) is None and (is_linear(module) or name == structure.embedding)
    }
    return {
        **found,
        "blocks": {"path": structure.blocks, "count": structure.depth},
        "embedding": structure.embedding,
        "head": structure.head,
        "tied": f"{structure.head}.weight" in split.all_tied_weights_keys,
        "experts": {path: split.get_submodule(path).num_experts for path in structure.experts},
        "fused": [list(group) for group in structure.fused],
        "matrices": _gathered({name: {"shape": list(shape)} for name, shape in taken.items()}),
        "left": _gathered({name: {"reason": reason} for name, reason in structure.left.items()}),
        "outside": _gathered({name: {"parameters": count} for name, count in outside.items()}),
    }


def _gathered(entries: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Put entries together whose names differ by numbers alone and that say the same."""
    found: dict[str, dict[str, Any]] = {}
    for name, entry in entries.items():
        short = _INDEX.sub(".*", name)
        while short in found and {**found[short], "count": 0} != {**entry, "count": 0}:
            short += "'"
        found.setdefault(short, {**entry, "count": 0})["count"] += 1
    return found


def lines(found: dict[str, Any]) -> list[str]:
    """Return an outline as text."""
    head = f"{found['class']} ({found['model_type']}), {found['parameters'] / 1e6:.1f} M parameters"
    if found["refused"]:
        return [head, f"refused: {found['refused']}"]
    packed = sum(entry["count"] * math.prod(entry["shape"]) for entry in found["matrices"].values())
    share = f"{100 * packed / found['parameters']:.1f} % of all"
    blocks, experts = found["blocks"], found["experts"]
    text = [head, f"blocks: {blocks['count']}, at {blocks['path']}"]
    if experts:
        text.append(f"mixtures of experts: {len(experts)}, of {max(experts.values())} experts")
    tie = " (one tensor)" if found["tied"] else ""
    text.append(f"embedding and head{tie}: {found['embedding']}, {found['head']}")
    text.append(f"packed: {packed / 1e6:.1f} M weights, {share}")
    for name, entry in found["matrices"].items():
        text.append(f"  {name}: {entry['count']} of {entry['shape'][0]} x {entry['shape'][1]}")
    for title, part in (("left dense", found["left"]), ("outside the blocks", found["outside"])):
        if part:
            text.append(f"{title}:")
        for name, entry in part.items():
            said = entry.get("reason") or f"{entry['parameters']} parameters"
            text.append(f"  {name}: {entry['count']}, {said}" if entry["count"] > 1 else f"  {name}: {said}")
    return text
