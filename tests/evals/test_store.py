"""Measurements survive a kill, count once, and leave the checkpoint's own files alone."""

import json
import shutil

import pytest

from compress.errors import CompressError
from compress.evals.store import Key, Results, dense_identity, identity, results_of
from compress.manifest import read_manifest

KEY = Key("text", "a.txt", "0123", "4", settings={"sha256": "ab"})


def test_what_is_added_is_found_again(tmp_path):
    path = tmp_path / "report" / "results.jsonl"
    store = Results(path)
    assert store.find(KEY) is None
    store.add(KEY, {"loss": 1.5}, label="x")
    again = Results(path)
    assert again.find(KEY)["metrics"] == {"loss": 1.5}
    assert again.rows("text")[0]["label"] == "x"
    assert again.find(Key("text", "a.txt", "0123", "4", prompt="p", settings={"sha256": "ab"})) is None


def test_the_last_of_equal_keys_counts(tmp_path):
    store = Results(tmp_path / "r.jsonl")
    store.add(KEY, {"loss": 1.0})
    store.add(KEY, {"loss": 2.0})
    assert [row["metrics"]["loss"] for row in Results(tmp_path / "r.jsonl").rows()] == [2.0]


def test_a_line_cut_by_a_kill_is_dropped_and_any_other_damage_named(tmp_path):
    path = tmp_path / "r.jsonl"
    Results(path).add(KEY, {"loss": 1.0})
    with path.open("a") as file:
        file.write('{"kind": "te')
    store = Results(path)
    assert len(store.rows()) == 1
    store.add(Key("text", "b.txt", "0123", "4"), {"loss": 3.0})
    assert len(Results(path).rows()) == 2
    path.write_text('{"kind": 1}\n' + path.read_text())
    with pytest.raises(CompressError, match="line 1: is not a measurement"):
        Results(path)


def test_a_line_that_another_process_finished_is_kept(tmp_path):
    path = tmp_path / "r.jsonl"
    Results(path).add(KEY, {"loss": 1.0})
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])  # the other process is in the middle of its line
    ours = Results(path)
    path.write_bytes(whole)
    ours.add(Key("text", "b.txt", "0123", "4"), {"loss": 3.0})
    assert len(Results(path).rows()) == 2


def test_a_folder_that_can_not_be_written_says_what_to_do(tmp_path):
    (tmp_path / "report").write_text("a file where the folder should be")
    with pytest.raises(CompressError, match="--results FILE"):
        Results(tmp_path / "report" / "results.jsonl").add(KEY, {})


@pytest.mark.slow
def test_a_checkpoint_keeps_its_own_and_verify_does_not_mind(compressed, tmp_path, tiny_llama, verify):
    folder = shutil.copytree(compressed, tmp_path / "model")
    results_of(folder).add(KEY, {"loss": 1.0})
    assert (folder / "report" / "results.jsonl").is_file()
    assert len(verify(folder)) == 3
    assert results_of(tiny_llama).path is None  # a dense model's folder is not ours to write to


def test_what_a_model_is(compressed, tiny_llama, tmp_path):
    assert dense_identity(read_manifest(compressed)) == identity(tiny_llama)
    folder = shutil.copytree(compressed, tmp_path / "model")
    assert identity(folder) == identity(compressed)
    manifest = json.loads((folder / "compression.json").read_text())
    next(iter(manifest["files"].values()))["sha256"] = "0"
    (folder / "compression.json").write_text(json.dumps(manifest))
    assert identity(folder) != identity(compressed)
