"""Built-in tasks: the same items every time, from held-out modules alone, with one right choice among four."""

import json
from collections import Counter

import pytest
import yaml

from compress.evals import cloze
from compress.texts import CALIBRATION, HELDOUT, read_modules, training_files


@pytest.fixture(scope="module")
def held_out():
    return [source.expandtabs() for source in read_modules(HELDOUT).values()]


@pytest.mark.parametrize("task", cloze.MAKERS)
def test_what_follows_in_the_file_is_right_and_the_rest_is_not(task, held_out):
    items = cloze.builtin_items(task)
    assert len(items) == 200
    assert items == cloze.builtin_items(task)
    for item in items:
        assert len(set(item["choices"])) == cloze.CHOICES
        follows = [any(item["query"] + choice in source for source in held_out) for choice in item["choices"]]
        assert follows[item["gold"]]
    assert all(30 < count < 70 for count in Counter(item["gold"] for item in items).values())


def test_items_of_a_small_module_by_hand():
    import random

    body = [f"    value_{letter} = function_{letter}(argument)" for letter in "abcdefghij"]
    source = "def first(argument):\n" + "\n".join(body) + "\n"
    items = cloze.items_of(cloze.line_items(source), random.Random(0))
    assert len(items) == 5  # lines f to j: six lines before them, and rivals among the first ones
    assert items[0]["query"].endswith("value_e = function_e(argument)\n    ")
    assert items[0]["choices"][items[0]["gold"]] == "value_f = function_f(argument)"
    names = cloze.items_of(cloze.name_items(source), random.Random(0))
    assert {item["choices"][item["gold"]] for item in names} == {"argument"}


@pytest.mark.slow
def test_held_out_modules_are_not_trained_on():
    assert not {path.stem for path in training_files()} & set(HELDOUT)
    assert not set(CALIBRATION) & set(HELDOUT)


@pytest.mark.slow
def test_the_task_folder_is_lm_evals(tmp_path):
    """What the script writes runs as an ordinary task folder, and gives what the tasks in memory give."""
    pytest.importorskip("lm_eval")
    from compress.evals.tasks import Tasks, evaluate_tasks
    from compress.source import model_folder

    paths = cloze.write(tmp_path)
    assert [path.name for path in paths][:2] == ["builtin_line.jsonl", "builtin_line.yaml"]
    settings = yaml.safe_load(paths[1].read_text())
    assert len(paths[0].read_text().splitlines()) == 200
    assert json.loads(paths[0].read_text().splitlines()[0]) == cloze.builtin_items("builtin_line")[0]
    paths[1].write_text(yaml.safe_dump({**settings, "task": "written"}))
    for path in paths[2:]:
        path.unlink()
    model = str(model_folder("builtin"))
    mine = evaluate_tasks(model, Tasks(("builtin_line",), limit=5))["dense"]["builtin_line"]
    written = evaluate_tasks(model, Tasks(("written",), tmp_path, limit=5))["dense"]["written"]
    assert mine["metrics"] == written["metrics"]
    assert mine["answers"] == written["answers"]
