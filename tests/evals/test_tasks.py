"""lm-eval in process: its figures are those of a plain loop, one load serves every width, nothing is measured twice."""

import csv
import json
import math
import re
import shutil
import subprocess
import sys

import pytest
import torch
from tokenizers import processors
from transformers import AutoTokenizer

import compress
from compress.errors import CompressError
from compress.evals import tasks as module
from compress.evals.evaluate import Protocol, evaluate_text
from compress.evals.store import Results
from compress.evals.tasks import Tasks, evaluate_tasks, tidy, write_lm_eval, write_table

lm_eval = pytest.importorskip("lm_eval")


def plain_log_likelihood(model, tokenizer, context, continuation, prompt=None):
    """log P(continuation | context), one sequence at a time: what follows the context's own tokens is the continuation."""
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    before = tokenizer(context)["input_ids"]
    after = tokenizer(context + continuation)["input_ids"][len(before) :]
    before = before or [tokenizer.eos_token_id]  # something must stand in front
    embedded = model.get_input_embeddings()(torch.tensor([before + after]))
    offset = 0
    if prompt is not None:
        embedded, offset = torch.cat([prompt[None], embedded], 1), len(prompt)
    with torch.no_grad():
        shares = model(inputs_embeds=embedded).logits[0].double().log_softmax(-1)
    return sum(float(shares[offset + len(before) - 1 + i, token]) for i, token in enumerate(after))


def plain_figures(model, tokenizer, items, prompt=None):
    """Answers and accuracies of multiple choice, by the definition."""
    answers, right, normed = [], [], []
    for item in items:
        pairs = [(item["query"], " " + choice) for choice in item["choices"]]
        scores = [plain_log_likelihood(model, tokenizer, *pair, prompt) for pair in pairs]
        answers.append(max(range(len(scores)), key=scores.__getitem__))
        right.append(answers[-1] == item["gold"])
        by_length = [score / len(choice) for score, choice in zip(scores, item["choices"], strict=True)]
        normed.append(by_length.index(max(by_length)) == item["gold"])
    return answers, sum(right) / len(items), sum(normed) / len(items)


def read_items(path, limit=None):
    return [json.loads(line) for line in path.read_text().splitlines()[:limit]]


@pytest.mark.slow
def test_every_width_equals_a_plain_loop_and_the_model_is_loaded_once(compressed, task_folder, monkeypatch):
    loads, load = [], compress.load

    def counted(*arguments, **settings):
        loads.append(arguments)
        return load(*arguments, **settings)

    monkeypatch.setattr(compress, "load", counted)
    found = evaluate_tasks(str(compressed), Tasks(("animals",), task_folder))
    assert list(found) == ["6", "5", "4", "3"]
    assert len(loads) == 1
    model, tokenizer = load(compressed, dtype=torch.float32), AutoTokenizer.from_pretrained(compressed)
    for width in (3, 6):
        compress.set_bits(model, width)
        row = found[str(width)]["animals"]
        answers, accuracy, normed = plain_figures(model, tokenizer, read_items(task_folder / "animals.jsonl"))
        assert row["answers"] == answers
        assert row["metrics"]["acc"] == pytest.approx(accuracy)
        assert row["metrics"]["acc_norm"] == pytest.approx(normed)
        assert (row["n"], row["truncated"]) == (8, 0)


