"""The tables of a report as plain data, for the page and for Markdown alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compress.evals.gather import Facts

METRICS = ("acc_norm", "acc", "exact_match")
"""What a task is shown by: the first of these that it has."""


@dataclass(frozen=True)
class Table:
    """Heads, rows of cells, and what each row is: ``dense``, ``stage``, ``width``, ``prompt``, ``control``."""

    heads: list[str]
    rows: list[list[str]] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)

    def add(self, kind: str, *cells: str) -> None:
        """Append a row."""
        self.rows.append(list(cells))
        self.kinds.append(kind)

    def without_empty(self) -> Table:
        """Without the columns that have nothing in any row."""
        kept = [place for place in range(len(self.heads)) if any(row[place] not in ("", "–") for row in self.rows)]
        rows = [[row[place] for place in kept] for row in self.rows]
        return Table([self.heads[place] for place in kept], rows, self.kinds)


def megabytes(size: int | float | None) -> str:
    """Bytes as MB or GB, or a dash."""
    if size is None:
        return "–"
    return f"{size / 1e9:.2f} GB" if size >= 1e10 else f"{size / 1e6:.2f} MB"


def number(value: float | None, digits: int = 4) -> str:
    """A figure with its digits, or a dash."""
    return "–" if value is None else f"{value:.{digits}f}"


def label(width: str, prompt: str | None = None) -> str:
    """Name a row: ``4 bits``, ``dense``, with a word for its prompt or for the adapter that it is without."""
    name = width if width == "dense" else f"{width} bits"
    return f"{name}, {prompt}" if prompt and "without" in prompt else f"{name} + {prompt}" if prompt else name


def quality(facts: Facts, text: Mapping[str, Any]) -> Table:
    """Dense, stages, widths (with and without prompts): size and the text's figures, controls beside them."""
    rows: Mapping[tuple[str, str | None], Mapping[str, float]] = text["rows"]
    dense = rows.get(("dense", None))
    controls = _controls(facts, text)
    heads = ["", "read", "× dense", "loss, nats", "vs dense", "perplexity", "bits per byte", *controls]
    table = Table(heads)

    def add(kind: str, name: str, size: int | None, metrics: Mapping[str, float], width: str = "") -> None:
        share = f"{size / facts.dense_bytes:.2f}" if size and facts.dense_bytes else "–"
        above = "–" if dense is None or kind == "dense" else f"{100 * (metrics['loss'] / dense['loss'] - 1):+.2f} %"
        cells = [number(controls[name].get(width)) if kind == "width" else "–" for name in controls]
        table.add(
            kind, name, megabytes(size), share, number(metrics["loss"]), above, number(metrics["perplexity"]),
            number(metrics["bits_per_byte"]), *cells,
        )  # fmt: skip

    if dense is not None:
        add("dense", "dense", facts.dense_bytes, dense)
    for row in _variants(facts, text, "stage"):
        for width, metrics in row["widths"].items():
            name = row["label"] if width == "dense" else f"{row['label']}, {label(width)}"
            add("stage", name, metrics["disk_bytes"], metrics)
    prompts = sorted({prompt for _, prompt in rows if prompt})
    if ("dense", None) in rows:
        for prompt in prompts:
            if ("dense", prompt) in rows:
                add("prompt", label("dense", prompt), facts.dense_bytes, rows["dense", prompt])
    for width in facts.widths:
        if (width, None) in rows and width != "dense":
            add("width", label(width), facts.bytes_at(width), rows[width, None], width)
        for prompt in prompts:
            if (width, prompt) in rows and width != "dense":
                add("prompt", label(width, prompt), facts.bytes_at(width), rows[width, prompt])
    return table.without_empty()


def _variants(facts: Facts, text: Mapping[str, Any], group: str) -> list[dict[str, Any]]:
    return [
        row
        for row in facts.variants
        if row["group"] == group
        and row["name"] == text["name"]
        and row["settings"]["sha256"] == text["settings"]["sha256"]
    ]


