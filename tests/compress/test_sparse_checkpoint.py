"""A checkpoint with matrices that are stored sparse: smaller on disk, and the very same model at every width."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import compress
from compress.cli import making
from compress.errors import CompressError
from compress.hf import CompressConfig, CompressQuantizer, packed_modules
from compress.inspect import inspect
from compress.quant.format import pack, pack_smaller
from compress.quant.records import PackedShape, SparseShape
from compress.streaming import State, StreamedModel
from compress.weights import Checkpoint

PASS = {
    "kind": "any_precision",
    "embedding_bits": 0,
    "seed_bits": 3,
    "parent_bits": 5,
    "objective": "weight",
    "sensitivity": "none",
    "keep_zeros": True,
}
KINDS = ("llama", "opt", "gpt2", "bloom")
"""Without biases and with them, with weights the other way round, and with fused matrices."""
TOKENS = torch.arange(5, 25)[None]
PRINT_LOGITS = """
import sys, json, torch, {imports}
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(json.dumps(model(torch.arange(5, 25)[None]).logits[0, -1].tolist()))
"""
DOWN = "model.layers.1.mlp.down_proj"


@torch.no_grad()
def logits(model):
    return model(TOKENS).logits


def rewrite(folder, change):
    """Change one tensor file in place: ``change(tensors)`` says whether it was the right one."""
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        if change(tensors):
            save_file(tensors, file, metadata={"format": "pt"})
            return
    raise AssertionError("nothing to change")


def prune(source, target, sparsity):
    """A copy of a model without the smallest weights of every matrix (and row 1 of each without any)."""
    shutil.copytree(source, target)
    file = target / "model.safetensors"
    tensors = load_file(file)
    for tensor in tensors.values():
        if tensor.ndim == 2:
            tensor[tensor.abs() <= tensor.abs().flatten().quantile(sparsity)] = 0
            tensor[1] = 0
    save_file(tensors, file, metadata={"format": "pt"})
    return target


def run(model, target, **settings):
    return compress.run({"model": str(model), "passes": [{**PASS, **settings}]}, target)


def run_dense(model, target, **settings):
    """The same checkpoint as it was before there was a sparse form; embedding and head, which share codebooks, have none."""

    def dense(found):
        return pack_smaller(found) if found.shared else (*pack(found.codes, found.codebooks), None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compress.runner.pack_smaller", dense)
        return run(model, target, **settings)


def tensor_bytes(folder):
    """Bytes of the safetensors files' data, without their headers."""
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    headers = [int.from_bytes(file.read_bytes()[:8], "little") + 8 for file in folder.glob("*.safetensors")]
    return size - sum(headers)


def weights(folder, bits):
    return {name: module.dense() for name, module in packed_modules(compress.load(folder, bits=bits)).items()}


