"""Set soft prompts beside LoRA and beside each other: ``python -m compress.evals.experiments.prompts OUT --help``.

Runs the grid ``prompts`` in ``OUT``, trains LoRA of as many numbers as a prompt has at every level, and puts every level's own prompt
before every level's model. ``OUT/tables.md`` has the tables, ``OUT/transfer.svg`` the matrix; what is measured is kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Optional

import torch
import typer

import compress
from compress.calibration import draw_samples
from compress.evals import plots, tables
from compress.evals.evaluate import documents_of
from compress.evals.grids import script
from compress.evals.grids.grid import GridRun, Line, cells_of, fill, pivot, settle, tables_of
from compress.evals.perplexity import score
from compress.evals.store import Key
from compress.evals.tasks import Tasks
from compress.evals.transfer import NONE, Place, transfer
from compress.passes import Context
from compress.prompts.settings import SoftPromptConfig
from compress.pruning.lora import adapter_model
from compress.source import make_context, open_source, pick_device
from compress.training import train

DENSE, OWN, WITHOUT, LORA = "dense", "its own prompt", "no prompt", "LoRA"
RATES = (0.003, 0.01, 0.03)
TUNED_AT = "3 bits"  # where LoRA's learning rate is chosen, as the prompts' is


def lora_of(context: Context, count: int) -> tuple[list[str], int]:
    """Return the first linears of every block, and the rank, whose updates have nearest to ``count`` trained numbers."""
    blocks = {name.split(".")[-1]: shape for name, shape in context.linears.items()}
    each = len(context.linears) // len(blocks)
    choices = []
    for last in range(1, len(blocks) + 1):
        names = list(blocks)[:last]
        size = each * sum(sum(blocks[name]) for name in names)
        choices += [(abs(size * rank - count), -last, rank, names) for rank in range(1, 65)]
    _, _, rank, names = min(choices)
    return names, rank


class Lora:
    """Train LoRA as a control of a grid's prompts, on its checkpoints without prompts, which it has kept."""

    def __init__(self, run: GridRun) -> None:
        self.run = run
        source = open_source(run.grid.model)
        calibration = run.grid.calibration.model_dump(mode="json")
        self.config = SoftPromptConfig(**fill("{prompt}", {**run.grid.define, "calibration": calibration}))
        self.context, self.tokenizer = make_context(source, pick_device("cpu"), 0), source.tokenizer
        text, limit = self.config.text or run.grid.calibration, self.context.context_length
        room = (limit or 2048) - self.config.tokens
        self.samples = [sample[:room] for sample in draw_samples(text, self.tokenizer, limit).tokens]

    def figures(self, place: Place) -> dict[str, Any]:
        """Return the score of LoRA trained at a level, its rate chosen on what training holds back."""
        tuned, quarter = place_of(self.run, TUNED_AT), max(1, self.config.steps // 4)
        short = {"steps": quarter, "validate_every": quarter}
        trials = [(self._trained(tuned, {**short, "learning_rate": rate})["held_out"], rate) for rate in RATES]
        return self._trained(place, {"learning_rate": min(trials)[1]})

    def _trained(self, place: Place, changes: Mapping[str, Any]) -> dict[str, Any]:
        """Train at a level and score on the text, unless that is known."""
        config = self.config.model_copy(update=changes)
        settings = {"config": config.model_dump(mode="json"), "about": self.run.about}
        key = Key("lora", place.label, str(self.run.about["model"]), str(place.bits), settings=settings)
        if known := self.run.store.find(key):
            return known["metrics"]  # type: ignore[no-any-return]
        model = compress.load(place.folder, bits=place.bits, dtype=torch.float32)
        targets, rank = lora_of(self.context, config.tokens * int(model.config.hidden_size))
        adapted = adapter_model(model, targets, rank, float(rank), 0.0, self.context.seed)
        adapted.eval()
        record = train(adapted, self.samples, config, self.context.seed).record()
        documents, _ = documents_of(self.run.grid.text, self.run.protocol)
        metrics = score(model, self.run.protocol.cut(documents, self.tokenizer)).json()
        metrics["held_out"] = sum(record["best"]["held_out"].values())
        return self.run.store.add(key, metrics, rank=rank, targets=targets)["metrics"]  # type: ignore[no-any-return]


def place_of(run: GridRun, level: str) -> Place:
    """Return the model of a level without a prompt."""
    found = [cell for cell in cells_of(run.grid) if cell.place == {"row": WITHOUT, "level": level}]
    return Place(level, str(run.checkpoint(found[0])), next(iter(found[0].values["level"]["bits"]), None))


def add_gaps(lines: Sequence[Line]) -> None:
    """Add the share that every way closes of a level's gap to the dense model, and its own prompt of that to the prompted one."""
    losses = {(line["row"], line["level"]): line["loss"] for line in lines}
    dense, prompted = losses[WITHOUT, DENSE], losses[OWN, DENSE]
    for line in lines:
        gap = losses[WITHOUT, line["level"]] - dense
        if gap:
            line["gap_closed"] = 1 - (line["loss"] - dense) / gap
            if line["row"] == OWN:
                line["gap_closed_to_prompted"] = 1 - (line["loss"] - prompted) / gap


def main(
    out: Annotated[Path, typer.Argument(help="Folder of the grid's results.")],
    model: Annotated[str, typer.Option(help="Dense model.")] = "builtin",
    calibration: Annotated[Optional[str], typer.Option(help="Text file, as given to the grid.")] = None,
    text: Annotated[str, typer.Option(help="Text file to measure on, as given to the grid.")] = "builtin",
    separator: Annotated[Optional[str], typer.Option(help="Divides both texts into documents.")] = None,
    settings: Annotated[Optional[list[str]], typer.Option("--set", help="KEY.KEY=VALUE, as given to the grid.")] = None,
    only: Annotated[Optional[list[str]], typer.Option(help="AXIS=LABEL, as given to the grid.")] = None,
) -> None:
    """Fill the tables of prompts, LoRA and transfer."""
    chosen = settle("prompts", model, calibration, text, separator, settings or [])
    run = GridRun(chosen, out, True, script.progress())
    dense, *lines = run.lines(only or [])
    cells = [cell for cell in cells_of(chosen, only or []) if cell.place["row"] == OWN]
    levels = [str(cell.place["level"]) for cell in cells]
    lora, places = Lora(run), [place_of(run, level) for level in levels]
    lines += [{"row": LORA, "level": place.label, **lora.figures(place)} for place in places]
    prompts = {NONE: None, **{str(cell.place["level"]): run.checkpoint(cell) for cell in cells}}
    rows = transfer(places, prompts, {"text": chosen.text}, Tasks(()), run.protocol, run.store)
    lines += [
        {**row, "row": "the dense model's prompt", "level": row["model"]} for row in rows if row["prompt"] == DENSE
    ]
    add_gaps(lines)
    elsewhere = [row for row in rows if row["model"] == DENSE and row["prompt"] != NONE]
    lines += [{**row, "row": f"{OWN} on the dense model", "level": row["prompt"]} for row in elsewhere]
    value = "bits_per_byte" if chosen.text == "builtin" else "perplexity"
    matrix = tables.transfer(rows, list(prompts), levels, "text", value)
    plots.save(plots.heat_map(matrix, value.replace("_", " "), by_column=True), out / "transfer.svg")
    gaps = [pivot(lines, ["row"], ["level"], [name]) for name in ("gap_closed", "gap_closed_to_prompted")]
    found = "\n\n".join([tables_of(chosen, [dense, *lines]), *gaps, pivot(rows, ["prompt"], ["model"], [value])]) + "\n"
    (out / "tables.md").write_text(found, encoding="utf-8")
    typer.echo(found)


if __name__ == "__main__":
    script.run(main)
