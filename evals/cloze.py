"""Make multiple-choice tasks in the built-in model's own domain: ``python -m compress.evals.cloze FOLDER``.

Items are cut from held-out modules of the running Python's standard library. What stands in the file is right; the three
distractors are other lines and names of the same file, so that knowing Python is not enough. The same Python gives the same
items, in memory for ``compress eval DIR --tasks builtin_line,builtin_name``, in a folder for lm-eval's ``--include_path``.
"""

from __future__ import annotations

import io
import json
import keyword
import random
import tokenize
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import typer
import yaml

from compress.texts import HELDOUT, read_modules
from compress.workspace import digest

Item = dict[str, Any]  # ``query`` (text before), ``choices`` (four texts), ``gold`` (index of the right one)
CHOICES = 4
_CONTEXT_LINES = 6
_ITEMS = 200
Question = tuple[str, str, set[str]]  # the text before, what is asked for, and its rivals


def line_items(source: str) -> Iterator[Question]:
    """Ask for every line of code in a module; rivals are lines of code elsewhere, indented alike and of like length."""
    lines = source.splitlines()
    code = {row: _split(lines[row]) for row in _rows_of_code(source)}
    for place, (wanted, indent) in code.items():
        if place < _CONTEXT_LINES or not 12 <= len(wanted) <= 72:
            continue
        before = lines[place - _CONTEXT_LINES : place]
        rivals = {
            text
            for text, depth in code.values()
            if depth == indent and abs(len(text) - len(wanted)) <= len(wanted) // 4 and text != wanted
        } - {_split(line)[0] for line in before}
        yield "\n".join(before) + "\n" + " " * indent, wanted, rivals


def _split(line: str) -> tuple[str, int]:
    text = line.strip()
    return text, len(line) - len(line.lstrip())


def _rows_of_code(source: str) -> list[int]:
    """Return the rows, from 0, where a logical line begins with a word."""
    rows, fresh = [], True
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if fresh and token.type == tokenize.NAME:
            rows.append(token.start[0] - 1)
        if token.type not in (tokenize.INDENT, tokenize.DEDENT, tokenize.NL, tokenize.COMMENT):
            fresh = token.type == tokenize.NEWLINE
    return rows


def name_items(source: str) -> Iterator[Question]:
    """Ask for every name of a module that stands in the lines before too; rivals are other names of those lines."""
    lines = source.splitlines()
    names: list[tuple[int, int, str]] = [
        (token.start[0] - 1, token.start[1], token.string)
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.NAME and len(token.string) >= 3 and not keyword.iskeyword(token.string)
    ]
    inside: dict[int, set[str]] = {}
    for row, _, name in names:
        inside.setdefault(row, set()).add(name)
    for row, column, wanted in names:
        near = set().union(*(inside.get(row - back, ()) for back in range(1, _CONTEXT_LINES + 1)))
        if row >= _CONTEXT_LINES and lines[row][:column].strip() and wanted in near:
            query = "\n".join([*lines[row - _CONTEXT_LINES : row], lines[row][:column]])
            yield query, wanted, {n for n in near if not wanted.startswith(n) and not n.startswith(wanted)}


def items_of(questions: Iterable[Question], generator: random.Random) -> list[Item]:
    """Make items of the questions that have enough rivals, drawing rivals and the order of choices."""
    items = []
    for query, right, rivals in questions:
        if len(rivals) >= CHOICES - 1:
            choices = [right, *generator.sample(sorted(rivals), CHOICES - 1)]
            generator.shuffle(choices)
            items.append({"query": query, "choices": choices, "gold": choices.index(right)})
    return items


MAKERS: Mapping[str, Callable[[str], Iterator[Question]]] = {"builtin_line": line_items, "builtin_name": name_items}


def builtin_items(task: str, count: int = _ITEMS) -> list[Item]:
    """Return the items of a built-in task, drawn evenly from all held-out modules and always the same."""
    generator = random.Random(0)
    sources = [source.expandtabs() for source in read_modules(HELDOUT).values()]
    found = [item for source in sources for item in items_of(MAKERS[task](source), generator)]
    return generator.sample(found, min(count, len(found)))


def task_settings(task: str) -> dict[str, Any]:
    """Describe the task in lm-eval's terms, without its data. Names are too short for a metric by length."""
    metrics = ("acc", "acc_norm") if task == "builtin_line" else ("acc",)
    return {
        "task": task,
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{query}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "target_delimiter": "",
        "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in metrics],
        "metadata": {"version": 1.0},
    }


def fingerprint(task: str) -> str:
    """Return the digest of a task's items, which depend on the running Python's library."""
    return digest(builtin_items(task))


def write(folder: Path) -> list[Path]:
    """Write both tasks as YAML and JSON lines; return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for task in MAKERS:
        data, settings = folder / f"{task}.jsonl", folder / f"{task}.yaml"
        data.write_text("".join(json.dumps(item) + "\n" for item in builtin_items(task)), encoding="utf-8")
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data.resolve())}}}
        settings.write_text(yaml.safe_dump({**task_settings(task), **source}, sort_keys=False), encoding="utf-8")
        written += [data, settings]
    return written


def main(folder: Path) -> None:
    """Write the task folder and say what is in it."""
    for path in write(folder):
        print(path)
    for task in MAKERS:
        print(f"{task}: {len(builtin_items(task))} items, sha256 {fingerprint(task)}")


if __name__ == "__main__":
    typer.run(main)
