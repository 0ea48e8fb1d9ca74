"""What a recipe may say, and how a wrong one is answered."""

import copy
import re
from importlib.metadata import EntryPoint

import pydantic
import pytest

from compress.errors import CompressError
from compress.passes import pass_class
from compress.recipe import Recipe, explain, json_schema, load_recipe
from compress.settings import Calibration, PassConfig, config_class, kinds

INSTALLED = [
    "any_precision", "joint", "kmeans", "kv_calibrate", "lora_recovery", "mini_llm", "prune", "rtn", "soft_prompt", "tune_tables",
]  # fmt: skip


def recipe(**changes):
    """A short valid recipe, as a mapping."""
    return {"model": "some/model", "passes": [{"kind": "rtn", "bits": 4}], **copy.deepcopy(changes)}


def refused(data, *overrides):
    """The message a wrong recipe gets."""
    with pytest.raises(CompressError) as caught:
        load_recipe(data, overrides)
    return str(caught.value)


# Valid recipes


def test_only_model_and_passes_are_needed():
    loaded = load_recipe(recipe())
    assert loaded.model == "some/model"
    assert (loaded.revision, loaded.calibration, loaded.output) == (None, None, None)
    assert (loaded.seed, loaded.device) == (0, "auto")
    (only,) = loaded.passes
    assert (only.kind, only.bits, only.ignore, only.include) == ("rtn", 4, (), ())


def test_calibration_defaults():
    calibration = load_recipe(recipe(calibration={"builtin": "stdlib"})).calibration
    assert (calibration.samples, calibration.length, calibration.min_characters) == (100, 512, 0)
    assert (calibration.split, calibration.column, calibration.separator) == ("train", "text", None)


def test_any_precision_defaults():
    (only,) = load_recipe(recipe(passes=[{"kind": "any_precision"}])).passes
    assert (only.seed_bits, only.parent_bits, only.sensitivity, only.keep_zeros) == (3, 8, "fisher", False)


def test_passes_keep_their_order():
    loaded = load_recipe(recipe(passes=[{"kind": kind} for kind in ("rtn", "kmeans", "any_precision")]))
    assert [each.kind for each in loaded.passes] == ["rtn", "kmeans", "any_precision"]


