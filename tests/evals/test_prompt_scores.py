"""What a text costs behind a prompt, by hand; and prompts on other models."""

import json
import math

import pytest
import torch

import compress
from compress.adapters import attach_prompts
from compress.errors import CompressError
from compress.evals import tables, transfer
from compress.evals.evaluate import Protocol, evaluate_text
from compress.evals.grids import script
from compress.evals.perplexity import Text, Window, context_length, score
from compress.evals.store import Results
from compress.evals.tasks import Tasks
from compress.evals.transfer import NONE, Place, common_length, main
from compress.loading import load_tokenizer

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
    assert common_length(prompts, str(prompted)) == 59
    with pytest.raises(CompressError, match="the longest prompt leaves room for 59"):
        common_length(prompts, str(prompted), 60)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "foxes.txt"
    path.write_text("the dog jumps over the fox. " * 30)
    return str(path)


def test_a_matrix_is_filled_once(prompted, text, tmp_path, monkeypatch):
    """Each entry is the score of that prompt on that model; a second run measures nothing."""
    places = [Place.parse(f"three={prompted}@3"), Place.parse(f"four={prompted}@4")]
    prompts = {NONE: None, "of 3": prompted / "soft_prompt" / "3bit"}
    arguments = (places, prompts, {"foxes": text}, Tasks(()), Protocol(length=40))
    rows = transfer.transfer(*arguments, Results(tmp_path / "results.jsonl"))
    found = tables.transfer(rows, list(prompts), ["three", "four"], "foxes", "loss").values
    for line, prompt in enumerate((False, prompts["of 3"])):
        alone = evaluate_text(str(prompted), text, [3, 4], Protocol(length=40), prompt=prompt)["bits"]
        assert found[line] == [alone["3"]["loss"], alone["4"]["loss"]]
    monkeypatch.setattr("compress.evals.evaluate.score", None)
    assert transfer.transfer(*arguments, Results(tmp_path / "results.jsonl")) == rows
    assert tables.transfer(rows, [NONE], ["five"], "foxes", "loss").values == [[None]]


@pytest.mark.slow
def test_tasks_are_rows_too(prompted, task_folder):
    prompts = {NONE: None, "of 3": prompted / "soft_prompt" / "3bit"}
    places = [Place.parse(f"three={prompted}@3")]
    rows = transfer.transfer(places, prompts, {}, Tasks(("animals",), task_folder), Protocol(), Results(None))
    assert all(0 <= row[0] <= 1 for row in tables.transfer(rows, list(prompts), ["three"], "animals", "acc").values)
    assert [row["items"] for row in rows] == [8, 8]


def test_answers_to_tasks_do_not_depend_on_the_batch(prompted):
    """lm-eval pads shorter questions on the left."""
    from lm_eval.api.instance import Instance

    from compress.evals.harness import Harness

    model = compress.load(prompted, bits=3, prompt=True, dtype=torch.float32)
    questions = ["the quick brown fox jumps over the lazy", "the dog", "fox and dog", "jumps over"]
    rules = {"until": ["<s>"], "max_gen_toks": 8}
    answers = []
    for batch in (1, 2, 4):
        asked = [Instance("generate_until", {}, (question, rules), place) for place, question in enumerate(questions)]
        answers.append(Harness(model, load_tokenizer(prompted), batch).generate_until(asked, disable_tqdm=True))
    assert answers[0] == answers[1] == answers[2]
    assert len(set(answers[0])) > 1


def test_the_command_line_of_transfer(prompted, text, tmp_path, monkeypatch, capsys):
    arguments = [tmp_path / "out", "--model", f"3={prompted}@3", "--prompt", f"own={prompted / 'soft_prompt' / '3bit'}"]
    monkeypatch.setattr("sys.argv", ["transfer", *map(str, arguments), "--text", text])
    with pytest.raises(SystemExit, match="0"):
        script.run(main)
    assert "| own |" in capsys.readouterr().out
    rows = json.loads((tmp_path / "out" / "transfer.json").read_text())
    assert [(row["prompt"], row["model"], row["text"]) for row in rows] == [
        ("none", "3", "foxes"),
        ("own", "3", "foxes"),
    ]
    assert (tmp_path / "out" / "transfer-foxes.svg").read_text().startswith("<?xml")
    monkeypatch.setattr("sys.argv", ["transfer", str(tmp_path / "out"), "--model", f"a={prompted}@x", "--text", text])
    with pytest.raises(SystemExit, match=r"error: model 'a=.*@x': write it as LABEL=DIR or LABEL=DIR@BITS"):
        script.run(main)
