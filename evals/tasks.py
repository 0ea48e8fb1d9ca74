"""Run lm-eval (``compress eval --tasks``) in process, at several numbers of bits from one load."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, redirect_stderr
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from compress.errors import CompressError, did_you_mean, first_line
from compress.evals import cloze
from compress.evals.agreement import calibration_error
from compress.evals.evaluate import OpenModel
from compress.evals.store import Results, versions
from compress.weights import sha256_of
from compress.workspace import digest

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

Row = Mapping[str, Any]
Rows = dict[str, dict[str, dict[str, Any]]]  # number of bits -> task -> row of the store


@dataclass(frozen=True)
class Tasks:
    """Say what to run."""

    names: tuple[str, ...] = ()  # lm-eval's, from ``include``, ``builtin_line`` and ``builtin_name``
    include: Path | None = None  # folder of task YAML files, lm-eval's to interpret, Python functions among it
    limit: int | None = None  # items of each task, from the first; all if None
    fewshot: int | None = None  # examples in front; as the task says if None


def evaluate_tasks(
    folder: str,
    tasks: Tasks,
    bits: Sequence[int | float] | None = None,
    store: Results | None = None,
    prompt: bool | str | Path = False,
    batch: int | None = None,
    **options: Any,
) -> Rows:
    """Run lm-eval tasks at several numbers of bits from one load.

    Args:
        folder: checkpoint, or a dense model.
        tasks: what to run.
        bits: numbers of bits, or mean numbers such as 3.5; all there are if None.
        store: measurements that are in it are not made again; new ones are added.
        prompt: put the checkpoint's own soft prompts (True), or those of a folder, in front.
        batch: rows in a batch; chosen automatically if None.
        **options: ``dtype``, ``device``, ``adapter`` and ``progress`` of :class:`compress.evals.evaluate.OpenModel`;
            with progress lm-eval's own bars are silenced.

    Returns:
        ``{bits: {task: row}}``; a row as :class:`compress.evals.store.Results` keeps it, with ``lm_eval``, the
        result in lm-eval's own schema, and for multiple choice ``answers`` (the choice of every item) and the
        metric ``ece`` (:func:`compress.evals.agreement.calibration_error` over items). A dense model's key is ``dense``.

    Raises:
        CompressError: lm-eval is absent, a task is unknown, or its data can not be had.
    """
    manager = task_manager(tasks)
    at = OpenModel(folder, bits, store=store, prompt=prompt, **options)
    found: Rows = {label: {} for label in at.all_bits}
    for name in tasks.names:
        key = at.key("task", name, {**_settings(name, tasks), "dtype": at.dtype})
        for label, row in at.measure(key, partial(_measure, name, tasks, manager, at, batch)).items():
            found[label][name] = row
    return found


def task_manager(tasks: Tasks) -> TaskManager:
    """Return what lm-eval looks tasks up in; its own are indexed only where one of them is asked for, as that takes seconds."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise CompressError("--tasks needs lm-eval: pip install 'compress-llm[eval]'.") from error
    if tasks.include is not None and not tasks.include.is_dir():
        raise CompressError(f"--include {tasks.include}: there is no such folder.")
    include = str(tasks.include) if tasks.include else None
    wanted = set(tasks.names) - cloze.MAKERS.keys()
    with redirect_stderr(io.StringIO()):
        manager = TaskManager(include_path=include, include_defaults=False)
        if not wanted <= set(manager.all_tasks):
            manager = TaskManager(include_path=include)
    for name in sorted(wanted - set(manager.all_tasks)):
        hint = did_you_mean(name, [*manager.all_tasks, *cloze.MAKERS])
        if len(manager.all_tasks) < 50 or hint.startswith("Did"):
            raise CompressError(f"--tasks: there is no task {name!r}. {hint}")
        raise CompressError(f"--tasks: lm-eval has no task {name!r}, nor is it in --include or built in.")
    return manager


def _settings(name: str, tasks: Tasks) -> dict[str, Any]:
    """Return what else decides the figures: data, number of items, examples in front, lm-eval's release."""
    data = {"builtin": cloze.fingerprint(name)} if name in cloze.MAKERS else {}
    if tasks.include is not None and name not in cloze.MAKERS:
        files = [path for path in sorted(tasks.include.rglob("*")) if path.is_file() and path.suffix != ".pyc"]
        data = {"include": digest({str(path.relative_to(tasks.include)): sha256_of(path) for path in files})}
    return {"limit": tasks.limit, "fewshot": tasks.fewshot, "data": data, **versions(["lm_eval"])}