@pytest.mark.slow
def test_log_likelihoods_with_a_soft_prompt_equal_a_plain_loop(compressed, soft_prompt):
    """Virtual tokens shift the logits and take their part of the context."""
    from lm_eval.api.instance import Instance
    from peft import PeftModel

    from compress.evals.harness import Harness

    model, tokenizer = compress.load(compressed, dtype=torch.float32), AutoTokenizer.from_pretrained(compressed)
    pairs = [("the quick", " brown fox"), ("the lazy dog", " sleeps"), ("", "and the fox"), ("the fox ", "jumps")]
    requests = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
    bare = Harness(model, tokenizer)
    assert bare.max_length == 64
    wanted = [plain_log_likelihood(model, tokenizer, *pair) for pair in pairs]
    assert [score for score, _ in bare.loglikelihood(requests)] == pytest.approx(wanted, abs=1e-4)
    prompted = PeftModel.from_pretrained(model, str(soft_prompt)).eval()
    prompt = prompted.prompt_encoder["default"].embedding.weight.detach()
    harness = Harness(prompted, tokenizer)
    assert (harness.virtual_tokens, harness.max_length) == (5, 59)
    shifted = [plain_log_likelihood(model, tokenizer, *pair, prompt) for pair in pairs]
    assert [score for score, _ in harness.loglikelihood(requests)] == pytest.approx(shifted, abs=1e-4)
    assert max(abs(a - b) for a, b in zip(wanted, shifted, strict=True)) > 0.01


@pytest.mark.slow
def test_tasks_with_and_without_the_soft_prompt(compressed, task_folder, soft_prompt):
    store = Results(None)
    for prompt in (False, soft_prompt):
        evaluate_tasks(str(compressed), Tasks(("animals",), task_folder), [4], store, prompt)
    rows = {row["prompt"]: row for row in store.rows("task")}
    name = f"prompt of {soft_prompt.parent.name}"
    assert set(rows) == {None, name}
    assert rows[None]["metrics"]["ece"] != rows[name]["metrics"]["ece"]


@pytest.mark.slow
def test_long_requests_with_a_prompt_are_cut_to_what_fits(compressed, soft_prompt, write_task, tmp_path):
    """64 positions, 5 of them virtual: a longer request is cut on the left and counted."""
    items = [{"query": "the fox sleeps. " * 20, "choices": ["fox", "dog"], "gold": 0}] * 2
    write_task(tmp_path, "long", items)
    row = evaluate_tasks(str(compressed), Tasks(("long",), tmp_path), [4], prompt=soft_prompt)["4"]["long"]
    assert row["truncated"] == 4


@pytest.mark.slow
def test_a_stopped_evaluation_continues(compressed, task_folder, tmp_path, monkeypatch):
    """Stopped after one of four (width, task) pairs, three are left; done once more, none."""
    path, wanted = tmp_path / "results.jsonl", Tasks(("animals", "verbs"), task_folder)
    from compress.evals import harness

    run, measured = harness.run_task, []

    def stopping(model, task, *settings):
        if measured:
            raise KeyboardInterrupt
        measured.append(task)
        return run(model, task, *settings)

    monkeypatch.setattr(harness, "run_task", stopping)
    with pytest.raises(KeyboardInterrupt):
        evaluate_tasks(str(compressed), wanted, [3, 5], Results(path))
    with path.open("a") as file:
        file.write('{"kind": "task", "na')  # what a kill in the middle of a line leaves
    monkeypatch.setattr(harness, "run_task", lambda *settings: measured.append(settings[1]) or run(*settings))
    found = evaluate_tasks(str(compressed), wanted, [3, 5], Results(path))
    assert len(measured) == 4
    assert evaluate_tasks(str(compressed), wanted, [3, 5], Results(path)) == found
    assert len(measured) == 4


@pytest.mark.slow
def test_other_items_in_the_folder_are_measured_anew(compressed, write_task, tmp_path):
    items = [{"query": "the", "choices": ["fox", "dog"], "gold": 0}] * 2
    store = Results(None)
    for count in (2, 1):
        write_task(tmp_path, "changing", items[:count])
        found = evaluate_tasks(str(compressed), Tasks(("changing",), tmp_path), [3], store)
        assert found["3"]["changing"]["n"] == count
    assert len(store.rows("task")) == 2


