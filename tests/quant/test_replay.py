"""Runs that continue where a block was left give what whole runs give, and compute nothing twice."""

import copy

import pytest
import torch
from torch import nn

from compress.quant.replay import Replay
from compress.statistics import watch


class Counted(nn.Linear):
    """Counts how often it multiplies."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class Attention(nn.Module):
    """Two linears that are called with one tensor, something costly between, and a linear at the end; returns a tuple."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.o = (Counted(8, 8, bias=False) for _ in range(3))
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.o(torch.softmax(self.q(x) * self.k(x), -1)), None


class Block(nn.Module):
    """A residual stream that is written to in place, and one linear that is called twice."""

    def __init__(self):
        super().__init__()
        self.attention, self.up, self.down = Attention(), Counted(8, 16), Counted(16, 8)
        self.twice = Counted(8, 8)

    def forward(self, x):
        hidden = self.attention(x)[0]
        hidden += x
        hidden = hidden + self.down(self.up(hidden).relu())
        return self.twice(self.twice(hidden))


GROUPS = [["attention.q", "attention.k"], ["attention.o"], ["up"], ["down"], ["twice"]]


@pytest.fixture
def block():
    torch.manual_seed(0)
    return Block()


@torch.no_grad()
def change(block, names):
    for name in names:
        block.get_submodule(name).weight.add_(0.1)


@torch.no_grad()
def test_inputs_and_outputs_are_those_of_whole_runs(block):
    samples = [torch.randn(1, 3, 8) for _ in range(2)]
    runs = [lambda module, x=x: module(x) for x in samples]
    replay = Replay(block, runs, [name for group in GROUPS for name in group])
    for group in GROUPS:
        plain, seen = copy.deepcopy(block), []
        with watch({"": plain.get_submodule(group[0])}, lambda _name, x, seen=seen: seen.append(x)):
            for x in samples:
                plain(x)
        found = list(replay.inputs(group[0]))
        for given, expected in zip(found, seen[:: len(seen) // 2], strict=True):
            torch.testing.assert_close(given, expected[0])
        change(block, group)
        replay.finish(group)
    for output, x in zip(replay.outputs(), samples, strict=True):
        torch.testing.assert_close(output, block(x))
    assert "forward" not in vars(block.attention), "the block is left as it was found"


@torch.no_grad()
def test_a_part_is_computed_once_after_it_has_become_final(block):
    replay = Replay(block, [lambda module: module(torch.ones(1, 3, 8))], [name for group in GROUPS for name in group])
    for group in GROUPS:
        assert len(list(replay.inputs(group[0]))) == 1
        replay.finish(group)
    assert len(list(replay.outputs())) == 1
    counts = {name: part.calls for name, part in block.named_modules() if isinstance(part, Counted)}
    assert counts == {"attention.q": 1, "attention.k": 1, "attention.o": 1, "up": 1, "down": 1, "twice": 2}
    assert block.attention.calls == 3, "for what q is given, what o is given, and what it returns"


@torch.no_grad()
def test_a_linear_that_a_sample_does_not_come_to_has_no_input(block):
    class Alone(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.used(x)

    module = Alone()
    replay = Replay(module, [lambda inner: inner(torch.ones(1, 2, 4))], ["used", "idle"])
    assert list(replay.inputs("idle")) == [None]


@torch.no_grad()
def test_what_a_final_part_leaves_in_a_mapping_is_left_again():
    """Shared keys and values, which later blocks take from a mapping that the attention has filled."""

    class Sharing(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.up = nn.Module(), nn.Linear(8, 8)
            self.attention.k = nn.Linear(8, 8)
            self.attention.forward = self.attend

        def attend(self, x, shared):
            shared["keys"] = (self.attention.k(x),)
            return x

        def forward(self, x, shared):
            return self.up(self.attention(x, shared))

    torch.manual_seed(0)
    module, x = Sharing(), torch.randn(1, 3, 8)

    def run(block):
        shared = {}
        return block(x, shared) + shared["keys"][0]

    expected = run(module)
    replay = Replay(module, [run], ["attention.k", "up"])
    replay.finish(["attention.k"])
    assert [torch.equal(next(replay.inputs("up")), x[0]) for _ in range(2)] == [True, True]
    assert torch.equal(next(replay.outputs()), expected)
