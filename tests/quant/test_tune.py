"""Tables trained by distillation: what changes, what does not, and by how much it helps."""

import filecmp
import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

import compress
from compress.quant.tune import divergence


@pytest.fixture
def tuned_recipe(recipe):
    recipe["passes"][0] |= {"parent_bits": 4, "objective": "weight"}  # which leaves more to gain
    recipe["passes"].append({"kind": "tune_tables", "steps": 30, "batch": 4})
    return recipe


def tensors(folder):
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as handle:
            found |= {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    return found


def test_divergence_is_the_mean_over_predicted_tokens(tiny_llama):
    """Two samples of different length, against one log-softmax at a time."""
    dense = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    other = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.mul_(1.5)
    samples = [torch.arange(5, 12), torch.tensor([1, 9, 4])]
    total = 0.0
    for sample in samples:
        with torch.no_grad():
            wanted, found = (m(sample[None]).logits[0, :-1].double().log_softmax(-1) for m in (dense, other))
        total += float((wanted.exp() * (wanted - found)).sum())
    assert divergence(other, dense, samples).item() == pytest.approx(total / (6 + 2), rel=1e-4)


@pytest.mark.slow
def test_only_tables_change_and_the_model_comes_nearer(tuned_recipe, tmp_path):
    tuned = compress.run(tuned_recipe, tmp_path / "tuned")
    plain = compress.run({**tuned_recipe, "passes": tuned_recipe["passes"][:1]}, tmp_path / "plain")
    before, after = tensors(plain), tensors(tuned)
    assert before.keys() == after.keys()
    assert all(tensor.dtype == after[name].dtype for name, tensor in before.items())
    units = json.loads((tuned / "compression.json").read_text())["passes"][1]["units"]
    assert units["width-3"]["kept"]
    for name, tensor in before.items():
        trained = ".codebook_" in name and units[f"width-{name[-1]}"]["kept"]
        assert torch.equal(tensor, after[name]) != trained, name
    dense = AutoModelForCausalLM.from_pretrained(tuned_recipe["model"], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tuned_recipe["model"])
    sample = [torch.tensor(tokenizer("the lazy dog sleeps on the quick fox")["input_ids"])]
    apart = [divergence(compress.load(f, bits=3, dtype=torch.float32), dense, sample).item() for f in (plain, tuned)]
    assert apart[1] < apart[0]


@pytest.mark.slow
def test_killed_between_widths_it_goes_on_with_the_same_bytes(tuned_recipe, tmp_path):
    """Each width is a unit of its own: what one was stopped before another is not done again, and nothing differs."""
    whole = compress.run(tuned_recipe, tmp_path / "whole")

    def stop(what, done, total):
        if "width-4" in what and done == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress.run(tuned_recipe, tmp_path / "again", progress=stop)
    seen = []
    again = compress.run(tuned_recipe, tmp_path / "again", progress=lambda what, done, total: seen.append(what))
    assert not any("width-3" in what or "block" in what for what in seen)
    names = [path.name for path in whole.iterdir()]
    assert filecmp.cmpfiles(whole, again, names, shallow=False)[0] == names


@pytest.mark.slow
def test_pruned_weights_stay_zero(tuned_recipe, make_model, tmp_path):
    pruned = [{"kind": "prune", "score": "magnitude", "sparsity": 0.5, "allocation": "uniform"}]
    tuned_recipe["passes"][0] |= {"keep_zeros": True}
    tuned_recipe["passes"] = pruned + tuned_recipe["passes"]
    model = compress.load(compress.run(tuned_recipe, tmp_path / "out"), bits=3, dtype=torch.float32)
    dense = AutoModelForCausalLM.from_pretrained(
        compress.run({**tuned_recipe, "passes": pruned}, tmp_path / "pruned"), dtype=torch.float32
    )
    for name, module in compress.hf.packed_modules(model).items():
        gone = dense.get_submodule(name).weight == 0
        assert int(gone.sum()) == pytest.approx(gone.numel() / 2, abs=gone.shape[0])  # half of every row
        assert (module.dense()[gone] == 0).all()


@pytest.mark.parametrize(
    ("passes", "complaint"),
    [
        ([{"kind": "tune_tables"}], "works on packed matrices; put a quantising pass before it"),
        ([{"kind": "rtn", "bits": 4}, {"kind": "tune_tables", "widths": [3]}], "3 bits are not among the 4 to 4"),
    ],
)
def test_what_cannot_be_tuned_is_refused_before_any_work(recipe, tmp_path, passes, complaint):
    with pytest.raises(compress.CompressError, match=complaint):
        compress.run({**recipe, "passes": passes}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_of_shared_codebooks_only_what_no_other_bits_read_is_trained(tuned_recipe, tmp_path):
    shared = {"kind": "any_precision", "seed_bits": 4, "parent_bits": 6, "codebooks": "shared"}
    tune = {"kind": "tune_tables", "steps": 8, "batch": 2}
    plain = compress.run({**tuned_recipe, "passes": [shared]}, tmp_path / "plain")
    tuned = compress.run({**tuned_recipe, "passes": [shared, tune]}, tmp_path / "tuned")
    units = json.loads((tuned / "compression.json").read_text())["passes"][1]["units"]
    assert "computed from these" in units["width-5"]["reason"]
    before, after = tensors(plain), tensors(tuned)
    changed = {name.rpartition(".")[2] for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed == {kind for kind in ("basis_4", "place_6") if units[f"width-{kind[-1]}"]["kept"]}
    assert changed