def settings_of(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def change_record(folder, changes, module=DOWN):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["modules"][module] |= changes
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def pruned(tiny_llama, tmp_path_factory):
    return prune(tiny_llama, tmp_path_factory.mktemp("pruned") / "model", 0.7)


@pytest.fixture(scope="module")
def sparse(pruned, tmp_path_factory):
    """Every matrix is stored sparse but one that is left dense."""
    return run(pruned, tmp_path_factory.mktemp("sparse") / "model", ignore=["model.layers.0.self_attn.v_proj"])


@pytest.fixture
def copy(sparse, tmp_path):
    return shutil.copytree(sparse, tmp_path / "copy")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_architecture_is_the_same_model_in_fewer_bytes(make_model, tmp_path, kind):
    source = prune(make_model(kind), tmp_path / "source", 0.7)
    stored, dense = run(source, tmp_path / "sparse"), run_dense(source, tmp_path / "dense")
    assert settings_of(stored)["format_version"] == 2
    assert all("survivors" in record for record in settings_of(stored)["modules"].values())
    assert settings_of(dense)["format_version"] == 1
    assert tensor_bytes(stored) < tensor_bytes(dense)
    for bits in (3, 4, 5):
        expected = weights(dense, bits)
        assert expected.keys() == settings_of(dense)["modules"].keys()
        found = weights(stored, bits)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert torch.equal(logits(compress.load(stored, bits=bits)), logits(compress.load(dense, bits=bits)))


@pytest.mark.slow
@pytest.mark.parametrize(("sparsity", "saved"), [(0.5, 4 - (2.0 + 1.0)), (0.7, 4 - (1.2 + 0.89))])
def test_bytes_on_disk(make_model, tmp_path, sparsity, saved):
    """In bits per weight at 4 bits: planes of the survivors and a mask, instead of all planes."""
    wide = make_model("llama", hidden_size=256, intermediate_size=512, num_hidden_layers=1, head_dim=64)
    source = prune(wide, tmp_path / "source", sparsity)
    stored, dense = (make(source, tmp_path / make.__name__, parent_bits=4) for make in (run, run_dense))
    packed = sum(record["out_features"] * record["in_features"] for record in settings_of(stored)["modules"].values())
    assert 8 * (tensor_bytes(dense) - tensor_bytes(stored)) / packed == pytest.approx(saved, abs=0.03)
    assert inspect(stored)["bytes"] == tensor_bytes(stored)


@pytest.mark.slow
def test_a_fresh_process_loads_it_by_plain_from_pretrained(sparse, plain_python, run_code):
    found = json.loads(run_code(PRINT_LOGITS.format(imports="compress"), sparse))
    torch.testing.assert_close(torch.tensor(found), logits(compress.load(sparse))[0, -1], rtol=1e-5, atol=1e-5)
    assert "mismatch" in plain_python(PRINT_LOGITS.format(imports="transformers"), sparse, fails=True)


def test_in_memory_it_is_a_packed_model_like_any_other(sparse, pruned):
    model = compress.load(sparse)
    for module in packed_modules(model).values():
        assert type(module.shape) is PackedShape
        assert {name for name, _ in module.named_buffers()} == module.shape.specification().keys()
    assert not model.get_submodule(DOWN).dense()[1].any()
    before = AutoModelForCausalLM.from_pretrained(pruned).get_submodule(DOWN).weight == 0
    compress.set_bits(model, 3)
    assert (model.get_submodule(DOWN).dense()[before] == 0).all()
    assert torch.equal(logits(model), logits(compress.load(sparse, bits=3)))


def test_widths_by_pattern(sparse):
    model = compress.load(sparse, bits={"re:.*": 3, DOWN: 5})
    assert torch.equal(model.get_submodule(DOWN).dense(), weights(sparse, 5)[DOWN])
    assert model.get_submodule("model.layers.0.mlp.up_proj").shape.parent_bits == 3


def test_a_width_needs_no_higher_plane(copy, sparse):
    for file in copy.glob("model-[45]bit-*.safetensors"):
        file.unlink()
    assert torch.equal(logits(compress.load(copy, bits=3)), logits(compress.load(sparse, bits=3)))
    with pytest.raises(CompressError, match="which is not there"):
        compress.load(copy, bits=4)


@pytest.mark.parametrize("bits", [None, 4])
def test_a_loaded_model_is_saved_in_the_dense_form(sparse, tmp_path, bits):
    model = compress.load(sparse, bits=bits)
    model.save_pretrained(tmp_path / "again")
    settings = settings_of(tmp_path / "again")
    assert settings["format_version"] == 1
    assert settings["modules"] == {name: vars(module.shape) for name, module in packed_modules(model).items()}
    assert {record["parent_bits"] for record in settings["modules"].values()} == {bits or 5}
    assert torch.equal(logits(compress.load(tmp_path / "again")), logits(model))


@pytest.mark.parametrize("device_map", ["cpu", "auto"])
def test_device_maps(sparse, device_map):
    model = compress.load(sparse, bits=4, device_map=device_map, dtype=torch.bfloat16)
    assert model.get_submodule(DOWN).codebook().dtype == torch.float16
    assert torch.equal(model.get_submodule(DOWN).dense(), weights(sparse, 4)[DOWN])


def test_an_automatic_device_map_leaves_room_for_what_is_rebuilt(sparse):
    quantizer = CompressQuantizer(CompressConfig(**settings_of(sparse)), pre_quantized=True)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(sparse))
    assert quantizer.adjust_max_memory({0: 1000}) == {0: 1000}
    quantizer.preprocess_model(model)
    stored = sum(tensor.nbytes for module in packed_modules(model).values() for tensor in module.buffers())
    rebuilt = sum(
        tensor.nbytes for module in packed_modules(compress.load(sparse)).values() for tensor in module.buffers()
    )
    assert quantizer.adjust_max_memory({0: 10**6}) == {0: int(10**6 * stored / rebuilt)}
    assert stored < rebuilt


@pytest.mark.slow
def test_head_and_embedding(make_model, tmp_path, verify):
    source = prune(make_model("llama", tie_word_embeddings=False), tmp_path / "source", 0.6)
    names = ["lm_head", "model.embed_tokens"]
    stored, dense = (make(source, tmp_path / make.__name__, include=names) for make in (run, run_dense))
    assert all("read_at" in settings_of(stored)["modules"][name] for name in names), "they have a form of their own"
    assert torch.equal(logits(compress.load(stored)), logits(compress.load(dense)))
    assert verify(stored)


def test_a_streamed_model_rebuilds_one_block_at_a_time(sparse):
    config = AutoModelForCausalLM.from_pretrained(sparse).config
    shapes = CompressConfig(**settings_of(sparse)).shapes()
    del config.quantization_config
    model = StreamedModel(State(Checkpoint(sparse), config, shapes, ""), torch.device("cpu"))
    module = model.model.get_submodule(DOWN)
    for _ in range(2):
        with model.block(1):
            assert type(module.shape) is PackedShape
            assert torch.equal(module.dense(), weights(sparse, 5)[DOWN])
        assert isinstance(module.shape, SparseShape)
        assert all(buffer.is_meta for buffer in module.buffers())


