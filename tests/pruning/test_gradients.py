"""Estimates from forward passes, against derivatives by backpropagation written out anew; and weights left as they were."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from compress.pruning.structured.gradients import (
    gates_backprop,
    gates_residual,
    gates_spsa,
    noise,
    sample_losses,
    spsa,
    spsa_gradient,
    weight_gradients,
)
from compress.pruning.structured.groups import parts_of
from compress.pruning.structured.scores import element_scores, group_scores, lowest
from compress.shapes import config_shape
from compress.structure import Linear, architecture, linears_of

SAMPLES = [torch.randint(0, 300, (length,), generator=torch.Generator().manual_seed(length)) for length in (20, 20, 13)]


def quiet(*_):
    return


@pytest.fixture(params=["llama", "opt"])
def model(request, make_model):
    loaded = AutoModelForCausalLM.from_pretrained(make_model(request.param), dtype=torch.float32).eval()
    return loaded.requires_grad_(False)


def linears(model):
    structure = architecture(model.config)
    prefix = f"{structure.blocks}.1"
    return linears_of(model.get_submodule(prefix), prefix)


def mean_loss(model):
    losses = [model(sample[None], labels=sample[None]).loss for sample in SAMPLES]
    return torch.stack(losses).mean()


def gated(model):
    structure = architecture(model.config)
    found = {}
    for index in range(model.config.num_hidden_layers):
        name = f"{structure.blocks}.{index}.{structure.mlp[-1]}"
        found[f"{index}"] = (Linear(name, model.get_submodule(name)), torch.arange(100))
    return found


def slopes(model, name):
    """[samples, 100]: the derivative of each sample's loss by factors on the columns of a linear."""
    weight, found = model.get_submodule(name).weight, []
    for sample in SAMPLES:
        weight.requires_grad_(True)
        loss = model(sample[None], labels=sample[None]).loss
        (gradient,) = torch.autograd.grad(loss, weight)
        weight.requires_grad_(False)
        found.append((gradient * weight).sum(0))
    return torch.stack(found)


def test_spsa_is_the_derivative_along_its_noise_and_writes_nothing(model):
    some = linears(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    draws = spsa(model, some, SAMPLES, 2, 1e-3, 11, quiet)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    weights = [linear.module.weight.requires_grad_() for linear in some.values()]
    gradients = torch.autograd.grad(mean_loss(model), weights)
    for seed, slope in draws:
        along = [(g * noise(g.shape, seed, place, g.device)).sum() for place, g in enumerate(gradients)]
        assert slope == pytest.approx(float(sum(along)), rel=0.02, abs=1e-4)
    (_, first), (_, second) = draws
    shape = gradients[1].shape
    estimate = spsa_gradient(draws, 1, shape, gradients[1].device)
    by_hand = (first * noise(shape, 11, 1, estimate.device) + second * noise(shape, 12, 1, estimate.device)) / 2
    assert torch.allclose(estimate, by_hand)


def test_one_draw_scores_as_its_noise_does():
    """The loss enters through one number, which no ranking sees: why noise is the control."""
    weight, z, norm = torch.randn(8, 6), torch.randn(8, 6), torch.rand(6)
    estimated = element_scores(weight, norm, norm, -0.37 * z, "F1")
    control = element_scores(weight, norm, norm, z, "F1")
    assert torch.equal(estimated.sum(0).argsort(), control.sum(0).argsort())


def test_weight_gradients_are_those_of_the_mean_loss(model):
    some = linears(model)
    found = weight_gradients(model, some, SAMPLES, quiet)
    weights = [linear.module.weight.requires_grad_() for linear in some.values()]
    for gradient, expected in zip(found.values(), torch.autograd.grad(mean_loss(model), weights), strict=True):
        assert torch.allclose(gradient, expected, atol=1e-5)


def test_gate_fisher_is_the_mean_square_of_each_samples_slope(model):
    gates = gated(model)
    found = gates_backprop(model, gates, SAMPLES, quiet)
    for label, (linear, _) in gates.items():
        assert torch.allclose(found[label], slopes(model, linear.name).square().mean(0), rtol=1e-3, atol=1e-8)


def test_the_residual_gradient_is_exact_where_no_block_follows(model):
    gates = gated(model)
    structure = architecture(model.config)
    last = model.get_submodule(structure.blocks)[-1]
    found, exact = gates_residual(model, last, gates, SAMPLES, quiet), gates_backprop(model, gates, SAMPLES, quiet)
    label = str(model.config.num_hidden_layers - 1)
    assert torch.allclose(found[label], exact[label], rtol=1e-3, atol=1e-8)
    assert not torch.allclose(found["0"], exact["0"], rtol=0.1)


def test_gate_spsa_comes_near_the_truth_with_many_draws(make_model):
    model = AutoModelForCausalLM.from_pretrained(make_model("llama"), dtype=torch.float32).eval().requires_grad_(False)
    gates = {"2": (gated(model)["2"][0], torch.arange(100) // 20)}  # five groups
    found = gates_spsa(model, gates, SAMPLES, 60, 1e-2, 3, quiet)["2"]
    exact = gates_backprop(model, gates, SAMPLES, quiet)["2"]
    assert torch.corrcoef(torch.stack([found, exact]))[0, 1] > 0.8


def test_losses_leave_out_the_padding(model):
    tokens = torch.zeros(3, 20, dtype=torch.long)
    scored = torch.zeros(3, 19, dtype=torch.bool)
    for row, sample in enumerate(SAMPLES):
        tokens[row, : len(sample)] = sample
        scored[row, : len(sample) - 1] = True
    alone = [model(sample[None], labels=sample[None]).loss for sample in SAMPLES]
    assert torch.allclose(sample_losses(model, tokens, scored), torch.stack(alone), atol=1e-4)


def test_group_scores_add_rows_and_columns_of_every_member(make_model):
    config = AutoConfig.from_pretrained(make_model("llama"))
    part = parts_of(architecture(config), config, config_shape(config), "groups", set())["attention"]
    sizes = {
        "self_attn.q_proj": (48, 48),
        "self_attn.k_proj": (24, 48),
        "self_attn.v_proj": (24, 48),
        "self_attn.o_proj": (48, 48),
    }
    elements = {name: torch.rand(size) for name, size in sizes.items()}
    q, k, v, o = elements.values()
    sums = [torch.stack([q[g * 24 : g * 24 + 24].sum(), k[g * 12 : g * 12 + 12].sum(), v[g * 12 : g * 12 + 12].sum(),
                         o[:, g * 24 : g * 24 + 24].sum()]) for g in (0, 1)]  # fmt: skip
    assert torch.allclose(group_scores(part, elements, "sum"), torch.stack([s.sum() for s in sums]))
    assert torch.allclose(group_scores(part, elements, "max"), torch.stack([s.max() for s in sums]))


def test_the_lowest_go_first_and_classes_lose_as_many():
    scores = torch.tensor([0.1, 0.2, 5.0, 4.0, 0.3, 0.4])
    assert lowest(scores, torch.zeros(6, dtype=torch.long), 3) == [0, 1, 4]
    assert lowest(scores, torch.tensor([0, 0, 1, 1, 2, 2]), 3) == [0, 4, 3]
