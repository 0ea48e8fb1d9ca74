"""Recipes of several passes, a stranger's pass among them, and everything that is refused before work begins."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import compress
from compress.calibration import draw_samples
from compress.errors import CompressError
from compress.plan import plan
from compress.settings import Calibration
from compress.source import open_source


@pytest.mark.slow
def test_a_strangers_pass_runs_in_a_recipe(recipe, tmp_path, strangers_folder, run_code):
    """shrink, then any-precision: the result equals the same done by hand on the whole model."""
    recipe["passes"] = [
        {"kind": "shrink", "factor": 0.25},
        {"kind": "any_precision", "parent_bits": 8, "objective": "weight"},
    ]
    code = "import compress, json, sys; compress.run(json.loads(sys.argv[1]), sys.argv[2])"
    target = tmp_path / "model"
    run_code(code, json.dumps(recipe), target, path=[strangers_folder])
    model = compress.load(target)  # needs no stranger
    expected, quiet = shrunk_by_hand(recipe)
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.2.mlp.down_proj"):
        weight = expected.get_submodule(name).weight
        assert (model.get_submodule(name).dense() - weight).abs().max() < 0.02 * weight.abs().max()
    manifest = json.loads((target / "compression.json").read_text())
    assert [step["config"]["kind"] for step in manifest["passes"]] == ["shrink", "any_precision"]
    units = manifest["passes"][0]["units"]
    assert {name: count for unit in units.values() for name, count in unit["quiet"].items()} == quiet


@torch.no_grad()
def shrunk_by_hand(recipe):
    """Block by block on the whole model: hooks, scale, run again; the model, and how many columns of each linear."""
    model = AutoModelForCausalLM.from_pretrained(recipe["model"])
    source = open_source(recipe["model"])
    samples = draw_samples(Calibration(**recipe["calibration"]), source.tokenizer, 64).tokens
    names, quiet = {module: name for name, module in model.named_modules()}, {}
    for layer in model.model.layers:
        linears = [module for module in layer.modules() if isinstance(module, torch.nn.Linear)]
        energy = dict.fromkeys(linears, 0)

        def add(module, inputs, energy=energy):
            energy[module] = energy[module] + inputs[0].flatten(0, -2).square().sum(0)

        hooks = [module.register_forward_pre_hook(add) for module in linears]
        for tokens in samples:
            model(input_ids=tokens[None])
        for hook in hooks:
            hook.remove()
        for module in linears:
            columns = energy[module] < energy[module].mean()
            module.weight[:, columns] *= 0.25
            quiet[names[module]] = int(columns.sum())
    return model, quiet


@pytest.mark.slow
def test_a_dense_result_is_an_ordinary_model(recipe, tmp_path, strangers_folder, run_code, plain_python, verify):
    recipe["passes"] = [{"kind": "shrink"}]
    code = "import compress, json, sys; compress.run(json.loads(sys.argv[1]), sys.argv[2])"
    run_code(code, json.dumps(recipe), tmp_path / "model", path=[strangers_folder])
    plain = (
        "import sys; from transformers import AutoModelForCausalLM as A; A.from_pretrained(sys.argv[1]); print('ok')"
    )
    assert "ok" in plain_python(plain, tmp_path / "model")
    assert verify(tmp_path / "model")


def test_a_pass_after_a_packing_one_is_refused(recipe, tmp_path):
    recipe["passes"] = [{"kind": "rtn"}, {"kind": "kmeans"}]
    with pytest.raises(CompressError, match=r"passes\.1 \(kmeans\) works on dense weights, but passes\.0 \(rtn\)"):
        compress.run(recipe, tmp_path / "model")


@pytest.mark.slow
def test_calibration_is_asked_for(recipe, tmp_path):
    del recipe["calibration"]
    with pytest.raises(CompressError, match=r"passes\.0 \(any_precision\) looks at text"):
        compress.run(recipe, tmp_path / "model")
    recipe["passes"][0] |= {"objective": "weight", "sensitivity": "none"}
    compress.run(recipe, tmp_path / "model")


def test_an_existing_output_is_never_overwritten(recipe, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "precious").touch()
    with pytest.raises(CompressError, match="exists already"):
        compress.run(recipe, tmp_path / "model")
    assert (tmp_path / "model" / "precious").exists()


def test_a_tokenizer_of_another_model_is_named(recipe, make_model, tmp_path):
    recipe["model"] = str(make_model("llama", vocab_size=200))
    with pytest.raises(CompressError, match="an embedding for 200 tokens; the two do not belong together"):
        compress.run(recipe, tmp_path / "model")


def test_an_output_needs_a_name(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CompressError, match="give the name of a folder to create"):
        compress.run(recipe, ".")


def test_a_compressed_model_is_no_starting_point(recipe, compressed, tmp_path):
    with pytest.raises(CompressError, match="already quantised"):
        compress.run({**recipe, "model": str(compressed)}, tmp_path / "model")


def test_a_model_without_a_language_model_is_refused_before_any_work(recipe, tiny_llama, tmp_path):
    folder = shutil.copytree(tiny_llama, tmp_path / "odd")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "vit"}))
    with pytest.raises(CompressError, match="'vit' is no language model"):
        compress.run({**recipe, "model": str(folder)}, tmp_path / "model")
    assert not (tmp_path / "model.work").exists()


@pytest.mark.slow
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(recipe, tiny_llama, tmp_path, value):
    folder = shutil.copytree(tiny_llama, tmp_path / "broken")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][7, 3] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    recipe["passes"][0]["sensitivity"] = "none"
    with pytest.raises(CompressError, match=r"model\.layers\.1\.mlp\.up_proj: row 7"):
        compress.run({**recipe, "model": str(folder)}, tmp_path / "model")
    recipe["passes"][0]["sensitivity"] = "fisher"
    with pytest.raises(CompressError, match="loss is nan"):
        compress.run({**recipe, "model": str(folder)}, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_model_that_computes_no_number_is_not_written(tiny_llama, tmp_path):
    source = shutil.copytree(tiny_llama, tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors["model.embed_tokens.weight"].fill_(torch.nan)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CompressError, match="at 4 bits the model's loss on a few tokens is not finite"):
        compress.run({"model": str(source), "passes": [{"kind": "rtn"}]}, tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.slow
def test_ignored_linears_are_listed_with_the_reason(recipe, tmp_path):
    recipe["passes"][0]["ignore"] = [r"re:.*\.v_proj", "model.layers.1.mlp.up_proj"]
    target = compress.run(recipe, tmp_path / "model")
    listed = json.loads((target / "compression.json").read_text())["not_quantised"]
    assert listed["model.layers.0.self_attn.v_proj"] == r"ignored by 're:.*\\.v_proj'"
    assert "outside the blocks" in listed["lm_head"]
    assert len(listed) == 3 + 1 + 2
    recipe["passes"][0]["ignore"] = ["re:.*experts.*"]
    with pytest.raises(CompressError, match="matches no module"):
        compress.run(recipe, tmp_path / "other")


@pytest.mark.slow
def test_zeros_of_a_pruned_model_stay_zero(recipe, tiny_llama, tmp_path):
    folder = shutil.copytree(tiny_llama, tmp_path / "pruned")
    tensors = load_file(folder / "model.safetensors")
    torch.manual_seed(0)
    for name, tensor in tensors.items():
        if "proj" in name:
            tensor[torch.rand_like(tensor) < 0.5] = 0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    recipe["passes"][0]["keep_zeros"] = True
    model = compress.load(compress.run({**recipe, "model": str(folder)}, tmp_path / "model"))
    for bits in (3, 4, 6):
        compress.set_bits(model, bits)
        weight = model.get_submodule("model.layers.0.mlp.up_proj").dense()
        assert (weight[tensors["model.layers.0.mlp.up_proj.weight"] == 0] == 0).all()


@pytest.mark.slow
def test_sensitivities_matter(recipe, tmp_path):
    """Weighted by the Fisher information, the weighted error is smaller than without it, at every width."""
    errors = {}
    for sensitivity in ("fisher", "none"):
        recipe["passes"][0] |= {"objective": "weight", "sensitivity": sensitivity}
        target = compress.run(recipe, tmp_path / sensitivity)
        units = json.loads((target / "compression.json").read_text())["passes"][0]["units"]
        errors[sensitivity] = units["block-0"]["errors"]["model.layers.0.mlp.down_proj"]
    assert all(errors["fisher"][bits]["relative"] > errors["none"][bits]["relative"] for bits in "3456")


@pytest.mark.slow
def test_a_full_disk_is_said_and_leaves_nothing(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(CompressError, match=r"needs 0\.00 GB and 0\.00 GB are free"):
        compress.run(recipe, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    monkeypatch.undo()
    compress.run(recipe, tmp_path / "model")


def test_the_plan_foresees_the_bytes_exactly(recipe, compressed):
    foreseen = plan(recipe)
    sizes = json.loads((compressed / "compression.json").read_text())["sizes"]
    assert foreseen["bytes_at_bits"] == sizes["tensors_at_bits"]
    assert foreseen["checkpoint_bytes"] == sizes["tensors"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "include"),
    [
        ({"tie_word_embeddings": False}, ["lm_head", "model.embed_tokens"]),
        ({"tie_word_embeddings": True}, ["lm_head"]),
    ],
)
def test_the_plan_knows_of_the_head(make_model, recipe, tmp_path, changes, include):
    recipe["model"] = str(make_model("llama", **changes))
    recipe["passes"][0] |= {"include": include, "ignore": [r"re:.*\.v_proj"]}
    target = compress.run(recipe, tmp_path / "model")
    sizes = json.loads((target / "compression.json").read_text())["sizes"]
    assert plan(recipe)["bytes_at_bits"] == sizes["tensors_at_bits"]