@pytest.mark.slow
def test_inspect_and_verify_know_the_form(sparse, verify):
    assert any("recorded logits at 3, 4, 5" in line for line in verify(sparse))
    found = inspect(sparse)
    manifest = json.loads((sparse / "compression.json").read_text())
    assert found["format_version"] == manifest["format_version"] == 2
    for name, module in found["modules"].items():
        storage, record = module["storage"], settings_of(sparse)["modules"][name]
        assert storage["form"] == "sparse"
        assert storage["zeros"] == record["out_features"] * record["in_features"] - record["survivors"]
        assert storage["bytes"]["sparse"] == module["bytes_at_bits"]["5"] < storage["bytes"]["dense"]
    assert found["bytes_at_bits"] == manifest["sizes"]["tensors_at_bits"]


def test_the_command_says_what_was_saved(sparse, capsys):
    making.inspect(sparse, as_json=False, modules=True)
    modules = inspect(sparse)["modules"].values()
    stored, instead = (
        sum(module["storage"]["bytes"][form] for module in modules) / 1e6 for form in ("sparse", "dense")
    )
    assert f"stored sparse: 20 matrices, {stored:.3f} MB instead of {instead:.3f} MB" in capsys.readouterr().out


@pytest.mark.slow
def test_where_it_does_not_pay_the_dense_form_is_stored_and_that_is_said(make_model, tmp_path, capsys):
    """Columns fill whole words here; with 48 of them, the dense form's padding alone would cost more than a mask."""
    source = prune(make_model("llama", hidden_size=64, intermediate_size=96, head_dim=16), tmp_path / "source", 0.05)
    stored, dense = run(source, tmp_path / "stored"), run_dense(source, tmp_path / "dense")
    assert settings_of(stored) == settings_of(dense)
    for file in dense.glob("*.safetensors"):
        assert (stored / file.name).read_bytes() == file.read_bytes()
    for module in inspect(stored)["modules"].values():
        assert module["storage"]["form"] == "dense"
        assert module["storage"]["bytes"]["dense"] <= module["storage"]["bytes"]["sparse"]
        assert 0 < module["storage"]["zeros"] < 0.1 * module["shape"][0] * module["shape"][1]
    making.inspect(stored, as_json=False, modules=True)
    assert capsys.readouterr().out.count("stored dense, as that is smaller: model.layers.") == 21


def test_without_pruned_weights_nothing_changes(compressed):
    assert settings_of(compressed)["format_version"] == 1
    units = json.loads((compressed / "compression.json").read_text())["passes"][0]["units"]
    assert not any("storage" in unit for unit in units.values())


@pytest.mark.parametrize("tensor", ["mask", "mask_low", "plane_5"])
def test_a_missing_tensor_is_named(copy, tensor):
    name = f"{DOWN}.{tensor}"
    rewrite(copy, lambda tensors: tensors.pop(name, None) is not None)
    for load in (AutoModelForCausalLM.from_pretrained, compress.load):
        with pytest.raises(CompressError, match=re.escape(f"{name} is missing")):
            load(copy)


def test_a_damaged_mask_is_named(copy, verify):
    rewrite(copy, lambda tensors: f"{DOWN}.mask" in tensors and tensors[f"{DOWN}.mask"].fill_(-1) is not None)
    with pytest.raises(CompressError, match=re.escape(f"{DOWN}: its mask does not fit")):
        AutoModelForCausalLM.from_pretrained(copy)
    with pytest.raises(CompressError, match="its content has changed"):
        verify(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"survivors": 10**6}, "out of range"),
        ({"gap_bits": 9}, "out of range"),
        ({"mask_bits": 1}, "out of range"),
        ({"survivors": "many"}, "no integer"),
        ({"colour": "red"}, "malformed"),
        ({"survivors": 1000}, r"int32 \[3, 1, \d+\] instead of int32 \[3, 1, 32\]"),
    ],
)
def test_malformed_records_are_refused(copy, change, message):
    change_record(copy, change)
    with pytest.raises(CompressError, match=message):
        compress.load(copy)


def test_a_version_1_with_sparse_records_is_refused(copy):
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"]["format_version"] = 1
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(CompressError, match="version 1 has no modules that are stored sparse or shared"):
        AutoModelForCausalLM.from_pretrained(copy)


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_sparse_files(pruned, sparse, tmp_path):
    """Units in the workspace are stored in the chosen form already."""
    settings = {"ignore": ["model.layers.0.self_attn.v_proj"]}
    recipe = {"model": str(pruned), "passes": [{**PASS, **settings}]}
    with pytest.raises(KeyboardInterrupt):
        compress.run(recipe, tmp_path / "model", progress=lambda what, done, total: stop(done))
    again = compress.run(recipe, tmp_path / "model")
    for file in sparse.glob("*.safetensors"):
        assert (again / file.name).read_bytes() == file.read_bytes()


def stop(done):
    if done == 2:
        raise KeyboardInterrupt
