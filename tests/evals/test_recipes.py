"""The papers' recipes are valid and run to the point where weights would be needed."""

import math
from pathlib import Path

import pytest
import yaml
from dry_run import CONFIGS, dry_run, headers_only, shapes

from compress.errors import CompressError
from compress.passes import kinds

FOLDER = Path(__file__).parents[2] / "docs" / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_runs_until_it_needs_weights(recipe):
    written = yaml.safe_load(recipe.read_text())
    if absent := {step["kind"] for step in written["passes"]} - set(kinds()):
        pytest.skip(f"needs the pass {min(absent)}")
    found = dry_run(recipe, small=True)
    assert found["model"] == written["model"]
    assert found["blocks"] == 1
    assert found["checkpoint_bytes"] > 0


def test_there_are_recipes_for_every_paper():
    assert {path.stem.partition("-llama")[0].partition("-opt")[0].partition("-mistral")[0] for path in RECIPES} >= {
        "any-precision",
        "prune",
        "joint",
        "mini-llm",
        "compress-then-prompt",
    }


@pytest.mark.parametrize(
    ("model", "billions"),
    [("meta-llama/Llama-2-7b-hf", 6.738), ("mistralai/Mistral-7B-v0.1", 7.242), ("facebook/opt-6.7b", 6.658)],
)
def test_the_shapes_are_the_published_ones(model, billions):
    assert sum(math.prod(shape) for shape in shapes(CONFIGS[model]).values()) / 1e9 == pytest.approx(billions, abs=1e-3)


def test_headers_take_no_room(tmp_path):
    config = type(CONFIGS["facebook/opt-1.3b"])(**CONFIGS["facebook/opt-1.3b"].to_dict())
    config.num_hidden_layers = 1
    file = headers_only(config, tmp_path / "model") / "model.safetensors"
    assert file.stat().st_size > 1e8
    assert file.stat().st_blocks * 512 < 1e6


def test_a_model_of_unknown_shape_is_named(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: facebook/opt-2.8b\npasses: [{kind: rtn, bits: 4}]\n")
    with pytest.raises(CompressError, match=r"Did you mean 'facebook/opt-2\.7b'"):
        dry_run(recipe)