@pytest.mark.slow
def test_lm_evals_own_schema_and_the_tidy_table(compressed, task_folder, tmp_path):
    found = evaluate_tasks(str(compressed), Tasks(("animals", "verbs"), task_folder, limit=4), [3, 4])
    paths = write_lm_eval(found, tmp_path / "json")
    assert [path.name for path in paths] == ["results_4bit.json", "results_3bit.json"]
    whole = json.loads(paths[0].read_text())
    assert {"results", "configs", "versions", "n-shot", "n-samples", "higher_is_better", "config"} <= whole.keys()
    assert set(whole["results"]) == set(whole["configs"]) == {"animals", "verbs"}
    assert whole["results"]["animals"]["acc,none"] == found["4"]["animals"]["metrics"]["acc"]
    write_table(tidy(found), tmp_path / "table.csv")
    with (tmp_path / "table.csv").open() as file:
        records = list(csv.DictReader(file))
    assert len(records) == 2 * 2 * 3  # widths, tasks; acc, acc_norm and ece
    assert {"model", "width", "prompt", "task", "metric", "value", "stderr", "n"} == records[0].keys()
    write_table(tidy(found), tmp_path / "table.jsonl")
    assert len((tmp_path / "table.jsonl").read_text().splitlines()) == len(records)


@pytest.mark.slow
def test_a_dense_model_has_one_width(tiny_llama, task_folder):
    assert list(evaluate_tasks(str(tiny_llama), Tasks(("animals",), task_folder, limit=2))) == ["dense"]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (Tasks(("animal",), "{folder}"), "there is no task 'animal'. Did you mean 'animals'?"),
        (Tasks(("animals",), "nowhere"), "--include nowhere: there is no such folder"),
    ],
)
def test_mistakes(compressed, task_folder, wanted, message, monkeypatch):
    from pathlib import Path

    from lm_eval import tasks as theirs

    index = theirs.TaskManager  # without its own tasks, which take seconds to list
    monkeypatch.setattr(
        theirs, "TaskManager", lambda include_path, **_: index(include_path=include_path, include_defaults=False)
    )
    include = task_folder if wanted.include == "{folder}" else Path(wanted.include)
    with pytest.raises(CompressError, match=message.replace("?", r"\?")):
        evaluate_tasks(str(compressed), Tasks(wanted.names, include))


def test_an_answer_beyond_the_context_is_one_sentence(compressed, write_task, tmp_path):
    write_task(tmp_path, "endless", [{"query": "the", "choices": ["fox " * 100, "dog"], "gold": 0}])
    with pytest.raises(CompressError, match=r"an answer has \d+ tokens, but the context holds 64"):
        evaluate_tasks(str(compressed), Tasks(("endless",), tmp_path), [3])


def test_data_that_is_not_there_is_one_sentence(compressed, write_task, tmp_path):
    write_task(tmp_path, "gone", [], dataset_kwargs={"data_files": {"test": str(tmp_path / "gone.json")}})
    with pytest.raises(CompressError, match="task gone: cannot be run"):
        evaluate_tasks(str(compressed), Tasks(("gone",), tmp_path), [3])


def test_without_lm_eval_the_extra_is_named(compressed, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(CompressError, match=r"pip install 'compress-llm\[eval\]'"):
        module.task_manager(Tasks(("animals",)))


def rolling_task(write_task, folder, documents):
    """A task of lm-eval's that scores whole documents, and the same documents as a text file."""
    write_task(
        folder,
        "whole",
        [{"page": document} for document in documents],
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{page}}",
        doc_to_choice=None,
        metric_list=[{"metric": "bits_per_byte"}, {"metric": "word_perplexity"}],
    )
    (folder / "whole.txt").write_text("|".join(documents))
    return Tasks(("whole",), folder), str(folder / "whole.txt")


DOCUMENTS = ["the quick brown fox jumps", "and the <s> dog sleeps on, " * 12 + "ends", "<s>lazy", "the"]


