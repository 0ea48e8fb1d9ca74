"""A row of a batch behind a prompt or prefix gets what it gets alone, whatever its neighbours and on whichever side it is padded."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

import compress
from compress.errors import CompressError
from compress.hf import cache_name
from compress.prompts.stored import new_prompt

PAD = 299
GREEDY = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5, "pad_token_id": PAD}
KINDS = ("llama", "gpt2", "opt", "bloom", "gpt_neox", "gemma3_text")


def text(length, seed=0):
    return torch.randint(1, 298, (length,), generator=torch.Generator().manual_seed(100 * length + seed))


def batch(rows, side="left"):
    """Token ids and mask [B, T]."""
    ids = pad_sequence(rows, batch_first=True, padding_value=PAD, padding_side=side)
    mask = pad_sequence([torch.ones(len(row), dtype=torch.long) for row in rows], batch_first=True, padding_side=side)
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture(scope="module")
def behind(make_model):
    """A model behind random virtual tokens, by architecture and method; made once."""
    made = {}

    def make(kind, method, **changes):
        key = (kind, method, *sorted(changes.items()))
        if key not in made:
            model = compress.load(make_model(kind, **changes))
            torch.manual_seed(1)
            size = 48
            if method == "prefix":
                cache = model(torch.zeros(1, 1, dtype=torch.long), use_cache=True).past_key_values
                size = sum(
                    part.shape[1] * part.shape[3] for layer in cache.layers for part in (layer.keys, layer.values)
                )
            made[key] = new_prompt(model, method, torch.randn(4, size))
        return made[key]

    return make


@pytest.mark.parametrize("method", ["prompt", "prefix"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_padded_row_gets_the_logits_it_gets_alone(behind, kind, method):
    model, rows = behind(kind, method), [text(9), text(3), text(1)]
    for side in ("left", "right"):
        logits = model(**batch(rows, side)).logits[:, -9:]
        for row, found in zip(rows, logits, strict=True):
            own = found[-len(row) :] if side == "left" else found[: len(row)]
            torch.testing.assert_close(own, model(row[None]).logits[0, -len(row) :], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("method", ["prompt", "prefix"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_padded_row_is_continued_as_it_is_alone(behind, kind, method):
    model, rows = behind(kind, method), [text(9), text(3)]
    made = model.generate(**batch(rows), **GREEDY)
    assert torch.equal(model.generate(**batch(rows), **GREEDY, use_cache=False), made)
    for row, found in zip(rows, made, strict=True):
        alone = model.generate(row[None], **GREEDY)[0]
        assert torch.equal(alone[: len(row)], row)
        assert torch.equal(found[9:], alone[len(row) :])
        ids = row
        for _ in range(5):  # and as the forward pass continues it
            ids = torch.cat([ids, model(ids[None]).logits[0, -1:, 1:].argmax(-1) + 1])
        assert torch.equal(alone, ids)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["prompt", "prefix"])
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=5), seed=st.integers(0, 5))
@settings(max_examples=15, deadline=None)
@torch.no_grad()
def test_no_row_depends_on_its_neighbours(behind, method, lengths, seed):
    model, rows = behind("llama", method), [text(length, seed) for length in lengths]
    logits = model(**batch(rows)).logits[:, -1]
    alone = torch.cat([model(row[None]).logits[:, -1] for row in rows])
    torch.testing.assert_close(logits, alone, atol=1e-4, rtol=1e-4)
    made = model.generate(**batch(rows), **GREEDY)[:, -5:]
    assert torch.equal(made, torch.cat([model.generate(row[None], **GREEDY)[:, -5:] for row in rows]))


@pytest.mark.parametrize("method", ["prompt", "prefix"])
@torch.no_grad()
def test_lengths_and_masks_are_those_of_the_text(behind, method):
    model, rows = behind("llama", method), [text(9), text(3)]
    given_batch = batch(rows)
    expected = model.generate(**given_batch, **GREEDY)
    ids, rest = given_batch["input_ids"], {"do_sample": False, "pad_token_id": PAD, "eos_token_id": None}
    assert torch.equal(model.generate(ids, **GREEDY), expected)  # the mask follows from the padding
    assert model.generate(**given_batch, max_length=12, **rest).shape == (2, 12)
    config = GenerationConfig(max_length=12, **rest)
    assert model.generate(**given_batch, generation_config=config).shape == (2, 12)
    assert config.max_length == 12
    beams = model.generate(**given_batch, num_beams=3, num_return_sequences=2, max_new_tokens=4, **rest)
    alone = model.generate(rows[1][None], num_beams=3, num_return_sequences=2, max_new_tokens=4, **rest)
    assert torch.equal(beams[2:, 9:], alone[:, 3:])


class Seen(BaseStreamer):
    def __init__(self):
        self.tokens = []

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.tokens.append("end")


@pytest.mark.parametrize("method", ["prompt", "prefix"])
@torch.no_grad()
def test_a_streamer_sees_the_text_alone(behind, method):
    model, seen = behind("llama", method), Seen()
    made = model.generate(text(6)[None], streamer=seen, output_logits=True, return_dict_in_generate=True, **GREEDY)
    assert seen.tokens == [*made.sequences[0].tolist(), "end"]
    assert made.sequences.shape == (1, 11)
    assert len(made.logits) == 5


@torch.no_grad()
def test_a_cache_that_is_begun_holds_the_prompt(behind):
    model, rows = behind("llama", "prompt"), [text(6), text(4)]
    given_batch = batch(rows)
    first = model(**{name: value[:, :5] for name, value in given_batch.items()}, use_cache=True)
    cache = {cache_name(model): getattr(first, cache_name(model))}
    last = model(given_batch["input_ids"][:, 5:], given_batch["attention_mask"], **cache)
    torch.testing.assert_close(last.logits[:, -1], model(**given_batch).logits[:, -1], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_labels_are_those_of_the_text(behind):
    """Also of the first one, which follows the last virtual token."""
    model, rows = behind("llama", "prompt"), [text(7), text(3)]
    given_batch = batch(rows)
    labels = given_batch["input_ids"].masked_fill(given_batch["attention_mask"] == 0, -100)
    losses = [torch.nn.functional.cross_entropy(model(row[None]).logits[0, 3:-1], row, reduction="sum") for row in rows]
    torch.testing.assert_close(model(**given_batch, labels=labels).loss, sum(losses) / 10, atol=1e-4, rtol=1e-4)


def test_what_cannot_be_right_is_refused(behind):
    windowed = behind("gemma3_text", "prefix", sliding_window=10)
    with pytest.raises(CompressError, match="window of 10 tokens in padded rows only"):
        windowed(**batch([text(8), text(3)]))
    with pytest.raises(CompressError, match="needs input_ids"):
        behind("llama", "prefix").generate(inputs_embeds=torch.zeros(1, 3, 48))
    with pytest.raises(CompressError, match=r"attention_mask must be \[rows, tokens\]"):
        behind("llama", "prompt")(text(3)[None], torch.ones(1, 1, 3, 3))
