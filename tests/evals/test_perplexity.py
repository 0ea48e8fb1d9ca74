"""Every token scored once, bytes counted as UTF-8, and losses equal to a plain loop over the windows."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from compress.errors import CompressError
from compress.evals.perplexity import Text, Window, context_length, prepare, score

ALPHABET = pre_tokenizers.ByteLevel.alphabet()
BOS, VOCABULARY = 0, 259


def byte_tokenizer(bos=True, learn="", trim_offsets=False):
    """One token per byte; with ``learn``, also tokens for what is frequent in that text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    tokenizer.decoder = decoders.ByteLevel()
    size = 258 + 20 * bool(learn)
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<s>", "</s>"], initial_alphabet=ALPHABET, show_progress=False
    )
    tokenizer.train_from_iterator([learn], trainer)
    names = {"bos_token": "<s>"} if bos else {}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", **names)


WITH_BOS, WITHOUT_BOS = byte_tokenizer(), byte_tokenizer(bos=False)


def ids(text):
    return WITHOUT_BOS(text, add_special_tokens=False)["input_ids"]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


# Windows


@given(
    documents=st.lists(st.text("abcdefgh", max_size=40), max_size=3).map(lambda texts: [*texts, "the last"]),
    cut=st.integers(2, 12).flatmap(lambda length: st.tuples(st.just(length), st.integers(1, length - 1))),
    bos=st.booleans(),
)
@settings(deadline=None)
def test_every_token_is_scored_once_whatever_the_stride(documents, cut, bos):
    length, stride = cut
    text = prepare(documents, WITH_BOS if bos else WITHOUT_BOS, length, stride)
    # With BOS in front every token of a document can be predicted, otherwise all but its first.
    expected = [token for document in documents for token in ids(document)[0 if bos else 1 :]]
    assert [token for window in text.windows for token in window.tokens[-window.scored :]] == expected
    assert text.bytes == len(expected)  # one byte per token
    assert max(len(window.tokens) for window in text.windows) <= length


@pytest.mark.parametrize("stride", [1, 3, 7])
def test_later_windows_keep_the_context_that_the_stride_leaves(stride):
    first, *later = prepare(["abcdefghijklmnopqrstuvwxyz"], WITH_BOS, 8, stride).windows
    assert first == Window([BOS, *ids("abcdefg")], 7)
    assert all(len(window.tokens) - window.scored >= 8 - stride for window in later)


def test_the_stride_is_half_the_length_unless_given():
    assert prepare(["abcdefghi"], WITHOUT_BOS, 4).windows == [
        Window(ids("abcd"), 3),
        Window(ids("cdef"), 2),
        Window(ids("efgh"), 2),
        Window(ids("fghi"), 1),
    ]


def test_bos_goes_in_front_of_every_document():
    assert prepare(["ab", "", "c"], WITH_BOS, 8).windows == [Window([BOS, *ids("ab")], 2), Window([BOS, *ids("c")], 1)]


def test_without_bos_a_documents_first_token_is_not_predicted():
    assert prepare(["abc", "d", "ef"], WITHOUT_BOS, 8).windows == [Window(ids("abc"), 2), Window(ids("ef"), 1)]


def test_truncate_scores_the_first_window_of_each_document():
    text = prepare(["abcdefgh", "ijklmnop", "q"], WITH_BOS, 4, truncate=True)
    assert [window.tokens[1:] for window in text.windows] == [ids("abc"), ids("ijk"), ids("q")]
    assert text.bytes == 7


# Bytes


def test_bytes_are_those_of_utf8():
    documents = ["naïve café", "日本語", "🙂 done"]
    assert prepare(documents, WITH_BOS, 6).bytes == sum(len(document.encode()) for document in documents)


def test_bytes_of_unscored_tokens_do_not_count():
    assert prepare(["a日本"], WITHOUT_BOS, 32).bytes == 6
    assert prepare(["é日本語"], WITH_BOS, length=1 + 2 + 3, truncate=True).bytes == 5


@pytest.mark.parametrize("trim_offsets", [False, True])
@pytest.mark.parametrize("document", ["the then", "the  日本 the"])
def test_bytes_of_longer_tokens_count_with_their_spaces(document, trim_offsets):
    """Some tokenizers (RoBERTa's) leave the space of a token like ' then' out of its offsets."""
    tokenizer = byte_tokenizer(bos=False, learn="the the the then then", trim_offsets=trim_offsets)
    first = tokenizer.decode(tokenizer(document)["input_ids"][:1])
    assert first == "the"
    assert prepare([document], tokenizer, 32).bytes == len(document.encode()) - 3


