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


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_runs_until_it_needs_weights(recipe):
    written = yaml.safe_load(recipe.read_text())
    if absent := {step["kind"] for step in written["passes"]} - set(kinds()):
        pytest.skip(f"needs the pass {min(absent)}")
    found = dry_run(recipe, small=True)
    assert found["model"] == written["model"]
    assert found["blocks"] == 1
    assert found["checkpoint_bytes"] == pytest.approx(stored_bytes(written), rel=1e-3)


def packed_bytes(rows, columns, seed, parent, shared):
    """Bit planes in whole words of 32 columns, and a float16 codebook of 2**bits values per row for every width; or 7 bytes a row."""
    planes = parent * 4 * math.ceil(columns / 32)
    if shared:
        return rows * (planes + 7) + 2 * columns
    return rows * (planes + sum(2 * 2**bits for bits in range(seed, parent + 1)))


def stored_bytes(recipe):
    """What one block and a small vocabulary of the paper's model take once the recipe's first pass is done."""
    config = type(CONFIGS[recipe["model"]])(**CONFIGS[recipe["model"]].to_dict())
    config.num_hidden_layers, config.vocab_size = 1, 2048
    sizes = {name: shape for name, shape in shapes(config).items() if ".layers." in name and len(shape) == 2}
    dense = 2 * sum(map(math.prod, shapes(config).values()))
    step = recipe["passes"][0]
    if step["kind"] == "mini_llm":
        return (1 - step["ratio"]) * dense
    if step["kind"] == "prune":
        return dense
    seed, parent = (step[key] if key in step else step["bits"] for key in ("seed_bits", "parent_bits"))
    shared = step["kind"] == "any_precision" and step.get("objective") != "weight"
    return dense + sum(packed_bytes(*shape, seed, parent, shared) - 2 * math.prod(shape) for shape in sizes.values())


def test_there_are_recipes_for_every_paper():
    assert {path.stem.partition("-llama")[0].partition("-opt")[0].partition("-mistral")[0] for path in RECIPES} >= {
        "any-precision",
        "prune",
        "joint",
        "mini-llm",
        "compress-then-prompt",
    }


@pytest.mark.slow
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
