"""What is drafted and checked is what the model would have written; a view costs no memory."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

import compress
from compress.drafting import Decoding, Drafting
from compress.errors import CompressError
from compress.hf import cache_name

PROMPT = torch.arange(5, 25)[None]


@pytest.fixture
def model(compressed):
    return compress.load(compressed, dtype=torch.float32)


@torch.no_grad()
def logits(model):
    return model(input_ids=PROMPT).logits


def test_a_view_shares_every_tensor(model):
    draft = compress.view(model, bits=3)
    own = {tensor.data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    assert all(tensor.data_ptr() in own for tensor in [*draft.parameters(), *draft.buffers()])
    assert (compress.get_bits(model), compress.get_bits(draft)) == (6, 3)
    before = logits(model)
    at_three = logits(draft)
    assert torch.equal(logits(model), before)
    compress.set_bits(model, 3)
    assert torch.equal(logits(model), at_three)


@pytest.mark.slow
def test_a_view_of_a_packed_vocabulary(recipe, make_model, tmp_path):
    recipe["model"] = str(make_model("llama", tie_word_embeddings=True))
    recipe["passes"] = [{"kind": "any_precision", "seed_bits": 3, "parent_bits": 6, "embedding_bits": "auto"}]
    model = compress.load(compress.run(recipe, tmp_path / "small"), dtype=torch.float32)
    draft = compress.view(model, bits=3)
    expected = logits(draft)
    assert compress.get_bits(model) == 6
    compress.set_bits(model, 3)
    assert torch.equal(logits(model), expected)
    assert draft.lm_head.embedding is draft.model.embed_tokens


def test_views_that_cannot_be(model, tiny_llama):
    with pytest.raises(CompressError, match="Load it at more bits"):
        compress.view(model, bits=7)
    with pytest.raises(CompressError, match="no packed modules"):
        compress.view(AutoModelForCausalLM.from_pretrained(tiny_llama), bits=3)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 4, None])
def test_greedy_text_is_the_same(model, tokens):
    options = {"max_new_tokens": 40, "do_sample": False, "repetition_penalty": 1.3}
    drafts = Drafting(compress.view(model, bits=3), tokens=tokens)
    expected = model.generate(PROMPT, **options)
    for _ in range(2):
        assert torch.equal(model.generate(PROMPT, custom_generate=drafts, **options), expected)
    assert drafts.rounds > 0
    assert 0 <= drafts.accepted <= drafts.drafted
    assert drafts.drafted > 0 or tokens is None


@pytest.mark.slow
@torch.no_grad()
def test_transformers_own_loop_takes_a_view(model):
    options = {"max_new_tokens": 20, "do_sample": False}
    expected = model.generate(PROMPT, **options)
    assert torch.equal(model.generate(PROMPT, assistant_model=compress.view(model, bits=3), **options), expected)


@torch.no_grad()
def test_what_stops_a_text_stops_it_among_drafts(model):
    written = model.generate(PROMPT, max_new_tokens=30, do_sample=False)[0, PROMPT.shape[1] :].tolist()
    stop = written[7]
    drafts = Drafting(compress.view(model, bits=6), tokens=5)
    made = model.generate(PROMPT, max_new_tokens=30, do_sample=False, eos_token_id=stop, custom_generate=drafts)
    assert made[0, PROMPT.shape[1] :].tolist() == written[: written.index(stop) + 1]


@pytest.mark.slow
@torch.no_grad()
def test_sampled_tokens_have_the_models_distribution(model):
    """Chi-squared over a sampled token that a draft proposes, of the likeliest 12 and all others (0.1 % level)."""
    draws, top = 300, 12
    options = {"max_new_tokens": 1, "min_new_tokens": 1, "do_sample": True, "temperature": 0.7, "top_k": 20}
    drafts = Drafting(compress.view(model, bits=3), tokens=2)
    torch.manual_seed(0)
    first = model.generate(PROMPT, max_new_tokens=1, do_sample=False)
    scores = model(input_ids=first).logits[0, -1] / 0.7
    scores[scores < scores.topk(20).values[-1]] = -torch.inf
    wanted = scores.softmax(-1)
    likely = wanted.topk(top).indices
    counts = torch.zeros(top + 1)
    read = DynamicCache(config=model.config)  # nothing is drafted before the model itself has read the prompt
    model(input_ids=PROMPT, use_cache=True, **{cache_name(model): read})
    for _ in range(draws):
        known = {cache_name(model): copy.deepcopy(read)}
        token = model.generate(first, custom_generate=drafts, **options, **known)[0, -1]
        place = (likely == token).nonzero()
        counts[int(place[0, 0]) if len(place) else top] += 1
    expected = draws * torch.cat([wanted[likely], 1 - wanted[likely].sum(0, keepdim=True)])
    kept = expected > 5
    statistic = ((counts - expected) ** 2 / expected)[kept].sum()
    assert drafts.drafted > 0
    assert 0 < drafts.accepted < drafts.drafted
    assert (
        statistic < 36.1
    )  # of 13 - 1 degrees of freedom at most: 32.9 at 0.1 %, and a little for cells that were left out


@pytest.mark.parametrize("kind", [Decoding, Drafting])
def test_loops_are_for_one_sequence(model, kind):
    loop = Decoding() if kind is Decoding else Drafting(compress.view(model, bits=3))
    with pytest.raises(CompressError, match=f"{kind.__name__} is for one sequence"):
        model.generate(PROMPT.repeat(2, 1), max_new_tokens=5, custom_generate=loop)
    mask = torch.ones_like(PROMPT)
    mask[0, 0] = 0
    with pytest.raises(CompressError, match="without padding"):
        model.generate(PROMPT, attention_mask=mask, max_new_tokens=5, custom_generate=loop)
    embedded = model.get_input_embeddings()(PROMPT)
    with pytest.raises(CompressError, match="in place of inputs_embeds"):
        model.generate(inputs_embeds=embedded, max_new_tokens=5, custom_generate=loop)


def test_choosing_how_many_to_draft(model):
    drafts = Drafting(model, cost=0.3, check=0.1, share=0.9)
    many = drafts.count()
    drafts.share = 0.6
    few = drafts.count()
    drafts.share = 0.1
    counts = [drafts.count() for _ in range(40)]
    assert many > few > 0
    assert counts.count(0) > counts.count(1) > 0  # tried again now and then


def test_command(command, compressed):
    plain = command("generate", compressed, "the quick brown", "--max-new-tokens", "12")
    assert command("generate", compressed, "the quick brown", "--max-new-tokens", "12", "--draft-bits", "3") == plain
