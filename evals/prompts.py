"""Soft prompts on one model, with every control: ``python -m compress.evals.prompts OUT --help``.

The model is quantised, pruned, and both; a prompt is trained at each of these levels by the pass's own code, and on the dense
model. Beside them: no prompt, an untrained one, LoRA of as many trained numbers, a prompt for all widths, one distilled from the
dense model, and a prefix. Learning rates are chosen at one level on held-out training text, with as many trials for each
method. Rows go to ``OUT/rows.json`` as they come: a stopped run continues. ``OUT/tables.md`` has the tables.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import compress
from compress.calibration import draw_samples
from compress.errors import CompressError
from compress.evals import experiments, plots
from compress.evals.experiments import Rows
from compress.evals.perplexity import Score, Text, score
from compress.evals.text import Protocol
from compress.evals.transfer import NONE, Models, Place, fill, markdown, matrix, measure, read_text
from compress.passes import Report, Whole
from compress.pipeline import make_context, open_source, pick_device
from compress.prompts.soft_prompt import SoftPrompt, SoftPromptConfig
from compress.prompts.stored import write_prompt
from compress.pruning.lora import adapter_model
from compress.recipe import Calibration, plain
from compress.training import train

DENSE = "dense"
TUNED_AT = "3 bits"
"""Level at which learning rates are chosen, and at which texts are exchanged."""
ALSO_AT = "50 % + 4 bits"
"""Level at which a distilled prompt and a prefix are trained too."""
RATES = {"prompt": (0.05, 0.2, 0.6), "prefix": (0.05, 0.2, 0.6), "LoRA": (0.003, 0.01, 0.03)}
SPARSE: dict[str, Any] = {"kind": "prune", "score": "wanda", "allocation": "uniform", "sparsity": 0.5}
PACKED: dict[str, Any] = {"kind": "any_precision", "seed_bits": 2, "parent_bits": 4}
RECIPES: dict[str, list[dict[str, Any]]] = {
    "quantised": [PACKED], "sparse": [SPARSE], "both": [SPARSE, {**PACKED, "keep_zeros": True}],
}  # fmt: skip


class Bench:
    """The checkpoints, the texts, and what is trained on them.

    Args:
        out: folder for everything.
        model: dense model.
        calibration: what quantising and pruning look at.
        training: what prompts are trained on.
        settings: of every training; ``tokens``, ``steps`` and the like.
        levels: labels of the places to work at beside the dense model; all if empty.
        report: told of progress.
    """

    def __init__(
        self, out: Path, model: str, calibration: Calibration, training: Mapping[str, Calibration],
        settings: SoftPromptConfig, levels: Sequence[str], report: Report,
    ) -> None:  # fmt: skip
        self.out, self.settings, self.report = out, settings, report
        source = open_source(model)
        self.context = make_context(source, pick_device("cpu"), 0)
        limit = (self.context.context_length or 2048) - settings.tokens
        self.samples = {
            name: [
                sample[:limit] for sample in draw_samples(text, source.tokenizer, self.context.context_length).tokens
            ]
            for name, text in training.items()
        }
        about = {"model": model, "calibration": calibration, "settings": settings, **training}
        self.rows, self.models = Rows(out / "rows.json", plain(about)), Models()
        for name, passes in RECIPES.items():
            if not (out / name).exists():
                recipe = {"model": model, "calibration": calibration.model_dump(), "passes": passes}
                compress.run(recipe, out / name, workspace=out / "work", report=report)
        self.dense = Place(DENSE, str(source.folder))
        self.packed = [Place(f"{bits} bits", str(out / "quantised"), bits) for bits in (4, 3, 2)]
        sparse = [Place("50 %", str(out / "sparse")), Place("50 % + 4 bits", str(out / "both"), 4)]
        known = [*self.packed, *sparse]
        if unknown := set(levels) - {place.label for place in known}:
            raise CompressError(f"--levels: there is no {min(unknown)!r} among {', '.join(p.label for p in known)}.")
        self.places = [self.dense, *(place for place in known if not levels or place.label in levels)]

    def whole(self, place: Place, text: str) -> Whole:
        """What the pass works on."""
        scratch = self.out / "work" / "scratch"
        dense = Models()
        return Whole(self.models.open(place), lambda: dense.open(self.dense), self.samples[text], scratch)

    def train(self, method: str, place: Place, **changes: Any) -> dict[str, Any]:
        """Train at a level; a prompt is written, LoRA is left in the open model. Returns the record, with seconds."""
        begun, used = time.perf_counter(), time.process_time()
        text = changes.pop("text_name", "text")
        widths = changes.pop("widths", (place.bits,) if place.bits else ())
        config = self.settings.model_copy(update={"widths": widths, **changes})
        if method == "LoRA":
            record = self._train_lora(place, config)
        else:
            step = SoftPrompt(config.model_copy(update={"method": "prefix" if method == "prefix" else "prompt"}))
            tensors, record = step.run_model("prompt", self.whole(place, text), self.context, self.report)
            write_prompt(self.prompt_folder(method, place), tensors["prompt_embeddings"], record.pop("adapter"))
        seconds = {"seconds": time.perf_counter() - begun, "processor_seconds": time.process_time() - used}
        return {**record, **seconds, "steps": config.steps}

    def prompt_folder(self, method: str, place: Place) -> Path:
        """Where a trained prompt is."""
        return self.out / "prompts" / f"{method} {place.label}".replace(" ", "-").replace("%", "pct")

    def _train_lora(self, place: Place, config: SoftPromptConfig) -> dict[str, Any]:
        self.models.forget()
        model = self.models.open(place)
        targets, rank = self.lora_of(self.settings.tokens * int(model.config.hidden_size))
        adapted = adapter_model(model, targets, rank, float(rank), 0.0, self.context.seed)
        adapted.eval()
        record = train(adapted, self.samples["text"], config, self.context.seed, report=self.report).record()
        return {**record, "rank": rank, "targets": targets}

    def lora_of(self, count: int) -> tuple[list[str], int]:
        """The first linears of every block, and the rank, whose updates have nearest to ``count`` trained numbers."""
        blocks = {name.split(".")[-1]: shape for name, shape in self.context.linears.items()}
        each = len(self.context.linears) // len(blocks)
        choices = []
        for last in range(1, len(blocks) + 1):
            names = list(blocks)[:last]
            size = each * sum(sum(blocks[name]) for name in names)
            choices += [(abs(size * rank - count), -last, rank, names) for rank in range(1, 65)]
        _, _, rank, names = min(choices)
        return names, rank

    def rate(self, method: str) -> float:
        """The best of a method's learning rates on held-out training text, after a quarter of the steps."""
        place = next(place for place in self.packed if place.label == TUNED_AT)
        steps = max(1, self.settings.steps // 4)
        found = []
        for rate in RATES[method]:
            key = {"trial": method, "rate": rate}
            changes = {"learning_rate": rate, "steps": steps, "validate_every": steps}
            row = self.rows.get(key, lambda changes=changes: self.train(method, place, **changes))  # type: ignore[misc]
            found.append((sum(row["best"]["held_out"].values()), rate))
        if method == "LoRA":
            self.models.forget()
        return min(found)[1]

    def prompt(self, method: str, place: Place, **changes: Any) -> Path:
        """The folder of a prompt, trained now if it is not there."""
        rate = self.rate("prefix" if method == "prefix" else "prompt")
        key = {"method": method, "level": place.label}
        self.rows.get(key, lambda: self.train(method, place, learning_rate=rate, **changes))
        return self.prompt_folder(method, place)

    def lora(self, place: Place, text: Text) -> None:
        """Train and score LoRA at a level."""
        rate = self.rate("LoRA")

        def make() -> dict[str, Any]:
            record = self.train("LoRA", place, learning_rate=rate)
            measured: Score = score(self.models.open(place), text)
            self.models.forget()
            return {**measured.json(), **record}

        self.rows.get({"prompt": "LoRA", "model": place.label, "text": "text"}, make)

    def untrained(self) -> Path:
        """A prompt as it is before the first step."""
        folder = self.prompt_folder("untrained", self.dense)
        if not folder.exists():
            self.train("untrained", self.dense, steps=1, learning_rate=1e-12, validate_every=1)
        return folder


def fill_all(bench: Bench, texts: Mapping[str, Text]) -> None:
    """Train and score everything, what matters most first."""
    text = {"text": texts["text"]}
    own: dict[str, Path | None] = {}
    fill(bench.rows, bench.models, bench.places, {NONE: None, "untrained": bench.untrained()}, text)
    for place in bench.places:
        own[place.label] = bench.prompt("prompt", place)
        fill(bench.rows, bench.models, [place, bench.dense], {place.label: own[place.label]}, text)
    fill(bench.rows, bench.models, bench.places, own, text)
    for place in reversed(bench.places):  # where most is lost comes first
        bench.lora(place, texts["text"])
    widths = tuple(place.bits or 0 for place in bench.packed)
    shared = bench.prompt("all widths", bench.packed[0], widths=widths)
    fill(bench.rows, bench.models, bench.packed, {"all widths": shared}, text)
    for place in bench.places:
        if place.label != ALSO_AT:
            continue
        for method, changes in (("distilled", {"distill": 64}), ("prefix", {})):
            path = bench.prompt(method, place, **changes)
            key = {"prompt": method, "model": place.label, "text": "text"}
            bench.rows.get(key, lambda path=path, place=place: measure(bench.models, place, path, texts["text"]).json())  # type: ignore[misc]
    if "other" in texts:
        place = next(place for place in bench.packed if place.label == TUNED_AT)
        other = bench.prompt("other text", place, text_name="other")
        prompts = {NONE: None, place.label: own[place.label], "other text": other}
        fill(bench.rows, bench.models, [place, bench.dense], prompts, texts)


def tables(bench: Bench, value: str) -> str:
    """All tables, in Markdown; draws the heat map too."""
    rows, labels = bench.rows.rows, [place.label for place in bench.places]

    def line(prompt: str, measure: str = value) -> list[float | None]:
        return matrix(rows, [prompt], labels, "text", measure)[0]

    def own(measure: str = value) -> list[float | None]:
        return [matrix(rows, [label], [label], "text", measure)[0][0] for label in labels]

    lines = {
        "no prompt": line(NONE), "untrained prompt": line("untrained"), "its own prompt": own(),
        "its own prompt on the dense model": [matrix(rows, [label], [DENSE], "text", value)[0][0] for label in labels],
        "the dense model's prompt": line(DENSE), "one prompt for 2, 3 and 4 bits": line("all widths"),
        "its own prompt, distilled": line("distilled"), "its own prefix": line("prefix"), "LoRA": line("LoRA"),
        "(its own prompt, diluted perplexity)": own("diluted_perplexity"),
    }  # fmt: skip
    parts = [f"## {value}\n", markdown(list(lines.values()), list(lines), labels, value)]
    parts += ["\n## Share of the gap to the dense model that closes, in loss\n", _shares(line, own, labels)]
    transfer = matrix(rows, [NONE, *labels], labels, "text", value)
    plots.heat_map(transfer, [NONE, *labels], labels, value.replace("_", " "), bench.out / "transfer.svg")
    parts += [
        "\n## Transfer: learned at (down), evaluated at (across)\n",
        markdown(transfer, [NONE, *labels], labels, value),
    ]
    if any(row.get("text") == "other" for row in rows):
        prompts = [NONE, TUNED_AT, "other text"]
        for place in (TUNED_AT, DENSE):
            found = [
                [matrix(rows, [prompt], [place], text, value)[0][0] for text in ("text", "other")] for prompt in prompts
            ]
            parts += [f"\n## Texts, at {place}\n", markdown(found, prompts, ["text", "other"], "learned on")]
    return "".join(parts)


def _shares(
    line: Callable[[str, str], list[float | None]], own: Callable[[str], list[float | None]], labels: Sequence[str]
) -> str:
    """Of every way to close it; and of its own prompt's, against the dense model with a prompt of its own."""
    without = line(NONE, "loss")
    dense = without[0]
    assert dense is not None
    adapted = own("loss")[0]
    ways = {
        "its own prompt": own("loss"), "the dense model's prompt": line(DENSE, "loss"),
        "one prompt for 2, 3 and 4 bits": line("all widths", "loss"), "distilled": line("distilled", "loss"),
        "prefix": line("prefix", "loss"), "LoRA": line("LoRA", "loss"),
    }  # fmt: skip

    def shares(losses: Sequence[float | None], end: float | None) -> list[float | None]:
        pairs = list(zip(without, losses, strict=True))[1:]
        return [
            None if loss is None or before is None or end is None else 100 * (1 - (loss - end) / (before - dense))
            for before, loss in pairs
        ]

    table = {f"{name}, %": shares(losses, dense) for name, losses in ways.items()}
    table["its own prompt, to the dense model with its own, %"] = shares(ways["its own prompt"], adapted)
    return markdown(list(table.values()), list(table), labels[1:], "level")


def arguments_of() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m compress.evals.prompts", description=__doc__)
    parser.add_argument("out", type=Path, help="folder for rows.json, tables.md, checkpoints and prompts")
    parser.add_argument("--model", default="builtin", help="dense model (default: builtin)")
    parser.add_argument("--train", help="text file to calibrate and train on; built-in modules if absent")
    parser.add_argument("--text", default="builtin", help="text to measure on; 'builtin' for held-out modules")
    parser.add_argument("--other-train", help="another text to train on, for the exchange of texts")
    parser.add_argument("--other-text", help="and to measure on; a part of it that is not trained on")
    parser.add_argument("--other-limit", type=int, help="measure on the first so many of its documents")
    parser.add_argument("--samples", type=int, default=60, help="calibration samples")
    parser.add_argument("--train-samples", type=int, default=400)
    parser.add_argument("--length", type=int, default=128, help="tokens per training sample")
    parser.add_argument("--tokens", type=int, default=20, help="virtual tokens")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--levels", help="comma-separated: 4 bits,3 bits,2 bits,50 %%,50 %% + 4 bits; all if absent")
    experiments.protocol_arguments(parser)
    return parser


def text_settings(source: str | None, separator: str | None, samples: int, length: int) -> Calibration:
    """A training text of the command line."""
    place = {"text": source, "separator": separator, "min_characters": 4 * length} if source else {"builtin": "stdlib"}
    return Calibration.model_validate({**place, "samples": samples, "length": length})


def main() -> None:
    """Fill all tables."""
    from compress.cli.common import progress_bar

    given = arguments_of().parse_args()
    training = {"text": text_settings(given.train, given.separator, given.train_samples, given.length)}
    if given.other_train:
        training["other"] = text_settings(given.other_train, None, given.train_samples, given.length)
    calibration = text_settings(given.train, given.separator, given.samples, 2 * given.length)
    settings = SoftPromptConfig.model_validate(
        {
            "tokens": given.tokens, "steps": given.steps, "batch": given.batch, "micro_batch": given.batch, "held_out": 10,
            "validate_every": max(1, given.steps // 5),
        }
    )  # fmt: skip
    levels = given.levels.split(",") if given.levels else []
    with progress_bar() as report:
        bench = Bench(given.out, given.model, calibration, training, settings, levels, report)
        length = (bench.context.context_length or 2048) - given.tokens
        texts = {"text": read_text(given.text, bench.places[1].folder, experiments.protocol_of(given, length))}
        if given.other_text:
            other = Protocol(None, given.other_limit, 0, length, given.stride, given.truncate)
            texts["other"] = read_text(given.other_text, bench.places[1].folder, other)
        fill_all(bench, texts)
    found = tables(bench, experiments.value_of(given))
    (given.out / "tables.md").write_text(found)
    print(found)


if __name__ == "__main__":
    experiments.run(main)
