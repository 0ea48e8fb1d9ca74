"""Recovery: adapters merged or beside the model, whole models, instructions, resuming."""

import json

import pytest
import torch
from transformers import AutoTokenizer

import compress
from compress.errors import CompressError
from compress.pruning.adapter import load_adapter
from compress.pruning.instructions import answer_loss, read_instructions
from compress.pruning.settings import LoraRecoveryConfig
from compress.settings import Calibration
from compress.training import Batch

TOKENS = torch.tensor([[5, 17, 40, 3, 99, 250, 12, 8]])
PRUNE = {"kind": "mini_llm", "ratio": 0.3}
FAST = {"kind": "lora_recovery", "steps": 12, "batch": 4, "learning_rate": 0.01, "warmup": 2, "validate_every": 6}


@pytest.fixture
def longer(recipe):
    recipe["calibration"] |= {"samples": 16}
    return recipe


def unit(folder, index=-1):
    [record] = json.loads((folder / "compression.json").read_text())["passes"][index]["units"].values()
    return record


def held_out(record, row):
    return record["history"][row]["held_out"]["loss"]


@torch.no_grad()
def logits(model):
    return model(TOKENS).logits


@pytest.mark.parametrize("full", [False, True])
def test_training_lowers_the_held_out_loss(longer, tmp_path, full):
    longer["passes"] = [{**PRUNE, "mode": "global"}, {**FAST, "full": full}]
    folder = compress.run(longer, tmp_path / "model")
    record = unit(folder)
    assert held_out(record, -1) < held_out(record, 0)
    assert record["best"]["step"] == 12
    assert not (folder / "adapter").exists()
    assert torch.isfinite(logits(compress.load(folder))).all()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_an_adapter_beside_the_model_does_what_the_merged_one_does(longer, make_model, tmp_path, kind):
    longer["model"] = str(make_model(kind))
    prune = {**PRUNE, "ratio": 0.1}
    work = tmp_path / "work"
    merged = compress.run({**longer, "passes": [prune, FAST]}, tmp_path / "merged", workspace=work)
    beside = compress.run({**longer, "passes": [prune, {**FAST, "merge": False}]}, tmp_path / "beside", workspace=work)
    plain = compress.run({**longer, "passes": [prune]}, tmp_path / "plain", workspace=work)
    model = load_adapter(compress.load(beside), beside)
    assert torch.allclose(logits(model), logits(compress.load(merged)), atol=1e-3)
    with model.disable_adapter():
        assert torch.allclose(logits(model), logits(compress.load(plain)), atol=1e-5)
    assert "adapter/adapter_config.json" in json.loads((beside / "compression.json").read_text())["files"]


@pytest.mark.slow
def test_adapters_train_on_bit_planes_and_serve_every_width(longer, tmp_path):
    quantise = {"kind": "any_precision", "seed_bits": 2, "parent_bits": 4}
    longer["passes"] = [PRUNE, quantise, {**FAST, "merge": False, "dropout": 0.1}]
    folder = compress.run(longer, tmp_path / "model")
    record = unit(folder)
    assert held_out(record, -1) < held_out(record, 0)
    model = compress.load(folder)
    bare = logits(model)
    adapted = load_adapter(model, folder)
    assert not torch.allclose(logits(adapted), bare)
    compress.set_bits(adapted, 2)
    assert not torch.allclose(logits(adapted), bare)
    adapted.generate(input_ids=TOKENS, max_new_tokens=3, pad_token_id=0)


@pytest.mark.slow
def test_a_stopped_training_continues_to_the_same_bytes(longer, tmp_path, monkeypatch):
    longer["passes"] = [PRUNE, FAST]
    whole = compress.run(longer, tmp_path / "whole")

    def stop(what, done, total):
        if "held-out" in what and done == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress.run(longer, tmp_path / "again", report=stop)
    again = compress.run(longer, tmp_path / "again")
    assert (whole / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()


def test_only_answers_are_learned(tiny_llama, longer, tmp_path):
    rows = [
        {"instruction": "say fox", "input": "", "output": "the fox"},
        {"instruction": "x", "input": "y", "output": "z"},
    ]
    path = tmp_path / "alpaca.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows * 8))
    text = Calibration(text=str(path), column="output", samples=16, length=60)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    with pytest.raises(CompressError, match="answers begin within 60 tokens"):
        read_instructions(text, tokenizer)
    found = read_instructions(text.model_copy(update={"length": 400}), tokenizer)
    sample = found[0]
    assert tokenizer.decode(sample.tokens[sample.prompt :], skip_special_tokens=True) == "the fox"
    assert "### Instruction:\nsay fox" in tokenizer.decode(sample.tokens[: sample.prompt])
    assert "### Input:\ny" in tokenizer.decode(found[1].tokens)
    model = compress.load(tiny_llama)
    batch = Batch(sample.tokens[None], torch.ones(1, len(sample.tokens) - 1, dtype=torch.bool), [0])
    losses = -model(sample.tokens[None]).logits[0, :-1].log_softmax(-1).gather(1, sample.tokens[1:, None])[:, 0]
    expected = losses[sample.prompt - 1 :].mean() * len(losses)
    assert torch.allclose(answer_loss(found)(model, batch), expected, rtol=1e-4)


def test_the_preset_is_llm_pruners():
    config = LoraRecoveryConfig(preset="llm_pruner", rank=4)
    assert (config.rank, config.alpha, config.dropout, config.epochs, config.batch) == (4, 16.0, 0.05, 2, 64)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "adapters cannot be added to packed weights"),
        ({"full": True}, "full trains weights, but a pass before has quantised them"),
        ({"full": True, "merge": False}, "nothing is left to keep beside them"),
        ({"instructions": True}, "instructions needs text"),
    ],
)
def test_what_cannot_be_done_is_refused_before_any_work(longer, tmp_path, settings, message):
    longer["passes"] = [{"kind": "rtn", "bits": 4}, {**FAST, **settings}]
    with pytest.raises(CompressError, match=message):
        compress.run(longer, tmp_path / "model")
    assert not list(tmp_path.glob("*.work/*/*.safetensors"))
