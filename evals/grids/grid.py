"""Run a grid of recipes and tabulate what they make.

A grid is a YAML file (:class:`Grid`; those beside this module are examples): recipes with ``{axis}`` in place of settings, the
values of the axes, and what to measure. Every recipe goes through the ordinary pipeline, all in one workspace, and every checkpoint
is measured at every number of bits. ``OUT/results.jsonl`` keeps what is measured; ``OUT/tables.md`` has the tables.
"""

from __future__ import annotations

import itertools
import json
import re
import shutil
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Union

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from compress.errors import CompressError, did_you_mean
from compress.evals import tables
from compress.evals.evaluate import BUILTIN, Protocol, documents_of
from compress.evals.grids.figures import facts_of, held_out_loss
from compress.evals.measure import Figures, make, measure
from compress.evals.store import Key, Results, identity
from compress.hub import model_folder
from compress.passes import Progress
from compress.recipe import explain, load_recipe, override
from compress.settings import Calibration
from compress.workspace import digest

GRIDS = Path(__file__).parent
HELD_OUT = "held-out"  # in place of a text: calibration text that no pass has seen
Scalar = Union[str, int, float, bool, None]
Axes = dict[str, Union[list[Scalar], dict[str, Any]]]
Line = dict[str, Any]  # where a figure stands (``row``, axes, ``seed``, ``bits``) and its metrics


class Strict(BaseModel):
    """Base of the parts of a grid: unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Choose(Strict):
    """A setting that every cell chooses on calibration text that no pass has seen."""

    axis: str = Field(description="Name under which the passes use the chosen value.")
    among: tuple[Any, ...] = Field(min_length=2, description="Values to try; as many in every row that chooses.")
    at: dict[str, Any] = Field({}, description="Axes to fix while trying, so that cells share their choice.")
    scale: str | None = Field(None, description="Axis of `at` with which the chosen value grows in proportion.")


class Row(Strict):
    """Recipes that share a template."""

    passes: list[Any] = Field(description="Of the recipe; `use` in a mapping takes over the keys of an axis's value.")
    axes: Axes = Field({}, description="Axes of this row alone, or the labels it takes of an axis of the grid.")
    seeds: tuple[int, ...] = Field((0,), description="Of the recipe; tables show the mean (least to largest).")
    choose: Choose | None = Field(None, description="A setting to choose.")
    bits: Any = Field(None, description="Numbers of bits to measure at; all if absent.")
    prompt: bool = Field(False, description="Measure with the checkpoint's own soft prompt.")


class Grid(Strict):
    """What to run and to measure."""

    model: str = Field(BUILTIN, description="Dense model.")
    text: str = Field(BUILTIN, description="File to measure on, 'builtin', or 'held-out'.")
    calibration: Calibration = Field(description="Of every recipe.")
    held_out: int = Field(40, ge=1, description="Further calibration samples, to choose on.")
    protocol: dict[str, Any] = Field({}, description="How the text is cut, as compress.evals.evaluate.Protocol.")
    axes: Axes = Field({}, description="Name -> list of values, or label -> value. A row has those that it names.")
    define: dict[str, Any] = Field({}, description="Further names for templates, each of one value.")
    rows: dict[str, Row] = Field(min_length=1, description="Label -> recipes.")
    per: str | None = Field(None, description="Axis with a table for each of its labels.")
    down: tuple[str, ...] = Field(("row",), description="What heads a table's lines: row, bits, axes.")
    across: tuple[str, ...] = Field((), description="What heads its columns; the metrics themselves if empty.")
    columns: tuple[str, ...] = Field(("value",), description="Metrics; value is bits_per_byte or perplexity.")

    @model_validator(mode="after")
    def _consistent(self) -> Grid:
        if len({len(row.choose.among) for row in self.rows.values() if row.choose}) > 1:
            raise ValueError("rows choose among different numbers of values; give all of them equally many")
        if unknown := self.protocol.keys() - asdict(Protocol()).keys():
            raise ValueError(f"protocol has no key {min(unknown)!r}")
        return self


@dataclass(frozen=True)
class Cell:
    """One recipe of a grid: its row, where it stands in tables (``row`` and axes -> labels), the axes' values, its seed."""

    row: Row
    place: dict[str, Any]
    values: dict[str, Any]
    seed: int

    def recipe(self, grid: Grid, **changes: Any) -> dict[str, Any]:
        """Return the recipe, with some axes changed."""
        calibration = grid.calibration.model_dump(mode="json")
        passes = fill(self.row.passes, {**grid.define, "calibration": calibration, **self.values, **changes})
        return {"model": grid.model, "calibration": calibration, "passes": passes, "seed": self.seed}


