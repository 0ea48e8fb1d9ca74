"""What blocks hand on besides the hidden states travels with these."""

import pytest
import torch
from transformers import AutoConfig

from compress.carrying import Call, Item, Load, pack, unpack
from compress.streaming import examine


def test_what_is_packed_is_what_the_next_block_is_given():
    torch.manual_seed(0)
    keys, values = torch.randn(1, 2, 5, 4), torch.randn(1, 3, 5, 2)
    chosen, hidden = torch.randint(9, (1, 5, 3)), torch.randn(4, 1, 5, 6)
    items = (
        Item("shared", "full", 0, (1, 2, -1, 4), torch.float32),
        Item("shared", "full", 1, (1, 3, -1, 2), torch.float32),
        Item(0, None, 1, (1, -1, 3), torch.int64),
    )
    load = Load((4, 1, -1, 6), items)
    call = Call((None,), {"shared": {}, "mask": None}, given=load, handed_on=load)
    carried = pack((hidden, chosen), (), {"shared": {"full": (keys, values)}}, call)
    assert carried.shape == (1, 5, 4 * 6 + 2 * 4 + 3 * 2 + 3)
    again, args, kwargs = unpack(carried, call)
    assert torch.equal(again, hidden)
    assert torch.equal(args[0], chosen)
    assert args[0].dtype == torch.int64
    assert [torch.equal(a, b) for a, b in zip(kwargs["shared"]["full"], (keys, values), strict=True)] == [True, True]
    assert call.kwargs["shared"] == {}, "the model's own mapping is left alone"


def test_hidden_states_alone_stay_as_they_are():
    hidden = torch.randn(1, 5, 6)
    given, args, kwargs = unpack(hidden, Call((1,), {"mask": None}))
    assert given is hidden
    assert (args, kwargs) == ((1,), {"mask": None})
    assert pack((hidden, None), args, kwargs, Call((), {})) is hidden


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "given"),
    [
        ("llama", [0, 0, 0]),
        ("gemma4_text", [0, 2, 4]),  # keys and values of each type of attention
        ("zaya", [0, 1, 1, 1]),  # the router's state
    ],
)
def test_what_blocks_are_given_is_found(make_model, kind, given):
    structure = examine(AutoConfig.from_pretrained(make_model(kind)))
    assert [len(load.items) for load in structure.carried] == given
