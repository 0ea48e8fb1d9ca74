"""Structured pruning of types that nothing is declared for: what inspection recognises, and that it is right."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import compress
from compress.models import empty_model
from compress.structure import ARCHITECTURES, inspected
from tests import zoo

RECOGNISED = ("arcee", "cohere2", "granite", "hunyuan_v1_dense", "jais2", "phi")
OTHERS = {  # heads that belong together in pairs, norms over all heads, experts, sinks, cross attention
    "bart", "diffllama", "gpt_oss", "mamba2", "mixtral", "olmo2", "phi3",
}  # fmt: skip


def structure_of(kind):
    return inspected(empty_model(zoo.tiny_config(kind)))


@torch.no_grad()
def save_with_idle_groups(kind, folder):
    """Save a model whose last key-value head and last half of channels add nothing to the residual stream; return its logits."""
    structure, model = structure_of(kind), zoo.build(kind)
    for block in model.get_submodule(structure.blocks):
        heads, channels = (block.get_submodule(part[-1]).weight for part in (structure.attention, structure.mlp))
        key = block.get_submodule(structure.attention[1]).weight
        pairs = model.config.num_key_value_heads or model.config.num_attention_heads
        assert len(key) % pairs == 0
        heads[:, heads.shape[1] // pairs * ((pairs + 1) // 2) :] = 0
        channels[:, channels.shape[1] // 2 :] = 0
    model.save_pretrained(folder)
    zoo.save_tokenizer(folder)
    return model(zoo.TOKENS[None]).logits


@pytest.mark.slow
@pytest.mark.parametrize("kind", RECOGNISED)
def test_groups_that_add_nothing_go_and_leave_the_logits_as_they_were(kind, text_file, tmp_path):
    before = save_with_idle_groups(kind, tmp_path / "model")
    step = {"kind": "mini_llm", "ratio": 0.5, "ratio_of": "layers", "mode": "local", "compensate": False}
    calibration = {"text": str(text_file), "samples": 4, "length": 32}
    recipe = {"model": str(tmp_path / "model"), "calibration": calibration, "passes": [step]}
    out = compress.run(recipe, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    shapes = [sum(p.numel() for p in each.parameters()) for each in (model, zoo.build(kind))]
    assert shapes[0] < 0.85 * shapes[1]
    with torch.no_grad():
        torch.testing.assert_close(model(zoo.TOKENS[None]).logits, before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", sorted(OTHERS))
def test_what_is_of_no_known_form_is_not_recognised(kind):
    assert structure_of(kind).groups is None


def test_what_is_declared_stays():
    known = next(one for one in ARCHITECTURES if "opt" in one.model_types)
    assert structure_of("opt").groups == known.groups
