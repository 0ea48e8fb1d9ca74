"""A unit of finished work is there whole or not at all, and found again by what it depends on."""

import fcntl
import os

import pytest
import torch

from compress.errors import CompressError
from compress.workspace import Stage, Workspace, digest, write_atomic

TENSORS = {
    "half": torch.arange(6, dtype=torch.float16).view(2, 3),
    "planes": torch.tensor([[-1, 1 << 30]], dtype=torch.int32),
    "transposed": torch.arange(6.0).view(2, 3).t(),
    "scalar": torch.tensor(3.5),
    "empty": torch.empty(0, 4),
}
RECORD = {"error": {"3": 0.25}, "skipped": ["a", "b"], "name": "größe"}


@pytest.fixture
def stage(tmp_path):
    return Workspace(tmp_path).stage("pass", "settings")


def holding(path):
    """Another user of the workspace: holds the lock file until closed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = path.open("w")
    fcntl.flock(handle, fcntl.LOCK_EX)
    return handle


# Units


def test_tensors_and_record_of_a_unit_come_back(stage):
    stage.save("block-0", TENSORS, RECORD)
    loaded = stage.load("block-0")
    assert loaded.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    assert stage.record("block-0") == RECORD


def test_a_unit_without_figures_has_an_empty_record(stage):
    stage.save("block-0", TENSORS)
    assert stage.record("block-0") == {}


def test_a_unit_never_saved_has_no_record(stage):
    assert stage.record("block-0") is None


def test_a_partial_file_is_not_a_unit(stage):
    stage.save("block-0", TENSORS, RECORD)
    path = stage.path("block-0")
    path.rename(path.with_name(path.name + ".partial"))
    assert stage.record("block-0") is None


@pytest.mark.parametrize("keep", [0, 4, 8, 40, -20, -1])
def test_a_truncated_file_is_not_a_unit_and_can_be_saved_again(stage, keep):
    stage.save("block-0", TENSORS, RECORD)
    path = stage.path("block-0")
    path.write_bytes(path.read_bytes()[:keep])
    assert stage.record("block-0") is None
    stage.save("block-0", TENSORS, RECORD)
    assert stage.record("block-0") == RECORD


def test_a_run_killed_while_saving_leaves_what_was_there(stage, monkeypatch):
    def killed(tensors, path, metadata):
        path.write_bytes(b"half a file")
        raise KeyboardInterrupt

    stage.save("block-0", TENSORS, RECORD)
    monkeypatch.setattr("compress.workspace.save_file", killed)
    for unit in ("block-0", "block-1"):
        with pytest.raises(KeyboardInterrupt):
            stage.save(unit, {}, {"new": True})
    assert stage.record("block-0") == RECORD
    assert stage.record("block-1") is None


def test_a_finished_unit_leaves_no_partial_file(stage):
    stage.save("block-0", TENSORS)
    assert list(stage.folder.iterdir()) == [stage.path("block-0")]


def test_equal_work_gives_equal_bytes(tmp_path):
    one, two = Stage(tmp_path / "one", "key"), Stage(tmp_path / "two", "key")
    one.save("block-0", TENSORS, RECORD)
    two.save("block-0", dict(reversed(TENSORS.items())), dict(reversed(RECORD.items())))
    assert one.path("block-0").read_bytes() == two.path("block-0").read_bytes()


def test_a_discarded_unit_is_forgotten(stage):
    stage.save("block-0", TENSORS)
    stage.discard("block-0")
    stage.discard("block-0")  # nothing to do the second time
    assert stage.record("block-0") is None


def test_files_get_the_permissions_of_the_users_umask(stage):
    before = os.umask(0o027)
    try:
        stage.save("block-0", TENSORS)
    finally:
        os.umask(before)
    assert stage.path("block-0").stat().st_mode & 0o777 == 0o640


def test_a_text_file_is_replaced_whole(tmp_path):
    path = tmp_path / "manifest.json"
    write_atomic(path, "old, and longer")
    write_atomic(path, "größe")
    assert path.read_text(encoding="utf-8") == "größe"
    assert list(tmp_path.iterdir()) == [path]


# Stages


def test_equal_parts_find_the_same_stage(tmp_path):
    first = Workspace(tmp_path).stage("pass", {"bits": 3, "seed": 0}, [1, 2])
    assert Workspace(tmp_path).stage("pass", {"seed": 0, "bits": 3}, (1, 2)) == first
    assert first.folder.parent == tmp_path


@pytest.mark.parametrize(
    "other",
    [("fisher", {"bits": 3}, "a"), ("pass", {"bits": 4}, "a"), ("pass", {"bits": "3"}, "a"), ("pass", {"bits": 3})],
    ids=["label", "value", "type", "fewer"],
)
def test_another_part_is_another_stage(tmp_path, other):
    workspace = Workspace(tmp_path)
    first, second = workspace.stage("pass", {"bits": 3}, "a"), workspace.stage(*other)
    assert first.folder != second.folder
    assert first.key != second.key


def test_neighbouring_parts_do_not_run_together():
    assert digest("ab", "c") != digest("a", "bc")
    assert digest(["a"], "b") != digest(["a", "b"])


# The lock


def test_a_second_user_is_refused_and_told_what_to_do(tmp_path):
    folder = tmp_path / "work"
    with holding(folder / "lock"), pytest.raises(CompressError) as caught, Workspace(folder).locked():
        pass
    assert str(caught.value) == f"{folder}: another run is working there; wait for it, or choose another --workspace."


def test_a_lock_keeps_a_second_run_out(tmp_path):
    with Workspace(tmp_path).locked(), pytest.raises(CompressError, match="another run"), Workspace(tmp_path).locked():
        pass


def test_the_lock_is_free_after_a_failure(tmp_path):
    workspace = Workspace(tmp_path)
    with pytest.raises(ZeroDivisionError), workspace.locked():
        raise ZeroDivisionError
    with workspace.locked():
        pass


def test_a_removed_workspace_is_gone_with_its_units(tmp_path):
    workspace = Workspace(tmp_path / "work")
    workspace.stage("pass").save("block-0", TENSORS)
    workspace.remove()
    workspace.remove()  # nothing to do the second time
    assert not workspace.folder.exists()
