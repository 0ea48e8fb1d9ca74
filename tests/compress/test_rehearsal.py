"""The plan's time: what is rehearsed, and what it concludes from that."""

import re
from types import SimpleNamespace

import pytest
import torch

from compress import rehearsal
from compress.plan import plan
from compress.structure import Linear


@pytest.mark.slow
def test_time_is_foreseen_where_it_can_be(recipe):
    recipe["passes"] = [
        {"kind": "prune", "score": "wanda", "allocation": "mrp"},
        {"kind": "any_precision", "seed_bits": 3, "parent_bits": 4},
        {"kind": "tune_tables", "steps": 1},
    ]
    found = plan(recipe, seconds=True)["passes"]
    assert [step["kind"] for step in found if step["processor_seconds"] is None] == ["tune_tables"]
    assert min(step["processor_seconds"] for step in found[:2]) > 0
    assert "processor_seconds" not in plan(recipe)["passes"][0]


def test_a_pass_that_looks_at_no_text_is_foreseen_too(recipe):
    del recipe["calibration"]
    recipe["passes"] = [{"kind": "prune", "score": "magnitude"}, {"kind": "rtn", "bits": 4}]
    assert min(step["processor_seconds"] for step in plan(recipe, seconds=True)["passes"]) > 0


@pytest.mark.slow
def test_embedding_and_head_are_foreseen_like_blocks(recipe, monkeypatch):
    """Seconds that are known: one for each call, of which each sample has one of its own, and a hundred for all rows of an embedding."""
    monkeypatch.setattr(rehearsal, "_timed", lambda work, amount: work(amount) or 1.0)
    monkeypatch.setattr(rehearsal._Rehearsal, "_work_outside", lambda self, amount: 1 + 100 * amount.share)
    quantise = {"kind": "any_precision", "seed_bits": 3, "parent_bits": 4}
    recipe["passes"] = [quantise, quantise | {"embedding_bits": "auto"}]
    recipe["passes"][0]["embedding_bits"] = None
    without, packed = (
        plan(recipe | {"passes": [one]}, seconds=True)["passes"][0]["processor_seconds"] for one in recipe["passes"]
    )
    assert packed == pytest.approx(without + 101 + recipe["calibration"]["samples"])


@pytest.mark.parametrize(("transposed", "shape"), [(False, (3, 4)), (True, (2, 5))])
def test_thin_linears_are_the_first_rows_of_whole_ones(transposed, shape):
    """Of [out_features, in_features] whichever way the module stores them; writing to them changes the module."""
    from transformers.pytorch_utils import Conv1D

    module = Conv1D(4, 5) if transposed else torch.nn.Linear(4, 6)
    thin = rehearsal._Thin(Linear("name", module), 0.5)
    assert thin.shape == shape
    thin.weight.zero_()
    assert int((Linear("name", module).weight == 0).all(1).sum()) == shape[0]


def test_each_slope_is_measured_by_itself(monkeypatch):
    """Seconds that are known: 2 for the block, 30 for all its rows, and 5 for each sample after the first."""
    watch = rehearsal._Rehearsal.__new__(rehearsal._Rehearsal)
    watch.count, watch.needs = 64, SimpleNamespace(inputs="original")
    monkeypatch.setattr(rehearsal, "_timed", lambda work, amount: work(amount))
    found = watch._foresee(lambda amount: 2 + 30 * amount.share + 5 * (amount.samples - 1), 0.1)
    assert found == pytest.approx(2 + 30 + 5 * 63)


@pytest.mark.slow
def test_the_plan_says_what_does_not_fit_and_what_would(recipe, monkeypatch):
    recipe["calibration"] |= {"samples": 64, "length": 64}
    needed = plan(recipe)["peak_memory_bytes"]
    assert plan(recipe)["warnings"] == []
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=needed - (1 << 20)))
    (said,) = plan(recipe)["warnings"]
    found = re.fullmatch(
        r"memory: .* GB are needed, .* GB are free; calibration.samples (\d+) and calibration.length 64 .*", said
    )
    assert found is not None
    assert int(found[1]) < 64
    recipe["calibration"]["samples"] = int(found[1])
    assert plan(recipe)["peak_memory_bytes"] < needed - (1 << 20)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1))
    assert "it takes a machine with more memory" in plan(recipe)["warnings"][0]
    monkeypatch.undo()
    monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=10))
    assert "disk:" in plan(recipe)["warnings"][0]


@pytest.mark.slow
def test_the_plan_counts_processes_that_can_help(recipe):
    recipe["passes"] = [{"kind": "prune", "score": "magnitude"}, {"kind": "any_precision"}, {"kind": "tune_tables"}]
    recipe["passes"] += [{"kind": "soft_prompt", "batch": 3, "tokens": 4}]
    assert [step["processes"] for step in plan(recipe)["passes"]] == [7, 4, 4, 3]
    recipe["calibration"]["samples"] = 32
    assert [step["processes"] for step in plan(recipe)["passes"]] == [7, 8, 8, 3]
