"""What README, CONTRIBUTING and docs/ say is true: links lead somewhere, recipes are valid, and shown code runs."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import yaml
from safetensors import safe_open

from compress.passes import Needs
from compress.recipe import load_recipe

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def names(paths):
    return [str(path.relative_to(ROOT)) for path in paths]


def blocks(page, language):
    return re.findall(rf"^ *```{language}\n(.*?)^ *```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)


def anchors(page):
    """The names of a page's headings, as GitHub and MkDocs make them."""
    without_code = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.*)", without_code, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_links_lead_somewhere(page):
    broken = []
    for target in re.findall(r"\]\(([^()\s]+)\)", page.read_text("utf-8")):
        if not re.match(r"[a-z]+:", target):
            path, _, anchor = target.partition("#")
            there = (page.parent / path).resolve() if path else page
            if not there.exists() or (anchor and anchor not in anchors(there)):
                broken.append(target)
    assert not broken


def test_every_page_is_in_the_sites_navigation():
    shown = set(re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    pages = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    assert pages <= shown


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 130


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_recipes_shown_are_valid(page):
    for text in blocks(page, "yaml"):
        shown = yaml.safe_load(text)
        recipe = shown if isinstance(shown, dict) else {"passes": shown}
        recipe = {"model": "builtin", **recipe}
        assert load_recipe(recipe).passes


def test_code_shown_in_contributing_is_the_strangers_package():
    files = {path.name: path.read_text("utf-8") for path in (ROOT / "tests" / "stranger").glob("*.py")}
    shown = blocks(ROOT / "CONTRIBUTING.md", "python")
    missing = [name for name, text in files.items() if text not in shown]
    assert files
    assert not missing


def test_contributing_explains_every_need():
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    table = text[text.index("| `Needs` field") :].partition("\n\n")[0]
    explained = {name for row in table.splitlines()[2:] for name in re.findall(r"`(\w+)[^`]*`", row.split("|")[1])}
    assert explained == {field.name for field in dataclasses.fields(Needs)}


@pytest.mark.slow
def test_passes_shown_in_contributing_run(recipe, tmp_path, strangers_folder, run_code):
    """Prune by the shown score under an allocation that measures, then train norms to make up for it."""
    recipe["passes"] = [
        {"kind": "prune_relative", "sparsity": 0.5, "allocation": "mrp"},
        {"kind": "tune_norms", "steps": 8, "batch": 2, "validate_every": 4, "learning_rate": 0.01},
    ]
    code = "import compress, json, sys; compress.run(json.loads(sys.argv[1]), sys.argv[2])"
    run_code(code, json.dumps(recipe), tmp_path / "model", path=[strangers_folder])
    pruned, tuned = json.loads((tmp_path / "model" / "compression.json").read_text())["passes"]
    counts = [linear for unit in pruned["units"].values() for linear in unit["linears"].values()]
    zeros, weights = (sum(count[key] for count in counts) for key in ("zeros", "parameters"))
    assert zeros == weights // 2
    history = tuned["units"]["model"]["history"]
    assert tuned["units"]["model"]["best"]["held_out"]["loss"] < history[0]["held_out"]["loss"]
    with safe_open(tmp_path / "model" / "model.safetensors", framework="pt") as after:
        with safe_open(Path(recipe["model"]) / "model.safetensors", framework="pt") as before:
            norm = "model.layers.1.input_layernorm.weight"
            assert not after.get_tensor(norm).equal(before.get_tensor(norm))
        up = "model.layers.1.mlp.up_proj"
        kept = pruned["units"]["block-1"]["linears"][up]["zeros"]
        assert (after.get_tensor(f"{up}.weight") == 0).sum() == kept > 0  # the zeros stay


@pytest.mark.slow
def test_the_shown_score_is_relative_importance(recipe, tmp_path, strangers_folder, run_code):
    """A weight of ten times its row's others is small beside them once the row is as large."""
    code = (
        "import torch\n"
        "from types import SimpleNamespace as Of\n"
        "from compress.ranks import Ranks\n"
        "from relative import PruneRelative\n"
        "weight = torch.tensor([[1.0, 1.0], [10.0, 30.0]])\n"
        "def inputs(visit, end_lot):\n"
        "    visit('x', torch.ones(4, 2))\n"
        "    end_lot()\n"
        "block = Of(linears={'x': Of(weight=weight)}, for_each_input=inputs, ranks=Ranks())\n"
        "step = PruneRelative(PruneRelative.Config())\n"
        "print(step.scored(block, ['x']).scores['x'].tolist())\n"
    )
    found = json.loads(run_code(code, path=[strangers_folder]))
    expected = [[1 / 2 + 1 / 11, 1 / 2 + 1 / 31], [10 / 40 + 10 / 11, 30 / 40 + 30 / 31]]
    assert found == [pytest.approx(row, rel=1e-5) for row in expected]
