"""The passes in recipes: exact targets, every architecture, composition with quantisation, and what is refused."""

import json
import shutil
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import compress
from compress.calibration import draw_samples
from compress.errors import CompressError
from compress.passes import pass_class
from compress.plan import plan
from compress.pruning.scores import select, select_pattern
from compress.settings import Calibration
from compress.source import open_source
from compress.structure import ARCHITECTURES

SCORES = ("magnitude", "wanda", "sparsegpt")


def pruning(recipe, **settings):
    return {**recipe, "passes": [{"kind": "prune", **settings}]}


def units_of(folder, step=0):
    return json.loads((folder / "compression.json").read_text())["passes"][step]["units"]


def linears_of(folder):
    """Name -> (zeros, parameters), counted in the loaded model."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    names = [name for unit in units_of(folder).values() for name in unit["linears"]]
    weights = {name: model.get_submodule(name).weight for name in names}
    return {name: (int((weight == 0).sum()), weight.numel()) for name, weight in weights.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("score", "allocation"),
    [*((score, "uniform") for score in SCORES), *(("wanda", name) for name in ("random", "owl", "atp", "mrp")),
     ("magnitude", "alpha"), ("magnitude", "dlp"), ("sparsegpt", "hessian"), ("sparsegpt", "mrp")],
)  # fmt: skip
def test_the_target_is_met_to_the_weight(recipe, tmp_path, score, allocation):
    target = compress.run(pruning(recipe, score=score, allocation=allocation, sparsity=0.37), tmp_path / "model")
    found = linears_of(target)
    assert len(found) == 3 * 7
    zeros, parameters = (sum(column) for column in zip(*found.values(), strict=True))
    assert zeros == round(0.37 * parameters)
    recorded = {name: entry for unit in units_of(target).values() for name, entry in unit["linears"].items()}
    assert {name: (entry["zeros"], entry["parameters"]) for name, entry in recorded.items()} == found
    shares = {unit["sparsity"] for unit in units_of(target).values()}
    assert (max(shares) - min(shares) < 1e-3) == (allocation == "uniform")


@pytest.mark.slow
@pytest.mark.parametrize("kind", [family.model_types[0] for family in ARCHITECTURES])
def test_every_family(make_model, recipe, tmp_path, kind):
    recipe["model"] = str(make_model(kind))
    target = compress.run(pruning(recipe, score="sparsegpt", allocation="mrp", sparsity=0.5), tmp_path / "model")
    zeros, parameters = (sum(column) for column in zip(*linears_of(target).values(), strict=True))
    assert zeros == round(0.5 * parameters)


@torch.no_grad()
def by_hand(recipe, choose):
    """Block by block on the whole model with hooks; ``choose(weight, norms)`` is the mask of a matrix."""
    model = AutoModelForCausalLM.from_pretrained(recipe["model"])
    source = open_source(recipe["model"])
    samples = draw_samples(Calibration(**recipe["calibration"]), source.tokenizer, 64).tokens
    conv = type(model).__name__.startswith("GPT2")
    for layer in model.transformer.h if conv else model.model.layers:
        linears = [module for module in layer.modules() if getattr(module, "weight", torch.ones(1)).ndim == 2]
        energy = dict.fromkeys(linears, 0)

        def add(module, inputs, energy=energy):
            energy[module] = energy[module] + inputs[0].flatten(0, -2).square().sum(0)

        hooks = [module.register_forward_pre_hook(add) for module in linears]
        for tokens in samples:
            model(input_ids=tokens[None])
        for hook in hooks:
            hook.remove()
        for module in linears:
            weight = module.weight.t() if conv else module.weight
            weight[choose(weight, energy[module].sqrt())] = 0
    return model


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_wanda_goes_block_by_block_on_pruned_inputs(make_model, recipe, tmp_path, kind):
    """GPT-2 keeps its matrices transposed: its rows are outputs all the same."""
    recipe["model"] = str(make_model(kind))
    settings = {"score": "wanda", "allocation": "uniform", "sparsity": 0.5}
    found = AutoModelForCausalLM.from_pretrained(compress.run(pruning(recipe, **settings), tmp_path / "model"))
    expected = by_hand(recipe, lambda w, norms: select(w.abs() * norms, w.numel() // 2, "row"))
    for name, tensor in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name


@pytest.mark.slow
@pytest.mark.parametrize(("pattern", "kept", "of"), [("2:4", 2, 4), ("4:8", 4, 8)])
def test_patterns_in_a_recipe(recipe, tmp_path, pattern, kept, of):
    settings = {"score": "wanda", "pattern": pattern}  # which implies the sparsity and the allocation
    found = AutoModelForCausalLM.from_pretrained(compress.run(pruning(recipe, **settings), tmp_path / "model"))
    expected = by_hand(recipe, lambda w, norms: select_pattern(w.abs() * norms, kept, of))
    name = "model.layers.2.mlp.down_proj.weight"  # 100 columns: the last group of 8 is a half
    assert torch.equal(found.state_dict()[name], expected.state_dict()[name])


def run_first(streamed, hidden, calls, block):
    return streamed.run(block, hidden, calls[0])


@pytest.mark.slow
def test_shared_inputs_are_measured_once(make_model):
    """Query, key and value; gate and up: four distinct inputs in a block of seven linears, three in one of OPT."""
    from compress.passes import Block
    from compress.statistics import Moments
    from compress.streaming import StreamedModel

    for kind, distinct in (("llama", 4), ("opt", 4), ("gpt2", 4), ("gpt_neox", 4)):
        streamed = StreamedModel(open_source(str(make_model(kind))).state, torch.device("cpu"))
        tokens = [torch.randint(1, 300, (n,), generator=torch.Generator().manual_seed(n)) for n in (9, 30)]
        with torch.no_grad(), streamed.block(0) as module:
            captured = [streamed.capture(sample) for sample in tokens]
            runs = [partial(run_first, streamed, *pair) for pair in captured]
            block = Block(0, "", module, streamed.linears(0), samples=runs)
            full, diagonal, seen = Moments(full=True), Moments(), {}
            for moments in (full, diagonal):
                block.for_each_input(moments.add)
            block.for_each_input(lambda name, x, seen=seen: seen.setdefault(name, []).append(x.clone()))
        assert len(full.sums) == len(diagonal.sums) == distinct
        for name, parts in seen.items():
            x = torch.cat(parts)
            assert torch.allclose(full.mean(name), x.t() @ x / len(x), atol=1e-4)
            assert torch.allclose(diagonal.mean(name), x.square().mean(0), atol=1e-4)


@pytest.mark.slow
def test_the_report_has_ratios_and_every_iteration(recipe, tmp_path):
    target = compress.run(pruning(recipe, allocation="mrp", sparsity=0.5, spread=0.1, outlier=3), tmp_path / "model")
    units = units_of(target).values()
    assert all(0 < unit["nor"]["after"] < unit["nor"]["before"] < 1 for unit in units)
    iterations = sorted((step for unit in units for step in unit["iterations"]), key=lambda step: step["iteration"])
    assert [step["iteration"] for step in iterations] == list(range(len(iterations)))
    assert len(iterations) == 30
    for unit in units:
        if unit["iterations"]:
            assert unit["iterations"][-1]["after"] == pytest.approx(unit["sparsity"], abs=1e-3)


@pytest.mark.slow
def test_refreshed_mrp_measures_again_on_the_sparse_model(recipe, tmp_path):
    """30 iterations in three rounds of up to 12; the first round's choices are those of the tabulated form."""
    shared = {"allocation": "mrp", "sparsity": 0.5, "spread": 0.1, "outlier": 3}
    log = {}
    for refresh in (0, 12):
        target = compress.run(pruning(recipe, **shared, refresh=refresh), tmp_path / str(refresh))
        steps = [step for unit in units_of(target).values() for step in unit["iterations"]]
        log[refresh] = sorted(steps, key=lambda step: step["iteration"])
    assert log[0][:12] == log[12][:12]
    assert [step["nor"] for step in log[0][12:]] != [step["nor"] for step in log[12][12:]]
    lines = (tmp_path / "12.log.jsonl").read_text().splitlines()
    surveyed = {json.loads(line)["unit"] for line in lines if "survey" in line}
    assert surveyed == {f"survey-{round}-{block}" for round in range(3) for block in range(3)}


