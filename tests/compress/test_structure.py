"""The declarations of model families name what the models have."""

from dataclasses import replace

import pytest
from torch import nn
from transformers import AutoConfig

from compress.errors import CompressError
from compress.models import empty_model, stated
from compress.structure import ARCHITECTURES, Linear, architecture, block_of, linears_of
from tests import zoo

KINDS = [kind for family in ARCHITECTURES for kind in family.model_types]


@pytest.mark.parametrize("kind", KINDS)
def test_a_declaration_names_every_linear_of_a_block(make_model, kind):
    model = empty_model(AutoConfig.from_pretrained(make_model(kind)))
    family = architecture(model.config)
    block = model.get_submodule(f"{family.blocks}.0")
    assert set(linears_of(block, "b")) == {f"b.{name}" for name in family.attention + family.mlp}
    assert {name for group in family.fused for name in group} <= set(family.attention + family.mlp)
    assert isinstance(model.get_submodule(family.embedding), nn.Embedding)


def test_a_linear_is_seen_as_outputs_by_inputs(make_model):
    """GPT-2 keeps its weights the other way round; passes need not know."""
    block = empty_model(AutoConfig.from_pretrained(make_model("gpt2"))).transformer.h[0]
    assert Linear("fc", block.mlp.c_fc).shape == (100, 48)
    assert tuple(block.mlp.c_fc.weight.shape) == (48, 100)


def test_the_block_of_a_tensor():
    family = replace(ARCHITECTURES[0], blocks="model.layers")
    assert block_of("model.layers.12.mlp.up_proj.weight", family) == 12
    assert block_of("model.embed_tokens.weight", family) is None


def test_a_model_that_is_no_language_model_is_refused():
    with pytest.raises(CompressError, match="'vit' is no language model"):
        architecture(AutoConfig.for_model("vit"))


def test_a_key_with_a_value_for_each_block_says_nothing_of_all():
    config = zoo.tiny_config("dots3_note_text")
    assert stated(config, "num_attention_heads") is None
    assert stated(config, "num_hidden_layers") == config.num_hidden_layers
