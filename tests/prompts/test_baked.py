"""A prompt in the vocabulary says what it says as an adapter."""

import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import compress
from compress.errors import CompressError
from compress.evals.perplexity import prepare
from compress.prompts import baked as module
from compress.prompts.baked import bake


@pytest.fixture(scope="module")
def baked(prompted, tmp_path_factory):
    output = tmp_path_factory.mktemp("baked") / "model"
    assert bake(prompted, output, bits=3) == [f"<|prompt_{place}|>" for place in range(5)]
    return output


@pytest.mark.parametrize("bits", [3, 4])
def test_logits_are_those_behind_the_prompt(baked, prompted, bits):
    """The tokenizer puts the tokens in front by itself; with BOS after them, where the old one had it."""
    text = "the quick brown fox"
    tokens = AutoTokenizer.from_pretrained(prompted)(text, return_tensors="pt")["input_ids"]
    inputs = AutoTokenizer.from_pretrained(baked)(text, return_tensors="pt")
    assert inputs["input_ids"].shape[1] == tokens.shape[1] + 5
    expected = compress.load(prompted, bits=bits, prompt=prompted / "soft_prompt" / "3bit")(tokens).logits
    found = compress.load(baked, bits=bits)(**inputs).logits
    torch.testing.assert_close(found[..., :300], expected, atol=1e-5, rtol=1e-5)
    assert not found[..., 300:].any()


@pytest.mark.slow
def test_it_is_a_checkpoint_like_any_other(baked, prompted, verify):
    assert len(verify(baked)) == 3
    assert not (baked / "soft_prompt").exists()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(baked), AutoTokenizer.from_pretrained(baked)
    inputs = tokenizer("the quick", return_tensors="pt", return_token_type_ids=False)
    generated = model.generate(**inputs, max_new_tokens=20, do_sample=True, temperature=5.0)
    assert int(generated[0, inputs["input_ids"].shape[1] :].max()) < 300
    assert tokenizer.decode(inputs["input_ids"][0], skip_special_tokens=True) == "the quick"


@pytest.mark.parametrize(
    "template", ["{% for m in messages %}{{ m['content'] }}{% endfor %}", "{%- set a = 1 %}  the fox"]
)
@pytest.mark.parametrize("named", [False, True])
def test_the_prompt_stands_before_conversations_too(prompted, tmp_path, template, named):
    """A template's text is tokenised without what the tokenizer puts in front of texts."""
    source = shutil.copytree(prompted, tmp_path / "source")
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = {"default": template, "tool_use": "T" + template} if named else template
    tokenizer.save_pretrained(source)
    added = bake(source, tmp_path / "baked", bits=3)
    before, after = tokenizer, AutoTokenizer.from_pretrained(tmp_path / "baked")
    said = [{"role": "user", "content": "the quick"}]
    for name in ("default", "tool_use") if named else (None,):
        without = before.apply_chat_template(said, chat_template=name, return_dict=True)["input_ids"]
        found = after.apply_chat_template(said, chat_template=name, return_dict=True)["input_ids"]
        assert found == after.convert_tokens_to_ids(added) + without


def test_a_text_measured_on_it_is_measured_behind_the_prompt(baked, prompted):
    """In every window, and the virtual tokens are never scored: the windows that the prompt has as an adapter."""
    tokenizer, plain = AutoTokenizer.from_pretrained(baked), AutoTokenizer.from_pretrained(prompted)
    virtual = list(range(300, 305))
    documents = ["sleeps on the lazy fox, and the dog jumps over. " * 12, "the quick"]
    for options in ({}, {"stride": 7}, {"truncate": True}, {"disjoint": True}):
        found, expected = prepare(documents, tokenizer, 25, **options), prepare(documents, plain, 20, **options)
        assert found.windows == [(virtual + window.tokens, window.scored) for window in expected.windows]
        assert found.bytes == expected.bytes
    with pytest.raises(CompressError, match="windows of 1 tokens"):
        prepare(documents, tokenizer, 6)


