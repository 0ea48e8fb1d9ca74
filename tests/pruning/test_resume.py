"""Kill a run in its surveys or its blocks, run again: the bytes are those of an undisturbed run."""

import os
import random
import signal
import subprocess
import time

import pytest
import yaml

import compress
from tests.compress.test_resume import assert_same_files, command, units

REFRESHED = {"kind": "prune", "score": "sparsegpt", "allocation": "mrp", "refresh": 5, "step": 0.02, "spread": 0.1}


SHAPED = {"kind": "mini_llm", "mode": "global", "ratio": 0.3, "score": "gates"}


@pytest.mark.parametrize("settings", [REFRESHED, {"kind": "joint", "bits": 3, "allocation": "hessian"}, SHAPED])
def test_killed_runs_end_with_the_same_bytes(recipe, tmp_path, settings):
    recipe["passes"] = [settings]
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    compress.run(recipe, tmp_path / "whole")
    target, work = tmp_path / "killed", tmp_path / "killed.work"
    draw = random.Random(settings["kind"])
    kills = 0
    while not target.exists():
        process = subprocess.Popen(command(path, target), stdout=subprocess.DEVNULL)
        if kills < 4:  # let it finish a unit or more, then a random moment later pull the plug
            before = units(work)
            while process.poll() is None and units(work) <= before:
                time.sleep(0.001)
            time.sleep(draw.random() * 0.05)
            os.kill(process.pid, signal.SIGKILL) if process.poll() is None else None
            kills += 1
        process.wait()
    assert kills >= 1
    assert_same_files(tmp_path / "whole", target)


@pytest.mark.parametrize("damaged", ["survey-0-1", "survey-1-2", "block-1"])
def test_a_damaged_survey_or_block_is_made_again(recipe, tmp_path, damaged):
    work = tmp_path / "work"
    recipe["passes"] = [REFRESHED]
    compress.run(recipe, tmp_path / "one", workspace=work)
    (file,) = work.glob(f"prune-*/{damaged}.safetensors")
    file.write_bytes(file.read_bytes()[:50])
    for later in work.glob("prune-*/block-2.safetensors"):
        later.unlink()  # or the pass would not look at its surveys again
    compress.run(recipe, tmp_path / "two", workspace=work)
    assert_same_files(tmp_path / "one", tmp_path / "two")