@pytest.mark.slow
def test_masks_survive_quantisation_saving_and_loading(recipe, tmp_path, run_code):
    """At every width, in a fresh process, each pruned weight is exactly zero; survivors may round to zero too."""
    first = {"kind": "prune", "score": "sparsegpt", "sparsity": 0.6}
    second = {"kind": "any_precision", "seed_bits": 3, "parent_bits": 5, "keep_zeros": True}
    pruned = compress.run({**recipe, "passes": [first]}, tmp_path / "pruned", workspace=tmp_path / "work")
    packed = compress.run({**recipe, "passes": [first, second]}, tmp_path / "packed", workspace=tmp_path / "work")
    assert units_of(pruned) == units_of(packed)
    code = (
        "import compress, sys; from transformers import AutoModelForCausalLM as A\n"
        "pruned, packed = A.from_pretrained(sys.argv[1]), compress.load(sys.argv[2])\n"
        "for bits in (3, 4, 5):\n"
        "    compress.set_bits(packed, bits)\n"
        "    for name in packed.config.quantization_config.modules:\n"
        "        weight, mask = packed.get_submodule(name).dense(), pruned.get_submodule(name).weight == 0\n"
        "        assert mask.any() and (weight[mask] == 0).all() and (bits < 5 or (weight[~mask] == 0).float().mean() < 0.2)\n"
        "    print(bits, name)"
    )
    assert [line[0] for line in run_code(code, pruned, packed).splitlines()] == ["3", "4", "5"]


