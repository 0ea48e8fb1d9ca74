"""Lay measurements out as tables of plain text, for a page, for Markdown and for the terminal alike."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any


@dataclass(frozen=True)
class Table:
    """Hold heads, rows of cells, and what each row is: ``dense``, ``stage``, ``width``, ``prompt``, ``fact``."""

    heads: list[str]
    rows: list[list[str]] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)

    def add(self, kind: str, *cells: str) -> None:
        """Append a row."""
        self.rows.append(list(cells))
        self.kinds.append(kind)

    def without_empty(self) -> Table:
        """Return the table without the columns that have nothing in any row."""
        kept = [place for place in range(len(self.heads)) if any(row[place] not in ("", "–") for row in self.rows)]
        rows = [[row[place] for place in kept] for row in self.rows]
        return Table([self.heads[place] for place in kept], rows, self.kinds)


@dataclass(frozen=True)
class Matrix:
    """Hold a matrix of figures: ``values`` is [rows][columns], None where nothing was measured; names of what goes down and across."""

    rows: list[str]
    columns: list[str]
    values: list[list[float | None]]
    form: Callable[[float], str] = "{:.4g}".format
    down: str = ""
    across: str = "block"

    def table(self) -> Table:
        """Write the figures as a table with the columns' names on top."""
        table = Table([self.down or self.across, *self.columns])
        for name, row in zip(self.rows, self.values, strict=True):
            table.add("width", name, *("–" if value is None else self.form(value) for value in row))
        return table


def by_block(values: Mapping[str, float], form: Callable[[float], str]) -> Matrix:
    """Arrange figures of modules with kinds of linears down and blocks across; modules outside the blocks are left out."""
    parts = {name: re.match(r"(.*?)(\d+)\.(.*)", name) for name in values}
    places = {(found[3], int(found[2])): values[name] for name, found in parts.items() if found}
    kinds, blocks = list(dict.fromkeys(kind for kind, _ in places)), sorted({block for _, block in places})
    matrix = [[places.get((kind, block)) for block in blocks] for kind in kinds]
    parted = [kind.split(".") for kind in kinds]
    levels = zip(*(part[:-1] for part in parted), strict=False)
    common = len([*takewhile(lambda level: len(set(level)) == 1, levels)])
    names = [".".join(part[common:]) for part in parted]
    return Matrix(names, [str(block) for block in blocks], matrix, form)


def transfer(
    rows: Sequence[Mapping[str, Any]], prompts: Sequence[str], models: Sequence[str], text: str, value: str
) -> Matrix:
    """Arrange a measure of a text with soft prompts down and models across; rows have ``prompt``, ``model`` and ``text``."""
    found = {(row["prompt"], row["model"], row["text"]): row for row in rows}
    values = [[found.get((prompt, model, text), {}).get(value) for model in models] for prompt in prompts]
    return Matrix([*prompts], [*models], values, down="prompt learned at", across="evaluated at")


def zeros(found: Mapping[str, Any]) -> Matrix:
    """Arrange the share of zeros, in %, of every linear and block that :func:`compress.inspect.sparsity` found."""
    percent = "{:.0f}".format
    matrix = by_block({name: 100 * counted["sparsity"] for name, counted in found["linears"].items()}, percent)
    whole: list[float | None] = [100 * counted["sparsity"] for counted in found["blocks"].values()]
    return replace(matrix, rows=[*matrix.rows, "all"], values=[*matrix.values, whole])


def megabytes(size: int | float | None) -> str:
    """Write bytes as MB or GB, or a dash."""
    if size is None:
        return "–"
    return f"{size / 1e9:.2f} GB" if size >= 1e10 else f"{size / 1e6:.2f} MB"


def number(value: float | None, digits: int = 4) -> str:
    """Write a figure with so many decimals, or a dash."""
    return "–" if value is None else f"{value:.{digits}f}"


