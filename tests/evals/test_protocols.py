"""The papers' ways of cutting text, against a plain loop over windows."""

import math

import pytest
import torch
from transformers import AutoTokenizer

import compress
from compress.errors import CompressError
from compress.evals import evaluate as module
from compress.evals.evaluate import PRESETS, Protocol, documents_of, evaluate_text, protocol_of
from compress.evals.store import Results

TEXT = "the fox sleeps and the lazy dog jumps over the quick brown fox. " * 12


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return str(path)


def test_windows_side_by_side_equal_the_papers_loop(tiny_llama, text):
    """exp of the mean over windows of the mean over the last L - 1 tokens of each; what is left over is dropped."""
    length = 40
    found = evaluate_text(str(tiny_llama), text, protocol=Protocol(length=length, disjoint=True))["bits"]["dense"]
    tokenizer, model = AutoTokenizer.from_pretrained(tiny_llama), compress.load(tiny_llama, dtype=torch.float32)
    ids = torch.tensor([tokenizer.bos_token_id, *tokenizer(TEXT, add_special_tokens=False)["input_ids"]])
    count = len(ids) // length
    assert count >= 3
    assert len(ids) % length
    means = []
    for window in ids[: count * length].view(count, length):
        with torch.no_grad():
            logits = model(window[None]).logits[0, :-1]
        means.append(torch.nn.functional.cross_entropy(logits, window[1:]).item())
    assert found["perplexity"] == pytest.approx(math.exp(sum(means) / count), rel=1e-5)
    assert found["tokens"] == count * (length - 1)
    scored = [ids[i * length + 1 : (i + 1) * length] for i in range(count)]
    assert found["bytes"] == sum(len(tokenizer.decode(part).encode()) for part in scored)


def test_documents_become_one_text_as_the_paper_joins_them(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("one#two#three#four")
    protocol = Protocol(separator="#", limit=3, join=" ", characters=9)
    assert documents_of(str(path), protocol)[0] == ["one two t"]


def test_presets_are_the_papers():
    assert (PRESETS["2048"].length, PRESETS["2048"].disjoint) == (2048, True)
    assert (PRESETS["llm-pruner"].length, PRESETS["llm-pruner"].join) == (128, "\n\n")
    c4 = PRESETS["any-precision-c4"]
    assert (c4.limit, c4.join, c4.characters, c4.length) == (1100, " ", 2088528, 2048)
    assert PRESETS["compress-then-prompt"].length == 1024


def test_a_preset_can_be_changed_and_its_name_mistyped():
    assert protocol_of("llm-pruner", length=64, stride=None).length == 64
    with pytest.raises(CompressError, match="Did you mean 'llm-pruner'"):
        protocol_of("llm-prunner")


def test_a_window_beyond_the_context_or_the_text_is_refused(tiny_llama, text):
    with pytest.raises(CompressError, match="windows of 2048 tokens: the context holds 64; give --length"):
        evaluate_text(str(tiny_llama), text, protocol=protocol_of("2048"))
    with pytest.raises(CompressError, match="no document with a window of 64 tokens"):
        evaluate_text(str(tiny_llama), text, protocol=Protocol(length=64, disjoint=True, join=" ", characters=20))


def test_widths_that_were_measured_are_not_measured_again(compressed, text, monkeypatch):
    store, measured = Results(None), []
    score = module.score
    monkeypatch.setattr(module, "score", lambda *a, **k: measured.append(1) or score(*a, **k))
    first = evaluate_text(str(compressed), text, [3, 4], store=store)
    assert evaluate_text(str(compressed), text, [3, 4, 5], store=store)["bits"]["3"] == first["bits"]["3"]
    assert len(measured) == 3
    evaluate_text(
        str(compressed), text, [3], Protocol(length=32), store=store
    )  # another protocol is another measurement
    assert len(measured) == 4