def parse_grid(data: Mapping[str, Any], where: str = "grid") -> Grid:
    """Validate a grid's plain data."""
    try:
        return Grid.model_validate(data)
    except ValidationError as error:
        raise CompressError(explain(error, Grid, where)) from error


def read_grid(name: str) -> dict[str, Any]:
    """Read the plain data of a grid: a YAML file, or one of ``evals/grids`` by name."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else GRIDS / f"{name}.yaml"
    if not path.is_file():
        known = [found.stem for found in GRIDS.glob("*.yaml")]
        raise CompressError(f"there is no grid {name!r} ({path}). {did_you_mean(name, known)}")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise CompressError(f"grid {path}: cannot be read ({' '.join(str(error).split())}).") from error
    if not isinstance(data, dict):
        raise CompressError(f"grid {path}: must be a mapping with the keys calibration and rows.")
    return data


def settle(
    name: str,
    model: str | None,
    calibration: str | None,
    text: str | None,
    separator: str | None,
    settings: Sequence[str],
) -> Grid:
    """Return a grid with the options of a command line: its files, and ``KEY.KEY=VALUE`` settings."""
    data = read_grid(name)
    data |= {key: value for key, value in (("model", model), ("text", text)) if value is not None}
    if calibration is not None:
        old = data.get("calibration", {})
        kept = {key: old[key] for key in ("samples", "length", "min_characters") if key in old}
        data["calibration"] = {**kept, "text": calibration, "separator": separator}
    if separator is not None:
        data["protocol"] = {**data.get("protocol", {}), "separator": separator}
    return parse_grid(override(data, settings), f"grid {name}")


def fill(template: Any, values: Mapping[str, Any]) -> Any:
    """Put the values of axes into a template.

    A string that is one ``{axis}``, or ``{axis.key}`` of a value that is a mapping, becomes that value; other strings are
    formatted. An item of a list that becomes a list is replaced by its items, one that becomes None by nothing.
    """
    if isinstance(template, str):
        whole = re.fullmatch(r"\{(\w+)(?:\.(\w+))?\}", template)
        try:
            if whole is None:
                return template.format(**values)
            value = values[whole[1]]
            return fill(value[whole[2]] if whole[2] else value, values)
        except (LookupError, TypeError, ValueError) as error:
            raise CompressError(f"grid: {template!r} cannot be filled in ({type(error).__name__}: {error}).") from error
    if isinstance(template, Mapping):
        used = fill(template.get("use"), values) or {}
        return {**used, **{key: fill(item, values) for key, item in template.items() if key != "use"}}
    if isinstance(template, list | tuple):
        pairs = [(item, fill(item, values)) for item in template]
        parts = [found if isinstance(item, str) and isinstance(found, list) else [found] for item, found in pairs]
        return [item for part in parts for item in part if item is not None]
    return template


def cells_of(grid: Grid, only: Sequence[str] = ()) -> list[Cell]:
    """Return the cells of all rows, in order; with ``AXIS=LABEL`` or ``row=LABEL``, not those that have another label."""
    cells = [cell for label, row in grid.rows.items() for cell in _cells_of_row(grid, label, row)]
    wanted: dict[str, set[str]] = {}
    for item in only:
        axis, _, label = item.partition("=")
        known = {str(cell.place[axis]) for cell in cells if axis in cell.place}
        if label not in known:
            raise CompressError(f"--only {item!r}: no cell has this label. {did_you_mean(label, known)}")
        wanted.setdefault(axis, set()).add(label)
    return [
        cell for cell in cells if all(str(cell.place.get(axis, "")) in {*labels, ""} for axis, labels in wanted.items())
    ]


def _cells_of_row(grid: Grid, label: str, row: Row) -> Iterator[Cell]:
    named = re.findall(r"\{(\w+)", json.dumps([label, row.passes, row.bits]))
    axes = {name: axis for name, axis in grid.axes.items() if name in named} | row.axes
    for labels in itertools.product(*axes.values()):
        point = dict(zip(axes, labels, strict=True))
        values = {name: _value(axes[name], grid.axes.get(name), chosen) for name, chosen in point.items()}
        for seed in row.seeds:
            yield Cell(row, {"row": label.format(**point), **point}, values, seed)


def _value(axis: Any, shared: Any, label: Any) -> Any:
    """Return what a label stands for: itself, unless the axis, or the grid's axis of that name, is a mapping."""
    known = axis if isinstance(axis, dict) else shared
    return known.get(str(label), label) if isinstance(known, dict) else label


