"""Write a checkpoint's model card: what it is, how to load it, sizes, what was measured, the recipe, and metadata for the hub."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from compress.errors import CompressError, first_line
from compress.manifest import read_manifest
from compress.settings import config_class
from compress.workspace import write_atomic

CARD = "README.md"
_MEASURED, _RECIPE = "## Measured", "## Recipe"
_KEPT = ("license", "license_name", "license_link", "language")  # of the dense model's card


def write_card(folder: Path, source: Path) -> None:
    """Write the card of a checkpoint, complete but for it; the dense model's licence and language go along."""
    manifest = read_manifest(folder)
    if manifest is None:
        raise CompressError(f"{folder}: has no manifest, so there is nothing to make a model card of.")
    kept = _metadata(source / CARD)
    model = manifest["recipe"]["model"]
    name = model if isinstance(model, str) else str(model["name"])
    on_hub = name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).exists()
    data = ModelCardData(
        base_model=name if on_hub else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["compress", *sorted({step["config"]["kind"] for step in manifest["passes"]})],
        **{key: kept[key] for key in _KEPT if kept.get(key) is not None},
    )
    title = Path(name).name
    body = "\n\n".join(_sections(title, manifest))
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n", ignore_metadata_errors=False)
    write_atomic(folder / CARD, str(card))


def _metadata(path: Path) -> dict[str, Any]:
    """Read the metadata of a card; nothing where there is none."""
    if not path.is_file():
        return {}
    try:
        card = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True)
        return dict(card.data.to_dict())  # type: ignore[no-untyped-call]
    except (ValueError, yaml.YAMLError) as error:
        raise CompressError(f"{path}: its metadata is not YAML ({first_line(error)}); mend or remove it.") from error


def add_measured(folder: Path, table: str) -> None:
    """Put what was measured of a checkpoint, Markdown, into its card, in place of what was there; the rest stays as it is."""
    path = folder / CARD
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    text = re.sub(rf"{_MEASURED}\n.*?(?=^## |\Z)", "", text, flags=re.DOTALL | re.MULTILINE)
    before, recipe, after = text.partition(_RECIPE)
    write_atomic(path, f"{before.rstrip()}\n\n{_MEASURED}\n\n{table.strip()}\n\n{recipe}{after}".strip() + "\n")


def _sections(title: str, manifest: Mapping[str, Any]) -> Iterator[str]:
    at = manifest["sizes"].get("tensors_at_bits", {})
    yield f"# {title}, compressed"
    yield f"{title} after post-training compression with `compress` {manifest['compress_version']}, pass by pass:"
    yield "\n".join(f"* {_said(step['config'])}" for step in manifest["passes"])
    yield "## Size"
    rows = [(f"{bits} bits", size) for bits, size in at.items()] or [("all tensors", manifest["sizes"]["tensors"])]
    yield "\n".join(
        ["| read at | MB of tensors |", "|---|---:|", *(f"| {what} | {size / 1e6:.2f} |" for what, size in rows)]
    )
    yield "## Load"
    yield _loading(list(map(int, at)))
    for unit in (unit for step in manifest["passes"] for unit in step["units"].values() if "kv" in unit):
        yield "## Cache of keys and values"
        yield _cache(unit)
    yield _RECIPE
    recipe = {key: value for key, value in manifest["recipe"].items() if value is not None}
    recipe["passes"] = [_changed(config) for config in recipe["passes"]]
    for key in ("model", "calibration"):
        recipe[key] = _without_folders(recipe.get(key))
    yield f"```yaml\n{yaml.safe_dump({k: v for k, v in recipe.items() if v is not None}, sort_keys=False)}```"
    versions = ", ".join(f"{name} {number}" for name, number in manifest["versions"].items())
    yield f"Made with {versions}. `compression.json` has the errors of every matrix; `compress verify` checks the files against it."


def _loading(all_bits: list[int]) -> str:
    code = ["import compress", "", 'model = compress.load("ORG/NAME")  # this repository, or its folder']
    serve = ["compress serve FOLDER"]
    for bits in all_bits if len(all_bits) > 1 else ():
        code.append(f'model = compress.load("ORG/NAME", bits={bits})')
        serve.append(f"vllm serve ORG/NAME --hf-overrides.compress_bits {bits}")
    if len(all_bits) > 1:
        code.append(f"compress.set_bits(model, {all_bits[0]})  # without reading anything again")
        serve[0] += f" --bits {all_bits[-1]}  # vLLM where it is installed, else transformers' server"
    if not all_bits:
        return "It is an ordinary checkpoint: `AutoModelForCausalLM.from_pretrained` and every server load it as they load any other."
    python = "\n".join(code)
    shell = "\n".join(serve)
    return f"With `pip install compress-llm`:\n\n```python\n{python}\n```\n\nWith a server:\n\n```\n{shell}\n```"


def _cache(unit: Mapping[str, Any]) -> str:
    """Say which bits of the cache ``kv_calibrate`` recommends, beside what it measured, in a table and a line of code."""
    by_layer = unit["kv"]["bits"] == unit["chosen"]
    bits = {
        "whole": "all whole",
        "chosen": f"{', '.join(map(str, unit['chosen']))} bits, layer after layer",
        "uniform": f"{unit['uniform']} bits",
    }
    bits["chosen" if by_layer else "uniform"] += " (recommended)"
    apart = unit.get("divergences") or {}  # manifests of earlier versions have none
    rows = [
        f"| {bits[name]} | {unit['losses'][name]:.4f} | {format(apart[name], '.5f') if apart else '–'} |"
        for name in bits
    ]
    head = "| keys and values | loss on calibration text, nats per token | divergence from a whole cache |"
    table = "\n".join([head, "|---|---:|---:|", *rows])
    code = 'model = compress.load("ORG/NAME", kv="recommended")  # on the command line --kv-bits recommended'
    return f"{table}\n\n```python\n{code}\n```"


def _changed(config: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out settings that are the defaults."""
    try:
        fields = config_class(config["kind"]).model_fields
    except (KeyError, CompressError):  # a pass of a package that is not here
        return dict(config)
    defaults = {name: json.loads(json.dumps(field.get_default(), default=list)) for name, field in fields.items()}
    return {k: v for k, v in config.items() if k == "kind" or k not in defaults or v != defaults[k]}


def _said(config: Mapping[str, Any]) -> str:
    changed = _changed(config)
    settings = ", ".join(f"{name} {value}" for name, value in changed.items() if name != "kind")
    return f"**{changed['kind']}**{': ' * bool(settings)}{settings}"


def _without_folders(value: Any) -> Any:
    """Return settings that name files of the machine they were used on by those files' names alone."""
    if isinstance(value, Mapping):
        found = {key: _without_folders(inner) if key in ("name", "text") else inner for key, inner in value.items()}
        return {key: inner for key, inner in found.items() if inner is not None}
    is_path = isinstance(value, str) and (Path(value).is_absolute() or value.startswith((".", "~")))
    return Path(value).name if is_path else value