def _controls(facts: Facts, text: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Label -> width -> loss, of the controls measured on the same text."""
    found: dict[str, dict[str, float]] = {}
    for row in _variants(facts, text, "control"):
        for width, metrics in row["widths"].items():
            found.setdefault(f"control loss: {row['label']}", {})[width] = metrics["loss"]
    return found


def control_points(facts: Facts, text: Mapping[str, Any]) -> dict[str, list[tuple[str, float, float]]]:
    """Label -> [(width, bytes, loss)] of the controls, narrowest first."""
    found: dict[str, list[tuple[str, float, float]]] = {}
    for row in _variants(facts, text, "control"):
        for width, metrics in row["widths"].items():
            found.setdefault(row["label"], []).append((width, metrics["disk_bytes"], metrics["loss"]))
    return {name: sorted(points, key=lambda point: point[1]) for name, points in found.items()}


def tasks(facts: Facts) -> Table:
    """What lm-eval found, at every width and with every prompt."""
    order = ["dense", *(width for width in facts.widths if width != "dense")]
    keys = {key for rows in facts.tasks.values() for key in rows}
    ranked = sorted(keys, key=lambda key: (order.index(key[0]) if key[0] in order else 99, key[1] or ""))
    return task_table({key: {name: rows[key] for name, rows in facts.tasks.items() if key in rows} for key in ranked})


def task_table(found: Mapping[tuple[str, str | None], Mapping[str, Mapping[str, Any]]]) -> Table:
    """One column per task: its main metric with standard error, and answers that differ from the dense model's.

    Args:
        found: (width, prompt) -> task -> row.
    """
    metrics = {name: main_metric(row["metrics"]) for rows in found.values() for name, row in rows.items()}
    table = Table(["", *(head for name in metrics for head in (f"{name}, {metrics[name]}", "answers changed", "ece"))])
    dense = found.get(("dense", None), {})
    for (width, prompt), rows in found.items():
        cells = [cell for name in metrics for cell in _task_cells(rows.get(name), dense.get(name))]
        table.add("dense" if width == "dense" else "prompt" if prompt else "width", label(width, prompt), *cells)
    return table.without_empty()


def main_metric(metrics: Mapping[str, float]) -> str:
    """The metric a task is shown by."""
    return next((metric for metric in METRICS if metric in metrics), next(iter(metrics), ""))


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
    """Share of items that are answered otherwise than by the dense model; None where there is nothing to compare."""
    if dense is None or len(row.get("answers", ())) != len(dense.get("answers", ())) or not row.get("answers"):
        return None
    pairs = zip(row["answers"], dense["answers"], strict=True)
    return float(sum(ours != theirs for ours, theirs in pairs) / len(row["answers"]))


def agreement(compared: Mapping[str, Mapping[str, float]], robustness: Mapping[str, Mapping[str, float]]) -> Table:
    """KL, top-1 agreement, flips, calibration and robustness: width -> metrics, each."""
    heads = [
        "", "KL to dense, nats", "same top token", "right ↔ wrong", "top token right", "calibration error",
        "bits per byte with typos", "added by typos",
    ]  # fmt: skip
    table = Table(heads)
    widths = (compared.keys() | robustness.keys()) - {"dense"}
    for width in ["dense", *sorted(widths, key=float, reverse=True)]:
        found, typos = compared.get(width, {}), robustness.get(width, {})
        if not found and not typos:
            continue
        kl = found.get("kl")
        cells = ["–" if kl is None or width == "dense" else f"{kl:.4g}"]
        for name in ("top1_agreement", "flipped"):
            cells.append("–" if width == "dense" or name not in found else f"{100 * found[name]:.2f} %")
        cells += [f"{100 * found['accuracy']:.2f} %" if found else "–", number(found.get("ece"))]
        cells += [number(typos.get("bits_per_byte_typos")), number(typos.get("increase"))]
        table.add("dense" if width == "dense" else "width", label(width), *cells)
    return table.without_empty()


def speed(found: Mapping[str, Any]) -> Table:
    """The benchmark: medians, with half the distance of the quartiles as a share of them."""
    heads = ["", "decode, tokens/s", "× dense", "prefill, tokens/s", "× dense", "first token, ms", "load, s", "resident", "read from disk"]  # fmt: skip
    table = Table(heads)
    for width, figures in found["widths"].items():
        ratios = [figures.get(f"{what}_versus_dense") for what in ("decode", "prefill")]
        shown = [f"{ratio['median']:.2f}" if ratio and width != "dense" else "–" for ratio in ratios]
        table.add(
            "dense" if width == "dense" else "width", label(width),
            with_spread(figures["decode_tokens_per_second"]), shown[0],
            with_spread(figures["prefill_tokens_per_second"]), shown[1],
            with_spread(figures["time_to_first_token_seconds"], 1e3), with_spread(figures["load_seconds"]),
            megabytes(figures["resident_bytes"]["median"]), megabytes(figures["disk_bytes"]),
        )  # fmt: skip
    return table.without_empty()


def with_spread(figure: Mapping[str, float], scale: float = 1.0) -> str:
    """``1,234 ± 2 %``: the median, and half the distance between the quartiles as a share of it."""
    middle = scale * figure["median"]
    share = 50 * (figure["high"] - figure["low"]) / figure["median"] if figure["median"] else 0.0
    return f"{plain(middle)} ± {share:.0f} %"


def plain(value: float) -> str:
    """Three figures, without an exponent."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    digits: Callable[[float], int] = lambda size: 1 if size >= 10 else 2 if size >= 1 else 3  # noqa: E731
    return f"{value:.{digits(abs(value))}f}"


def markdown(table: Table) -> str:
    """As a Markdown table."""
    lines = ["| " + " | ".join(table.heads) + " |", "|---" + "|---:" * (len(table.heads) - 1) + "|"]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table.rows]
    return "\n".join(lines)


def names_of(rows: Sequence[str]) -> list[str]:
    """Names without what they have in common in front."""
    parts = [name.split(".") for name in rows]
    common = 0
    while all(len(part) > common + 1 for part in parts) and len({part[common] for part in parts}) == 1:
        common += 1
    return [".".join(part[common:]) for part in parts]
