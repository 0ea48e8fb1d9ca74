"""What a text costs behind a prompt, by hand; and prompts on other models."""

import json
import math

import pytest
import torch

import compress
from compress.adapters import attach_prompts
from compress.errors import CompressError
from compress.evals.experiments import Rows
from compress.evals.perplexity import Text, Window, context_length, score
from compress.evals.plots import heat_map
from compress.evals.tasks import Tasks
from compress.evals.transfer import (
    NONE,
    Models,
    Place,
    common_length,
    fill,
    fill_tasks,
    main,
    markdown,
    matrix,
)

WINDOWS = [Window(list(range(1, 20)), 18), Window(list(range(30, 42)), 4), Window([5, 6], 1)]


@torch.no_grad()
def by_hand(model, prompt):
    """Summed loss of the scored tokens, one forward pass per window, no padding."""
    total = 0.0
    table = model.get_input_embeddings()
    for window in WINDOWS:
        tokens = torch.tensor(window.tokens)
        logs = model(inputs_embeds=torch.cat([prompt, table(tokens)])[None]).logits[0].log_softmax(-1)
        for place in range(len(tokens) - window.scored, len(tokens)):
            total -= float(logs[len(prompt) + place - 1, tokens[place]])
    return total


def test_only_text_is_scored(prompted):
    """Mean over the 23 scored tokens; the diluted form counts 5 places of each of the 3 windows too."""
    model = compress.load(prompted, bits=3, prompt=True, dtype=torch.float32)
    prompt = model.prompt_encoder["3bit"].embedding.weight.detach()
    total = by_hand(model.get_base_model(), prompt)
    found = score(model, Text(WINDOWS, 100))
    assert found.loss == pytest.approx(total / 23, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(total / 23), rel=1e-5)
    assert found.diluted_perplexity == pytest.approx(math.exp(total / (23 + 3 * 5)), rel=1e-5)
    assert found.json()["virtual"] == 15
    assert score(model, Text(WINDOWS, 100), batch_tokens=1).loss == pytest.approx(found.loss, rel=1e-5)


def test_without_a_prompt_nothing_is_diluted(prompted):
    found = score(compress.load(prompted, bits=3, dtype=torch.float32), Text(WINDOWS, 100))
    assert found.diluted_perplexity == pytest.approx(found.perplexity)
    assert not {"virtual", "diluted_perplexity"} & found.json().keys()


def test_windows_make_room(prompted):
    model = compress.load(prompted, bits=3)
    assert (context_length(model), context_length(attach_prompts(model, prompted))) == (64, 59)
    prompts = {NONE: None, "own": prompted / "soft_prompt"}
    assert common_length(prompts, model) == 59
    with pytest.raises(CompressError, match="the longest prompt leaves room for 59"):
        common_length(prompts, model, 60)


def test_a_matrix_is_filled_once(prompted, tmp_path):
    """Each entry is the score of that prompt on that model; a second run measures nothing."""
    places = [Place.parse(f"three={prompted}@3"), Place.parse(f"four={prompted}@4")]
    prompts = {NONE: None, "of 3": prompted / "soft_prompt" / "3bit"}
    fill(Rows(tmp_path / "rows.json"), Models(), places, prompts, {"text": Text(WINDOWS, 100)})
    rows = Rows(tmp_path / "rows.json")
    fill(rows, None, places, prompts, {"text": None})
    found = matrix(rows.rows, list(prompts), ["three", "four"], "text", "loss")
    for column, bits in enumerate((3, 4)):
        model = compress.load(prompted, bits=bits, dtype=torch.float32)
        assert found[0][column] == score(model, Text(WINDOWS, 100)).loss
        other = attach_prompts(model, prompted / "soft_prompt" / "3bit")
        assert found[1][column] == score(other, Text(WINDOWS, 100)).loss
    heat_map(found, list(prompts), ["three", "four"], "loss", tmp_path / "map.svg")
    assert (tmp_path / "map.svg").read_text().startswith("<?xml")
    assert markdown([[1.23456, None]], ["a"], ["x", "y"], "") == "|  | x | y |\n|---|---:|---:|\n| a | 1.235 | – |\n"


def test_tasks_are_rows_too(prompted, task_folder, tmp_path):
    rows = Rows(tmp_path / "rows.json")
    prompts = {NONE: None, "of 3": prompted / "soft_prompt" / "3bit"}
    fill_tasks(rows, [Place.parse(f"three={prompted}@3")], prompts, Tasks(("animals",), task_folder))
    found = matrix(rows.rows, list(prompts), ["three"], "animals", "acc")
    assert all(0 <= row[0] <= 1 for row in found)
    assert [row["items"] for row in rows.rows] == [8, 8]


def test_the_command_line_of_transfer(prompted, tmp_path, monkeypatch, capsys):
    text = tmp_path / "other.txt"
    text.write_text("the dog jumps over the fox. " * 30)
    arguments = [tmp_path / "out", "--model", f"3={prompted}@3", "--prompt", f"own={prompted / 'soft_prompt' / '3bit'}"]
    monkeypatch.setattr("sys.argv", ["transfer", *map(str, arguments), "--text", f"foxes={text}"])
    main()
    assert "| own |" in capsys.readouterr().out
    rows = json.loads((tmp_path / "out" / "transfer.json").read_text())
    assert [(row["prompt"], row["model"], row["text"]) for row in rows] == [
        ("none", "3", "foxes"),
        ("own", "3", "foxes"),
    ]
    assert (tmp_path / "out" / "transfer-foxes.svg").exists()
