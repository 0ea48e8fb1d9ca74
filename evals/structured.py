"""Structured pruning, score by score: ``python -m compress.evals.structured OUT --help``.

Every cell is a whole run: a checkpoint is written, then loaded and measured. Rows go to ``OUT/rows.json`` as they come: a
stopped evaluation continues. Random pruning is run with several seeds; all other rows are deterministic.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

import compress
from compress.evals import experiments, tables
from compress.evals.evaluate import evaluate_text
from compress.evals.experiments import Rows, calibration_of, protocol_of
from compress.pipeline import model_folder
from compress.source import model_folder
from compress.weights import Checkpoint

RATIOS = (0.1, 0.2, 0.3, 0.5)
SCORES: dict[str, dict[str, Any]] = {
    "output error (default)": {"score": "output"},
    "FMS, one SPSA draw (paper)": {"score": "fms"},
    "FMS, true gradient": {"score": "fms", "estimator": "backprop"},
    "gates, residual gradient": {"score": "gates"},
    "gates, SPSA": {"score": "gates", "estimator": "spsa", "draws": 2, "step": 0.01},
    "gates, backprop (Fisher)": {"score": "gates", "estimator": "backprop"},
    "Taylor, backprop": {"score": "taylor"},
    "Taylor of the group, backprop": {"score": "taylor", "variant": "vector"},
    "|W| |X|, no gradient": {"score": "no_gradient"},
    "|W| |X| |noise|": {"score": "noise"},
    "magnitude (L2)": {"score": "magnitude"},
    "random": {"score": "random"},
}
"""What is compared: label -> settings of ``mini_llm``."""
SEEDS = {"random": (0, 1, 2)}
REFIT = {"no": (False,), "yes": (True,), "both": (False, True)}


class Bench:
    """One model and one way to calibrate and to measure.

    Args:
        given: the command line's.
    """

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        self.work: Path = given.out / "work"
        self.protocol = protocol_of(given)

    def recipe(self, passes: Sequence[Mapping[str, Any]], seed: int) -> dict[str, Any]:
        """A whole recipe."""
        return {"model": self.given.model, "calibration": calibration_of(self.given), "passes": passes, "seed": seed}

    def cell(self, passes: Sequence[Mapping[str, Any]], seed: int = 0) -> dict[str, Any]:
        """Run a recipe and measure what it wrote."""
        folder = self.given.out / "model"
        shutil.rmtree(folder, ignore_errors=True)
        started = time.perf_counter()
        compress.run(self.recipe(passes, seed), folder, workspace=self.work)
        seconds = time.perf_counter() - started
        return {**self.measure(folder), "seconds": seconds}

    def measure(self, folder: Path) -> dict[str, Any]:
        """Perplexity at every width asked for, parameters, bytes and tokens per second."""
        found = evaluate_text(str(folder), self.given.text, self.given.bits, self.protocol)["bits"]
        best = next(iter(found.values()))
        info = Checkpoint(folder).info()
        return {
            "perplexity": best["perplexity"],
            "bits_per_byte": best["bits_per_byte"],
            "at_bits": {bits: score["perplexity"] for bits, score in found.items()},
            "parameters": sum(torch.Size(item.shape).numel() for item in info.values()),
            "bytes": sum(item.nbytes for item in info.values()),
        }


def table(bench: Bench, rows: Rows, given: argparse.Namespace) -> None:
    """Every score at every ratio, with and without refitting, before and after recovery."""
    rows.get({"label": "dense"}, lambda: bench.measure(model_folder(given.model)))
    recovery = (
        [{"kind": "lora_recovery", **_settings(given.recovery, calibration_of(given))}]
        if given.recovery is not None
        else []
    )
    if recovery:
        rows.get({"label": "dense, trained as long"}, lambda: bench.cell(recovery))
    stages = ([], recovery) if recovery else ([],)
    places = [
        (ratio, label, seed) for ratio in given.ratios for label in given.scores for seed in SEEDS.get(label, (0,))
    ]
    for ratio, label, seed in places:
        for compensate in REFIT[given.refit]:
            for after in stages:
                step = {"kind": "mini_llm", "ratio": ratio, **SCORES[label], "compensate": compensate}
                step |= _settings(given.settings)
                name = f"{label}, {given.settings}" if given.settings else label
                key = {"label": name, "ratio": ratio, "seed": seed, "compensate": compensate, "recovered": bool(after)}
                passes = [step, *after]
                rows.get(key, lambda p=passes, s=seed: bench.cell(p, s))  # type: ignore[misc]


def _settings(text: str, calibration: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """``mode=local,attention=0`` as a mapping; ``text.samples=500`` is the calibration with another number of samples."""
    found: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        key, _, value = part.partition("=")
        if key.startswith("text.") and calibration is not None:
            found.setdefault("text", dict(calibration))[key.removeprefix("text.")] = yaml.safe_load(value)
        else:
            found[key] = yaml.safe_load(value)
    return found


def markdown(rows: Sequence[Mapping[str, Any]], value: str) -> str:
    """One table: scores down; ratios across, each as it is cut, refitted, and after recovery."""
    dense = next((row[value] for row in rows if row["label"] == "dense"), None)
    cells = [row for row in rows if "ratio" in row]
    ratios = sorted({row["ratio"] for row in cells})
    kinds = sorted({(row["recovered"], row["compensate"]) for row in cells})
    names = {
        (False, False): "cut",
        (False, True): "refitted",
        (True, False): "cut, recovered",
        (True, True): "refitted, recovered",
    }
    columns = [(ratio, kind) for ratio in ratios for kind in kinds]
    found = []
    for label in dict.fromkeys(row["label"] for row in cells):
        figures = []
        for ratio, kind in columns:
            place = (label, ratio, *kind)
            each = [r[value] for r in cells if (r["label"], r["ratio"], r["recovered"], r["compensate"]) == place]
            figures.append(_figure(each))
        found.append([label, *figures])
    heads = ["score", *(f"{ratio:.0%} {names[kind]}" for ratio, kind in columns)]
    return (f"dense: {dense:.4f}\n\n" if dense else "") + tables.markdown(tables.Table(heads, found)) + "\n"


def _figure(found: Sequence[float]) -> str:
    if not found:
        return ""
    if len(found) == 1:
        return f"{found[0]:.2f}"
    return f"{sum(found) / len(found):.2f} ({min(found):.2f} to {max(found):.2f})"


def arguments_of() -> argparse.ArgumentParser:
    """The command line."""
    parser = experiments.arguments_of("structured", __doc__, 64, 128)
    parser.add_argument("--bits", type=experiments.listed(int), help="of packed models")
    parser.add_argument("--ratios", type=experiments.listed(float), default=RATIOS)
    parser.add_argument("--scores", type=lambda text: text.split(";"), default=list(SCORES), help="labels, between ;")
    parser.add_argument("--refit", choices=list(REFIT), default="both", help="refit what stays")
    parser.add_argument("--settings", default="", help="further settings of mini_llm: mode=local,attention=0")
    parser.add_argument("--recovery", help="also recover, with these settings of lora_recovery ('' for none)")
    return parser


def main() -> None:
    """Fill the table."""
    given = arguments_of().parse_args()
    rows = experiments.rows_of(given)
    table(Bench(given), rows, given)
    (given.out / "table.md").write_text(markdown(rows.rows, experiments.value_of(given)))
    print((given.out / "table.md").read_text())


if __name__ == "__main__":
    experiments.run(main)
