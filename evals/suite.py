"""Make all measurements of one call of ``compress eval``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compress.errors import CompressError
from compress.evals.agreement import dense_model_of, evaluate_agreement, evaluate_robustness
from compress.evals.evaluate import OpenText, Protocol
from compress.evals.kv import KVWanted
from compress.evals.store import Results, results_of
from compress.evals.tasks import Rows, Tasks, evaluate_tasks
from compress.hub import place_of
from compress.passes import Progress
from compress.sidecars import Choice


@dataclass(frozen=True)
class Suite:
    """Say what to measure."""

    text: str | None = None  # file, or ``builtin``; None for tasks alone
    protocol: Protocol = field(default_factory=Protocol)
    tasks: Tasks = field(default_factory=Tasks)
    prompt: bool | str | Path = False  # True puts the checkpoint's own soft prompts in front, a folder those of another
    agreement: bool = False  # compare with the dense model on the text
    robustness: bool = False  # measure the text with typing errors too
    dense: bool = False  # measure the dense model as well
    reference: str | None = None  # where that is; the recipe's if None
    batch: int | None = None  # rows in a batch of tasks
    adapter: Choice = None  # as for :func:`compress.load`; the dense model has none
    kv: KVWanted = field(default_factory=KVWanted)  # packed caches to measure the text with too


def evaluate_all(
    folder: str,
    suite: Suite,
    bits: Sequence[int | float] | None = None,
    store: Results | Path | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> tuple[dict[str, Any], Rows]:
    """Measure everything that a suite names.

    Args:
        folder: checkpoint, or a dense model.
        suite: what to measure.
        bits: numbers of bits; all there are if None.
        store: where measurements are kept, or the file; :func:`compress.evals.store.results_of` the folder if None.
        device: to compute on.
        progress: called with (what, done, total).

    Returns:
        One documented object, and the rows of the tasks by number of bits and name. The object has ``model``; with a text
        ``text``, ``protocol``, ``bits`` and ``kv`` (:func:`compress.evals.evaluate.evaluate_text`); ``tasks``: bits -> task -> metrics;
        ``agreement`` and ``robustness``: bits -> metrics. The dense model's key is ``dense``.

    Raises:
        CompressError: anything a user can put right.
    """
    folder = place_of(folder)
    if suite.prompt and (suite.agreement or suite.robustness):
        raise CompressError("agreement and robustness are measured without a soft prompt; ask for them on their own.")
    if not isinstance(store, Results):
        store = results_of(folder, store)
    result: dict[str, Any] = {"model": folder}
    rows: Rows = {}
    own: dict[str, Any] = {"bits": bits, "prompt": suite.prompt, "adapter": suite.adapter}
    places = [(folder, own)]
    if suite.dense:
        front = folder if suite.prompt is True else suite.prompt
        places.append((dense_model_of(folder, suite.reference), {"prompt": front, "adapter": False}))
    common: dict[str, Any] = {"device": device, "progress": progress, "store": store}
    if suite.tasks.names:
        for place, options in places:
            rows |= evaluate_tasks(place, suite.tasks, batch=suite.batch, **options, **common)
        result["tasks"] = {
            label: {name: row["metrics"] for name, row in found.items()} for label, found in rows.items()
        }
        result |= _begun(rows)
    if suite.text is None:
        return result, rows
    for place, options in places:
        work = OpenText(place, suite.text, protocol=suite.protocol, kv=suite.kv, **options, **common)
        found = work.evaluate()
        result.setdefault("bits", {}).update(found.pop("bits"))
        for label, metrics in found.pop("kv", {}).items():
            result.setdefault("kv", {}).setdefault(label, {}).update(metrics)
        result = {**found, **result}
        if suite.agreement and place == folder:
            result["agreement"] = evaluate_agreement(work, suite.reference)
        if suite.robustness:
            result.setdefault("robustness", {}).update(evaluate_robustness(work))
    return result, rows


def _begun(rows: Rows) -> dict[str, Any]:
    """Tell what stands in front of documents in rolling tasks: BOS, or EOS where there is none."""
    begun = {row.get("documents_begin_with") for found in rows.values() for row in found.values()} - {None}
    return {"documents_begin_with": begun.pop()} if begun else {}
