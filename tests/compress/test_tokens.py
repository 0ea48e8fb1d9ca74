"""Text is text, BOS is there once, and a model's own generation settings are not in force."""

import json
import shutil

import pytest
import torch
from tokenizers import processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import compress
from compress.calibration import draw_samples
from compress.errors import CompressError
from compress.evals.evaluate import OpenModel, Protocol, evaluate_text
from compress.evals.perplexity import prepare
from compress.manifest import read_manifest
from compress.settings import Calibration
from compress.tokens import bos_tokens, count_special, front_tokens, prompt_tokens, set_generation, token_ids

SPELLED = "the quick <s> brown fox <s>jumps over the lazy dog"
CHAT = "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% endfor %}!"


@pytest.fixture(scope="module")
def folder(tiny_llama):
    return tiny_llama


def tokenizer_of(folder, template=None, bos=True, **changes):
    """The tiny model's tokenizer, made anew; ``template`` is what it puts around a text (``"<s> $A"``)."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if template:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<s>", 0)]
        )
    if not bos:
        tokenizer.bos_token = None
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return tokenizer


def test_what_a_text_spells_is_letters_unless_it_is_meant(folder):
    tokenizer = tokenizer_of(folder)
    assert 0 not in token_ids(tokenizer, SPELLED)
    assert tokenizer.decode(token_ids(tokenizer, SPELLED)) == SPELLED
    assert token_ids(tokenizer, SPELLED, special_tokens=True).count(0) == 2
    assert token_ids(tokenizer, SPELLED) == token_ids(tokenizer, SPELLED)  # whatever was asked in between
    assert count_special(tokenizer, [SPELLED, "none", "<s>"]) == 3
    assert count_special(PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer), ["a"]) == 0


@pytest.mark.parametrize("template", [None, "<s> $A", "<s> $A <s>"])
@pytest.mark.parametrize("bos", [True, False])
def test_bos_is_in_front_once(folder, template, bos):
    """Whether the tokenizer puts it there or not, whether the text begins with it or not."""
    tokenizer = tokenizer_of(folder, template, bos)
    added = [0] * (template is not None)
    text = token_ids(tokenizer, "the fox")
    assert bos_tokens(tokenizer) == [0] * bos
    assert front_tokens(tokenizer) == ([] if bos else added)
    assert prompt_tokens(tokenizer, "the fox") == added + text
    assert prompt_tokens(tokenizer, "<s>the fox") == [0, *text]
    windows = prepare(["the fox"], tokenizer, 16).windows
    start = front_tokens(tokenizer) + bos_tokens(tokenizer)
    assert windows == [(start + text, len(text) - (not bos))]


def test_a_conversation_has_one_bos(folder):
    tokenizer = tokenizer_of(folder, "<s> $A", chat_template=CHAT)
    assert prompt_tokens(tokenizer, "the fox", chat=True) == [0, *token_ids(tokenizer, "user: the fox!")]
    with pytest.raises(CompressError, match="has no chat template"):
        prompt_tokens(tokenizer_of(folder), "the fox", chat=True)
    with pytest.raises(CompressError, match=r"the model's chat template fails \(no users here\)"):
        prompt_tokens(tokenizer_of(folder, chat_template="{{ raise_exception('no users here') }}"), "a", chat=True)


@pytest.mark.parametrize("separator", [None, "\n"])
def test_calibration_text_is_text_and_is_counted(folder, tmp_path, caplog, separator):
    file = tmp_path / "train.txt"
    file.write_text(f"{SPELLED}\n" * 20)
    settings = {"text": str(file), "samples": 2, "length": 16, "separator": separator}
    plain = draw_samples(Calibration(**settings), tokenizer_of(folder), 64)
    assert "special tokens, which are read as plain text" in caplog.text
    meant = draw_samples(Calibration(**settings, special_tokens=True), tokenizer_of(folder), 64)
    count = 40 if separator is None else 4
    for samples, read, expected in ((plain, "text", 0), (meant, "special tokens", 2)):
        said = {key: samples.source[key] for key in ("bos", "special_tokens_in_text", "special_tokens_read_as")}
        assert said == {"bos": "<s>", "special_tokens_in_text": count, "special_tokens_read_as": read}
        assert all(sample[0] == 0 for sample in samples.tokens)
        assert sum(int((sample[1:] == 0).sum()) for sample in samples.tokens) >= expected
        assert expected or not any((sample[1:] == 0).any() for sample in samples.tokens)


def test_evaluation_text_is_text_and_is_counted(folder, tmp_path):
    file = tmp_path / "test.txt"
    file.write_text(SPELLED)
    spelled = tmp_path / "plain.txt"
    spelled.write_text(SPELLED.replace("<s>", ""))
    plain = evaluate_text(str(folder), str(file))
    meant = evaluate_text(str(folder), str(file), protocol=Protocol(special_tokens=True))
    assert plain["text"]["special_tokens"] == meant["text"]["special_tokens"] == 2
    assert (plain["protocol"]["bos"], plain["protocol"]["special_tokens_read_as"]) == ("<s>", "text")
    assert meant["protocol"]["special_tokens_read_as"] == "special tokens"
    assert plain["bits"]["dense"]["bytes"] == meant["bits"]["dense"]["bytes"] == len(SPELLED)
    assert plain["bits"]["dense"]["tokens"] - meant["bits"]["dense"]["tokens"] == 2 * (len("<s>") - 1)
    assert evaluate_text(str(folder), str(spelled))["text"]["special_tokens"] == 0


def test_the_manifest_says_how_text_was_read(compressed):
    said = read_manifest(compressed)["calibration"]
    assert (said["bos"], said["special_tokens_in_text"], said["special_tokens_read_as"]) == ("<s>", 0, "text")


INHERITED = [
    {"num_beams": 4},
    {"do_sample": True, "num_return_sequences": 2, "temperature": 5.0},
    {"stop_strings": ["the"]},
    {"penalty_alpha": 0.6, "top_k": 4},
    {"repetition_penalty": 9.0, "no_repeat_ngram_size": 1, "min_new_tokens": 40, "max_length": 1},
]


@pytest.mark.parametrize("settings", INHERITED, ids=lambda settings: next(iter(settings)))
def test_a_models_own_generation_settings_are_not_in_force(folder, tmp_path, settings, command):
    """Greedy is greedy: the same tokens as without the file, from ``generate`` and from whatever evaluates."""
    copy = shutil.copytree(folder, tmp_path / "model")
    (copy / "generation_config.json").write_text(json.dumps({**settings, "bos_token_id": 0, "eos_token_id": [0, 7]}))
    for place in (folder, copy):
        code, said, complaint = command("generate", place, "the quick", "--max-new-tokens", 8)
        assert code == 0, complaint
        expected = said if place == folder else expected  # noqa: F821
    assert said == expected
    opened = OpenModel(str(copy))
    assert opened.model.generation_config.eos_token_id == [0, 7]
    given = torch.tensor([prompt_tokens(opened.tokenizer, "the quick")])
    made = opened.model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=8, do_sample=False)
    assert opened.tokenizer.decode(made[0], skip_special_tokens=True).strip() == said.strip()


def test_generation_settings_are_fresh_around_a_prompt_and_an_adapter_too(prompted):
    model = compress.load(prompted, bits=3, prompt=True)
    model.get_base_model().generation_config.update(num_beams=3, suppress_tokens=[5])
    set_generation(model, AutoTokenizer.from_pretrained(prompted))
    for layer in (model, model.get_base_model()):
        assert (layer.generation_config.num_beams, layer.generation_config.suppress_tokens) == (None, [5])
    given = torch.tensor([[5, 6, 7]])
    model.generate(given, max_new_tokens=3, do_sample=False)
    assert model.get_base_model().generation_config.num_beams is None


def test_a_chat_model_is_spoken_to_in_its_template(folder, tmp_path, command):
    copy = shutil.copytree(folder, tmp_path / "model")
    tokenizer_of(folder, chat_template=CHAT).save_pretrained(copy)
    _, plain, note = command("generate", copy, "the fox", "--max-new-tokens", 4)
    assert plain.startswith("the fox")
    assert "--chat says it to the model" in note
    code, answer, note = command("generate", copy, "the fox", "--max-new-tokens", 4, "--chat")
    assert (code, note) == (0, "")
    code, whole, _ = command("generate", copy, "<s>user: the fox!", "--max-new-tokens", 4)
    assert whole.strip() == f"user: the fox!{answer.rstrip()}".strip()
    code, _, complaint = command("generate", folder, "the fox", "--chat")
    assert (code, "has no chat template" in complaint) == (1, True)
