"""A sample of the types that transformers has, end to end, without a declaration for any of them."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import compress
from compress.source import open_source
from compress.streaming import StreamedModel
from tests.conftest import MODELS, stream

TOKENS = torch.arange(5, 29)


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_a_type_is_compressed_loaded_and_generates(make_model, text_file, tmp_path, kind):
    folder = make_model(kind)
    recipe = {
        "model": str(folder),
        "calibration": {"text": str(text_file), "samples": 3, "length": 32},
        "passes": [{"kind": "any_precision", "seed_bits": 3, "parent_bits": 4}],
    }
    out = compress.run(recipe, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(out)
    compress.set_bits(model, 3)
    probe = json.loads((out / "compression.json").read_text())["probe"]
    with torch.no_grad():
        last = model(input_ids=torch.tensor([probe["tokens"]]), use_cache=False).logits[0, -1]
    for token, value in probe["at_bits"]["3"]["top"]:
        assert last[token].item() == pytest.approx(value, rel=1e-3, abs=1e-4)
    made = model.generate(TOKENS[None], max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert made.shape == (1, len(TOKENS) + 3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_streamed_logits_equal_the_models_own(make_model, kind):
    folder = make_model(kind)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(TOKENS[None]).logits[0]
    model = StreamedModel(open_source(str(folder)).state, torch.device("cpu"))
    torch.testing.assert_close(model.logits(TOKENS, stream(model, TOKENS)), expected, rtol=1e-4, atol=1e-4)
