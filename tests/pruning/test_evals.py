"""The evaluation in memory does what recipes do, continues where it stopped, and never chooses on the measured text."""

import json
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

import compress
from compress.errors import CompressError
from compress.evals import pruning
from compress.evals.evaluate import Protocol
from compress.evals.experiments import Rows
from compress.evals.pruning import Bench, markdown, settings_of, table
from compress.recipe import Calibration
from compress.settings import Calibration

TEXT = "the dog jumps over the fox. the fox sleeps. " * 30


@pytest.fixture
def bench(recipe, tmp_path):
    (tmp_path / "valid.txt").write_text(TEXT)
    calibration = Calibration(**recipe["calibration"])
    return Bench(recipe["model"], calibration, 4, str(tmp_path / "valid.txt"), Protocol())


@pytest.mark.parametrize(
    "settings",
    [
        settings_of("wanda", 0.6, "owl"),
        settings_of("sparsegpt", 0.5, "mrp", refresh=15, outlier=3.0),
        settings_of("magnitude", 0.5, "random"),
        settings_of("wanda", 0.5, "hessian"),
    ],
)
def test_the_same_weights_as_a_recipe(bench, recipe, tmp_path, settings):
    """The bench draws more samples and calibrates on the first: so does this recipe, by name."""
    text = tmp_path / "train.jsonl"
    tokenizer = bench_tokenizer(recipe)
    text.write_text("".join(json.dumps({"text": tokenizer.decode(t[1:])}) + "\n" for t in bench.samples.tokens))
    bench.prune(settings)
    recipe |= {"calibration": {"text": str(text), "samples": 4, "length": 32}, "passes": [settings]}
    expected = AutoModelForCausalLM.from_pretrained(compress.run(recipe, tmp_path / "model"))
    for name, tensor in bench.model.state_dict().items():
        assert torch.equal(tensor, expected.state_dict()[name]), name


def bench_tokenizer(recipe):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(recipe["model"])


def test_the_table_continues_where_it_stopped(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(pruning, "TRIALS", {"owl": (0.05, 0.2), "mrp": (0.1, 0.2)})
    rows = Rows(tmp_path / "rows.json")
    table(bench, rows, ["wanda"], [0.5])
    made = [row["label"] for row in rows.rows if "label" in row]
    assert made == ["uniform", "random", "random", "random", "owl", "mrp", "mrp, defaults", "mrp, refreshed"]
    kept = (tmp_path / "rows.json").read_text()
    monkeypatch.setattr(bench, "prune", None)  # nothing is pruned again
    table(bench, Rows(tmp_path / "rows.json"), ["wanda"], [0.5])
    assert (tmp_path / "rows.json").read_text() == kept
    text = markdown([row for row in rows.rows if "perplexity" in row], "perplexity")
    assert "| wanda | 50% |" in text
    assert "(" in next(line for line in text.splitlines() if line.startswith("| random"))


def test_rows_of_other_settings_are_not_mixed(tmp_path):
    Rows(tmp_path / "rows.json", {"model": "a", "scores": ("x", 1)}).get({"label": "dense"}, lambda: {"loss": 1.0})
    again = Rows(tmp_path / "rows.json", {"model": "a", "scores": ["x", 1]})
    assert again.get({"label": "dense"}, dict)["loss"] == 1.0
    with pytest.raises(CompressError, match="has rows made with model 'a', not 'b'"):
        Rows(tmp_path / "rows.json", {"model": "b", "scores": ("x", 1)})
    (tmp_path / "rows.json").write_text("[{")
    with pytest.raises(CompressError, match="delete it to begin again"):
        Rows(tmp_path / "rows.json")


def test_settings_are_chosen_on_calibration_text(bench, tmp_path, monkeypatch):
    """Trials look at samples no pass has seen; the measured text is not touched."""
    monkeypatch.setattr(bench, "measure", None)
    rows = Rows(tmp_path / "rows.json")
    chosen = pruning.tuned_spread(bench, rows, "wanda", 0.5, "owl")
    losses = {row["spread"]: row["loss"] for row in rows.rows}
    assert losses.keys() == set(pruning.TRIALS["owl"])
    assert losses[chosen] == min(losses.values())
    seen = {tuple(tokens.tolist()) for tokens in bench.samples.tokens}
    assert not seen & {tuple(window.tokens) for window in bench.selection.windows}


def test_the_command(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pruning, "TRIALS", {"atp": (0.1,)})
    (tmp_path / "valid.txt").write_text(TEXT)
    arguments = ["--model", recipe["model"], "--calibration", recipe["calibration"]["text"], "--text"]
    arguments += [str(tmp_path / "valid.txt"), "--samples", "2", "--select", "2", "--length", "32"]
    arguments += ["--scores", "magnitude", "--sparsities", "0.5"]
    monkeypatch.setattr(sys, "argv", ["pruning", str(tmp_path / "out"), *arguments])
    pruning.main()
    assert "| atp |" in capsys.readouterr().out
    assert "nor_after" in (tmp_path / "out" / "tables.md").read_text()
