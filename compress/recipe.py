"""Read recipes: what is compressed, on what text, by which passes; YAML or the same object in Python."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Union, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    SerializeAsAny,
    Tag,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from compress.errors import CompressError, did_you_mean
from compress.settings import Calibration, ModelSource, PassConfig, config_class, kinds

_BEST = ("any_precision",)  # the passes of a recipe that names none
_NAME, _MAPPING = "model as a name", "model as a mapping"


def _form(value: Any) -> str:
    return _MAPPING if isinstance(value, Mapping | ModelSource) else _NAME


class Recipe(BaseModel):
    """Hold everything that decides the result."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: Annotated[Annotated[str, Tag(_NAME)] | Annotated[ModelSource, Tag(_MAPPING)], Discriminator(_form)] = Field(
        description="Folder, GGUF file or hub id of a dense causal LM, or 'builtin' for the built-in one; or a mapping with name, "
        "revision, subfolder, gguf_file, token, … as of from_pretrained."
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a hub model.")
    calibration: Calibration | None = Field(None, description="Needed by passes that look at text.")
    passes: tuple[SerializeAsAny[PassConfig], ...] = Field(
        default_factory=lambda: tuple(parse_pass({"kind": kind}, place) for place, kind in enumerate(_BEST)),
        min_length=1,
        description="Applied in this order; any_precision as it is by default, if not given.",
    )
    output: str | None = Field(None, description="Folder to write; the command line's -o takes precedence.")
    seed: int = Field(0, ge=0, description="For passes that draw random numbers.")
    device: str = Field("auto", description="'cpu', 'cuda', 'cuda:1', …; auto takes a GPU if there is one.")

    @model_validator(mode="after")
    def _one_revision(self) -> "Recipe":
        if self.revision is not None and not isinstance(self.model, str) and self.model.revision is not None:
            raise ValueError("give revision once, within model or beside it")
        return self

    @property
    def source(self) -> dict[str, Any]:
        """Return ``model`` as a mapping of what is given, ``revision`` with it, for :func:`compress.hub.model_folder`."""
        given = {"name": self.model} if isinstance(self.model, str) else self.model.model_dump(exclude_defaults=True)
        return {**given, **({} if self.revision is None else {"revision": self.revision})}

    def opened(self, revision: str | None, token: str | None) -> "Recipe":
        """Return the recipe with another revision of the model, or an access token, where these are given."""
        given = {key: value for key, value in (("revision", revision), ("token", token)) if value is not None}
        if not given:
            return self
        return self.model_copy(update={"model": ModelSource(**{**self.source, **given}), "revision": None})

    def record(self) -> dict[str, Any]:
        """Return the recipe for the manifest: without its output, and never with an access token."""
        data = self.model_dump(mode="json", exclude={"output"})
        if not isinstance(self.model, str):
            data["model"] = self.model.model_dump(mode="json", exclude={"token"}, exclude_defaults=True)
        return data

    @model_validator(mode="before")
    @classmethod
    def _configs_by_kind(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and isinstance(data.get("passes"), (list, tuple)):
            return {**data, "passes": [parse_pass(item, index) for index, item in enumerate(data["passes"])]}
        return data


def parse_pass(item: Any, index: int) -> PassConfig:
    """Validate one entry of ``passes`` by its ``kind``."""
    if isinstance(item, PassConfig):
        return item
    where = f"passes.{index}"
    if not isinstance(item, Mapping) or "kind" not in item:
        raise CompressError(f"{where}: a pass is a mapping with a 'kind', one of {', '.join(kinds())}; got {item!r}.")
    kind = str(item["kind"])
    if kind not in kinds():
        raise CompressError(f"{where}.kind: there is no pass {kind!r}. {did_you_mean(kind, kinds())}")
    config = config_class(kind)
    try:
        return config.model_validate(dict(item))
    except ValidationError as error:
        raise CompressError(explain(error, config, f"{where} ({kind})")) from error


def explain(error: ValidationError, model: type[BaseModel], where: str) -> str:
    """Say in one sentence what is wrong first."""
    # A misspelt key is also a missing one: say the first.
    first = min(error.errors(), key=lambda item: item["type"] != "extra_forbidden")
    location = ".".join(str(part) for part in first["loc"] if part not in (_NAME, _MAPPING))
    place = f"{where}: {location}" if location else where
    if first["type"] == "extra_forbidden":
        *path, key = first["loc"]
        return f"{place} is not a known key. {did_you_mean(str(key), _settings_at(model, path).model_fields)}"
    if first["type"] == "missing":
        return f"{place} is missing; it is required."
    message = first["msg"].removeprefix("Value error, ")
    return f"{place}: {message[0].lower()}{message[1:]} (got {first['input']!r})."


def _settings_at(model: type[BaseModel], path: Sequence[int | str]) -> type[BaseModel]:
    """Find the settings at a path of field names, indices, keys, and class names where a field takes several."""
    options: dict[int | str, type[BaseModel]] = {}
    for part in path:
        if part in options:
            model = options[part]
        elif (field := model.model_fields.get(str(part))) is not None:
            options = {found.__name__: found for found in _settings_in(field.annotation)}
            model = next(iter(options.values()), model)
    return model


def _settings_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _settings_in(argument)


def override(data: Any, assignments: Sequence[str]) -> Any:
    """Apply ``key.0.key=value`` assignments to a recipe's plain data, as far as they lead somewhere; values are YAML."""
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals or not path:
            raise CompressError(f"--set {assignment!r}: write it as key=value, for example passes.0.bits=4.")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise CompressError(f"--set {assignment!r}: the value {text!r} is not YAML.") from None
        target, keys = data, path.split(".")
        try:
            for key in keys[:-1]:
                if isinstance(target, dict) and target.get(key) is None:
                    target[key] = {}
                target = target[int(key)] if isinstance(target, list) else target[key]
            if isinstance(target, list):
                target[int(keys[-1])] = value
            else:
                target[keys[-1]] = value
        except (ValueError, IndexError, TypeError, KeyError) as error:
            raise CompressError(
                f"--set {assignment!r}: {path} does not lead to a place in the recipe ({error})."
            ) from error
    return data


Overrides = Sequence[str] | Mapping[str, Any]
"""``key.0.key=value`` assignments, or the same as a mapping of paths to values."""


def load_recipe(recipe: str | Path | Mapping[str, Any] | Recipe, overrides: Overrides = ()) -> Recipe:
    """Read a recipe, a YAML file, the same as a mapping or a :class:`Recipe`, and refuse anything that is wrong in it."""
    if isinstance(recipe, Recipe) and not overrides:
        return recipe
    if isinstance(recipe, (Recipe, Mapping)):
        data, where = _plain(recipe), "recipe"
    else:
        data, where = _read_yaml(Path(recipe)), str(recipe)
    if isinstance(overrides, Mapping):
        overrides = [f"{path}={json.dumps(value)}" for path, value in overrides.items()]
    try:
        return Recipe.model_validate(override(data, overrides))
    except ValidationError as error:
        raise CompressError(explain(error, Recipe, where)) from error


def _plain(value: Any) -> Any:
    """Copy settings into mappings, lists and scalars, whatever config objects are in them."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise CompressError(f"recipe {path}: cannot be read ({error}).") from error
    except yaml.YAMLError as error:
        raise CompressError(f"recipe {path}: not YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(data, dict):
        raise CompressError(f"recipe {path}: must be a mapping with the keys model and passes.")
    return data


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of recipes, with every installed pass."""
    configs = tuple(config_class(kind) for kind in kinds())
    choice: Any = Annotated[Union[configs], Field(discriminator="kind")] if len(configs) > 1 else configs[0]
    schema = Recipe.model_json_schema(ref_template="#/$defs/{model}")
    passes = TypeAdapter(choice).json_schema(ref_template="#/$defs/{model}")
    for definition in passes.get("$defs", {}).values():
        if "kind" in definition.get("properties", {}):
            definition["required"] = ["kind", *definition.get("required", [])]
    schema["$defs"] = {**schema.get("$defs", {}), **passes.pop("$defs", {})}
    schema["properties"]["passes"]["items"] = passes
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return schema
