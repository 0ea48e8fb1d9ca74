"""The training loop: what a step is, what is kept, and that a kill does not change the result."""

import itertools
import json
from typing import Literal

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from compress.errors import CompressError
from compress.training import TrainingConfig, next_token_loss, train

TRAINED = "model.norm.weight"


class Config(TrainingConfig):
    kind: Literal["test"] = "test"


def settings(**changes):
    base = {"steps": 6, "batch": 4, "micro_batch": 4, "learning_rate": 0.05, "warmup": 2, "validate_every": 2}
    return Config(**{**base, **changes})


@pytest.fixture
def model(tiny_llama):
    """Only its last norm is trained."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval().requires_grad_(False)
    model.get_parameter(TRAINED).requires_grad_(True)
    return model


@pytest.fixture(scope="module")
def samples():
    """Of different lengths, so that batches are padded, and of ten tokens only, so that there is something to learn."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(10, (length,), generator=generator) for length in (12, 9, 20, 5, 16, 7, 11, 13, 8)]


def trained(model):
    return model.get_parameter(TRAINED).detach().clone()


def test_steps_are_those_of_a_plain_loop(model, samples):
    """One sample at a time, no padding, everything written out; every sample is in each step."""
    config = settings(batch=7, micro_batch=2, clip=0.02, weight_decay=0.1, steps=4, validate_every=4)
    start = trained(model)
    train(model, samples, config, 0)
    found = trained(model)
    weight = model.get_parameter(TRAINED)
    weight.data.copy_(start)
    optimizer = torch.optim.AdamW([weight], weight_decay=0.1)
    training = [sample for place, sample in enumerate(samples) if place not in (0, 8)]
    for rate in (1 / 3, 2 / 3, 1.0, 0.5):  # two steps up, then down to nothing after the fourth
        total = sum(
            nn.functional.cross_entropy(model(sample[None]).logits[0, :-1], sample[1:], reduction="sum")
            for sample in training
        )
        (weight.grad,) = torch.autograd.grad(total / sum(len(sample) - 1 for sample in training), [weight])
        weight.grad *= 0.02 / weight.grad.norm()
        optimizer.param_groups[0]["lr"] = 0.05 * rate
        optimizer.step()
    assert not torch.equal(found, start)
    torch.testing.assert_close(found, trained(model), atol=1e-5, rtol=1e-5)


def test_the_history_tells_what_happened(model, samples):
    result = train(model, samples, settings(), 0)
    assert [row["step"] for row in result.history] == [0, 2, 4, 6]
    assert result.history[0]["loss"] is None
    assert result.best == min(result.history, key=lambda row: row["held_out"]["loss"])
    assert (result.trained, result.samples) == (48, {"trained": 7, "held_out": 2})
    assert json.loads(json.dumps(result.record())) == result.record()


def test_the_best_state_on_held_out_samples_stays(model, samples):
    """With a loss that drives away from the text, that is the one it came with."""
    start = trained(model)

    def perverse(model, batch):
        summed = next_token_loss(model, batch)
        return summed if not torch.is_grad_enabled() else -summed

    result = train(model, samples, settings(), 0, loss=perverse)
    assert result.best["step"] == 0
    assert torch.equal(trained(model), start)


class Killed(Exception):
    pass


@pytest.mark.parametrize("calls", [1, 9, 14])  # in a step, in a validation, in a later step
def test_a_killed_training_ends_with_the_same_bits(model, samples, tmp_path, calls):
    """Dropout and a state drawn per step included."""
    model.model.layers[0].mlp.down_proj = nn.Sequential(model.model.layers[0].mlp.down_proj, nn.Dropout(0.5)).train()
    start = trained(model)
    states = {"one": lambda: None, "two": lambda: None}
    config = settings(steps=8, micro_batch=2)
    whole, expected = train(model, samples, config, 3, states=states), trained(model)
    assert whole.best["step"] > 0
    count = itertools.count()

    def dies(model, batch):
        if next(count) == calls + 4:
            raise Killed
        return next_token_loss(model, batch)

    model.get_parameter(TRAINED).data.copy_(start)
    with pytest.raises(Killed):
        train(model, samples, config, 3, loss=dies, states=states, folder=tmp_path)
    model.get_parameter(TRAINED).data.copy_(start)
    seen = []
    resumed = train(
        model, samples, config, 3, states=states, folder=tmp_path, progress=lambda _what, done, _all: seen.append(done)
    )
    assert seen[0] == {1: 0, 9: 2, 14: 4}[calls]
    assert resumed == whole
    assert torch.equal(trained(model), expected)


def test_other_settings_do_not_continue_a_checkpoint(model, samples, tmp_path):
    start = trained(model)
    train(model, samples, settings(), 0, folder=tmp_path)
    model.get_parameter(TRAINED).data.copy_(start)
    seen = []
    train(model, samples, settings(), 1, folder=tmp_path, progress=lambda _what, done, _all: seen.append(done))
    assert seen[0] == 0


def test_every_state_is_trained_in_and_validated(model, samples):
    entered = []
    states = {label: lambda label=label: entered.append(label) for label in ("2", "3")}
    result = train(model, samples, settings(steps=12, validate_every=12), 0, states=states)
    assert entered[:2] == entered[-2:] == ["2", "3"]
    assert set(entered[2:-2]) == {"2", "3"}
    assert list(result.best["held_out"]) == ["2", "3"]


def test_autocast_trains_float32_parameters(model, samples):
    result = train(model, samples, settings(precision="bfloat16"), 0)
    assert trained(model).dtype == torch.float32
    assert result.best["held_out"]["loss"] < result.history[0]["held_out"]["loss"]


def test_what_cannot_be_trained_is_refused(model, samples):
    with pytest.raises(CompressError, match="two samples"):
        train(model, samples[:1], settings(), 0)
    with pytest.raises(CompressError, match="not finite; lower learning_rate"):
        train(model, samples, settings(), 0, loss=lambda m, b: next_token_loss(m, b) / int(not torch.is_grad_enabled()))
    model.requires_grad_(False)
    with pytest.raises(CompressError, match="no parameter"):
        train(model, samples, settings(), 0)
