"""Scores x sparsities x allocations on one model: ``python -m compress.evals.pruning OUT --help``.

The passes' own code runs on blocks in memory; what repeats (captured inputs, surveys, the model to score with) is kept.
Settings are chosen on calibration text that no pass has seen, with as many trials for every allocation; the text
measured on takes no part in that. Rows go to ``OUT/rows.json`` as they come: a stopped evaluation continues.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from compress.calibration import Samples, draw_samples
from compress.evals import experiments, tables
from compress.evals.evaluate import Protocol, documents_of, windows
from compress.evals.experiments import Rows
from compress.evals.perplexity import Score, Text, Window, context_length, score
from compress.passes import Block, Context, Pass, pass_class
from compress.recipe import parse_pass
from compress.settings import Calibration
from compress.source import make_context, open_source, pick_device
from compress.streaming import StreamedModel
from compress.structure import block_prefix
from compress.workspace import Record

SCORES = ("magnitude", "wanda", "sparsegpt")
SPARSITIES = (0.3, 0.5, 0.6, 0.7)
SEEDS = (0, 1, 2)
TRIALS: dict[str, tuple[float, ...]] = {
    "owl": (0.05, 0.08, 0.12, 0.2),
    "alpha": (0.1, 0.2, 0.3, 0.5),
    "dlp": (0.05, 0.1, 0.15, 0.2),
    "atp": (0.05, 0.1, 0.15, 0.2),
    "hessian": (0.05, 0.075, 0.1, 0.15),
    "mrp": (0.05, 0.1, 0.15, 0.25),  # the last, as its spread serves the refreshed form too
}
"""Values of ``spread`` that are tried for each allocation, on calibration text."""
TUNED_AT = 0.6
"""Sparsity at which an allocation's ``spread`` is chosen, for each score; others scale it in proportion."""
REFRESH = 50


class Bench:
    """One model in memory, to be pruned again and again.

    Args:
        model: dense model.
        calibration: the recipe's ``calibration``; ``select`` more samples are drawn to choose settings on.
        select: number of those.
        text: what to measure on.
        protocol: how it is cut.
    """

    def __init__(self, model: str, calibration: Calibration, select: int, text: str, protocol: Protocol) -> None:
        source = open_source(model)
        limit = getattr(source.state.config, "max_position_embeddings", None)
        wanted = calibration.model_copy(update={"samples": calibration.samples + select})
        drawn = draw_samples(wanted, source.tokenizer, limit)
        self.samples = Samples(drawn.tokens[: calibration.samples], drawn.source)
        rest = [tokens.tolist() for tokens in drawn.tokens[calibration.samples :]]
        self.selection = Text([Window(tokens, len(tokens) - 1) for tokens in rest], 1)
        self.streamed = StreamedModel(source.state, pick_device("cpu"))
        self.context = make_context(source, pick_device("cpu"), 0)
        self.model = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32)
        documents, _ = documents_of(text, protocol)
        self.text = windows(documents, source.tokenizer, replace(protocol, length=context_length(self.model)))
        with torch.no_grad():
            self.captured = [self.streamed.capture(tokens) for tokens in self.samples.tokens]
        self._surveys: dict[str, list[Record]] = {}

    def prune(self, settings: Mapping[str, Any], seed: int = 0) -> list[Record]:
        """Run a pruning pass on all blocks; ``self.model`` is then the result. Returns the blocks' records."""
        step: Pass[Any] = pass_class(str(settings["kind"]))(parse_pass(settings, 0))
        context = replace(self.context, seed=seed)
        step.check(context)
        surveys: list[list[Record]] = []
        while step.wants_survey(context, surveys):
            key = json.dumps([len(surveys), self._survey_key(settings)])
            if key not in self._surveys:
                self._surveys[key] = self._walk(step, context, surveys, survey=True)
            surveys.append(self._surveys[key])
        return self._walk(step, context, surveys, survey=False)

    @staticmethod
    def _survey_key(settings: Mapping[str, Any]) -> Mapping[str, Any]:
        """The settings that decide what a survey finds."""
        unused = {"owl": ("spread", "sparsity", "score"), "dlp": ("spread", "sparsity", "score"),
                  "alpha": ("spread", "sparsity", "score"), "hessian": ("spread", "score")}  # fmt: skip
        dropped = unused.get(str(settings.get("allocation")), ())
        if settings.get("allocation") == "mrp" and not settings.get("refresh"):
            dropped = ("spread", "sparsity")
        return {key: value for key, value in settings.items() if key not in dropped}

    @torch.no_grad()
    def _walk(self, step: Pass[Any], context: Context, surveys: list[list[Record]], survey: bool) -> list[Record]:
        """All blocks in order, each on the outputs of those before it as they were left."""
        hidden = [first for first, _ in self.captured]
        records = []
        for index in range(len(self.streamed.blocks)):
            with self.streamed.block(index) as module:
                runs = [self._run(hidden[n], calls[index]) for n, (_, calls) in enumerate(self.captured)]
                name = block_prefix(context.structure, index)
                linears = self.streamed.linears(index)
                block = Block(index, name, module, linears, samples=runs, surveys=surveys)
                records.append((step.survey_block if survey else step.run_block)(block, context))
                if step.needs().inputs and index + 1 < len(self.streamed.blocks):
                    hidden = [run(module) for run in runs]
                if not survey:
                    self.model.get_submodule(name).load_state_dict(module.state_dict())
        return records

    def _run(self, hidden: Tensor, call: Any) -> Callable[[nn.Module], Tensor]:
        return lambda module: self.streamed.run(module, hidden, call)

    def selection_loss(self) -> float:
        """Loss on calibration text that no pass has seen."""
        return score(self.model, self.selection).loss

    def measure(self) -> Score:
        """Score on the text."""
        return score(self.model, self.text)