class GridRun:
    """Run a grid in a folder, which keeps ``results.jsonl``, and the workspace and ``models`` if asked to."""

    def __init__(self, grid: Grid, out: Path, keep: bool = False, progress: Progress | None = None) -> None:
        self.grid, self.out, self.keep, self.progress = grid, out, keep, progress
        self.protocol, self.store = Protocol(**grid.protocol), Results(out / "results.jsonl")
        text = grid.text if grid.text == HELD_OUT else documents_of(grid.text, self.protocol)[1]
        self.about: dict[str, Any] = {
            "model": identity(model_folder(grid.model)),
            "text": text,
            "protocol": asdict(self.protocol),
            "calibration": grid.calibration.model_dump(mode="json"),
            "held_out": grid.held_out,
        }
        for row in self.store.rows("grid"):
            for name, value in self.about.items():
                if row["settings"]["about"][name] != value:
                    raise CompressError(f"{out}: has results with another {name}; choose another folder.")

    def lines(self, only: Sequence[str] = ()) -> list[Line]:
        """Measure what is not known yet; return the lines of the dense model and of all cells (:func:`cells_of`)."""
        cells = cells_of(self.grid, only)
        for cell in cells:  # a mistake shows before any work
            choose = cell.row.choose
            self._settled(cell.recipe(self.grid, **({choose.axis: choose.among[0]} if choose else {})))
        found = self.cell(Cell(Row.model_validate({"passes": []}), {"row": "dense"}, {}, 0))
        for number, cell in enumerate(cells):
            if self.progress is not None:
                self.progress(", ".join(map(str, cell.place.values())), number, len(cells))
            found += self.cell(cell)
        if not self.keep:
            shutil.rmtree(self.out / "work", ignore_errors=True)
        return found

    def cell(self, cell: Cell) -> list[Line]:
        """Return a cell's lines, one for each number of bits."""
        chosen, bits = self.chosen(cell), fill(cell.row.bits, cell.values) or None
        recipe = cell.recipe(self.grid, **chosen)
        figures = self._figures(recipe, self.grid.text, cell.place, bits, cell.row.prompt)
        place = {**cell.place, **chosen, "seed": cell.seed}
        return [{**place, "bits": name, **metrics} for name, metrics in figures.items()]

    def checkpoint(self, cell: Cell) -> Path:
        """Return a cell's checkpoint, made now if it was not kept."""
        return self._made(cell.place, cell.recipe(self.grid, **self.chosen(cell)))

    def chosen(self, cell: Cell) -> dict[str, Any]:
        """Return the setting with the least loss on held-out text, in proportion to the cell; empty if it chooses none."""
        choose = cell.row.choose
        if choose is None:
            return {}
        axes = self.grid.axes
        labels = {axis: fill(label, self.grid.define) for axis, label in choose.at.items()}
        fixed = {axis: _value(axes.get(axis), None, label) for axis, label in labels.items()}
        losses = []
        for value in choose.among:
            recipe = {**cell.recipe(self.grid, **fixed, **{choose.axis: value}), "seed": cell.row.seeds[0]}
            place = {**cell.place, **choose.at, choose.axis: value}
            losses.append((self._figures(recipe, HELD_OUT, place, None, False)["dense"]["loss"], value))
        best = min(losses)[1]
        if choose.scale is not None:
            best = round(best * cell.values[choose.scale] / fixed[choose.scale], 4)
        return {choose.axis: best}

    def _made(self, place: Mapping[str, Any], recipe: Mapping[str, Any]) -> Path:
        name = re.sub(r"[^\w.]+", "-", "-".join(map(str, place.values()))).strip("-")
        folder = self.out / "models" / f"{name}-{digest(recipe)[:8]}"  # of equal names and other settings another
        return make(recipe, folder, self.out / "work", self.progress)

    def _figures(
        self, recipe: dict[str, Any], text: str, place: Mapping[str, Any], bits: Sequence[int] | None, prompt: bool
    ) -> Figures:
        """Return what is known of a recipe, or run and measure it."""
        settings = {"passes": self._settled(recipe), "seed": recipe["seed"], "bits": bits, "prompt": prompt}
        key = Key("grid", text, self.about["model"], "all", settings={**settings, "about": self.about})
        if known := self.store.find(key):
            return known["figures"]  # type: ignore[no-any-return]
        folder = self._made(place, recipe)
        if text == HELD_OUT:
            figures: Figures = {"dense": {"loss": held_out_loss(folder, self.grid.calibration, self.grid.held_out)}}
        else:
            facts = facts_of(folder)
            found = measure(folder, text, self.protocol, bits, prompt, progress=self.progress)
            figures = {width: {**metrics, **facts} for width, metrics in found.items()}
        if recipe["passes"] and (text == HELD_OUT or not self.keep):
            shutil.rmtree(folder)
        self.store.add(key, {}, place=dict(place), figures=figures)
        return figures

    def _settled(self, recipe: dict[str, Any]) -> list[Any]:
        """Return the passes with every default, as they decide the result."""
        return load_recipe(recipe).model_dump(mode="json")["passes"] if recipe["passes"] else []