@pytest.mark.parametrize("adds", [None, "<s> $A", "<s> $A <s>"])
def test_a_rolling_task_gives_the_number_that_the_text_gives(tiny_llama, write_task, tmp_path, adds):
    """Whether the tokenizer adds BOS or not, in documents longer than the context too, and where they spell special tokens."""
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    if adds:
        engine = tokenizer.backend_tokenizer
        engine.post_processor = processors.TemplateProcessing(single=adds, special_tokens=[("<s>", 0)])
        tokenizer.save_pretrained(model)
    tasks, text = rolling_task(write_task, tmp_path, DOCUMENTS)
    task = evaluate_tasks(str(model), tasks)["dense"]["whole"]["metrics"]
    score = evaluate_text(str(model), text, protocol=Protocol(separator="|"))["bits"]["dense"]
    assert task["bits_per_byte"] == pytest.approx(score["bits_per_byte"], abs=1e-6)
    words = sum(len(document.split()) for document in DOCUMENTS)
    assert math.log(task["word_perplexity"]) == pytest.approx(score["loss"] * score["tokens"] / words, abs=1e-5)


def test_a_rolling_task_behind_a_prompt_too(prompted, write_task, tmp_path):
    tasks, text = rolling_task(write_task, tmp_path, DOCUMENTS)
    options = {"bits": [3], "prompt": True}
    task = evaluate_tasks(str(prompted), tasks, **options)["3"]["whole"]["metrics"]
    score = evaluate_text(str(prompted), text, protocol=Protocol(separator="|"), **options)["bits"]["3"]
    assert task["bits_per_byte"] == pytest.approx(score["bits_per_byte"], abs=1e-6)


def test_without_bos_the_end_of_text_stands_before_a_rolling_document(tiny_llama, write_task, tmp_path):
    """As with lm-eval, whose metrics count the first token's words and bytes."""
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    with_bos = evaluate_tasks(str(model), rolling_task(write_task, tmp_path, ["the dog", ""])[0])
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.bos_token = None
    tokenizer.save_pretrained(model)
    found = evaluate_tasks(str(model), rolling_task(write_task, tmp_path, ["the dog", ""])[0])
    assert found["dense"]["whole"]["metrics"] == with_bos["dense"]["whole"]["metrics"]  # its EOS is the same token
    assert found["dense"]["whole"]["documents_begin_with"] == tokenizer.eos_token


@pytest.mark.slow
def test_tasks_tell_of_progress_in_a_log_and_ask_no_git(tiny_llama, task_folder, tmp_path):
    """In a fresh process, in a folder that is no repository."""
    command = [sys.executable, "-m", "compress.cli", "eval", str(tiny_llama), "--tasks", "animals", "--include"]
    found = subprocess.run([*command, str(task_folder)], cwd=tmp_path, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert re.match(r"animals at dense \(\d+ of 24\)\n", found.stderr)
    assert "git" not in found.stderr


REAL = {
    "piqa": {},
    "arc_easy": {},
    "openbook_qa": {},
    "winogrande": {"doc_to_text": "gold", "doc_to_choice": "{{context_options}}", "doc_to_target": "continuation"},
}


@pytest.mark.slow
def test_four_published_tasks_equal_a_plain_loop(real, write_task, tmp_path):
    """On a trained model; the first 25 items of each (winogrande's context differs, its continuation does not)."""
    folder = str(real / "stories260K")
    for name, changes in REAL.items():
        write_task(tmp_path, name, read_items(real / "tasks" / f"{name}.jsonl", 25), **changes)
    found = evaluate_tasks(folder, Tasks(tuple(REAL), tmp_path))["dense"]
    model, tokenizer = compress.load(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)
    for name in REAL:
        items = read_items(real / "tasks" / f"{name}.jsonl", 25)
        if name == "winogrande":
            scores = [
                [
                    plain_log_likelihood(model, tokenizer, before, " " + item["continuation"])
                    for before in item["context_options"]
                ]
                for item in items
            ]
            answers = [max(range(len(row)), key=row.__getitem__) for row in scores]
            accuracy = sum(a == item["gold"] for a, item in zip(answers, items, strict=True)) / len(items)
        else:
            answers, accuracy, normed = plain_figures(model, tokenizer, items)
            assert found[name]["metrics"]["acc_norm"] == pytest.approx(normed)
        assert found[name]["answers"] == answers
        assert found[name]["metrics"]["acc"] == pytest.approx(accuracy)
