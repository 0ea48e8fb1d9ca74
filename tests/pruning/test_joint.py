"""Prune and quantise in one sweep: an exact zero in every table, masks kept, and what is loaded is what was swept."""

import json

import pytest
import torch

import compress
from compress.errors import CompressError
from compress.plan import plan
from compress.pruning.joint import Joint, codes_of, even_codebook, rounding


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_every_table_has_a_zero_and_covers_its_row(bits):
    weight = torch.randn(30, 50, generator=torch.Generator().manual_seed(0))
    weight[0] = 0  # a row of nothing
    weight[1] = weight[1].abs()  # one-sided
    weight[2] *= 1e-9  # too small for float16
    table = even_codebook(weight, bits)
    assert ((table == 0).any(dim=1)).all()
    assert (table[1:].diff(dim=1) > 0).all()
    step = (weight.amax(1).clamp(min=0) - weight.amin(1).clamp(max=0)) / (2**bits - 1)
    nearest = table.gather(1, codes_of(weight, table).long())
    assert ((weight - nearest).abs().amax(1) <= 1.01 * step).all()
    assert (table[0] == 0).all()


def test_codes_are_the_nearest_entries():
    generator = torch.Generator().manual_seed(1)
    weight, table = torch.randn(5, 40, generator=generator), torch.randn(5, 8, generator=generator).sort(1).values
    expected = (weight[:, :, None] - table[:, None]).abs().argmin(2)
    assert torch.equal(codes_of(weight, table).long(), expected)
    assert torch.equal(rounding(table)(weight[:, 3]), table.gather(1, expected)[:, 3])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_joint_in_a_recipe(make_model, recipe, tmp_path, kind, verify):
    recipe |= {"model": str(make_model(kind)), "passes": [{"kind": "joint", "bits": 3, "sparsity": 0.5}]}
    target = compress.run(recipe, tmp_path / "model")
    assert verify(target)
    model = compress.load(target)
    assert compress.get_bits(model)
    units = json.loads((target / "compression.json").read_text())["passes"][0]["units"].values()
    total = 0
    for unit in units:
        for name, entry in unit["linears"].items():
            weight = model.get_submodule(name).dense()
            assert int((weight == 0).sum()) == entry["zeros"]
            assert max(len(row.unique()) for row in weight) <= 8
            total += entry["parameters"]
    zeros = sum(entry["zeros"] for unit in units for entry in unit["linears"].values())
    assert 0.5 * total <= zeros < 0.75 * total  # survivors may round to zero
    assert plan(recipe)["bytes_at_bits"].keys() == {"3"}


@pytest.mark.parametrize("allocation", ["mrp", "alpha", "hessian"])
def test_nothing_is_measured_for_dividing_no_zeros(allocation, recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(Joint, "measure_block", None)
    recipe["passes"] = [{"kind": "joint", "bits": 4, "sparsity": 0, "allocation": allocation}]
    model = compress.load(compress.run(recipe, tmp_path / "model"))
    assert compress.get_bits(model) == 4


@pytest.mark.slow
def test_the_sweep_beats_rounding_what_is_left(recipe, tmp_path):
    """On the calibration text, one sweep loses less than the same masks followed by rounding to nearest."""
    from compress.calibration import draw_samples
    from compress.settings import Calibration
    from compress.source import open_source

    shared = {"score": "sparsegpt", "allocation": "uniform", "sparsity": 0.5}
    joint = {"kind": "joint", "bits": 3, "allocation": "uniform", "sparsity": 0.5}
    apart = [{"kind": "prune", **shared}, {"kind": "rtn", "bits": 3}]
    dense = compress.load(recipe["model"])
    tokens = draw_samples(Calibration(**recipe["calibration"]), open_source(recipe["model"]).tokenizer, 64).tokens

    def error(passes, name):
        model = compress.load(compress.run({**recipe, "passes": passes}, tmp_path / name))
        with torch.no_grad():
            pairs = [(model(t[None]).logits, dense(t[None]).logits) for t in tokens]
        return sum(float((ours - theirs).square().mean()) for ours, theirs in pairs)

    assert error([joint], "joint") < error(apart, "apart")


def test_nothing_comes_after_it(recipe, tmp_path):
    recipe["passes"] = [{"kind": "joint"}, {"kind": "prune"}]
    with pytest.raises(CompressError, match=r"passes\.1 \(prune\) works on dense weights, but passes\.0 \(joint\)"):
        compress.run(recipe, tmp_path / "model")
