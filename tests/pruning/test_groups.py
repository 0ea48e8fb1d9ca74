"""Cutting groups out of a block computes what zeroing them in the whole block computes, in every family."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from compress.passes import Block
from compress.pruning.structured.groups import cut, parts_of, remaining
from compress.shapes import block_shape, config_shape, groups_of, head_dim, linear_sizes
from compress.structure import ARCHITECTURES, Linear, architecture, linears_of

KINDS = [kind for family in ARCHITECTURES for kind in family.model_types]
TOKENS = torch.tensor([[5, 17, 40, 3, 99, 250, 12, 8]])


def block_parts(block, structure, config, heads):
    names = [*structure.attention, *structure.mlp]
    biased = {name for name in names if getattr(block.module.get_submodule(name), "bias", None) is not None}
    return parts_of(structure, config, block.shape, heads, biased)


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def cut_everywhere(model, kind, heads, removed):
    """Remove groups of one part from every block; the block's own columns are zeroed in a copy's."""
    structure = architecture(model.config)
    for index, module in enumerate(model.get_submodule(structure.blocks)):
        prefix = f"{structure.blocks}.{index}"
        block = Block(index, prefix, module, linears_of(module, prefix), shape=config_shape(model.config))
        part = block_parts(block, structure, model.config, heads)[kind]
        last = Linear(part.last, module.get_submodule(part.last))
        kept = remaining(last.shape[1], part.columns[torch.tensor(removed)])
        bias = getattr(last.module, "bias", None)
        context = SimpleNamespace(structure=structure, config=model.config)
        cut(block, part, removed, context, last.weight[:, kept].clone(), None if bias is None else bias.data)
        yield block, part


def zero_everywhere(model, kind, heads, removed):
    structure = architecture(model.config)
    for index, module in enumerate(model.get_submodule(structure.blocks)):
        block = Block(index, "", module, {}, shape=config_shape(model.config))
        part = block_parts(block, structure, model.config, heads)[kind]
        Linear("", module.get_submodule(part.last)).weight[:, part.columns[torch.tensor(removed)].flatten()] = 0.0


def cases():
    for kind in KINDS:
        yield kind, "mlp", "groups", [0, 5, 99]
        if kind != "bloom":
            yield kind, "attention", "groups", [1]
        if kind in ("llama", "qwen2", "gemma3_text"):
            yield kind, "attention", "queries", [1, 2]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "part", "heads", "removed"), list(cases()))
@torch.no_grad()
def test_cut_equals_zeroed(make_model, kind, part, heads, removed):
    small, zeroed = loaded(make_model(kind)), loaded(make_model(kind))
    zero_everywhere(zeroed, part, heads, removed)
    before = sum(p.numel() for p in small.parameters())
    blocks = list(cut_everywhere(small, part, heads, removed))
    lost = sum(p.cost * len(removed) for _, p in blocks)
    assert before - sum(p.numel() for p in small.parameters()) == lost
    assert torch.allclose(small(TOKENS).logits, zeroed(TOKENS).logits, atol=1e-4)
    for block, _ in blocks:
        sizes = linear_sizes(architecture(small.config), block.shape, head_dim(small.config))
        for name, (rows, columns) in sizes.items():
            found = Linear(name, block.module.get_submodule(name)).shape
            assert rows in (None, found[0]) and columns in (None, found[1])


def test_heads_of_bloom_are_fixed_for_a_reason(make_model):
    structure = architecture(AutoConfig.from_pretrained(make_model("bloom")))
    assert groups_of(structure).layout is None and "ALiBi" in groups_of(structure).heads_fixed


def test_a_recorded_shape_takes_precedence(make_model):
    config = AutoConfig.from_pretrained(make_model("llama"))
    whole = config_shape(config)
    assert (whole.heads, whole.key_value_heads, whole.channels, whole.queries) == (4, 2, 100, 2)
    assert block_shape(config, {}, "model.layers.0") == whole