def test_a_file_and_a_mapping_say_the_same(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("model: some/model\npasses:\n  - kind: rtn\n    bits: 4\n")
    assert load_recipe(path) == load_recipe(str(path)) == load_recipe(recipe())


def test_a_recipe_object_is_accepted():
    config = pass_class("rtn").Config
    assert load_recipe(Recipe(model="some/model", passes=[config(bits=4)])) == load_recipe(recipe())
    assert load_recipe({"model": "some/model", "passes": [config(bits=4)]}) == load_recipe(recipe())


@pytest.mark.parametrize("kind", INSTALLED)
def test_settings_are_frozen(kind):
    loaded = load_recipe(recipe(passes=[{"kind": kind}], calibration={"builtin": "stdlib"}))
    for settings, field in ((loaded, "seed"), (loaded.calibration, "samples"), (loaded.passes[0], "kind")):
        with pytest.raises(pydantic.ValidationError, match="frozen"):
            setattr(settings, field, getattr(settings, field))


# Wrong recipes


def test_a_misspelt_key_is_named_with_the_nearest_known_one():
    assert refused(recipe(devise="cpu")) == "recipe: devise is not a known key. Did you mean 'device'?"


def test_a_misspelt_calibration_key_is_compared_with_calibration_keys():
    message = refused(recipe(calibration={"builtin": "stdlib", "sample": 3}))
    assert message == "recipe: calibration.sample is not a known key. Did you mean 'samples'?"


@pytest.mark.parametrize(
    ("kind", "key", "near"),
    [("rtn", "bit", "bits"), ("any_precision", "seed_bit", "seed_bits"), ("kmeans", "keep_zero", "keep_zeros")],
)
def test_a_misspelt_pass_key_is_compared_with_that_passs_keys(kind, key, near):
    message = refused(recipe(passes=[{"kind": "rtn"}, {"kind": kind, key: 3}]))
    assert message == f"passes.1 ({kind}): {key} is not a known key. Did you mean {near!r}?"


def test_a_misspelt_key_of_a_passs_own_text_is_compared_with_calibration_keys():
    message = refused(recipe(passes=[{"kind": "soft_prompt", "text": {"builtin": "stdlib", "sampels": 3}}]))
    assert message == "passes.0 (soft_prompt): text.sampels is not a known key. Did you mean 'samples'?"


class Layer(pydantic.BaseModel, extra="forbid"):
    """Settings of one layer, in a config such as somebody else's pass may have."""

    rank: int = 8


class ByLayer(PassConfig):
    """Settings in a mapping, in a list, and in one field of two classes."""

    layers: dict[str, Layer] = {}
    stages: list[Layer] = []
    first: Layer | Calibration | None = None


@pytest.mark.parametrize(
    ("settings", "place", "near"),
    [
        ({"layers": {"q_proj": {"rnak": 4}}}, "layers.q_proj.rnak", "rank"),
        ({"stages": [{}, {"rnak": 4}]}, "stages.1.rnak", "rank"),
        ({"first": {"rnak": 4}}, "first.Layer.rnak", "rank"),
        ({"layer": {}}, "layer", "layers"),
    ],
)
def test_a_misspelt_key_in_nested_settings_is_compared_with_their_keys(settings, place, near):
    with pytest.raises(pydantic.ValidationError) as caught:
        ByLayer(kind="by_layer", **settings)
    message = explain(caught.value, ByLayer, "passes.0 (by_layer)")
    assert message == f"passes.0 (by_layer): {place} is not a known key. Did you mean {near!r}?"


def test_a_key_like_no_other_gets_the_list_of_keys():
    message = refused(recipe(zzz=1))
    known = "calibration, device, model, output, passes, revision, seed"
    assert message == f"recipe: zzz is not a known key. Known: {known}."


def test_an_unknown_kind_is_named_with_the_nearest_known_one():
    message = refused(recipe(passes=[{"kind": "any-precision"}]))
    assert message == "passes.0.kind: there is no pass 'any-precision'. Did you mean 'any_precision'?"


@pytest.mark.parametrize("item", [{"bits": 4}, 4, None, ["rtn"]])
def test_a_pass_without_kind_is_told_the_kinds(item):
    message = refused(recipe(passes=[item]))
    assert message.startswith(f"passes.0: a pass is a mapping with a 'kind', one of {', '.join(INSTALLED)}; got ")


def test_a_missing_key_is_named():
    data = recipe()
    del data["model"]
    assert refused(data) == "recipe: model is missing; it is required."


def test_without_passes_it_has_the_best_there_are():
    data = recipe()
    del data["passes"]
    (quantise,) = load_recipe(data).passes
    assert quantise == config_class("any_precision")()
    assert [quantise.shares(columns) for columns in (511, 512, 8192)] == [False, True, True]
    assert [quantise.packs_embedding(columns) for columns in (511, 512, 8192)] == [False, True, True]
    named = quantise.model_copy(update={"include": ("lm_head",)})
    assert not named.packs_embedding(4096)
    assert named.embedding_table(range(3, 5), 2) == {}
    assert quantise.embedding_table(range(3, 5), 2) == {3: 5, 4: 6}


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"model": 3}, "recipe: model: input should be a valid string (got 3)."),
        ({"seed": "x"}, "recipe: seed: input should be a valid integer"),
        ({"seed": -1}, "recipe: seed: input should be greater than or equal to 0 (got -1)."),
        ({"passes": []}, "recipe: passes: "),
        ({"passes": None}, "recipe: passes: "),
        ({"passes": {"kind": "rtn"}}, "recipe: passes: "),
        ({"passes": [{"kind": "rtn", "bits": "many"}]}, "passes.0 (rtn): bits: input should be a valid integer"),
        ({"passes": [{"kind": "rtn", "bits": 9}]}, "passes.0 (rtn): bits: input should be less than or equal to 8"),
        ({"passes": [{"kind": "kmeans", "sensitivity": 1}]}, "passes.0 (kmeans): sensitivity: input should be "),
        ({"calibration": "stdlib"}, "recipe: calibration: input should be a valid dictionary"),
        ({"calibration": {"builtin": "x"}}, "recipe: calibration.builtin: input should be 'stdlib' (got 'x')."),
        ({"calibration": {"text": "a", "samples": 0}}, "recipe: calibration.samples: input should be greater than"),
        ({"calibration": {"text": "a", "length": 1}}, "recipe: calibration.length: input should be greater than"),
    ],
)
def test_a_bad_value_is_named_with_its_place(changes, where):
    assert refused(recipe(**changes)).startswith(where)


def test_the_seed_width_must_not_exceed_the_parents():
    message = refused(recipe(passes=[{"kind": "any_precision", "seed_bits": 6, "parent_bits": 4}]))
    assert message.startswith("passes.0 (any_precision): seed_bits 6 must not exceed parent_bits 4")


@pytest.mark.parametrize("sources", [{}, {"text": "a.txt", "builtin": "stdlib"}, {"text": "a.txt", "dataset": "b"}])
def test_calibration_has_one_source(sources):
    message = refused(recipe(calibration=sources))
    assert message.startswith("recipe: calibration: give exactly one of text, dataset and builtin")


@pytest.mark.parametrize("source", [{"text": "a.txt"}, {"dataset": "b"}, {"builtin": "stdlib"}])
def test_each_source_will_do(source):
    assert load_recipe(recipe(calibration=source)).calibration == Calibration(**source)


# Files


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"passes: [", "not YAML: "),
        (b"- model\n", "must be a mapping with the keys model and passes."),
        (b"", "must be a mapping with the keys model and passes."),
        (b"model: \xff", "cannot be read ("),
        (None, "cannot be read ("),
    ],
    ids=["not_yaml", "list", "empty", "not_utf8", "not_there"],
)
def test_a_file_that_is_no_recipe_is_refused_by_name(tmp_path, content, complaint):
    path = tmp_path / "recipe.yaml"
    if content is not None:
        path.write_bytes(content)
    message = refused(path)
    assert message.startswith(f"recipe {path}: {complaint}")
    assert "\n" not in message


