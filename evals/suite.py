"""Make all measurements of one call of ``compress eval``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compress.errors import CompressError
from compress.evals.agreement import dense_model_of, evaluate_agreement, evaluate_robustness
from compress.evals.evaluate import Protocol, open_text
from compress.evals.store import Results, results_of
from compress.evals.tasks import Tasks, evaluate_tasks
from compress.passes import Report
from compress.sidecars import Choice

Rows = dict[str, dict[str, dict[str, Any]]]


@dataclass(frozen=True)
class Suite:
    """Say what to measure.

    Attributes:
        text: file, or ``builtin``; None for tasks alone.
        protocol: how the text is cut.
        tasks: for lm-eval; none if it names none.
        prompt: True puts the checkpoint's own soft prompts in front of text and tasks, a folder those of another.
        agreement: compare with the dense model on the text.
        robustness: measure the text with typing errors too.
        dense: measure the dense model as well.
        reference: where that is; the recipe's if None.
        batch: rows in a batch of tasks.
        adapter: as for :func:`compress.load`; the dense model has none.
    """

    text: str | None = None
    protocol: Protocol = field(default_factory=Protocol)
    tasks: Tasks = field(default_factory=lambda: Tasks(()))
    prompt: bool | str | Path = False
    agreement: bool = False
    robustness: bool = False
    dense: bool = False
    reference: str | None = None
    batch: int | None = None
    adapter: Choice = None


def evaluate_all(
    folder: str,
    suite: Suite,
    bits: Sequence[int | float] | None = None,
    results: Path | None = None,
    device: str = "cpu",
    report: Report | None = None,
    store: Results | None = None,
) -> tuple[dict[str, Any], Rows]:
    """Measure everything that a suite names.

    Args:
        folder: checkpoint, or a dense model.
        suite: what to measure.
        bits: widths; all there are if None.
        results: where measurements are kept; :func:`compress.evals.store.results_of` if None.
        device: to compute on.
        report: called with (what, done, total).
        store: an open one, instead of ``results``.

    Returns:
        One documented object, and the rows of the tasks by width and name. The object has ``model``; with a text
        ``text``, ``protocol`` and ``bits`` (:func:`compress.evals.evaluate.evaluate_text`); ``tasks``: width -> task -> metrics;
        ``agreement`` and ``robustness``: width -> metrics. The dense model is the width ``dense``.

    Raises:
        CompressError: anything a user can put right.
    """
    if suite.prompt and (suite.agreement or suite.robustness):
        raise CompressError("agreement and robustness are measured without a soft prompt; ask for them on their own.")
    store = store or results_of(folder, results)
    original = dense_model_of(folder, suite.reference) if suite.dense else None
    result: dict[str, Any] = {"model": folder}
    rows: Rows = {}
    tell: dict[str, Any] = {"device": device, "report": report}
    places = [(folder, bits, suite.prompt, suite.adapter)]
    if original is not None:
        places.append((original, None, folder if suite.prompt is True else suite.prompt, False))
    if suite.tasks.names:
        for place, widths, front, adapter in places:
            rows |= evaluate_tasks(place, suite.tasks, widths, store, front, suite.batch, adapter=adapter, **tell)
        result["tasks"] = {
            width: {name: row["metrics"] for name, row in found.items()} for width, found in rows.items()
        }
    if suite.text is None:
        return result, rows
    for place, widths, front, adapter in places:
        work = open_text(place, suite.text, widths, suite.protocol, prompt=front, store=store, adapter=adapter, **tell)
        found = work.evaluate()
        result.setdefault("bits", {}).update(found.pop("bits"))
        result = {**found, **result}
        if suite.agreement and place == folder:
            result["agreement"] = evaluate_agreement(work, suite.reference)
        if suite.robustness:
            result.setdefault("robustness", {}).update(evaluate_robustness(work))
    return result, rows