def tables_of(grid: Grid, lines: Sequence[Line]) -> str:
    """Lay lines out in Markdown: one table for each label of ``per`` and, where labels stand across, for each metric."""
    measured = "bits_per_byte" if grid.text == BUILTIN else "loss" if grid.text == HELD_OUT else "perplexity"
    metrics = [measured if name == "value" else name for name in grid.columns]
    dense, cells = lines[0], lines[1:]
    known = [f"{_head(name)} {_figure(name, [dense])}" for name in metrics if name in dense]
    parts = [f"dense model: {', '.join(known)}"]
    for label in dict.fromkeys(line.get(grid.per or "") for line in cells):
        mine = [line for line in cells if line.get(grid.per or "") == label]
        parts += [f"{grid.per}: {label}"] if grid.per else []
        groups = [[name] for name in metrics] if grid.across else [metrics]
        parts += [pivot(mine, grid.down, grid.across, group) for group in groups]
    return "\n\n".join(parts)


def pivot(lines: Sequence[Line], down: Sequence[str], across: Sequence[str], metrics: Sequence[str]) -> str:
    """Return a Markdown table of metrics, by what heads its lines and its columns; of equal places the mean and the range."""
    cells: dict[Any, list[Line]] = {}
    for line in lines:
        if any(line.get(name) is not None for name in metrics):
            place = tuple(tuple(str(line.get(name, "")) for name in names) for names in (down, across))
            cells.setdefault(place, []).append(line)
    columns = [(labels, name) for labels in dict.fromkeys(labels for _, labels in cells) for name in metrics]
    corner = _head(metrics[0]) if across else ""
    heads = [", ".join(labels) if across else _head(name) for labels, name in columns]
    table = tables.Table([corner, *[""] * (len(down) - 1), *heads])
    for head in dict.fromkeys(head for head, _ in cells):
        table.add("", *head, *(_figure(name, cells.get((head, labels), [])) for labels, name in columns))
    return tables.markdown(table)


def _head(metric: str) -> str:
    return "MB" if metric == "disk_bytes" else metric.replace("_", " ")


def _figure(metric: str, lines: Sequence[Line]) -> str:
    scale = 1e-6 if metric == "disk_bytes" else 1
    form = ".1%" if metric == "sparsity" or metric.startswith("gap") else ",.0f" if metric == "parameters" else ".4f"
    found = [scale * line[metric] for line in lines if line.get(metric) is not None]
    if len(found) < 2:
        return "".join(format(value, form) for value in found) or "–"
    return f"{statistics.mean(found):{form}} ({min(found):{form}} to {max(found):{form}})"
