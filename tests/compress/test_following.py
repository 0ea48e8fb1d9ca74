"""What one forward pass without data shows of a model, and what is refused for it."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

import compress
from compress.errors import CompressError
from compress.following import NOT_CALLED, READ, SHARED
from compress.streaming import examine

TOKENS = torch.arange(5, 29)


@pytest.mark.slow
def test_linears_whose_weight_the_model_reads_are_left(make_model):
    structure = examine(AutoConfig.from_pretrained(make_model("mamba")))
    assert structure.left["backbone.layers.0.mixer.dt_proj"] == READ
    assert not [name for name in structure.left if "in_proj" in name or "out_proj" in name]


def test_linears_that_text_does_not_come_to_are_left(make_model):
    """BART's decoder has attention to an encoder, which does not run."""
    structure = examine(AutoConfig.from_pretrained(make_model("bart", is_decoder=True, is_encoder_decoder=False)))
    assert {name.split(".")[-2] for name in structure.left} == {"encoder_attn"}
    assert set(structure.left.values()) == {NOT_CALLED}


def test_what_a_block_returns_is_found(make_model):
    assert examine(AutoConfig.from_pretrained(make_model("llama"))).returns == (0, 0, 0)
    assert examine(AutoConfig.from_pretrained(make_model("openai-gpt"))).returns == (1, 1, 1)


def test_a_choice_by_values_is_followed_as_if_all_were_chosen(make_model):
    """XMOD takes the tokens of each language by a mask, and a list of the languages that occur."""
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    structure = examine(AutoConfig.for_model("xmod", **sizes, is_decoder=True, default_language="en_XX"))
    assert structure.depth == 2
    assert not [name for name in structure.left if ".layer." in name]


@pytest.mark.slow
def test_experts_are_told_by_their_form_where_transformers_does_not_mark_them(make_model):
    config = AutoConfig.for_model("step3p7")
    text = config.get_text_config()
    text.num_hidden_layers, text.num_local_experts, text.sliding_window = 5, 16, 8
    structure = examine(config)
    assert [path for path in structure.experts if path.endswith("layers.4.mlp.experts")]
    assert not structure.left


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("xlm", "the model works on the hidden states between them"),
        ("vit", "is no language model"),
    ],
)
def test_models_whose_blocks_cannot_be_run_alone_are_refused_in_one_sentence(kind, reason):
    with pytest.raises(CompressError, match=reason) as refused:
        examine(AutoConfig.for_model(kind))
    assert kind in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_model_that_would_stay_mostly_dense_is_refused():
    """XLNet keeps its attention in parameters of three dimensions; the smaller the MLP, the more that is."""
    config = AutoConfig.for_model("xlnet", d_model=48, d_inner=16, n_layer=2, n_head=4, vocab_size=300)
    with pytest.raises(
        CompressError, match=r"only \d+ % of the weights of its blocks .* is transformer.layer.0.rel_attn"
    ):
        examine(config)


def test_a_model_of_another_task_is_refused_by_the_name_of_its_class():
    config = AutoConfig.for_model("gemma3", architectures=["Gemma3ForSequenceClassification"])
    with pytest.raises(CompressError, match="Gemma3ForSequenceClassification is no language model"):
        examine(config)


@pytest.mark.slow
def test_weights_that_blocks_share_are_left_and_stored_once(make_model, tmp_path):
    """Zamba2 has one transformer block that several of its layers call."""
    folder = make_model("zamba2")
    structure = examine(AutoConfig.from_pretrained(folder))
    shared = {name for name, reason in structure.left.items() if reason == SHARED}
    assert {name.split(".")[3] for name in shared} == {"shared_transformer"}
    recipe = {"model": str(folder), "passes": [{"kind": "rtn", "bits": 4}]}
    out = compress.run(recipe, tmp_path / "out")
    stored = [name for name in compress.config.Checkpoint(out).info() if "feed_forward.down_proj" in name]
    assert len(stored) == 1
    expected = AutoModelForCausalLM.from_pretrained(folder)(TOKENS[None]).logits
    assert torch.isfinite(compress.load(out)(TOKENS[None]).logits - expected).all()