def test_a_wrong_key_in_a_file_is_named_with_the_file(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("model: x\npasses: [{kind: rtn}]\ndevise: cpu\n")
    assert refused(path) == f"{path}: devise is not a known key. Did you mean 'device'?"


# Overrides


def test_overrides_reach_into_mappings_and_lists_and_are_read_as_yaml():
    loaded = load_recipe(
        recipe(passes=[{"kind": "rtn"}, {"kind": "kmeans"}]),
        ["seed=7", "passes.1.bits=3", "passes.0.ignore=[a, b]", "calibration.text=a=b.txt", "revision=null"],
    )
    assert loaded.seed == 7
    assert loaded.passes[1].bits == 3
    assert loaded.passes[0].ignore == ("a", "b")
    assert loaded.calibration.text == "a=b.txt"
    assert loaded.revision is None


def test_the_last_override_wins():
    assert load_recipe(recipe(), ["seed=1", "seed=2"]).seed == 2


def test_a_whole_pass_can_be_overridden():
    (only,) = load_recipe(recipe(), ["passes.0={kind: kmeans, bits: 5}"]).passes
    assert (only.kind, only.bits) == ("kmeans", 5)


def test_an_override_that_is_not_yaml_is_named():
    assert refused(recipe(), "seed=[1") == "--set 'seed=[1': the value '[1' is not YAML."


@pytest.mark.parametrize("item", ["passes.3.bits=3", "passes.x.bits=3", "passes.1=3", "model.a.b=3"])
def test_an_override_that_leads_nowhere_is_named(item):
    path = item.partition("=")[0]
    assert refused(recipe(), item).startswith(f"--set {item!r}: {path} does not lead to a place in the recipe")


def test_an_override_without_a_value_is_told_how_to_write_one():
    assert refused(recipe(), "seed") == "--set 'seed': write it as key=value, for example passes.0.bits=4."


def test_an_overridden_value_is_checked_like_any_other():
    assert refused(recipe(), "passes.0.bitz=3") == "passes.0 (rtn): bitz is not a known key. Did you mean 'bits'?"


def test_overrides_leave_the_callers_mapping_as_it_was():
    data = recipe()
    load_recipe(data, ["passes.0.bits=3"])
    assert data == recipe()


def test_overrides_apply_to_a_recipe_object():
    loaded = load_recipe(load_recipe(recipe()), ["passes.0.bits=3", "seed=5"])
    assert (loaded.passes[0].bits, loaded.seed) == (3, 5)


# Passes and schema


@pytest.mark.parametrize("kind", INSTALLED)
def test_settings_that_load_without_torch_are_those_of_the_pass(kind):
    assert config_class(kind) is pass_class(kind).Config


def test_the_installed_passes():
    assert kinds() == INSTALLED
    assert all(pass_class(kind).Config(kind=kind).kind == kind for kind in INSTALLED)


CONFIGS = [Recipe, Calibration, *(pass_class(kind).Config for kind in INSTALLED)]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)
def test_every_setting_is_described(config):
    assert [name for name, field in config.model_fields.items() if not field.description] == []


def references(node):
    """Every ``$ref`` anywhere in a schema."""
    if isinstance(node, dict):
        yield from [node["$ref"]] if isinstance(node.get("$ref"), str) else []
        node = list(node.values())
    if isinstance(node, list):
        for item in node:
            yield from references(item)


def test_the_schema_lists_every_pass_by_kind():
    schema = json_schema()
    items = schema["properties"]["passes"]["items"]
    assert sorted(items["discriminator"]["mapping"]) == INSTALLED
    assert len(items["oneOf"]) == len(INSTALLED)
    for kind, reference in items["discriminator"]["mapping"].items():
        definition = schema["$defs"][reference.removeprefix("#/$defs/")]
        assert definition["properties"]["kind"]["const"] == kind
        assert set(definition["properties"]) == set(pass_class(kind).Config.model_fields)


def test_the_schema_is_whole():
    schema = json_schema()
    assert schema["required"] == ["model"]
    assert schema["additionalProperties"] is False
    assert set(schema["properties"]) == set(Recipe.model_fields)
    names = [re.fullmatch(r"#/\$defs/(\w+)", reference)[1] for reference in references(schema)]
    assert names
    assert set(names) <= set(schema["$defs"])


def test_overrides_may_be_a_mapping():
    loaded = load_recipe(recipe(), {"passes.0.bits": 3, "seed": 5})
    assert loaded.passes[0].bits == 3
    assert loaded.seed == 5


def test_an_entry_that_names_no_settings_is_refused(monkeypatch):
    entry = EntryPoint("odd", "collections:OrderedDict", "compress.settings")
    monkeypatch.setattr("compress.settings._entries", lambda group: {"odd": entry})
    with pytest.raises(CompressError, match="pass 'odd': collections:OrderedDict is not a subclass"):
        config_class("odd")
