"""The pass that recommends bits of the cache."""

import itertools
import json

import pytest
import torch
from transformers import AutoTokenizer

import compress
from compress import CompressError, KVCache
from compress.calibration import draw_samples
from compress.hf import cache_name
from compress.quant.kv import _Beside, choose
from compress.settings import Calibration
from tests.conftest import assert_same_files

PASS = {"kind": "kv_calibrate", "bits": 3, "choices": [2, 4], "group": [4, 12], "residual": 8}


def test_the_choice_is_the_best_of_all():
    generator = torch.Generator().manual_seed(0)
    costs = [{bits: float(torch.rand((), generator=generator)) / bits for bits in (2, 3, 8)} for _ in range(4)]
    for total in (8, 12, 17, 32):
        fitting = [each for each in itertools.product((2, 3, 8), repeat=4) if sum(each) <= total]
        wanted = min(fitting, key=lambda each: sum(layer[bits] for layer, bits in zip(costs, each, strict=True)))
        assert choose(costs, total) == list(wanted)


@pytest.fixture(scope="module")
def calibrated(tiny_llama, text_file, tmp_path_factory):
    calibration = {"text": str(text_file), "samples": 3, "length": 60}
    passes = [{"kind": "rtn", "bits": 4}, PASS]
    recipe = {"model": str(tiny_llama), "calibration": calibration, "passes": passes}
    return compress.run(recipe, output=tmp_path_factory.mktemp("kv") / "model")


def test_a_checkpoint_is_loaded_with_what_the_pass_recommends(calibrated):
    manifest = json.loads((calibrated / "compression.json").read_text())
    record = manifest["passes"][-1]["units"]["kv"]
    kv = record["kv"]
    assert record["losses"].keys() == record["divergences"].keys() == {"whole", "chosen", "uniform"}
    assert len(record["alone"]) == 3
    assert sum(record["chosen"]) <= 9
    model = compress.load(calibrated, kv="recommended")
    cache = getattr(model(torch.arange(1, 40)[None]), cache_name(model))
    assert isinstance(cache, KVCache)
    bits = kv["bits"] if isinstance(kv["bits"], list) else [kv["bits"]] * 3
    assert [layer.bits for layer in cache.layers] == [(one, one) for one in bits]
    assert cache.settings.groups == (4, 12)


def test_the_card_has_the_recommendation_and_what_was_measured(calibrated):
    record = json.loads((calibrated / "compression.json").read_text())["passes"][-1]["units"]["kv"]
    card = (calibrated / "README.md").read_text().partition("## Cache of keys and values")[2].partition("\n## ")[0]
    assert 'compress.load("ORG/NAME", kv="recommended")' in card
    for loss in record["losses"].values():
        assert f"| {loss:.4f} |" in card
    (line,) = [line for line in card.splitlines() if "(recommended)" in line]
    bits = record["kv"]["bits"]
    assert line.startswith(f"| {bits} bits" if isinstance(bits, int) else f"| {', '.join(map(str, bits))} bits")


def test_the_pass_stands_beside_another_sidecar_but_not_behind_its_like(tiny_llama, text_file, tmp_path):
    calibration = {"text": str(text_file), "samples": 3, "length": 60}
    recipe = {"model": str(tiny_llama), "calibration": calibration, "passes": [PASS, PASS]}
    with pytest.raises(CompressError, match="put kv_calibrate last"):
        compress.run(recipe, output=tmp_path / "model")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 1}, "bits"),
        ({"bits": 2, "choices": [3, 4]}, "cannot be had"),
        ({"choices": [9]}, "from 2 to 8"),
        ({"group": 32}, "does not divide the 12 channels"),
        ({"residual": 100}, "no sample has more tokens"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, message, tiny_llama, text_file, tmp_path):
    calibration = {"text": str(text_file), "samples": 2, "length": 60}
    recipe = {"model": str(tiny_llama), "calibration": calibration, "passes": [{**PASS, **changes}]}
    with pytest.raises(CompressError, match=message):
        compress.run(recipe, output=tmp_path / "model")


def test_losses_are_those_of_each_sample_alone(tiny_llama, text_file, tmp_path):
    """Samples of three lengths are read together, padded."""
    documents = tmp_path / "documents.jsonl"
    texts = [text_file.read_text()[start : start + size] for start, size in ((0, 400), (90, 190), (300, 165))]
    documents.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    calibration = {"text": str(documents), "samples": 3, "length": 60, "min_characters": 1}
    recipe = {"model": str(tiny_llama), "calibration": calibration, "passes": [PASS]}
    folder = compress.run(recipe, output=tmp_path / "model")
    record = json.loads((folder / "compression.json").read_text())["passes"][-1]["units"]["kv"]
    model, tokenizer = compress.load(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)
    samples = draw_samples(Calibration.model_validate(calibration), tokenizer, None).tokens
    assert len({len(tokens) for tokens in samples if len(tokens) > 40}) == 3
    whole, packed, after = [], [], []
    for said, bits in ((whole, 16), (packed, 2)):
        for tokens in samples:
            cache = KVCache(bits, group=(4, 12), residual=8, config=model.config)
            with torch.no_grad():
                parts = [model(part[None], **{cache_name(model): cache}).logits[0] for part in tokens.split(32)]
            said.append(torch.cat(parts).double().log_softmax(-1)[8:-1])
    after = torch.cat([tokens[9:] for tokens in samples])[:, None]
    whole, packed = torch.cat(whole), torch.cat(packed)
    assert record["losses"]["whole"] == pytest.approx(-float(whole.gather(1, after).mean()), abs=1e-5)
    assert record["losses"]["uniform"] == pytest.approx(-float(packed.gather(1, after).mean()), abs=1e-5)
    listed = whole.topk(64).indices  # what is not listed counts as one event
    p, q = (
        torch.cat([part.exp(), 1 - part.exp().sum(1, True)], 1)
        for part in (whole.gather(1, listed), packed.gather(1, listed))
    )
    assert record["divergences"]["whole"] == pytest.approx(0, abs=1e-6)
    assert record["divergences"]["uniform"] == pytest.approx(float((p * (p / q).log()).sum(1).mean()), rel=1e-3)


def test_an_interrupted_pass_measures_nothing_again(calibrated, tiny_llama, text_file, tmp_path, monkeypatch):
    calibration = {"text": str(text_file), "samples": 3, "length": 60}
    recipe = {"model": str(tiny_llama), "calibration": calibration, "passes": [{"kind": "rtn", "bits": 4}, PASS]}
    measure, seen = _Beside.measure, []

    def stopped_at_the_fourth(self, bits):
        seen.append(str(bits))
        if len(seen) == 4:
            raise KeyboardInterrupt
        return measure(self, bits)

    monkeypatch.setattr(_Beside, "measure", stopped_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        compress.run(recipe, output=tmp_path / "model")
    compress.run(recipe, output=tmp_path / "model")
    assert seen.count(seen[3]) == 2
    assert len(set(seen)) == len(seen) - 1
    assert_same_files(tmp_path / "model", calibrated)
