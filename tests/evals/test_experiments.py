"""Experiments of the clone, on tiny models: LoRA beside prompts, what scores know, and rotations."""

import itertools
import math
import sys

import pytest
import torch

import compress
from compress.errors import CompressError
from compress.evals.evaluate import Protocol, evaluate_text
from compress.evals.experiments import estimators, prompts, rotated
from compress.evals.grids import script
from compress.pruning.settings import MiniLlmConfig
from compress.source import make_context, open_source

TEXT = "the dog jumps over the fox. the fox sleeps. " * 5


def run(monkeypatch, main, *arguments):
    monkeypatch.setattr(sys, "argv", ["experiment", *map(str, arguments)])
    with pytest.raises(SystemExit, match="0"):
        script.run(main)


def rows_of(lines, header):
    """Cells of a Markdown table by the name of the row."""
    after = lines[lines.index(header) + 2 :]
    rows = [line.strip("| ").split(" | ") for line in itertools.takewhile(bool, after)]
    return {name: cells for name, *cells in rows}


def test_lora_has_as_many_trained_numbers(tiny_llama):
    """Of q_proj 96 per rank and block, k_proj 72, v_proj 72, …: three blocks."""
    context = make_context(open_source(str(tiny_llama)), torch.device("cpu"), 0)
    assert prompts.lora_of(context, 96 * 3) == (["q_proj"], 1)
    assert prompts.lora_of(context, 2 * (96 + 72 + 72) * 3) == (["q_proj", "k_proj", "v_proj"], 2)


@pytest.mark.slow
def test_prompts_beside_lora_and_beside_each_other(tiny_llama, text_file, tmp_path, monkeypatch, capsys):
    (tmp_path / "valid.txt").write_text(TEXT)
    tiny = [
        "calibration.samples=4",
        "calibration.length=24",
        "protocol.length=40",
        "define.steps=2",
        "define.validate=2",
    ]
    tiny += ["define.prompt.tokens=3", "define.prompt.held_out=2", "define.prompt.batch=2"]
    tiny += ["define.prompt.text.samples=4", "define.prompt.text.length=24"]
    arguments = [tmp_path / "out", "--model", tiny_llama, "--calibration", text_file, "--text", tmp_path / "valid.txt"]
    arguments += [part for item in tiny for part in ("--set", item)]
    arguments += ["--only", "level=dense", "--only", "level=3 bits"]
    arguments += ["--only", "row=no prompt", "--only", "row=its own prompt"]
    run(monkeypatch, prompts.main, *arguments)
    found = (tmp_path / "out" / "tables.md").read_text().splitlines()
    assert (tmp_path / "out" / "transfer.svg").exists()
    perplexities, closed = rows_of(found, "| perplexity | dense | 3 bits |"), rows_of(found, "| gap closed | 3 bits |")
    dense, packed = map(float, perplexities["no prompt"])
    measured = evaluate_text(str(tiny_llama), str(tmp_path / "valid.txt"), None, Protocol(length=40))["bits"]["dense"]
    assert dense == pytest.approx(measured["perplexity"], abs=1e-4)
    for row in ("its own prompt", "the dense model's prompt", "LoRA"):
        assert all(float(cell) < without for cell, without in zip(perplexities[row], (dense, packed), strict=True))
        share = math.log(packed / float(perplexities[row][1])) / math.log(packed / dense)
        assert float(closed[row][0].rstrip("%")) / 100 == pytest.approx(share, abs=0.01)
    for name in ("grids.grid.measure", "grids.grid.make", "experiments.prompts.train", "evaluate.score"):
        monkeypatch.setattr(f"compress.evals.{name}", None)  # all of it is known

    def kept(run, cell):
        name = f"{cell.place['row']} {cell.place['level']}".replace(" ", "-")
        return next((run.out / "models").glob(f"{name}-*"), tiny_llama)

    monkeypatch.setattr(prompts.GridRun, "checkpoint", kept)
    run(monkeypatch, prompts.main, *arguments)


def test_a_score_ranks_as_itself_and_the_output_score_ranks_all_channels(tiny_llama, text_file):
    source = open_source(str(tiny_llama))
    context = make_context(source, torch.device("cpu"), 0)
    samples = [torch.arange(1, 20), torch.arange(30, 60)]
    exact = estimators.channel_scores(MiniLlmConfig(score="taylor"), source, context, samples)
    assert [len(scores) for scores in exact] == [100, 100, 100]
    assert estimators.rank_correlation(exact[0], exact[0]) == pytest.approx(1)
    assert estimators.rank_correlation(exact[0], -exact[0]) == pytest.approx(-1)
    [output, *_] = estimators.channel_scores(MiniLlmConfig(score="output"), source, context, samples)
    assert len(output.unique()) == 100


def test_forward_passes_are_counted():
    counted = {
        "1": MiniLlmConfig(score="output"),
        "0": MiniLlmConfig(score="random"),
        "21": MiniLlmConfig(score="fms", draws=10),
        "40": MiniLlmConfig(score="gates", estimator="spsa", draws=2, step=0.01),
        "2": MiniLlmConfig(score="gates"),
        "backward": MiniLlmConfig(score="fms", estimator="backprop"),
    }
    assert {number: estimators.forwards(config, 5) for number, config in counted.items()} == {n: n for n in counted}


@pytest.mark.parametrize(("kind", "changes"), [("llama", {}), ("qwen2", {"tie_word_embeddings": True})])
def test_a_rotated_model_says_the_same_with_other_weights(kind, changes, make_model, tmp_path, monkeypatch):
    folder = make_model(kind, **changes)
    run(monkeypatch, rotated.main, folder, tmp_path / "out")
    before, after = compress.load(folder), compress.load(tmp_path / "out")
    tokens = torch.arange(40)[None]
    torch.testing.assert_close(after(tokens).logits, before(tokens).logits, rtol=1e-4, atol=1e-4)
    changed = dict(before.named_parameters())
    for name, weight in after.model.named_parameters():
        if "proj.weight" in name and "norm" not in name:
            assert not torch.allclose(weight, changed[f"model.{name}"], atol=1e-3), name


@pytest.mark.parametrize("kind", ["gpt2", "gemma2"])
def test_what_is_not_built_as_a_llama_is_not_rotated(kind, make_model, tmp_path):
    with pytest.raises(CompressError, match=f"type '{kind}' is not rotated, only one built as a Llama"):
        rotated.rotated(str(make_model(kind)))