def settings_of(metric: str, sparsity: float, allocation: str, **others: Any) -> dict[str, Any]:
    """A ``prune`` entry of a recipe."""
    return {"kind": "prune", "score": metric, "sparsity": sparsity, "allocation": allocation, **others}


def tuned_spread(bench: Bench, rows: Rows, metric: str, sparsity: float, allocation: str) -> float:
    """The best of an allocation's trials on the selection text."""

    def trial(spread: float) -> Mapping[str, Any]:
        bench.prune(settings_of(metric, sparsity, allocation, spread=spread))
        return {"loss": bench.selection_loss()}

    found = []
    for spread in TRIALS[allocation]:
        key = {"trial": True, "score": metric, "sparsity": sparsity, "allocation": allocation, "spread": spread}
        found.append((rows.get(key, lambda spread=spread: trial(spread))["loss"], spread))  # type: ignore[misc]
    return min(found)[1]


def cell(bench: Bench, settings: Mapping[str, Any], seed: int = 0) -> dict[str, Any]:
    """Prune, measure, and what became of the blocks."""
    records = [record for record in bench.prune(settings, seed) if record["linears"]]
    ratios = [record["nor"]["after"] for record in records]
    return {
        **bench.measure().json(),
        "sparsities": [round(record["sparsity"], 4) for record in records],
        "nor_before": statistics.pstdev(record["nor"]["before"] for record in records),
        "nor_after": statistics.pstdev(ratios),
    }


def table(bench: Bench, rows: Rows, metrics: Sequence[str], sparsities: Sequence[float]) -> None:
    """Fill in every cell; those of refreshed MRP, which take longest, at the end."""
    rows.get({"allocation": "dense"}, lambda: bench.measure().json())
    places = [(metric, sparsity) for metric in metrics for sparsity in sparsities]
    for refreshed in (False, True):
        for metric, sparsity in places:
            for label, settings, seed in _labelled(bench, rows, metric, sparsity):
                full = settings_of(metric, sparsity, **settings)
                key = {"label": label, "score": metric, "sparsity": sparsity, "seed": seed}
                if ("refresh" in settings) == refreshed:
                    rows.get(key, lambda full=full, seed=seed: {"settings": full, **cell(bench, full, seed)})  # type: ignore[misc]


def _labelled(bench: Bench, rows: Rows, metric: str, sparsity: float) -> Iterator[tuple[str, dict[str, Any], int]]:
    """(label, settings, seed) of a column: allocations without settings, tuned ones, MRP with defaults and refreshed."""
    yield "uniform", {"allocation": "uniform"}, 0
    for seed in SEEDS:
        yield "random", {"allocation": "random"}, seed
    for name in TRIALS:
        spread = tuned_spread(bench, rows, metric, TUNED_AT, name)
        if name != "alpha":  # whose spread is a share of the sparsity already
            spread = round(spread * sparsity / TUNED_AT, 4)
        yield name, {"allocation": name, "spread": spread}, 0
    if "mrp" in TRIALS:
        yield "mrp, defaults", {"allocation": "mrp"}, 0
        if metric != "magnitude":  # whose scores no activation changes
            yield "mrp, refreshed", {"allocation": "mrp", "spread": spread, "refresh": REFRESH}, 0


