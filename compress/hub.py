"""Find models: a folder, the built-in one, or a hub id; and say which files belong to a model's folder (no torch)."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from compress.errors import CompressError, first_line

BUILTIN = "builtin"
"""Name of the model that comes with the package."""
ACCESS = ("cache_dir", "force_download", "gguf_file", "local_files_only", "proxies", "revision", "subfolder", "token")
"""What ``from_pretrained`` takes to find a model's files; every opening of one model is given the same."""
GGUF = ".gguf"
_TERMS = ("LICENSE*", "NOTICE*")
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
    *_TERMS,
)
_MODEL = ("config.json", "adapter_config.json", "*.safetensors", "*.safetensors.index.json", "README.md")


def files_beside(folder: Path) -> dict[str, Path]:
    """Return what belongs to a model beside its weights and ``config.json``: path within the folder -> file.

    Of a GGUF file these are its terms: it has the rest within.
    """
    folder, names = (folder.parent, _TERMS) if folder.is_file() else (folder, _BESIDE)
    found = {path.relative_to(folder).as_posix(): path for name in names for path in folder.glob(name)}
    return {name: found[name] for name in sorted(found) if found[name].is_file()}


def name_of(model: str | Mapping[str, Any]) -> str:
    """Return the folder or hub id in a recipe's ``model``."""
    return model if isinstance(model, str) else str(model["name"])


def located(model: str | Path, access: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return where a model is and what its openings are given: of a folder, the built-in one among them, the subfolder itself.

    A GGUF file is given as its folder, with ``gguf_file`` to name it.
    """
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
    if place.lower().endswith(GGUF) and Path(place).is_file():
        place, access["gguf_file"] = str(Path(place).parent), Path(place).name
    return place, access


def place_of(model: str | Path) -> str:
    """Return the folder of the model that ``builtin`` names; other folders, GGUF files and hub ids as they are given."""
    place, access = located(model, {})
    return str(model) if access else place


def model_folder(model: str | Mapping[str, Any], **access: Any) -> Path:
    """Find, or download from the hub, the folder of a model, or its GGUF file, as a recipe names it."""
    if not isinstance(model, str):
        access |= {key: value for key, value in model.items() if key != "name"}
    name = name_of(model)
    place, access = located(Path(name).expanduser(), access)
    within = access.pop("gguf_file", None)
    if Path(place).is_dir():
        return _chosen(Path(place), within)
    if name.startswith((".", "/", "~")) or name.count("/") != 1 or name.lower().endswith(GGUF):
        raise CompressError(f"model {name!r}: there is no such folder or file, and it is not a hub id (owner/name).")
    wanted = (within, "README.md", *_BESIDE) if within else (*_MODEL, *_BESIDE)
    return _chosen(fetched(place, wanted, access), within)


def _chosen(folder: Path, within: str | None) -> Path:
    """Return a folder, or the GGUF file that is wanted of it."""
    if within is None:
        if not (folder / "config.json").exists() and (found := sorted(folder.glob(f"*{GGUF}"))):
            raise CompressError(f"{folder}: holds GGUF files; name one, such as {found[0].name}, in model.gguf_file.")
        return folder
    if not (folder / within).is_file():
        raise CompressError(f"{folder}: has no file {within!r}, which model.gguf_file names.")
    return folder / within


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
