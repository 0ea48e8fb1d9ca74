"""The output objective through the ordinary path: recipes in, checkpoints out, errors measured by plain matrix products."""

import gc
import json
import weakref

import pytest
import torch
from transformers import AutoModelForCausalLM

import compress
from compress import runner
from compress.fisher import drawn_gradients
from compress.hf import packed_modules
from compress.passes import Block
from compress.plan import plan
from compress.quant import any_precision, block_sweep
from compress.quant.errors import OutputScale, layer_errors
from compress.structure import ARCHITECTURES


def settings(model, text_file, **options):
    return {
        "model": str(model),
        "calibration": {"text": str(text_file), "samples": 6, "length": 32},
        "passes": [{"kind": "any_precision", "seed_bits": 3, "parent_bits": 5, **options}],
    }


def layer_inputs(folder, tokens):
    """Every linear's inputs [T, K] in the dense model."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    seen = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "head" not in name:
            module.register_forward_pre_hook(lambda _m, x, name=name: seen.__setitem__(name, x[0].flatten(0, -2)))
    with torch.no_grad():
        model(tokens)
    return seen, model


def output_errors(checkpoint, dense_folder, tokens, bits):
    """Matrix -> sum of squared differences of its outputs on the dense model's inputs."""
    inputs, dense = layer_inputs(dense_folder, tokens)
    packed = packed_modules(compress.load(checkpoint, bits=bits, dtype=torch.float32))
    return {
        name: float((inputs[name] @ (module.dense() - dense.get_submodule(name).weight).t()).square().sum())
        for name, module in packed.items()
    }


@pytest.mark.slow
def test_outputs_are_nearer_than_by_the_weight_objective(tiny_llama, text_file, tmp_path):
    tokens = torch.tensor([json.loads(_tokens(tiny_llama, text_file))])
    sums = {}
    for objective in ("weight", "output"):
        target = compress.run(
            settings(tiny_llama, text_file, objective=objective, correction=0, codebooks="row"), tmp_path / objective
        )
        sums[objective] = {b: sum(output_errors(target, tiny_llama, tokens, b).values()) for b in (3, 4, 5)}
    for bits in (3, 4, 5):
        assert sums["output"][bits] < 0.95 * sums["weight"][bits], bits


def _tokens(folder, text_file):
    from transformers import AutoTokenizer

    return json.dumps(AutoTokenizer.from_pretrained(folder)(text_file.read_text()[:400])["input_ids"][:60])


@pytest.mark.slow
def test_recorded_errors_are_those_of_the_stored_matrices(tiny_llama, text_file, tmp_path):
    target = compress.run(settings(tiny_llama, text_file), tmp_path / "out")
    manifest = json.loads((target / "compression.json").read_text())
    errors = {k: v for unit in manifest["passes"][0]["units"].values() for k, v in unit["errors"].items()}
    dense = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    for bits in (3, 5):
        for name, module in packed_modules(compress.load(target, bits=bits, dtype=torch.float32)).items():
            weight = dense.get_submodule(name).weight
            relative = float((module.dense() - weight).square().sum() / weight.square().sum())
            assert errors[name][str(module.bits)]["relative"] == pytest.approx(relative, rel=1e-4)
    inside = {name: found for name, found in errors.items() if ".layers." in name}
    assert inside
    for found in inside.values():
        assert 1 > found["3"]["output"] > found["4"]["output"] > found["5"]["output"] > 0
        assert found["3"]["weighted"] > found["4"]["weighted"] > found["5"]["weighted"] > 0