def label(bits: str, prompt: str | None = None) -> str:
    """Name a row: ``4 bits``, ``dense``, with a word for its prompt or for the adapter that it is without."""
    name = f"{bits} bits" if bits[0].isdigit() else bits
    return f"{name}, {prompt}" if prompt and "without" in prompt else f"{name} + {prompt}" if prompt else name


def above(loss: float, dense: float) -> float:
    """Return how far a loss is above the dense model's, in % of that."""
    return 100 * (loss / dense - 1)


def task_table(found: Mapping[tuple[str, str | None], Mapping[str, Mapping[str, Any]]]) -> Table:
    """Show every task by its main metric, and by the answers that differ from the dense model's: (bits, prompt) -> task -> row."""
    metrics = {name: main_metric(row["metrics"]) for rows in found.values() for name, row in rows.items()}
    table = Table(["", *(head for name in metrics for head in (f"{name}, {metrics[name]}", "answers changed", "ece"))])
    dense = found.get(("dense", None), {})
    for (bits, prompt), rows in found.items():
        cells = [cell for name in metrics for cell in _task_cells(rows.get(name), dense.get(name))]
        table.add("dense" if bits == "dense" else "prompt" if prompt else "width", label(bits, prompt), *cells)
    return table.without_empty()


def main_metric(metrics: Mapping[str, float]) -> str:
    """Return the metric that a task is shown by, of those that it has."""
    return next((metric for metric in ("acc_norm", "acc", "exact_match") if metric in metrics), next(iter(metrics), ""))


def _task_cells(row: Mapping[str, Any] | None, dense: Mapping[str, Any] | None) -> list[str]:
    if row is None:
        return ["–", "–", "–"]
    metrics = row["metrics"]
    main = main_metric(metrics)
    error = metrics.get(f"{main}_stderr")
    shown = f"{metrics[main]:.3f}" + (f" ± {error:.3f}" if error is not None else "") if main else "–"
    changed = flipped(row, dense)
    return [shown, "–" if changed is None or row is dense else f"{100 * changed:.1f} %", number(metrics.get("ece"), 3)]


def flipped(row: Mapping[str, Any], dense: Mapping[str, Any] | None) -> float | None:
    """Return the share of items answered otherwise than by the dense model; None where there is nothing to compare."""
    if dense is None or len(row.get("answers", ())) != len(dense.get("answers", ())) or not row.get("answers"):
        return None
    pairs = zip(row["answers"], dense["answers"], strict=True)
    return float(sum(ours != theirs for ours, theirs in pairs) / len(row["answers"]))


def agreement(compared: Mapping[str, Mapping[str, float]], robustness: Mapping[str, Mapping[str, float]]) -> Table:
    """Set likeness to the dense model, calibration and robustness side by side; both arguments are bits -> metrics."""
    found = ["KL to dense, nats", "same top token", "right ↔ wrong", "top token right", "calibration error"]
    table = Table(["", *found, "bits per byte with typos", "added by typos"])
    all_bits = (compared.keys() | robustness.keys()) - {"dense"}
    for bits in ["dense", *sorted(all_bits, key=float, reverse=True)]:
        metrics = {**compared.get(bits, {}), **robustness.get(bits, {})}
        if not metrics:
            continue
        alike = ("kl", "{:.4g}"), ("top1_agreement", "{:.2%}"), ("flipped", "{:.2%}")
        own = ("accuracy", "{:.2%}"), ("ece", "{:.4f}"), ("bits_per_byte_typos", "{:.4f}"), ("increase", "{:.4f}")
        shown = [
            form.format(metrics[name]).replace("%", " %") if name in metrics else "–" for name, form in alike + own
        ]
        if bits == "dense":  # it is like itself
            shown[: len(alike)] = ["–"] * len(alike)
        table.add("dense" if bits == "dense" else "width", label(bits), *shown)
    return table.without_empty()


