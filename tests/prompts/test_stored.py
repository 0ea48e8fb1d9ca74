"""Prompts on disk and on a model: which one is used, and what room they leave."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from typer.testing import CliRunner

import compress
from compress.adapters import attach_prompts, choose_prompt, text_length, virtual_tokens
from compress.cli import app
from compress.errors import CompressError
from compress.prompts.stored import adapter_fields, embedding, new_prompt, write_prompt
from compress.sidecars import find_prompts, stored_prompts

TOKENS = torch.arange(3, 20)[None]


def test_stored_prompts_are_found_from_every_place(prompted):
    folder = prompted / "soft_prompt"
    expected = {3: folder / "3bit", 4: folder / "4bit"}
    assert stored_prompts(prompted) == stored_prompts(folder) == expected
    assert stored_prompts(folder / "3bit") == {None: folder / "3bit"}
    assert stored_prompts(folder / "nothing") == {}


def test_the_width_chooses_the_prompt(prompted):
    model = compress.load(prompted, prompt=True)
    assert isinstance(model, PeftModel)
    for bits in (3, 4):
        compress.set_bits(model, bits)
        assert model.active_adapter == f"{bits}bit"
        alone = PeftModel.from_pretrained(compress.load(prompted, bits=bits), prompted / "soft_prompt" / f"{bits}bit")
        assert torch.equal(model(TOKENS).logits, alone(TOKENS).logits)
    compress.set_bits(model, {"re:.*down_proj": 3})  # by mean width, it is nearer to 4
    assert model.active_adapter == "4bit"
    compress.set_bits(model, {"re:.*proj": 3, "model.layers.0.self_attn.k_proj": 4})
    assert model.active_adapter == "3bit"


def test_one_for_all_stands_in_for_widths_without_their_own(prompted, tmp_path):
    shutil.copytree(prompted / "soft_prompt" / "3bit", tmp_path / "soft_prompt")
    shutil.copytree(prompted / "soft_prompt" / "4bit", tmp_path / "soft_prompt" / "4bit")
    model = attach_prompts(compress.load(prompted, bits=4), tmp_path)
    assert model.active_adapter == "4bit"
    compress.set_bits(model, 3)
    assert model.active_adapter == "default"


def test_the_base_model_is_as_good_as_before(prompted):
    model = compress.load(prompted, bits=3)
    expected = model(TOKENS).logits
    prompted_model = attach_prompts(model, prompted)
    with prompted_model.disable_adapter():
        assert torch.equal(prompted_model(TOKENS).logits, expected)


@pytest.mark.slow
def test_a_packed_embedding_takes_a_prompt(make_model, recipe, tmp_path):
    """peft itself finds no embedding there."""
    recipe["model"] = str(make_model("llama", tie_word_embeddings=False))
    include = ["model.embed_tokens", "lm_head"]
    recipe["passes"] = [
        {"kind": "rtn", "include": include},
        {"kind": "soft_prompt", "tokens": 3, "steps": 1, "batch": 2},
    ]
    model = compress.load(compress.run(recipe, tmp_path / "model"), prompt=True)
    table = model.get_base_model().get_input_embeddings()
    states = torch.cat([embedding(model)[None], table(TOKENS)], 1)
    torch.testing.assert_close(model(TOKENS).logits, model.get_base_model()(inputs_embeds=states).logits)


def test_room(prompted):
    model = compress.load(prompted)
    assert (virtual_tokens(model), text_length(model), text_length(model, 50)) == (0, 64, 50)
    model = attach_prompts(model, prompted)
    assert (virtual_tokens(model), text_length(model), text_length(model, 50)) == (5, 59, 45)
    with pytest.raises(CompressError, match="5 virtual tokens leave no room for text in a context of 6"):
        text_length(model, 6)
    choose_prompt(model.get_base_model())  # nothing to choose


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"x"), "is not a soft prompt that can be read"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "is not a soft prompt that can be read"),
        (lambda folder: (folder / "adapter_config.json").write_text("[3]"), "is not a soft prompt that can be read"),
        (lambda folder: change(folder, peft_type="LORA"), "is a LORA adapter, not a prompt or prefix"),
        (lambda folder: change(folder, num_virtual_tokens=6), "6 virtual tokens, its tensor 5"),
        (shutil.rmtree, "holds no soft prompt"),
    ],
)  # fmt: skip
def test_what_is_no_prompt_is_refused(prompted, tmp_path, damage, complaint):
    folder = tmp_path / "prompt"
    shutil.copytree(prompted / "soft_prompt" / "3bit", folder)
    damage(folder)
    with pytest.raises(CompressError, match=complaint):
        compress.load(prompted, prompt=folder)


def change(folder, **fields):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_a_prompt_of_another_size_is_refused(prompted, make_model):
    model = compress.load(make_model("llama", hidden_size=96, head_dim=24))
    with pytest.raises(CompressError, match="does not fit this model"):
        attach_prompts(model, find_prompts(prompted))


def said(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.stdout
    return result.stdout


def test_the_command_line_uses_prompts(prompted, tmp_path):
    text = tmp_path / "other.txt"
    text.write_text("the dog jumps over the fox. " * 30)
    plain = json.loads(said("eval", prompted, "--text", text, "--json", "-", "--length", "40"))
    own = json.loads(said("eval", prompted, "--text", text, "--json", "-", "--length", "40", "--prompt"))
    other = said("eval", prompted, "--text", text, "--json", "-", "--prompt-from", prompted / "soft_prompt" / "3bit")
    assert own["prompt"] == {"from": str(prompted), "tokens": 5}
    assert own["bits"]["3"]["tokens"] == plain["bits"]["3"]["tokens"]
    assert own["bits"]["3"]["loss"] != plain["bits"]["3"]["loss"]
    assert json.loads(other)["protocol"]["length"] == 59
    assert "soft prompt for 4 bits: 5 virtual tokens, 240 numbers" in said("inspect", prompted)
    assert said("generate", prompted, "the quick", "--bits", "3", "--prompt", "--max-new-tokens", "4").startswith(
        "the quick"
    )


@pytest.mark.parametrize("method", ["prompt", "prefix"])
@torch.no_grad()
def test_generation_sees_the_prompt_once(prompted, tmp_path, method):
    """Every new token's logits, with a cache, are those of one forward pass over the whole text."""
    folder = prompted
    if method == "prefix":
        folder = tmp_path / "prefix"
        prefix = new_prompt(compress.load(prompted), "prefix", torch.randn(5, 2 * 3 * 24))
        write_prompt(folder, embedding(prefix), adapter_fields(prefix))
    model = compress.load(prompted, bits=3, prompt=folder)
    options = {"do_sample": False, "pad_token_id": 0, "output_logits": True, "return_dict_in_generate": True}
    made = model.generate(input_ids=TOKENS, max_new_tokens=6, min_new_tokens=6, **options)
    whole = model(made.sequences, use_cache=False).logits[:, -7:-1]
    torch.testing.assert_close(torch.stack(made.logits, 1), whole, atol=1e-4, rtol=1e-4)
    bare = compress.load(prompted, bits=3)
    expected = bare.generate(input_ids=TOKENS, max_new_tokens=6, do_sample=False, pad_token_id=0)
    with model.disable_adapter():
        without = model.generate(input_ids=TOKENS, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(without, expected)


def test_generation_ends_where_the_context_does(prompted):
    """64 places: 5 for the prompt."""
    result = CliRunner().invoke(app, ["generate", str(prompted), "the " * 70, "--prompt"])
    assert isinstance(result.exception, CompressError)
    assert "room for 59 beside the soft prompt" in str(result.exception)