def test_layer_errors_by_hand():
    weight = torch.tensor([[1.0, 2.0], [0.0, -1.0]])
    quantised = torch.tensor([[1.5, 2.0], [0.0, -2.0]])
    metric = torch.tensor([[2.0, 1.0], [1.0, 4.0]])
    sensitivity = torch.tensor([[3.0, 9.0], [0.5, 1.5]])
    # Rows' e H e: 0.25 * 2 and 1 * 4. Rows' w H w: 2 + 4 + 16 and 4. Rows' s: 12 and 2; trace 6.
    assert layer_errors(
        weight, quantised.__getitem__, sensitivity, OutputScale(weight, sensitivity, metric)
    ) == pytest.approx({"relative": 1.25 / 6, "output": 4.5 / 26, "weighted": 0.5 * 12 / 6 + 4 * 2 / 6})
    assert layer_errors(weight, quantised.__getitem__, sensitivity, None) == pytest.approx(
        {"relative": 1.25 / 6, "weighted": 0.25 * 3 + 1.5}
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", [family.model_types[0] for family in ARCHITECTURES])
def test_every_family(kind, make_model, text_file, tmp_path):
    folder = make_model(kind)
    target = compress.run(settings(folder, text_file), tmp_path / "out")
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = compress.load(target, dtype=torch.float32)
    tokens = torch.arange(1, 30)[None]
    with torch.no_grad():
        apart = [float((m(tokens).logits - dense(tokens).logits).square().mean()) for m in _at(model, (5, 3))]
    assert apart[0] < apart[1]


def _at(model, widths):
    for bits in widths:
        compress.set_bits(model, bits)
        yield model


@pytest.mark.slow
def test_pruned_weights_stay_zero(make_model, text_file, tmp_path):
    pruned = AutoModelForCausalLM.from_pretrained(make_model("llama"), dtype=torch.float32)
    folder = tmp_path / "pruned"
    zeros = {}
    with torch.no_grad():
        for name, module in pruned.model.layers.named_modules():
            if isinstance(module, torch.nn.Linear):
                zeros[f"model.layers.{name}"] = module.weight.abs() < module.weight.abs().median()
                module.weight.masked_fill_(zeros[f"model.layers.{name}"], 0)
    pruned.save_pretrained(folder)
    for file in make_model("llama").glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    target = compress.run(settings(folder, text_file, keep_zeros=True), tmp_path / "out")
    for bits in (3, 4, 5):
        for name, module in packed_modules(compress.load(target, bits=bits, dtype=torch.float32)).items():
            assert (module.dense()[zeros[name]] == 0).all(), (name, bits)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"focus": {9: 1.0}}, "focus 9"),
        ({"focus": {3: 0.0}}, "focus 3"),
        ({"correction": 1.5}, "correction"),
        ({"objective": "loss"}, "objective"),
    ],
)
def test_bad_settings_are_named(tiny_llama, text_file, tmp_path, options, complaint):
    with pytest.raises(compress.CompressError, match=complaint):
        compress.run(settings(tiny_llama, text_file, **options), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_metric_is_of_the_dense_models_inputs(tiny_llama, text_file, tmp_path, monkeypatch):
    """One for all widths, and as measured: what is added to it for the sweep is taken away again."""
    checked = []

    def watched(block, *rest):
        inputs = {name: [] for name in block.linears}
        handles = [
            linear.module.register_forward_pre_hook(lambda _m, x, name=name: inputs[name].append(x[0].flatten(0, -2)))
            for name, linear in block.linears.items()
        ]
        with torch.no_grad():
            for run in block.samples:
                run(block.module)
        for handle in handles:
            handle.remove()
        fitted = block_sweep.fit_block(block, *rest)
        for name, found in fitted.items():
            x = torch.cat(inputs[name]).double()
            outer = x[:, :, None] * x[:, None, :] / x.norm(dim=1)[:, None, None]
            assert torch.allclose(found.hessian.double(), outer.mean(0), rtol=1e-3, atol=1e-6), name
            checked.append(name)
        return fitted

    monkeypatch.setattr(any_precision, "fit_block", watched)
    compress.run(settings(tiny_llama, text_file), tmp_path / "out")
    assert len(checked) == 21


def test_correction_is_the_least_squares_one():
    """Rows that do to other inputs what the dense ones do to theirs, by a plain weighted regression with the same damping."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 40, 6, generator=generator)
    x[:, 0] *= 1000  # as the first token of a text
    other = x + 0.3 * torch.randn(3, 40, 6, generator=generator)
    weight = torch.randn(4, 6, generator=generator)
    others = [*other, None, other[0, :5]]  # of samples that were sent elsewhere nothing can be learnt
    found = block_sweep.correction(zip([*x, x[0], x[0]], others, strict=True), weight)
    counts = x.flatten(0, 1).norm(dim=1, keepdim=True) ** -0.5
    flat = other.flatten(0, 1) * counts
    damping = (0.01 * flat.square().sum() / 6).sqrt() * torch.eye(6)
    wanted = torch.cat([(x.flatten(0, 1) * counts - flat) @ weight.t(), torch.zeros(6, 4)])
    assert torch.allclose(found, torch.linalg.lstsq(torch.cat([flat, damping]), wanted).solution.t(), atol=1e-5)


@pytest.mark.slow
def test_few_tokens_go_through_the_variants_and_few_samples_backwards(tiny_llama, text_file, tmp_path, monkeypatch):
    """And the next block is given what whole runs of the changed block make of them."""
    monkeypatch.setattr(any_precision, "CORRECTING", 8)
    monkeypatch.setattr(block_sweep, "CORRECTING", 8)
    monkeypatch.setattr(any_precision, "_GRADIENTS", 2)
    lengths, backward = [], []

    def watched(block, *rest):
        fitted = block_sweep.fit_block(block, *rest)
        for variant, runs in block.variants.items():
            block.show(variant)
            for run, output in zip(runs, block.outputs[variant], strict=True):
                torch.testing.assert_close(run(block.module), output)
                lengths.append(output.shape[1])
        assert [output.shape[1] for output in block.outputs[""]] == [32] * 6
        return fitted

    def gradients(model, samples, *rest):
        backward.append(len(samples.tokens))
        return drawn_gradients(model, samples, *rest)

    monkeypatch.setattr(any_precision, "fit_block", watched)
    monkeypatch.setattr(runner, "drawn_gradients", gradients)
    compress.run(settings(tiny_llama, text_file), tmp_path / "out")
    assert lengths == [8] * (3 * 3 * 6)
    assert backward == [2]


@pytest.mark.slow
def test_the_plan_counts_the_rows_in_work_with_and_without_correction(tiny_llama, text_file):
    """Without a correction no width has inputs of its own, so the plan is smaller, but not that of the weight objective."""
    corrected, plain, by_weight = (
        plan(settings(tiny_llama, text_file, **options))["passes"][0]["memory_bytes"]
        for options in ({}, {"correction": 0}, {"objective": "weight"})
    )
    assert by_weight < plain < corrected


@pytest.mark.slow
def test_a_block_is_let_go_before_the_next(tiny_llama, text_file, tmp_path, monkeypatch):
    """Without the garbage collector, which comes when it likes: what keeps a block must not be kept by it."""
    seen, alive = [], []

    def watched(block, *rest):
        alive.append(sum(earlier() is not None for earlier in seen))
        seen.append(weakref.ref(block))
        return block_sweep.fit_block(block, *rest)

    monkeypatch.setattr(any_precision, "fit_block", watched)
    gc.disable()
    try:
        compress.run(settings(tiny_llama, text_file), tmp_path / "out")
    finally:
        gc.enable()
    assert len(alive) > 1
    assert set(alive) == {0}


@torch.no_grad()
def test_of_a_linear_that_is_called_twice_the_first_inputs_of_every_sample_are_kept():
    """Gemma 3n's routers, say; a changed run's inputs, the first as well, are compared with them sample by sample."""

    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(4, 4)

        def forward(self, x):
            return self.linear(self.linear(x)) if x[0, 0, 0] > 0 else x

    module, samples = Twice(), [torch.ones(1, 3, 4), -torch.ones(1, 3, 4), 2 * torch.ones(1, 3, 4)]
    runs = [lambda block, x=x: block(x) for x in samples]
    block = Block(0, "b", module, {}, samples=runs, variants={"3": runs})
    first, none, last = block_sweep.Originals(block, {"linear": module.linear}).take_inputs("linear")
    assert none is None
    assert torch.equal(first, samples[0][0])
    assert torch.equal(last, samples[2][0])
