"""Calibration, agreement, flips and robustness, each against figures worked out by hand."""

import math

import pytest
import torch

import compress
from compress.errors import CompressError
from compress.evals.agreement import (
    Comparison,
    calibration_error,
    dense_model_of,
    evaluate_agreement,
    evaluate_robustness,
    with_typos,
)
from compress.evals.evaluate import OpenText
from compress.evals.perplexity import prepare
from compress.evals.store import Results
from compress.evals.tables import flipped

TEXT = "the fox sleeps and the lazy dog jumps over the quick brown fox. " * 5


def test_calibration_error_by_hand():
    """Two bins: (0.2 + 0.4)/2 sure and never right, (0.6 + 0.8)/2 sure and right once."""
    confidence, right = torch.tensor([0.2, 0.4, 0.6, 0.8]), torch.tensor([0, 0, 1, 0])
    assert calibration_error(confidence, right, bins=2) == pytest.approx(2 / 4 * 0.3 + 2 / 4 * abs(0.5 - 0.7))
    assert calibration_error(torch.tensor([1.0, 1.0]), torch.tensor([1, 1])) == 0
    assert calibration_error(torch.tensor([0.5, 0.5]), torch.tensor([1, 0]), bins=2) == 0  # 0.5 ends the first bin


def test_a_comparison_of_three_tokens_by_hand():
    dense = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]])
    other = torch.tensor([[0.4, 0.5, 0.1], [0.2, 0.7, 0.1], [0.7, 0.2, 0.1]])
    target = torch.tensor([0, 1, 1])
    sums = Comparison()
    sums.add(dense.log(), other.log(), target)
    found = sums.metrics()
    divergences = [
        0.5 * math.log(0.5 / 0.4) + 0.3 * math.log(0.3 / 0.5) + 0.2 * math.log(0.2 / 0.1),
        0.1 * math.log(0.1 / 0.2) + 0.8 * math.log(0.8 / 0.7),
        0.2 * math.log(0.2 / 0.7) + 0.6 * math.log(0.6 / 0.1),
    ]
    assert found["kl"] == pytest.approx(sum(divergences) / 3)
    assert found["top1_agreement"] == pytest.approx(1 / 3)  # tokens 0 ≠ 1, 1 = 1, 2 ≠ 0
    assert found["flipped"] == pytest.approx(1 / 3)  # right → wrong at the first; the third is wrong both times
    assert found["accuracy"] == pytest.approx(1 / 3)
    # sure at 0.5 (wrong), 0.7 (right), 0.7 (wrong): bins 8 and 11 of 15
    assert found["ece"] == pytest.approx((0.5 + abs(1 - 1.4)) / 3)


def test_typos_are_swaps_of_inner_letters_in_their_share_of_words():
    text = "alpha beta gamma delta " * 500 + "a an the naïve ñandú"
    spoilt = with_typos(text, rate=0.05)
    before, after = text.split(), spoilt.split()
    changed = [(a, b) for a, b in zip(before, after, strict=True) if a != b]
    assert 60 < len(changed) < 140  # 5 % of 2000; some swaps are of equal letters
    assert all(sorted(a) == sorted(b) and a[0] == b[0] and a[-1] == b[-1] for a, b in changed)
    assert len(text.encode()) == len(spoilt.encode())
    assert with_typos(text) == spoilt
    assert with_typos(text, rate=0) == text


def test_share_of_changed_answers_by_hand():
    dense = {"answers": [0, 1, 2, 3]}
    assert flipped({"answers": [0, 2, 2, 1]}, dense) == 0.5
    assert flipped({"answers": [0, 1]}, dense) is None  # other items
    assert flipped({"answers": [0]}, None) is None


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return str(path)


def test_every_width_beside_the_dense_model_equals_a_plain_loop(compressed, tiny_llama, text):
    store = Results(None)
    found = evaluate_agreement(OpenText(str(compressed), text, bits=[6, 3], store=store))
    assert list(found) == ["6", "3", "dense"]
    assert found["dense"]["kl"] == 0
    assert found["dense"]["top1_agreement"] == 1
    assert found["6"]["kl"] < found["3"]["kl"]
    from transformers import AutoTokenizer

    dense, model = (compress.load(folder, dtype=torch.float32) for folder in (tiny_llama, compressed))
    compress.set_bits(model, 3)
    total, same, count, ties = 0.0, 0, 0, 0
    for window in prepare([TEXT], AutoTokenizer.from_pretrained(compressed), 64).windows:
        with torch.no_grad():
            p, q = (m(torch.tensor([window.tokens])).logits[0].double().softmax(-1) for m in (dense, model))
        for place in range(len(window.tokens) - 1 - window.scored, len(window.tokens) - 1):
            total += float((p[place] * (p[place] / q[place]).log()).sum())
            same += int(p[place].argmax() == q[place].argmax())
            first, second = q[place].topk(2).values
            ties += int(first - second < 1e-7)  # which a batch of windows may round to the other side
            count += 1
    assert found["3"]["tokens"] == count
    assert found["3"]["kl"] == pytest.approx(total / count, rel=1e-3)
    assert ties <= 1
    assert found["3"]["top1_agreement"] == pytest.approx(same / count, abs=ties / count + 1e-6)
    assert evaluate_agreement(OpenText(str(compressed), text, bits=[6, 3], store=store)) == found


def test_robustness_is_the_difference_of_two_measurements(compressed, text):
    found = evaluate_robustness(OpenText(str(compressed), text, bits=[4]), rate=0.5)["4"]
    assert found["increase"] == found["bits_per_byte_typos"] - found["bits_per_byte"]
    assert found["increase"] != 0


def test_the_dense_model_is_found_by_the_manifest_or_named(compressed, tiny_llama, make_model):
    assert dense_model_of(str(compressed)) == str(tiny_llama)
    assert dense_model_of("anything", str(make_model("opt"))) == str(make_model("opt"))
    with pytest.raises(CompressError, match="give --reference"):
        dense_model_of(str(tiny_llama))


def test_another_model_in_the_dense_ones_place_is_refused(compressed, tiny_llama, tmp_path):
    import json
    import shutil

    folder = shutil.copytree(compressed, tmp_path / "model")
    manifest = json.loads((folder / "compression.json").read_text())
    manifest["model_sha256"]["model.safetensors"] = "0" * 64
    (folder / "compression.json").write_text(json.dumps(manifest))
    with pytest.raises(CompressError, match="is not the model that"):
        dense_model_of(str(folder))
