"""Tensors of a model folder by name, one file or many, and what lies over them after a pass."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import save_file

from compress.errors import CompressError
from compress.weights import INDEX, SINGLE, Checkpoint, Overlay, Renamed, read_header, shard_files

TENSORS = {"model.norm.weight": torch.arange(3.0), "lm_head.weight": torch.ones(2, 3, dtype=torch.bfloat16)}


def one_file(folder, tensors=TENSORS):
    save_file(tensors, folder / SINGLE)
    return folder


def sharded(folder):
    """The same tensors, a file each."""
    shards = {name: f"model-{number:05d}.safetensors" for number, name in enumerate(TENSORS)}
    for name, file in shards.items():
        save_file({name: TENSORS[name]}, folder / file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    return folder


def holds(source, expected):
    """Whether a source has just these tensors, in its listing and when read."""
    listed = {name: (info.shape, info.dtype) for name, info in source.info().items()}
    assert listed == {
        name: (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")) for name, tensor in expected.items()
    }
    found = source.read(expected)
    assert found.keys() == expected.keys()
    return all(torch.equal(found[name], tensor) for name, tensor in expected.items())


# Checkpoints


@pytest.mark.parametrize("save", [one_file, sharded])
def test_every_tensor_is_found_and_read(tmp_path, save):
    assert holds(Checkpoint(save(tmp_path)), TENSORS)


@pytest.mark.parametrize("save", [one_file, sharded])
def test_tensors_are_read_under_the_names_asked_for(tmp_path, save):
    assert Checkpoint(save(tmp_path)).read(["lm_head.weight"]).keys() == {"lm_head.weight"}


def test_a_listing_tells_the_size_on_disk(tmp_path):
    info = Checkpoint(sharded(tmp_path)).info()["lm_head.weight"]
    assert info.nbytes == 2 * 3 * 2
    assert info.file == tmp_path / "model-00001.safetensors"


def test_files_of_a_base_model_lack_its_prefix(tmp_path):
    one_file(tmp_path, {"norm.weight": TENSORS["model.norm.weight"]})
    checkpoint = Checkpoint(tmp_path, {"model.norm.weight": ("model.norm.weight", "norm.weight")})
    assert holds(checkpoint, {"model.norm.weight": TENSORS["model.norm.weight"]})


def test_files_may_have_a_prefix_in_excess(tmp_path):
    checkpoint = Checkpoint(one_file(tmp_path), {"norm.weight": ("norm.weight", "model.norm.weight")})
    assert holds(checkpoint, {"norm.weight": TENSORS["model.norm.weight"]})


def test_the_first_name_that_is_there_is_taken(tmp_path):
    one_file(tmp_path, {"second": torch.full((1,), 2.0), "third": torch.full((1,), 3.0)})
    assert holds(Checkpoint(tmp_path, {"name": ("first", "second", "third")}), {"name": torch.full((1,), 2.0)})


def test_a_tensor_without_any_of_its_names_is_not_there(tmp_path):
    names = {"lm_head.weight": ("lm_head.weight",), "model.bias": ("model.bias", "bias")}
    assert holds(Checkpoint(one_file(tmp_path), names), {"lm_head.weight": TENSORS["lm_head.weight"]})


def test_digests_cover_weights_and_configuration(tmp_path):
    sharded(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "README.md").write_text("not part of the model")
    digests = Checkpoint(tmp_path).sha256()
    assert set(digests) == {"config.json", "model-00000.safetensors", "model-00001.safetensors"}
    assert digests["config.json"] == hashlib.sha256(b"{}").hexdigest()


def test_what_was_read_does_not_depend_on_the_file_any_more(tmp_path):
    found = Checkpoint(one_file(tmp_path)).read(["model.norm.weight"])
    (tmp_path / SINGLE).write_bytes(b"")
    assert torch.equal(found["model.norm.weight"], TENSORS["model.norm.weight"])


# Damaged and missing files


def test_a_missing_shard_is_named(tmp_path):
    (sharded(tmp_path) / "model-00001.safetensors").unlink()
    with pytest.raises(CompressError, match=r"index\.json names model-00001\.safetensors, which is not there; fetch"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 30, -1])
def test_a_truncated_file_is_named(tmp_path, keep):
    file = one_file(tmp_path) / SINGLE
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CompressError, match=r"model\.safetensors: not a readable safetensors file .*again"):
        Checkpoint(tmp_path)


def test_a_dtype_we_do_not_know_is_named(tmp_path):
    save_file({"a": torch.zeros(2, dtype=torch.float8_e4m3fnuz)}, tmp_path / SINGLE)
    with pytest.raises(CompressError, match=r"model\.safetensors: holds a tensor of dtype 'F8_E4M3FNUZ'"):
        read_header(tmp_path / SINGLE)


@pytest.mark.parametrize("content", ["{", "{}", '{"weight_map": []}', "[]", "null"])
def test_a_broken_index_is_named(tmp_path, content):
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(CompressError, match=r"model\.safetensors\.index\.json: not a safetensors index"):
        shard_files(tmp_path)


def test_pickled_weights_are_refused_with_a_way_out(tmp_path):
    (tmp_path / "pytorch_model-00001-of-00002.bin").write_bytes(b"")
    with pytest.raises(CompressError, match=r"pickled weights only .*save_pretrained"):
        Checkpoint(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(CompressError, match=r"no model\.safetensors and no model\.safetensors\.index\.json"):
        Checkpoint(tmp_path)


# Tensors under other names


def test_tensors_can_bear_other_names(tmp_path):
    renamed = Renamed(Checkpoint(one_file(tmp_path)), {"norm": "model.norm.weight"})
    assert holds(renamed, {"norm": TENSORS["model.norm.weight"]})


def test_one_tensor_can_bear_two_names(tmp_path):
    renamed = Renamed(Checkpoint(one_file(tmp_path)), {"head": "lm_head.weight", "embedding": "lm_head.weight"})
    assert holds(renamed, {"head": TENSORS["lm_head.weight"], "embedding": TENSORS["lm_head.weight"]})


# Overlays


def overlay(tmp_path, *units, removed=()):
    """Files with the given tensors over the checkpoint."""
    files = []
    for number, tensors in enumerate(units):
        files.append(tmp_path / f"unit-{number}.safetensors")
        save_file(tensors, files[-1])
    return Overlay(Checkpoint(one_file(tmp_path)), files, removed)


def test_an_overlay_of_nothing_is_what_was_there(tmp_path):
    assert holds(overlay(tmp_path), TENSORS)


def test_a_new_tensor_is_added_and_an_old_one_hidden(tmp_path):
    new = {"model.norm.weight": torch.zeros(5, dtype=torch.float16), "extra": torch.ones(1)}
    assert holds(overlay(tmp_path, new), TENSORS | new)


def test_a_later_file_hides_an_earlier_one(tmp_path):
    first, second = {"a": torch.zeros(1), "b": torch.zeros(2)}, {"a": torch.ones(3)}
    assert holds(overlay(tmp_path, first, second), TENSORS | first | second)


def test_an_overlay_can_lie_over_another(tmp_path):
    below = overlay(tmp_path, {"a": torch.zeros(1), "b": torch.zeros(2)})
    save_file({"a": torch.ones(3)}, tmp_path / "later.safetensors")
    above = Overlay(below, [tmp_path / "later.safetensors"], removed=["lm_head.weight"])
    left = {"model.norm.weight": TENSORS["model.norm.weight"], "a": torch.ones(3), "b": torch.zeros(2)}
    assert holds(above, left)


def test_a_removed_name_is_gone(tmp_path):
    left = {"model.norm.weight": TENSORS["model.norm.weight"]}
    source = overlay(tmp_path, removed=["lm_head.weight"])
    assert holds(source, left)
    with pytest.raises(KeyError):
        source.read(["lm_head.weight"])


def test_a_removed_name_that_a_file_brings_back_exists(tmp_path):
    packed = {"lm_head.weight": torch.zeros(3, 2, 1, dtype=torch.int32)}
    assert holds(overlay(tmp_path, packed, removed=["lm_head.weight"]), TENSORS | packed)
