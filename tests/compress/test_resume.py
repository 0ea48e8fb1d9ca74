"""Kill a run at any moment, run again: it continues, and the bytes are those of an undisturbed run."""

import json
import time

import pytest

import compress
from tests.conftest import assert_same_files


@pytest.mark.slow
@pytest.mark.parametrize(("objective", "sensitivity"), [("output", "fisher"), ("weight", "activation")])
def test_killed_runs_end_with_the_same_bytes(recipe, tmp_path, objective, sensitivity, kill_and_finish):
    recipe["calibration"] |= {"samples": 8, "length": 48}
    recipe["passes"][0] |= {"parent_bits": 8, "objective": objective, "sensitivity": sensitivity}
    compress.run(recipe, tmp_path / "whole")
    kill_and_finish(recipe, tmp_path / "killed", kills=3)
    assert_same_files(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
def test_a_finished_unit_is_not_done_again(recipe, tmp_path):
    """A shared workspace: the second recipe differs in its quantiser only, and reuses the sensitivities."""
    work = tmp_path / "work"
    recipe["passes"][0]["objective"] = "weight"  # objective output takes the gradients of fewer samples
    compress.run(recipe, tmp_path / "one", workspace=work)
    recipe["passes"] = [{"kind": "kmeans", "bits": 4}]
    seen = []
    compress.run(recipe, tmp_path / "two", workspace=work, progress=lambda what, *_: seen.append(what))
    assert "kmeans: block 0" in seen
    assert not any("forward" in what or "backward" in what for what in seen)


@pytest.mark.slow
def test_changed_settings_do_not_find_old_units(recipe, tmp_path):
    work = tmp_path / "work"
    compress.run(recipe, tmp_path / "one", workspace=work)
    recipe["passes"][0]["parent_bits"] = 5
    compress.run(recipe, tmp_path / "two", workspace=work)
    assert max(json.loads((tmp_path / "two" / "compression.json").read_text())["sizes"]["tensors_at_bits"]) == "5"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "sensitivity", "unit"),
    [
        ("output", "fisher", "any_precision-*/block-1"),
        ("output", "fisher", "draws-*/fisher-1"),
        ("weight", "fisher", "fisher-*/fisher--1"),
        ("output", "activation", "any_precision-*/block-1"),
    ],
)
def test_a_damaged_unit_is_made_again(make_model, recipe, tmp_path, objective, sensitivity, unit):
    """Also where the hidden states that led to it have been cleared away."""
    work = tmp_path / "work"
    recipe["model"] = str(make_model("llama", tie_word_embeddings=False))
    include = ["lm_head", "model.embed_tokens"] if sensitivity == "fisher" else []
    recipe["passes"][0] |= {"objective": objective, "sensitivity": sensitivity, "include": include}
    compress.run(recipe, tmp_path / "one", workspace=work)
    for later in work.glob("any_precision-*/block-1.safetensors"):
        later.unlink()  # or the pass would not look at the sensitivities again
    damaged = [*work.glob(f"{unit}.safetensors")]
    assert bool(damaged) == ("fisher-" in unit)
    for path in damaged:
        path.write_bytes(path.read_bytes()[:50])
    compress.run(recipe, tmp_path / "two", workspace=work)
    assert_same_files(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_the_log_has_one_line_per_unit(recipe, tmp_path):
    start = time.perf_counter()
    target = compress.run(recipe, tmp_path / "model")
    elapsed = time.perf_counter() - start
    lines = [json.loads(line) for line in (tmp_path / "model.log.jsonl").read_text().splitlines()]
    assert [line["unit"] for line in lines][1:] == [f"model.layers.{i}" for i in range(3)]
    assert all(line["seconds"] > 0 for line in lines)
    assert sum(line["seconds"] for line in lines) < elapsed  # one unit after the other
    assert "seconds" not in (target / "compression.json").read_text()
