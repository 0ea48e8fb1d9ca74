"""Find models: a folder, the built-in one, or a hub id; and say which files belong to a model's folder (no torch)."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from compress.errors import CompressError, first_line

BUILTIN = "builtin"
"""Name of the model that comes with the package."""
ACCESS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
"""What ``from_pretrained`` takes to find a model's files; every opening of one model is given the same."""
_BESIDE = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "*.spm",
    "*.jinja",
    "tekken.json",
    "chat_template*",
    "additional_chat_templates/*.jinja",
    "*processor_config.json",
    "LICENSE*",
    "NOTICE*",
)
_MODEL = ("config.json", "adapter_config.json", "*.safetensors", "*.safetensors.index.json", "README.md")


def files_beside(folder: Path) -> dict[str, Path]:
    """Return what belongs to a model beside its weights and ``config.json``: path within the folder -> file."""
    found = {path.relative_to(folder).as_posix(): path for name in _BESIDE for path in folder.glob(name)}
    return {name: found[name] for name in sorted(found) if found[name].is_file()}


def name_of(model: str | Mapping[str, Any]) -> str:
    """Return the folder or hub id in a recipe's ``model``."""
    return model if isinstance(model, str) else str(model["name"])


def located(model: str | Path, access: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return where a model is and what its openings are given: of a folder, the built-in one among them, the subfolder itself."""
    place, access = str(model), {key: value for key, value in access.items() if key in ACCESS}
    if place == BUILTIN:
        if Path(place).is_dir():
            raise CompressError(
                f"{BUILTIN!r} is the model that comes with the package, but there is a folder of that name too; rename the folder or "
                f"give its whole path, {Path(place).absolute()}."
            )
        place = str(files("compress.demo") / "model")
    if Path(place).is_dir() and (within := access.pop("subfolder", None)):
        place = str(Path(place) / within)
    return place, access


def model_folder(model: str | Mapping[str, Any], **access: Any) -> Path:
    """Find, or download from the hub, the folder of a model, as a recipe names it."""
    if not isinstance(model, str):
        access |= {key: value for key, value in model.items() if key != "name"}
    name = name_of(model)
    if name.lower().endswith(".gguf"):
        raise CompressError(
            f"model {name!r}: GGUF files are not read, as transformers' reader loses what some of them say (RoPE scaling of Llamas, "
            "without a word); start from the checkpoint that the file was made of."
        )
    place, access = located(Path(name).expanduser(), access)
    if Path(place).is_dir():
        return Path(place)
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise CompressError(f"model {name!r}: there is no such folder, and it is not a hub id (owner/name).")
    return fetched(place, (*_MODEL, *_BESIDE), access)


def fetched(name: str, patterns: tuple[str, ...], access: Mapping[str, Any]) -> Path:
    """Download some files of a model on the hub; return the folder that the model has here."""
    from huggingface_hub import snapshot_download

    given = {key: value for key, value in access.items() if key not in ("subfolder", "proxies")}
    within = str(access.get("subfolder") or "")
    wanted = [f"{within}/{pattern}".lstrip("/") for pattern in patterns]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted, **given)) / within
    except Exception as error:  # network, authorisation, absence: the hub's own types change between releases
        raise CompressError(
            f"model {name!r}: is no folder, and the hub did not deliver it ({first_line(error)})."
        ) from error
