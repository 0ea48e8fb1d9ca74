"""`compress inspect` counts the zeros that are there, in dense and in packed checkpoints."""

import json
import shutil
import sys

import pytest
from transformers import AutoModelForCausalLM

import compress
from compress.errors import CompressError
from compress.evals import plots
from compress.evals.tables import zeros
from compress.inspect import inspect, sparsity


@pytest.fixture
def said(command):
    def run(*arguments):
        code, text, _ = command(*arguments)
        assert code == 0
        return text

    return run


@pytest.fixture
def pruned(recipe, tmp_path):
    settings = {"kind": "prune", "sparsity": 0.6, "ignore": [r"re:.*layers\.0\..*v_proj"]}
    return compress.run({**recipe, "passes": [settings]}, tmp_path / "pruned", workspace=tmp_path / "work")


@pytest.mark.slow
def test_zeros_per_block_and_linear(pruned, said):
    found = json.loads(said("inspect", pruned, "--json"))["sparsity"]
    model = AutoModelForCausalLM.from_pretrained(pruned)
    for name, entry in found["linears"].items():
        assert entry["zeros"] == int((model.get_submodule(name).weight == 0).sum())
    assert found["linears"]["model.layers.0.self_attn.v_proj"]["sparsity"] == 0
    inside = [entry["zeros"] for name, entry in found["linears"].items() if name.startswith("model.layers.2.")]
    assert found["blocks"]["model.layers.2"]["zeros"] == sum(inside) > 0
    assert len(found["linears"]) == 21
    text = said("inspect", pruned)
    assert f"{found['zeros']} of {found['parameters']} weights in the blocks are zero" in text
    assert f"{100 * found['blocks']['model.layers.2']['sparsity']:.1f}" in text


@pytest.mark.slow
def test_packed_and_dense_models_too(recipe, pruned, tiny_llama, tmp_path, said):
    passes = [
        {"kind": "prune", "sparsity": 0.6, "ignore": [r"re:.*layers\.0\..*v_proj"]},
        {
            "kind": "any_precision",
            "objective": "weight",
            "sensitivity": "none",
            "parent_bits": 8,
            "keep_zeros": True,
            "include": ["lm_head"],
        },
    ]
    packed = compress.run({**recipe, "passes": passes}, tmp_path / "packed", workspace=tmp_path / "work")
    before, after = sparsity(pruned), sparsity(packed)
    assert all(after["linears"][name]["zeros"] >= entry["zeros"] for name, entry in before["linears"].items())
    assert after["sparsity"] == pytest.approx(before["sparsity"], abs=0.02)
    assert json.loads(said("inspect", tiny_llama, "--json", "--sparsity"))["sparsity"]["zeros"] == 0
    assert "sparsity" not in json.loads(said("inspect", tiny_llama, "--json"))
    assert "sparsity" not in json.loads(said("inspect", pruned, "--json", "--no-sparsity"))


def test_a_pass_that_records_its_linears_is_no_pruning_pass(tiny_llama, tmp_path):
    """Weights are read to count zeros only where a record has figures of zeros."""
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    manifest = {key: {} for key in ("compress_version", "not_quantised", "probe", "recipe", "sizes", "versions")}
    for linears, pruned in (({"q_proj": {"scaled": 3}}, False), (["q_proj"], False), ({"q_proj": {"zeros": 3}}, True)):
        passes = [{"units": {"model.layers.0": {"linears": linears}}}]
        (folder / "compression.json").write_text(json.dumps(manifest | {"files": {}, "passes": passes}))
        assert inspect(folder)["pruned"] == pruned


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "opt", "bloom"])
def test_other_architectures(make_model, recipe, tmp_path, kind):
    recipe |= {"model": str(make_model(kind)), "passes": [{"kind": "joint", "bits": 4, "allocation": "uniform"}]}
    found = sparsity(compress.run(recipe, tmp_path / "model"))
    assert 0.5 <= found["sparsity"] < 0.6
    assert len(found["blocks"]) == 3


@pytest.mark.slow
def test_a_plot(pruned, tmp_path, said, monkeypatch):
    said("inspect", pruned, "--plot", tmp_path / "plot.svg")
    assert "<svg" in (tmp_path / "plot.svg").read_text()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(CompressError, match="needs matplotlib"):
        plots.heat_map(zeros(sparsity(pruned)))