def defaults(
    bench: Bench, rows: Rows, outliers: Sequence[float], spreads: Sequence[float], metrics: Sequence[str],
    sparsities: Sequence[float],
) -> None:  # fmt: skip
    """MRP's M and width on the selection text: the choice of this library's defaults."""

    def trial(settings: Mapping[str, Any]) -> Mapping[str, Any]:
        bench.prune(settings)
        return {"loss": bench.selection_loss()}

    for metric in metrics:
        for sparsity in sparsities:
            place = {"defaults": True, "score": metric, "sparsity": sparsity}
            plain = settings_of(metric, sparsity, "uniform")
            rows.get({**place, "allocation": "uniform"}, lambda plain=plain: trial(plain))  # type: ignore[misc]
            for outlier in outliers:
                for spread in spreads:
                    full = settings_of(metric, sparsity, "mrp", outlier=outlier, spread=spread)
                    rows.get(place | full, lambda full=full: trial(full))  # type: ignore[misc]


def markdown(rows: Sequence[Mapping[str, Any]], value: str) -> str:
    """Tables of a measure, one per score: allocations down, sparsities across; random as mean (least to largest)."""
    rows = [row for row in rows if value in row]  # the dense model has no ratios of its own
    dense = next((row for row in rows if row.get("allocation") == "dense"), None)
    lines = [f"dense: {dense[value]:.4f}"] if dense else []
    cells = [row for row in rows if "label" in row]
    for metric in dict.fromkeys(row["score"] for row in cells):
        sparsities = sorted({row["sparsity"] for row in cells if row["score"] == metric})
        labels = dict.fromkeys(row["label"] for row in cells if row["score"] == metric)
        found = [[label, *(_figure(cells, metric, s, label, value) for s in sparsities)] for label in labels]
        lines += ["", tables.markdown(tables.Table([metric, *(f"{s:.0%}" for s in sparsities)], found))]
    return "\n".join(lines) + "\n"


def _figure(rows: Sequence[Mapping[str, Any]], metric: str, sparsity: float, label: str, value: str) -> str:
    place = (metric, sparsity, label)
    found = [row[value] for row in rows if (row["score"], row["sparsity"], row["label"]) == place]
    if not found:
        return ""
    mean = statistics.mean(found)
    return _short(mean) if len(found) == 1 else f"{_short(mean)} ({_short(min(found))} to {_short(max(found))})"


def _short(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"


def arguments_of() -> argparse.ArgumentParser:
    """The command line."""
    parser = experiments.arguments_of("pruning", __doc__, 100, 512)
    parser.add_argument("--select", type=int, default=40, help="further samples, to choose settings on")
    parser.add_argument("--scores", type=experiments.listed(str), default=SCORES)
    parser.add_argument("--sparsities", type=experiments.listed(float), default=SPARSITIES)
    parser.add_argument("--defaults", action="store_true", help="only try M and width of MRP on calibration text")
    parser.add_argument(
        "--outliers", type=experiments.listed(float), default=(3, 5, 7, 10), help="values of M for --defaults"
    )
    parser.add_argument(
        "--spreads", type=experiments.listed(float), default=(0.1, 0.15, 0.2, 0.25), help="widths for --defaults"
    )
    return parser


def main() -> None:
    """Fill the table, or try MRP's settings."""
    given = arguments_of().parse_args()
    calibration = Calibration(**experiments.calibration_of(given))
    rows = experiments.rows_of(given)
    bench = Bench(given.model, calibration, given.select, given.text, experiments.protocol_of(given))
    if given.defaults:
        defaults(bench, rows, given.outliers, given.spreads, given.scores, given.sparsities)
        return
    table(bench, rows, given.scores, given.sparsities)
    values = (experiments.value_of(given), "nor_after")
    (given.out / "tables.md").write_text("\n\n".join(f"## {v}\n\n{markdown(rows.rows, v)}" for v in values))
    print((given.out / "tables.md").read_text())


if __name__ == "__main__":
    experiments.run(main)
