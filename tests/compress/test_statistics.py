"""Watching inputs, telling shared ones, and their second moments, against sums over all of them written out."""

from collections import Counter

import pytest
import torch
from torch import nn

from compress.errors import CompressError
from compress.passes import Block
from compress.statistics import Moments, SharedInputs, check_weight, watch


def test_watching_ends_with_the_with():
    linear, seen = torch.nn.Linear(3, 2), []

    def visit(name, x):
        seen.append((name, x.shape))
        return "this takes no part"

    with watch({"a": linear}, visit):
        linear(torch.ones(4, 3))
    linear(torch.ones(5, 3))
    assert seen == [("a", (4, 3))]


def test_the_same_input_is_the_same_memory_in_the_same_order_unchanged():
    x = torch.zeros(3, 3)
    for same, other in ((True, x), (True, x.view(3, 3)), (False, x.clone()), (False, x.t()), (False, x[:2])):
        shared = SharedInputs()
        shared.owner("first", x)
        assert (shared.owner("second", other) == "first") == same


def test_an_input_written_to_between_two_calls_is_not_shared():
    """As where a block adds a residual in place: same tensor, same memory, other numbers."""
    shared, x = SharedInputs(), torch.ones(2, 3)
    assert [shared.owner(name, x) for name in ("q", "k", "v")] == ["q", "q", "q"]
    x.add_(1)
    assert [shared.owner(name, x) for name in ("gate", "up")] == ["gate", "gate"]


@pytest.mark.parametrize("full", [False, True])
def test_moments_are_means_over_all_tokens_of_every_distinct_input(full):
    generator = torch.Generator().manual_seed(0)
    moments, seen = Moments(full), {"q": [], "down": []}
    for tokens in (5, 9):
        x, other = torch.randn(tokens, 4, generator=generator), torch.randn(tokens, 6, generator=generator)
        for name, given in (("q", x), ("k", x), ("down", other)):
            moments.add(name, given)
        seen["q"].append(x)
        seen["down"].append(other)
    assert moments.owner == {"q": "q", "k": "q", "down": "down"}
    assert moments.sums.keys() == {"q", "down"}
    for name, owner in moments.owner.items():
        x = torch.cat(seen[owner]).double()
        expected = x.t() @ x / 14 if full else x.square().mean(0)
        torch.testing.assert_close(moments.mean(name).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("columns", [1, 64, 255, 256, 257, 300])
def test_half_the_products_make_a_whole_matrix(columns):
    """Also where there are few columns, or not a multiple of four; and a matrix that is taken is let go."""
    generator, moments = torch.Generator().manual_seed(0), Moments(full=True)
    parts = [torch.randn(tokens, columns, generator=generator) for tokens in (7, 20)]
    for part in parts:
        moments.add("q", part)
    x = torch.cat(parts).double()
    found = moments.take("q")
    torch.testing.assert_close(found.double(), x.t() @ x / 27, rtol=1e-5, atol=1e-5)
    assert torch.equal(found, found.t())
    assert not moments.sums


def test_a_module_called_twice_with_one_tensor_counts_twice():
    moments, x = Moments(), torch.ones(2, 3)
    moments.add("a", x)
    moments.add("a", x)
    assert moments.tokens == {"a": 4}


def test_what_is_not_finite_is_named():
    moments = Moments()
    moments.add("layer.q", torch.tensor([[1.0, float("inf")]]))
    with pytest.raises(CompressError, match=r"layer\.q: its inputs on the calibration text are not finite"):
        moments.mean("layer.q")
    with pytest.raises(CompressError, match=r"layer\.q: row 1 of its weight holds NaN or infinity"):
        check_weight("layer.q", torch.tensor([[0.0, 1.0], [float("nan"), 0.0]]))


@pytest.mark.parametrize(("twice", "runs_of_the_last"), [(False, 1), (True, 4)])
def test_a_block_runs_no_further_than_the_last_input_asked_for(twice, runs_of_the_last):
    """Unless a module is called several times in a run: then its last call may be anywhere."""
    module = nn.ModuleDict({name: nn.Linear(3, 3) for name in ("first", "last")})
    calls, inputs = Counter(), []
    for name, inner in module.items():
        inner.register_forward_pre_hook(lambda _module, _inputs, name=name: calls.update([name]))

    def run(block):
        x = torch.full((1, 2, 3), float(calls["first"]))
        return block["last"](block["first"](block["first"](x) if twice else x))

    block = Block(0, "", module, {}, samples=[run] * 4, lots=[3, 1])
    block.for_each_input(lambda name, x: inputs.append((name, x.shape)), {"q": module["first"]})
    assert calls == {"first": 8 if twice else 4, "last": runs_of_the_last}
    assert inputs == [("q", (2, 3))] * calls["first"]
    block.for_each_input(lambda *_: None, {"q": module["first"]}, keep_outputs=True)
    assert calls["last"] == runs_of_the_last + 4
    assert len(block.outputs[""]) == 4
