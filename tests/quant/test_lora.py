"""Low-rank updates on packed layers."""

import pytest
import torch
from peft import PeftModel

import compress
from compress.quant.lora import LoraBitPlaneLinear, add_lora, lora_config

TOKENS = torch.arange(24)[None]


@pytest.fixture
def adapted(compressed):
    model = compress.load(compressed, bits=4, dtype=torch.float32)
    return add_lora(model, lora_config(2, ["q_proj", "down_proj"], alpha=4), seed=0)


def randomise(model):
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def test_nothing_changes_until_it_is_trained(compressed, adapted):
    expected = compress.load(compressed, bits=4, dtype=torch.float32)(TOKENS).logits
    torch.testing.assert_close(adapted(TOKENS).logits, expected)
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * 2 * 3
    assert all("lora_" in name for name in trained)


def test_the_update_is_the_formula(adapted):
    """y = W x + alpha / r · B A x, and the gradient of both factors."""
    randomise(adapted)
    layer = adapted.get_base_model().model.layers[0].self_attn.q_proj
    assert isinstance(layer, LoraBitPlaneLinear)
    x = torch.randn(3, 48, generator=torch.Generator().manual_seed(2))
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    weight = layer.base_layer.dense() + 4 / 2 * up @ down
    torch.testing.assert_close(layer(x), x @ weight.T)
    found = torch.autograd.grad(layer(x).square().sum(), [down, up])
    expected = torch.autograd.grad((x @ weight.T).square().sum(), [down, up])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_it_is_saved_as_any_adapter(adapted, compressed, tmp_path):
    randomise(adapted)
    adapted.save_pretrained(tmp_path)
    model = compress.load(compressed, bits=4, dtype=torch.float32)
    again = PeftModel.from_pretrained(model, tmp_path, config=lora_config(2, ["q_proj", "down_proj"], alpha=4))
    torch.testing.assert_close(again(TOKENS).logits, adapted(TOKENS).logits)


def test_the_width_can_change_under_it(adapted, compressed):
    compress.set_bits(adapted, 3)
    assert compress.get_bits(adapted) == 3
    expected = compress.load(compressed, bits=3, dtype=torch.float32)(TOKENS).logits
    with adapted.disable_adapter():
        torch.testing.assert_close(adapted(TOKENS).logits, expected)
