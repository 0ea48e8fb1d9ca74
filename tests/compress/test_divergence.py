"""What an error of a matrix costs: gradients against plain backpropagation, and the estimate against the divergence itself."""

import json
from functools import partial

import pytest
import torch
from torch.nn.functional import kl_div
from transformers import AutoModelForCausalLM

import compress
from compress.calibration import Samples
from compress.divergence import add_divergences, block_draw, divergences, outside_draw
from compress.fisher import drawn_gradients, drawn_loss, predicted_tokens, unit_of
from compress.loading import bits_for
from compress.ranks import ALONE
from compress.source import open_source
from compress.streaming import StreamedModel
from compress.workspace import Stage

TOKENS = torch.arange(24) * 7 % 61 + 2  # not 0, of whose row Gemma's embedding has no gradient


@pytest.fixture
def streamed(make_model, tmp_path):
    """Return, for a kind of model, samples and matrices outside the blocks: every sample's gradients by all matrices, streamed."""

    def measure(kind, samples, outside=(), **config):
        folder = make_model(kind, **config)
        model, stage = StreamedModel(open_source(str(folder)).state, torch.device("cpu")), Stage(tmp_path / kind, "key")
        drawn_gradients(model, samples, stage, list(outside), lambda *_: None)
        captured = [model.capture(tokens) for tokens in samples.tokens]
        hidden, calls = [first.detach() for first, _ in captured], [calls for _, calls in captured]
        draws = [{} for _ in samples.tokens]
        for i in range(len(model.blocks)):
            wanted = stage.load(unit_of(i))
            with model.block(i) as module:
                for n, found in enumerate(draws):
                    run = partial(model.run, hidden=hidden[n], call=calls[n][i])
                    found |= block_draw(module, model.linears(i), run, wanted[str(n)])()
                    hidden[n] = run(module).detach()
        left = stage.load(unit_of(-1)) if outside else {}
        for n, found in enumerate(draws if outside else []):
            found |= outside_draw(model, outside, n, samples.tokens[n], left, predicted_tokens(samples))()
        return folder, draws

    return measure


@pytest.mark.parametrize(
    ("kind", "outside"),
    [
        ("llama", ["model.embed_tokens", "lm_head"]),
        ("gemma3_text", ["model.embed_tokens"]),
        ("gpt2", ["transformer.wte"]),
    ],
)
def test_gradients_for_drawn_labels_equal_plain_backpropagation(streamed, kind, outside):
    """With a head of its own, one that is tied and looked up with a factor, and one of transposed matrices."""
    samples = Samples((TOKENS, TOKENS[:9] + 3), {})
    folder, draws = streamed(kind, samples, outside, tie_word_embeddings=len(outside) == 1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert {*outside} < draws[0].keys()
    for n, (tokens, found) in enumerate(zip(samples.tokens, draws, strict=True)):
        model.zero_grad()
        drawn_loss(model(input_ids=tokens[None]).logits[0, :-1], n, predicted_tokens(samples)).backward()
        for name, rows in found.items():
            wanted = model.get_submodule(name).weight.grad
            wanted = wanted if name in outside or kind != "gpt2" else wanted.t()
            torch.testing.assert_close(rows(slice(0, len(wanted))), wanted, rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(rows(slice(3, 5)), wanted[3:5], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_the_estimate_is_the_divergence_of_a_small_error(streamed):
    """Of one matrix of the first block, and of the tied embedding; 240 draws know it to about a tenth."""
    generator = torch.Generator().manual_seed(0)
    samples = Samples(tuple(torch.randint(0, 61, (8,), generator=generator) for _ in range(240)), {})
    folder, draws = streamed("llama", samples, ["model.embed_tokens"], tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        dense = [model(input_ids=tokens[None]).logits[0, :-1].log_softmax(-1) for tokens in samples.tokens]
        for name in ("model.layers.0.mlp.down_proj", "model.embed_tokens"):
            weight = model.get_submodule(name).weight
            error = 0.02 * weight.std() * torch.randn(weight.shape, generator=generator)
            lots = [[partial(dict, {name: draw[name]}) for draw in draws]]
            found = divergences(lots, {name: (len(error), error.__getitem__)}, ALONE)[name]
            weight += error
            changed = [model(input_ids=tokens[None]).logits[0, :-1].log_softmax(-1) for tokens in samples.tokens]
            weight -= error
            pairs = zip(changed, dense, strict=True)
            true = sum(float(kl_div(now, was, log_target=True, reduction="sum")) for now, was in pairs)
            assert found == pytest.approx(true / predicted_tokens(samples), rel=0.3)


def test_a_gradient_that_is_no_number_is_named():
    rows = torch.full((2, 3), torch.inf).__getitem__
    with pytest.raises(compress.CompressError, match="up_proj: its gradient on calibration text is not finite"):
        divergences([[lambda: {"up_proj": rows}]], {"up_proj": (2, torch.ones(2, 3).__getitem__)}, ALONE)


def test_other_numbers_of_bits_follow_the_errors_of_outputs():
    """A matrix that no token has come to, an expert's say, costs as little as the least."""
    errors = {
        "a": {"3": {"weighted": 8.0}, "4": {"weighted": 2.0}},
        "b": {"3": {"weighted": 4.0}, "4": {"weighted": 1.0}},
        "no token": {"3": {"weighted": 3.0}, "4": {"weighted": 1.0}},
    }
    add_divergences(errors, "4", {"a": 0.5, "b": 1.0, "no token": 0.0})
    found = {name: [error["divergence"] for error in by_bits.values()] for name, by_bits in errors.items()}
    assert found == {"a": [2.0, 0.5], "b": [4.0, 1.0], "no token": [0.75, 0.25]}


@pytest.mark.slow
def test_a_mix_of_bits_is_chosen_by_divergences(recipe, tmp_path):
    """Every matrix of a run has them; the one whose errors cost most has more bits than the others."""
    settings = {"kind": "any_precision", "seed_bits": 2, "parent_bits": 4, "codebooks": "row", "embedding_bits": 4}
    out = compress.run(recipe | {"passes": [settings]}, tmp_path / "out")
    manifest = json.loads((out / "compression.json").read_text())
    units = manifest["passes"][0]["units"].values()
    errors = {name: by_bits for unit in units for name, by_bits in unit["errors"].items()}
    assert all(error["divergence"] > 0 for by_bits in errors.values() for error in by_bits.values())
    costly = next(name for name in errors if name.endswith("0.mlp.down_proj"))
    for bits, error in errors[costly].items():
        error["divergence"] = 100.0 / int(bits)
    (out / "compression.json").write_text(json.dumps(manifest))
    bits = bits_for(out, "2.5")
    assert bits[costly] == 4
    assert 2 in bits.values()


def test_labels_are_drawn_as_often_as_the_model_says():
    """Never one that it rules out; the loss of a sample is that of its own draw, the same every time."""
    chances = torch.tensor([0.5, 0.0, 0.3, 0.2])
    logits = chances.log().repeat(4000, 1)
    losses = [float(drawn_loss(logits, place, predicted=1)) / 4000 for place in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]
    assert losses == pytest.approx([float(torch.special.entr(chances).sum())] * 3, rel=0.03)
