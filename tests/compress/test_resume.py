"""Kill a run at any moment, run again: it continues, and the bytes are those of an undisturbed run."""

import filecmp
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import yaml

import compress


def command(recipe_file, output):
    return [sys.executable, "-m", "compress.cli", "run", str(recipe_file), "-o", str(output)]


def assert_same_files(left, right):
    names = sorted(path.name for path in left.iterdir())
    assert names == sorted(path.name for path in right.iterdir())
    _, different, unreadable = filecmp.cmpfiles(left, right, names, shallow=False)
    assert not different
    assert not unreadable


@pytest.fixture
def slow_recipe(recipe, tmp_path):
    """A run that takes a second or two after its imports, on inputs carried from block to block."""
    recipe["calibration"] |= {"samples": 8, "length": 48}
    recipe["passes"][0] |= {"parent_bits": 8, "include": []}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def units(work):
    return len(list(work.glob("*/*.safetensors"))) if work.exists() else 0


@pytest.mark.parametrize(("objective", "sensitivity"), [("output", "fisher"), ("weight", "activation")])
def test_killed_runs_end_with_the_same_bytes(slow_recipe, tmp_path, objective, sensitivity):
    arguments = ["--set", f"passes.0.objective={objective}", "--set", f"passes.0.sensitivity={sensitivity}"]
    subprocess.run([*command(slow_recipe, tmp_path / "whole"), *arguments], check=True, capture_output=True)
    target, work = tmp_path / "killed", tmp_path / "killed.work"
    draw = random.Random(sensitivity)
    kills = 0
    while not target.exists():
        process = subprocess.Popen([*command(slow_recipe, target), *arguments], stdout=subprocess.DEVNULL)
        if kills < 3:  # let it finish a unit or more, then a random moment later pull the plug
            before = units(work)
            while process.poll() is None and units(work) <= before:
                time.sleep(0.002)
            time.sleep(draw.random() * 0.1)
            os.kill(process.pid, signal.SIGKILL) if process.poll() is None else None
            kills += 1
        process.wait()
        assert target.exists() == (process.returncode == 0)
    assert kills >= 1
    assert_same_files(tmp_path / "whole", target)
    assert {path.name for path in tmp_path.iterdir()} == {
        "recipe.yaml", "whole", "whole.log.jsonl", "killed", "killed.log.jsonl",
    }  # fmt: skip


def test_a_finished_unit_is_not_done_again(recipe, tmp_path):
    """A shared workspace: the second recipe differs in its quantiser only, and reuses the sensitivities."""
    work = tmp_path / "work"
    compress.run(recipe, tmp_path / "one", workspace=work)
    recipe["passes"] = [{"kind": "kmeans", "bits": 4}]
    seen = []
    compress.run(recipe, tmp_path / "two", workspace=work, report=lambda what, *_: seen.append(what))
    assert "kmeans: block 0" in seen
    assert not any("forward" in what or "backward" in what for what in seen)


def test_changed_settings_do_not_find_old_units(recipe, tmp_path):
    work = tmp_path / "work"
    compress.run(recipe, tmp_path / "one", workspace=work)
    recipe["passes"][0]["parent_bits"] = 5
    compress.run(recipe, tmp_path / "two", workspace=work)
    assert max(json.loads((tmp_path / "two" / "compression.json").read_text())["sizes"]["tensors_at_bits"]) == "5"


@pytest.mark.parametrize("unit", ["any_precision-*/block-1", "fisher-*/fisher-1", "fisher-*/fisher--1"])
@pytest.mark.parametrize("sensitivity", ["fisher", "activation"])
def test_a_damaged_unit_is_made_again(make_model, recipe, tmp_path, sensitivity, unit):
    """Also where the hidden states that led to it have been cleared away."""
    work = tmp_path / "work"
    recipe["model"] = str(make_model("llama", tie_word_embeddings=False))
    include = ["lm_head", "model.embed_tokens"] if sensitivity == "fisher" else []
    recipe["passes"][0] |= {"sensitivity": sensitivity, "include": include}
    compress.run(recipe, tmp_path / "one", workspace=work)
    for later in work.glob("any_precision-*/block-1.safetensors"):
        later.unlink()  # or the pass would not look at the sensitivities again
    for damaged in work.glob(f"{unit}.safetensors"):
        damaged.write_bytes(damaged.read_bytes()[:50])
    compress.run(recipe, tmp_path / "two", workspace=work)
    assert_same_files(tmp_path / "one", tmp_path / "two")


def test_the_log_has_one_line_per_unit(recipe, tmp_path):
    target = compress.run(recipe, tmp_path / "model")
    lines = [json.loads(line) for line in (tmp_path / "model.log.jsonl").read_text().splitlines()]
    assert [line["unit"] for line in lines][1:] == [f"model.layers.{i}" for i in range(3)]
    assert all(line["seconds"] >= 0 for line in lines)
    assert "seconds" not in (target / "compression.json").read_text()
