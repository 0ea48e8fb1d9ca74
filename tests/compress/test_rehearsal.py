"""The plan's time: what is rehearsed, and what it concludes from that."""

import re
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

import compress
from compress import rehearsal, training
from compress.plan import plan
from compress.quant import tune
from compress.structure import Linear


@pytest.mark.slow
def test_time_is_foreseen_where_it_can_be(recipe):
    recipe["passes"] = [
        {"kind": "mini_llm", "ratio": 0.1},
        {"kind": "lora_recovery", "steps": 1},
        {"kind": "prune", "score": "wanda", "allocation": "mrp"},
        {"kind": "any_precision", "seed_bits": 3, "parent_bits": 4},
        {"kind": "tune_tables", "steps": 1},
        {"kind": "soft_prompt", "steps": 1, "tokens": 4},
    ]
    found = plan(recipe, seconds=True)["passes"]
    assert [step["kind"] for step in found if step["processor_seconds"] is None] == ["mini_llm"]
    assert min(step["processor_seconds"] for step in found[1:]) > 0
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
def test_no_setting_is_named_where_writing_takes_the_most(recipe, make_model, monkeypatch):
    recipe |= {"model": str(make_model("llama", vocab_size=3000)), "passes": [{"kind": "rtn", "bits": 4}]}
    needed = plan(recipe)["peak_memory_bytes"]
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=needed - 1))
    assert plan(recipe)["warnings"][0].endswith("it takes a machine with more memory.")


@pytest.mark.slow
def test_the_plan_counts_what_a_training_keeps_for_its_gradient(make_model, monkeypatch):
    """Beside what autograd saves of a sample of 100 tokens behind a prompt of 28, in all blocks; logits are the same few in both."""
    folder = make_model("llama", vocab_size=300, hidden_size=256, intermediate_size=704, num_hidden_layers=6)
    step = {"kind": "soft_prompt", "tokens": 28, "micro_batch": 8}
    recipe = {
        "model": str(folder),
        "calibration": {"builtin": "stdlib", "samples": 16, "length": 100},
        "passes": [step],
    }
    eight = plan(recipe)["peak_memory_bytes"]
    step["micro_batch"] = 1
    one = plan(recipe)["peak_memory_bytes"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).requires_grad_(False)
    saved = {}

    def keep(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(inputs_embeds=torch.randn(1, 128, 256, requires_grad=True), use_cache=False)
    held = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    values = sum(t.untyped_storage().nbytes() for place, t in saved.items() if place not in held)
    assert (eight - one) / 7 == pytest.approx(values, rel=0.3)
    step["micro_batch"] = 8
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=one))
    assert plan(recipe)["warnings"][0].endswith(f"; micro_batch 1 would take {one / 1e9:.2f} GB.")


@pytest.mark.slow
def test_what_a_training_runs_is_counted_as_it_is_run(recipe, tmp_path, monkeypatch):
    """Samples that models are run on, with a gradient and without, in two trainings at several numbers of bits."""
    run, real = Counter(), {}

    def counting(name):
        def counted(model, tokens, *arguments, **options):
            way = "trained" if torch.is_grad_enabled() and name != "likeliest" else "scored"
            run[name, way] += len(tokens)
            return real[name](model, tokens, *arguments, **options)

        return counted

    for module, name in ((tune, "listed_divergence"), (tune, "likeliest"), (training, "token_losses")):
        real[name] = getattr(module, name)
        monkeypatch.setattr(module, name, counting(name))
    tables = {"kind": "tune_tables", "steps": 2, "batch": 3, "length": 16}
    prompt = {"kind": "soft_prompt", "steps": 5, "validate_every": 2, "batch": 3, "tokens": 4, "per_width": True}
    recipe["passes"] += [tables, prompt]
    compress.run(recipe, tmp_path / "model")
    counted = []
    monkeypatch.setattr(rehearsal._Rehearsal, "training", lambda self, work: counted.append(work) or 0.0)
    plan(recipe, seconds=True)
    first, second = counted
    assert first.trained == run["listed_divergence", "trained"]
    assert first.scored == run["listed_divergence", "scored"] + run["likeliest", "scored"]
    assert (second.trained, second.scored) == (run["token_losses", "trained"], run["token_losses", "scored"])
    assert (first.length, second.length) == (16, recipe["calibration"]["length"] + 4)


@pytest.mark.slow
def test_the_plan_counts_processes_that_can_help(recipe):
    recipe["passes"] = [{"kind": "prune", "score": "magnitude"}, {"kind": "any_precision"}, {"kind": "tune_tables"}]
    recipe["passes"] += [{"kind": "soft_prompt", "batch": 3, "tokens": 4}]
    assert [step["processes"] for step in plan(recipe)["passes"]] == [7, 4, 4, 3]
    recipe["calibration"]["samples"] = 32
    assert [step["processes"] for step in plan(recipe)["passes"]] == [7, 8, 8, 3]