def test_a_tokenizer_that_forgets_is_refused(prompted, tmp_path, monkeypatch):
    """Some classes make their rules anew when they are read again."""
    forgetful = AutoTokenizer.from_pretrained(prompted)
    monkeypatch.setattr(
        module, "load_tokenizer", lambda place: AutoTokenizer.from_pretrained(place) if place == prompted else forgetful
    )
    with pytest.raises(CompressError, match="do not keep tokens that are put in front"):
        bake(prompted, tmp_path / "no", bits=3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["opt", "gpt2", "bloom", "gemma3_text"])
def test_dense_models_of_other_kinds(make_model, recipe, tmp_path, kind):
    recipe |= {"model": str(make_model(kind)), "passes": [{"kind": "soft_prompt", "tokens": 4, "steps": 1, "batch": 2}]}
    output = compress.run(recipe, tmp_path / "model")
    added = bake(output, tmp_path / "baked")
    tokens = torch.arange(3, 20)[None]
    with_prompt = torch.cat([torch.arange(300, 304)[None], tokens], 1)
    assert len(added) == 4
    found = compress.load(tmp_path / "baked")(with_prompt).logits
    torch.testing.assert_close(
        found[..., :300], compress.load(output, prompt=True)(tokens).logits, atol=1e-4, rtol=1e-4
    )


@pytest.mark.slow
def test_what_cannot_be_baked_is_refused(prompted, compressed, baked, recipe, make_model, tmp_path):
    with pytest.raises(CompressError, match="a prompt for each of 3, 4 bits; say with --bits"):
        bake(prompted, tmp_path / "no")
    with pytest.raises(CompressError, match="holds no soft prompt"):
        bake(compressed, tmp_path / "no")
    with pytest.raises(CompressError, match="exists already"):
        bake(prompted, baked, bits=3)
    with pytest.raises(CompressError, match="already; the model holds a prompt"):
        bake(baked, tmp_path / "no", prompt=prompted / "soft_prompt" / "3bit")
    recipe["model"] = str(make_model("llama", tie_word_embeddings=False))
    prefix = {"kind": "soft_prompt", "method": "prefix", "tokens": 3, "steps": 1, "batch": 2}
    recipe["passes"] = [{"kind": "rtn", "include": ["lm_head"]}, prefix]
    output = compress.run(recipe, tmp_path / "packed")
    with pytest.raises(CompressError, match="is a prefix"):
        bake(output, tmp_path / "no")
    assert not (tmp_path / "no").exists()


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_a_packed_vocabulary_gets_the_prompt_as_rows_of_its_own(prompted, recipe, make_model, tmp_path, tied, verify):
    recipe["model"] = str(make_model("llama", tie_word_embeddings=tied))
    recipe["passes"] = [{"kind": "rtn", "bits": 8, "embedding_bits": "auto"}]
    prompt, tokens = prompted / "soft_prompt" / "3bit", torch.arange(3, 20)[None]
    output = compress.run(recipe, tmp_path / "packed")
    bake(output, tmp_path / "baked", prompt=prompt)
    model = compress.load(tmp_path / "baked")
    assert model.config.tie_word_embeddings is tied
    found = model(torch.cat([torch.arange(300, 305)[None], tokens], 1)).logits
    expected = compress.load(output, prompt=prompt)(tokens).logits
    assert (found[:, 5:, :300] - expected[:, -17:]).abs().max() < 0.02 * expected.abs().max()
    assert tied or not found[..., 300:].any()
    assert verify(tmp_path / "baked")


@pytest.mark.slow
def test_a_dense_model_behind_the_prompt_of_another_can_be_looked_at(prompted, tiny_llama, tmp_path, command):
    bake(tiny_llama, tmp_path / "baked", prompt=prompted / "soft_prompt" / "3bit")
    code, text, _ = command("inspect", tmp_path / "baked")
    assert code == 0
    assert text.startswith(f"{tiny_llama}, seed 0")
    assert command("report", tmp_path / "baked", "--no-run")[0] == 0