# Refusals


@pytest.mark.parametrize(("length", "stride"), [(1, None), (8, 8), (8, 0), (8, 9)])
def test_windows_that_cannot_work_are_refused(length, stride):
    with pytest.raises(CompressError, match=rf"windows of {length} tokens with stride .*1 <= stride < length"):
        prepare(["abc"], WITH_BOS, length, stride)


@pytest.mark.parametrize(("documents", "tokenizer"), [([], WITH_BOS), ([""], WITH_BOS), (["a", "b"], WITHOUT_BOS)])
def test_a_text_with_nothing_to_predict_is_refused(documents, tokenizer):
    with pytest.raises(CompressError, match="no document with a token to predict"):
        prepare(documents, tokenizer, 8)


# Losses


WINDOWS = [Window(list(range(5, 17)), 11), Window([9, 3, 200, 7], 2), Window([1, 2], 1), Window([8, 8, 1, 50, 4, 2], 5)]


@torch.no_grad()
def plain_loss(model, windows):
    """Summed negative log-likelihood: one window and one token at a time, in float64."""
    total = 0.0
    for window in windows:
        logits = model(torch.tensor([window.tokens])).logits[0].double()
        for place in range(len(window.tokens) - window.scored, len(window.tokens)):
            total -= logits[place - 1].log_softmax(-1)[window.tokens[place]].item()
    return total


def test_the_score_equals_a_plain_loop(model):
    result = score(model, Text(WINDOWS, bytes=30))
    total, tokens = plain_loss(model, WINDOWS), 11 + 2 + 1 + 5
    assert result.tokens == tokens
    assert result.bytes == 30
    assert result.loss == pytest.approx(total / tokens, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(total / tokens), rel=1e-4)
    assert result.bits_per_byte == pytest.approx(total / math.log(2) / 30, rel=1e-5)


def test_documents_are_scored_on_their_own(model):
    documents = ["hello", "wörld", "x"]
    windows = [Window([BOS, *ids(document)], len(ids(document))) for document in documents]
    result = score(model, prepare(documents, WITH_BOS, 16))
    assert result.loss == pytest.approx(plain_loss(model, windows) / (5 + 6 + 1), rel=1e-5)


@pytest.mark.parametrize("batch_tokens", [1, 7, 12, 25, 1000])
def test_the_batch_size_does_not_matter(model, batch_tokens):
    result = score(model, Text(WINDOWS, bytes=30), batch_tokens)
    assert result.loss == pytest.approx(plain_loss(model, WINDOWS) / 19, rel=1e-5)


def test_logits_are_made_where_something_is_scored(model):
    """Two documents of 64 tokens in windows of 16 that advance by 4, eight windows at a time: 2 of 26 windows are scored whole."""
    rows = []
    handle = model.lm_head.register_forward_hook(
        lambda _module, inputs, _output: rows.append(inputs[0][..., 0].numel())
    )
    text = prepare(["abcdefghi" * 7, "xyz" * 21], WITH_BOS, 16, 4)
    result = score(model, text, batch_tokens=8 * 16)
    handle.remove()
    assert [len(text.windows), result.tokens] == [26, 2 * 63]
    assert sum(rows) == 24 * 4 + 2 * 15
    assert result.loss == pytest.approx(plain_loss(model, text.windows) / result.tokens, rel=1e-5)


def test_a_model_that_knows_nothing_needs_ln_v_nats_per_token(model):
    uniform = copy.deepcopy(model)
    torch.nn.init.zeros_(uniform.lm_head.weight)
    result = score(uniform, prepare(["abc"], WITH_BOS, 8))
    assert result.loss == pytest.approx(math.log(VOCABULARY), rel=1e-6)
    assert result.perplexity == pytest.approx(VOCABULARY, rel=1e-5)
    assert result.bits_per_byte == pytest.approx(math.log2(VOCABULARY), rel=1e-6)


def test_progress_is_reported_up_to_the_last_window(model):
    seen = []
    score(model, Text(WINDOWS, bytes=30), 12, progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1] == (len(WINDOWS), len(WINDOWS))


def test_a_window_is_the_models_context_up_to_a_cap(model):
    assert context_length(model) == 64
    assert context_length(model, cap=10) == 10