@pytest.mark.slow
def test_ignored_linears_stay_as_they_are(recipe, tiny_llama, tmp_path):
    settings = {"ignore": [r"re:.*\.layers\.1\..*", "model.layers.0.self_attn.q_proj"], "sparsity": 0.5}
    target = compress.run(pruning(recipe, **settings), tmp_path / "model")
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny_llama, target))
    for name in before:
        same = ".1." in name or name.endswith("0.self_attn.q_proj.weight") or "proj" not in name
        assert torch.equal(before[name], after[name]) == same, name
    found = linears_of(target)
    zeros, parameters = (sum(column) for column in zip(*found.values(), strict=True))
    assert len(found) == 13
    assert zeros == round(0.5 * parameters)


@pytest.mark.slow
def test_zero_rows_dead_inputs_and_half_precision(recipe, make_model, tmp_path):
    folder = shutil.copytree(make_model("llama"), tmp_path / "odd")
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(folder / "model.safetensors").items()}
    tensors["model.layers.0.mlp.up_proj.weight"][7] = 0  # so column 7 of down_proj never sees anything
    tensors["model.layers.1.self_attn.o_proj.weight"][:] = 0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    recipe["model"] = str(folder)
    for score in SCORES:
        target = compress.run(pruning(recipe, score=score, allocation="uniform", sparsity=0.5), tmp_path / score)
        found = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
        assert all(torch.isfinite(tensor).all() for tensor in found.state_dict().values())
        if score != "magnitude":
            assert (found.state_dict()["model.layers.0.mlp.down_proj.weight"][:, 7] == 0).all()


@pytest.mark.slow
def test_random_allocations_follow_the_seed(recipe, tmp_path):
    shares = []
    for index, seed in enumerate((0, 0, 1)):
        settings = {**pruning(recipe, score="magnitude", allocation="random"), "seed": seed}
        units = units_of(compress.run(settings, tmp_path / str(index)))
        shares.append([unit["sparsity"] for unit in units.values()])
    assert shares[0] == shares[1] != shares[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsity": 1.0}, "sparsity: input should be less than 1"),
        ({"sparsity": 0.5, "cap": 0.4}, r"prune: sparsity 0\.5 is not between floor 0 and cap 0\.4"),
        ({"sparsity": 0.5, "floor": 0.6}, r"prune: sparsity 0\.5 is not between floor 0\.6 and cap"),
        ({"pattern": "2:4", "sparsity": 0.6, "allocation": "uniform"}, r"pattern 2:4 fixes what goes: it needs sparsity 0\.5"),
        ({"pattern": "2:4", "allocation": "owl"}, "needs sparsity 0.5, allocation uniform and no group"),
        ({"pattern": "4:0"}, "pattern '4:0' is not n:m"),
        ({"pattern": "4:2"}, "pattern '4:2' is not n:m"),
        ({"score": "taste"}, "score: input should be 'magnitude', 'wanda' or 'sparsegpt'"),
        ({"allocation": "mrb"}, "allocation: input should be 'uniform'"),
        ({"ignore": ["re:.*experts.*"]}, "matches no module"),
        ({"ignore": ["re:.*"]}, "prune: ignore names every linear"),
    ],
)  # fmt: skip
def test_settings_that_cannot_work_are_refused_before_any_work(recipe, tmp_path, settings, message):
    with pytest.raises(CompressError, match=message):
        plan(pruning(recipe, **settings))
    with pytest.raises(CompressError, match=message):
        compress.run(pruning(recipe, **settings), tmp_path / "model")
    assert not (tmp_path / "model.log.jsonl").exists() or not (tmp_path / "model.log.jsonl").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("score", SCORES)
def test_weights_that_are_not_finite_are_named(recipe, tiny_llama, tmp_path, score):
    folder = shutil.copytree(tiny_llama, tmp_path / "broken")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][7, 3] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    recipe["model"] = str(folder)
    with pytest.raises(CompressError, match=r"model\.layers\.1\.mlp\.up_proj: row 7 of its weight holds NaN"):
        compress.run(pruning(recipe, score=score, allocation="uniform"), tmp_path / "model")


@pytest.mark.slow
def test_calibration_is_asked_for_only_where_something_looks_at_it(recipe, tmp_path):
    del recipe["calibration"]
    with pytest.raises(CompressError, match=r"passes\.0 \(prune\) looks at text"):
        compress.run(pruning(recipe, score="magnitude", allocation="owl"), tmp_path / "model")
    settings = {"score": "magnitude", "allocation": "mrp", "outlier": 3, "sparsity": 0.6}
    target = compress.run(pruning(recipe, **settings), tmp_path / "model")
    zeros, parameters = (sum(column) for column in zip(*linears_of(target).values(), strict=True))
    assert zeros == round(0.6 * parameters)


def test_plan_foresees_a_pruned_model(recipe):
    foreseen = plan(pruning(recipe))
    assert foreseen["checkpoint_bytes"] == foreseen["dense_bytes"]
    assert foreseen["passes"][0]["kind"] == "prune"
    hungry, modest = (
        plan(pruning(recipe, score=score))["passes"][0]["memory_bytes"] for score in ("sparsegpt", "wanda")
    )
    assert hungry > modest


@pytest.mark.parametrize("kind", ["prune", "joint"])
def test_every_setting_is_described(kind):
    assert all(field.description for field in pass_class(kind).Config.model_fields.values())