def _measure(
    name: str, tasks: Tasks, manager: TaskManager, at: OpenModel, batch: int | None, label: str
) -> dict[str, Any]:
    """Run one task with the model as it is."""
    from compress.evals.harness import Harness, run_task

    watch = at.watch(f"{name} at {label}")
    with redirect_stderr(io.StringIO()) if watch else nullcontext():
        harness = Harness(at.model, at.tokenizer, batch, watch)
        try:
            found = run_task(harness, _definition(name), manager, tasks.fewshot, tasks.limit)
        except (OSError, ValueError) as error:
            raise CompressError(
                f"task {name}: cannot be run ({type(error).__name__}: {first_line(error)}); its data must be in the datasets "
                "cache, within reach, or named by a local file."
            ) from error
    metrics = {
        metric.removesuffix(",none"): value
        for metric, value in found["results"][name].items()
        if isinstance(value, float)
    }
    samples = found["samples"].get(name, ())
    answers = multiple_choice(samples) or {}
    if answers:
        metrics["ece"] = answers.pop("ece")
    kept = {key: part for key, part in found.items() if key != "samples"}
    row = {"metrics": metrics, "n": len(samples), "truncated": harness.truncated, **answers}
    row |= {"documents_begin_with": harness.began} if harness.began else {}
    return {**row, "lm_eval": json.loads(json.dumps(kept, default=str))}


def _definition(name: str) -> str | dict[str, Any]:
    """Return a name for lm-eval to look up, or a built-in task with its items."""
    if name not in cloze.MAKERS:
        return name

    def dataset(**_: Any) -> dict[str, Any]:
        from datasets import Dataset

        return {"test": Dataset.from_list(cloze.builtin_items(name))}

    return {**cloze.task_settings(name), "custom_dataset": dataset}


def multiple_choice(samples: Sequence[Row]) -> dict[str, Any] | None:
    """Return ``answers`` (the likeliest choices), ``right`` (as ``acc`` counts them) and ``ece`` of lm-eval's samples.

    The calibration error is of the softmax over the choices' log-likelihoods. None where samples are not of one choice each.
    """
    answers, right, confidence = [], [], []
    for sample in sorted(samples, key=lambda sample: int(sample["doc_id"])):
        scores = [response[0] for response in sample["filtered_resps"] if isinstance(response, (list, tuple))]
        if len(scores) < 2 or len(scores) != len(sample["filtered_resps"]) or "acc" not in sample:
            return None
        share = torch.tensor(scores, dtype=torch.float64).softmax(0)
        answers.append(int(share.argmax()))
        confidence.append(float(share.max()))
        right.append(int(sample["acc"]))
    if not answers:
        return None
    ece = calibration_error(torch.tensor(confidence, dtype=torch.float64), torch.tensor(right))
    return {"answers": answers, "right": right, "ece": ece}


def tidy(found: Rows) -> list[dict[str, Any]]:
    """Return one record per (bits, prompt, task, metric) with its value, standard error and number of items."""
    return [
        {
            "model": row["model"][:12],
            "width": label,
            "prompt": row["prompt"] or "",
            "task": task,
            "metric": metric,
            "value": value,
            "stderr": row["metrics"].get(metric + "_stderr"),
            "n": row["n"],
        }
        for label, rows in found.items()
        for task, row in rows.items()
        for metric, value in row["metrics"].items()
        if not metric.endswith("_stderr")
    ]


def write_table(records: Sequence[Row], path: Path) -> None:
    """Write tidy records as ``.csv``, or as JSON lines."""
    text = io.StringIO()
    if path.suffix == ".csv":
        writer = csv.DictWriter(text, fieldnames=list(records[0]) if records else [])
        writer.writeheader()
        writer.writerows(records)
    else:
        text.writelines(json.dumps(record) + "\n" for record in records)
    try:
        path.write_text(text.getvalue(), encoding="utf-8")
    except OSError as error:
        raise CompressError(f"--table {path}: {error.strerror}.") from error


def merged(rows: Mapping[str, Row]) -> dict[str, Any]:
    """Join the results of several tasks at one number of bits as one object of lm-eval's schema."""
    whole: dict[str, Any] = {}
    for row in rows.values():
        for name, value in row["lm_eval"].items():
            if isinstance(value, dict) and name != "config":
                whole.setdefault(name, {}).update(value)
            else:
                whole.setdefault(name, value)
    return whole


def write_lm_eval(found: Rows, folder: Path) -> list[Path]:
    """Write ``results_<bits>.json`` in lm-eval's own schema, one per number of bits."""
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for label, rows in found.items():
            path = folder / f"results_{label if label == 'dense' else f'{label}bit'}.json"
            path.write_text(json.dumps(merged(rows), indent=2) + "\n", encoding="utf-8")
            written.append(path)
    except OSError as error:
        raise CompressError(f"--output {folder}: {error.strerror}.") from error
    return written
