"""Define the settings of passes, and find them by name: all that a recipe's validation needs, without importing torch.

A pass is an entry point of group ``compress.passes``. Its settings may be one of group ``compress.settings`` under the same name,
in a module that does not import torch, so that the answer to a mistyped key is quick; else they are taken from the pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from compress.errors import CompressError

PASSES, SETTINGS = "compress.passes", "compress.settings"


class Calibration(BaseModel):
    """Choose text that passes learn from; it must not be text that anything is measured on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: str | None = Field(None, description="File: plain text, or JSON lines (.jsonl), either of them also gzipped.")
    dataset: str | None = Field(None, description="Name or folder of a Hugging Face dataset.")
    name: str | None = Field(None, description="Configuration of the dataset.")
    split: str = Field("train", description="Split of the dataset.")
    column: str = Field("text", description="Column of the dataset, or key of each JSON line, that holds the text.")
    builtin: Literal["stdlib"] | None = Field(None, description="Modules of Python's own standard library.")
    separator: str | None = Field(None, description="Divides a plain text file into documents; without it, windows.")
    samples: int = Field(100, ge=1, description="Number of samples.")
    length: int = Field(512, ge=2, description="Tokens per sample; a longer document is cut.")
    min_characters: int = Field(0, ge=0, description="Documents with fewer characters are passed over.")
    special_tokens: bool = Field(
        False,
        description="Read special tokens that the text spells (<|endoftext|>, say) as such, and not as plain text.",
    )

    @model_validator(mode="after")
    def _one_source(self) -> Calibration:
        if sum(source is not None for source in (self.text, self.dataset, self.builtin)) != 1:
            raise ValueError("give exactly one of text, dataset and builtin")
        return self


class ModelSource(BaseModel):
    """Say where a model is and how its files are had, in the words of ``from_pretrained``."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    name: str = Field(description="Folder, GGUF file or hub id, or 'builtin'.")
    gguf_file: str | None = Field(
        None, description="File within it that llama.cpp would read, in place of safetensors."
    )
    revision: str | None = Field(None, description="Branch, tag or commit on the hub.")
    subfolder: str | None = Field(None, description="Folder within it that holds the model.")
    cache_dir: str | None = Field(None, description="Where downloads are kept; the hub's own cache if absent.")
    token: str | bool | None = Field(None, repr=False, description="Of a user of the hub; never written anywhere.")
    local_files_only: bool = Field(False, description="Take what has been downloaded, ask nobody.")
    force_download: bool = Field(False, description="Download again.")


class PassConfig(BaseModel):
    """Hold the settings of a pass. Subclasses fix ``kind`` to a literal and describe every field.

    Attributes:
        PRESETS: values of a field ``preset`` -> the settings that each stands for, which keys of the recipe override.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    kind: str = Field(description="Name of the pass.")

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, data: Any) -> Any:
        return {**cls.PRESETS.get(str(data.get("preset")), {}), **data} if isinstance(data, Mapping) else data


class TrainingConfig(PassConfig):
    """Hold the settings of a pass that trains; subclasses fix ``kind``."""

    text: Calibration | None = Field(None, description="Text to train on; the recipe's calibration if absent.")
    steps: int = Field(500, ge=1, description="Steps of AdamW.")
    batch: int = Field(16, ge=1, description="Samples per step, over all processes.")
    micro_batch: int = Field(4, ge=1, description="Samples in memory at once in a process; gradients are accumulated.")
    learning_rate: float = Field(1e-3, gt=0, description="At its largest, after the warm-up; it falls linearly to 0.")
    warmup: int = Field(20, ge=0, description="Steps in which the learning rate rises.")
    weight_decay: float = Field(0.0, ge=0, description="Of AdamW.")
    clip: float = Field(1.0, gt=0, description="Largest norm of a step's gradient.")
    validate_every: int = Field(50, ge=1, description="Steps between validations, each of which is a checkpoint.")
    held_out: int = Field(8, ge=2, description="One sample of so many is held out; the best state on those stays.")
    precision: Literal["float32", "bfloat16"] = Field("float32", description="Of autocast; parameters stay float32.")


@cache
def _entries(group: str) -> dict[str, EntryPoint]:
    found: dict[str, EntryPoint] = {}
    for point in sorted(entry_points(group=group), key=lambda point: (point.name, point.value)):
        if point.name in found and found[point.name].value != point.value:
            raise CompressError(
                f"two installed packages provide the pass {point.name!r} ({found[point.name].value} and {point.value}); "
                "uninstall one of them."
            )
        found[point.name] = point
    return found


def kinds() -> list[str]:
    """List the names of all installed passes, sorted."""
    return sorted(_entries(PASSES))


def load_entry(group: str, kind: str, base: type) -> Any:
    """Import what a package names for a pass, in group ``PASSES`` or ``SETTINGS``, and refuse what is no subclass of ``base``."""
    point = _entries(group)[kind]
    try:
        loaded = point.load()
    except (ImportError, AttributeError) as error:
        raise CompressError(f"pass {kind!r} ({point.value}) cannot be imported: {error}.") from error
    if not (isinstance(loaded, type) and issubclass(loaded, base)):
        raise CompressError(f"pass {kind!r}: {point.value} is not a subclass of {base.__module__}.{base.__qualname__}.")
    return loaded


def config_class(kind: str) -> type[PassConfig]:
    """Return the settings of a pass by its name; errors as of :func:`load_entry`."""
    if kind in _entries(SETTINGS):
        loaded: type[PassConfig] = load_entry(SETTINGS, kind, PassConfig)
        return loaded
    from compress.passes import pass_class

    return pass_class(kind).Config