@pytest.fixture(scope="module")
def image_text(make_model, tmp_path_factory):
    """A tiny Gemma 3 with its vision tower, under the names that hub files have."""
    folder = tmp_path_factory.mktemp("gemma3")
    text = AutoConfig.from_pretrained(make_model("gemma3_text", sliding_window=8)).to_dict()
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 28,
    }
    special = {"image_token_index": 299, "boi_token_index": 298, "eoi_token_index": 297, "mm_tokens_per_image": 4}
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config={**vision, "patch_size": 14}, **special)
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(make_model("gemma3_text", sliding_window=8) / name, folder / name)
    return folder


@pytest.mark.slow
def test_the_language_model_inside_a_model_of_images_is_packed_and_the_rest_kept(image_text, text_file, tmp_path):
    recipe = {
        "model": str(image_text),
        "calibration": {"text": str(text_file), "samples": 3, "length": 32},
        "passes": [{"kind": "any_precision", "seed_bits": 3, "parent_bits": 4}],
    }
    out = compress.run(recipe, tmp_path / "out")
    model, stock = compress.load(out), AutoModelForImageTextToText.from_pretrained(image_text)
    plain = AutoModelForImageTextToText.from_pretrained(out)
    assert type(model) is type(stock) is type(plain)
    tower = {name: value for name, value in stock.state_dict().items() if "vision" in name}
    assert tower
    assert all(torch.equal(model.state_dict()[name], value) for name, value in tower.items())
    with torch.no_grad():
        for name, module in compress.hf.packed_modules(model).items():
            assert "language_model" in name
            stock.get_submodule(name).weight.copy_(module.dense())
        expected = stock(input_ids=TOKENS[None]).logits
        torch.testing.assert_close(model(input_ids=TOKENS[None]).logits, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(plain(input_ids=TOKENS[None]).logits, model(input_ids=TOKENS[None]).logits)
    manifest = json.loads((out / "compression.json").read_text())
    outside = [name for name, reason in manifest["not_quantised"].items() if "outside the blocks of" in reason]
    assert any("vision_tower" in name for name in outside)


def test_tensors_beyond_the_model_are_kept_and_listed(make_model, text_file, tmp_path):
    """Heads that predict several tokens, say, which transformers does not build."""
    folder = shutil.copytree(make_model("llama"), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    extra = {
        "mtp.layers.0.proj.weight": torch.randn(8, 4),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6),
    }
    save_file(tensors | extra, folder / "model.safetensors", metadata={"format": "pt"})
    recipe = {"model": str(folder), "passes": [{"kind": "rtn", "bits": 4}]}
    out = compress.run(recipe, tmp_path / "out")
    stored = compress.config.Checkpoint(out)
    assert torch.equal(stored.read(["mtp.layers.0.proj.weight"]).popitem()[1], extra["mtp.layers.0.proj.weight"])
    assert not [name for name in stored.info() if "inv_freq" in name]
    manifest = json.loads((out / "compression.json").read_text())
    assert "beyond the model" in manifest["not_quantised"]["mtp.layers.0.proj.weight"]
    assert AutoModelForCausalLM.from_pretrained(out).config.model_type == "llama"


def test_structure_is_shown_from_a_config_alone(make_model, tmp_path, command):
    (tmp_path / "config.json").write_text((make_model("qwen3_moe") / "config.json").read_text())
    code, shown, _ = command("inspect", tmp_path, "--structure")
    assert code == 0
    assert "model.layers.*.mlp.experts.*.down_proj: 12 of 48 x 16" in shown
    code, shown, _ = command("inspect", tmp_path, "--structure", "--json")
    assert json.loads(shown)["experts"]["model.layers.0.mlp.experts"] == 4
