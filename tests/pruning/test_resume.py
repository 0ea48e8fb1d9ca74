"""Kill a run in its surveys or its blocks, run again: the bytes are those of an undisturbed run."""

import pytest

import compress
from tests.conftest import assert_same_files

REFRESHED = {"kind": "prune", "score": "sparsegpt", "allocation": "mrp", "refresh": 5, "step": 0.02, "spread": 0.1}


SHAPED = {"kind": "mini_llm", "mode": "global", "ratio": 0.3, "score": "gates"}


@pytest.mark.slow
@pytest.mark.parametrize("settings", [REFRESHED, {"kind": "joint", "bits": 3, "allocation": "hessian"}, SHAPED])
def test_killed_runs_end_with_the_same_bytes(recipe, tmp_path, settings, kill_and_finish):
    recipe["passes"] = [settings]
    compress.run(recipe, tmp_path / "whole")
    kill_and_finish(recipe, tmp_path / "killed", kills=4, pause=0.05)
    assert_same_files(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
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