def cached(found: Mapping[str, Mapping[str, Any]], plain: Mapping[str, Any]) -> Table:
    """Set perplexity with packed caches in the loop beside that without; ``found`` is bits of the cache -> of the weights -> metrics."""
    table = Table(["bits", "cache", "perplexity", "above no cache", "bytes per token"])
    for label_, by_bits in found.items():
        for bits, metrics in by_bits.items():
            more = math.exp(metrics["loss"] - plain[bits]["loss"]) - 1
            size = metrics["kv_bytes"] / metrics["kv_tokens"]
            kind = "dense" if bits == "dense" else "width"
            table.add(
                kind, bits, label_, number(metrics["perplexity"]), f"{more:+.2%}".replace("%", " %"), f"{size:.0f}"
            )
    return table


def cache_speed(found: Mapping[str, Any]) -> Table:
    """Set decoding with packed caches beside the plain one, behind as many tokens."""
    table = Table(["cache", "ms per token", "times plain", "MB"])
    for name, row in found["caches"].items():
        table.add(
            "width",
            name,
            with_spread(row["seconds"], 1000),
            with_spread(row["versus_plain"]),
            f"{row['bytes'] / 1e6:.1f}",
        )
    return table


_DRAFT_FIGURES = "accepted", "drafted_per_round", "cost", "check", "break_even"


def speed(found: Mapping[str, Any]) -> Table:
    """Show the medians of a benchmark, each with half the distance between its quartiles."""
    heads = ["decode, tokens/s", "× dense", "prefill, tokens/s", "× dense", "first token, ms", "switch, ms", "load, s"]
    table = Table(["", *heads, "resident", "read from disk"])
    for bits, figures in {**found["widths"], **found.get("llama_cpp", {})}.items():
        cells = []
        for what in ("decode", "prefill"):
            ratio = figures.get(f"{what}_versus_dense")
            cells.append(with_spread(figures[f"{what}_tokens_per_second"]))
            cells.append(f"{ratio['median']:.2f}" if ratio and bits != "dense" else "–")
        cells.append(with_spread(figures["time_to_first_token_seconds"], 1e3))
        cells.append(with_spread(figures["switch_seconds"], 1e3) if "switch_seconds" in figures else "–")
        cells.append(with_spread(figures["load_seconds"]) if "load_seconds" in figures else "–")
        cells += [megabytes(figures.get("resident_bytes", {}).get("median")), megabytes(figures["disk_bytes"])]
        table.add("dense" if bits == "dense" else "width", label(bits), *cells)
    return table.without_empty()


def draft_speed(found: Mapping[str, Any]) -> Table:
    """Show what drafts gain, beside none and prompt look-up."""
    heads = [
        "decode, tokens/s",
        "× plain",
        "same text",
        "accepted",
        "drafted a round",
        "cost of one",
        "of a check",
        "break-even",
    ]
    table = Table(["draft", *heads])
    for name, figures in found.items():
        shares = [f"{figures[key]:.2f}" if key in figures else "–" for key in _DRAFT_FIGURES]
        same = "yes" if figures["same_text"] else "no"
        ratio = f"{figures['versus_plain']['median']:.2f}"
        table.add("width", label(name), with_spread(figures["tokens_per_second"]), ratio, same, *shares)
    return table


def with_spread(figure: Mapping[str, float], scale: float = 1.0) -> str:
    """Write a median and half the distance between the quartiles as a share of it: ``1,234 ± 2 %``."""
    middle = scale * figure["median"]
    share = 50 * (figure["high"] - figure["low"]) / figure["median"] if figure["median"] else 0.0
    return f"{plain(middle)} ± {share:.0f} %"


def plain(value: float) -> str:
    """Write a number with three figures and without an exponent."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    size = abs(value)
    return f"{value:.{1 if size >= 10 else 2 if size >= 1 else 3}f}"


def short(value: float) -> str:
    """Write a number with two figures, short enough for a cell: 0.012, 3e-5."""
    text = f"{value:.1e}" if value < 1e-2 else f"{value:.2g}"
    return text.replace("e-0", "e-").replace(".0e", "e")


def markdown(table: Table) -> str:
    """Write a table in Markdown."""
    lines = ["| " + " | ".join(table.heads) + " |", "|---" + "|---:" * (len(table.heads) - 1) + "|"]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table.rows]
    return "\n".join(lines)
